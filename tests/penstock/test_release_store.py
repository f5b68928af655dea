from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from penstock import release
from penstock.release import ReleaseError
from penstock.release_store import ReleaseStore
from penstock.routing import Routing
from tests.penstock.test_release import candidate


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3.

    It answers one request after another: moto looks whether an object is there and then makes it, where S3 does both
    at once.
    """
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=False, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["directory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store."""
    if request.param == "directory":
        return str(tmp_path / "store")
    endpoint = request.getfixturevalue("s3")
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = tmp_path.name.lower().replace("_", "-")[-40:].strip("-")
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/releases"


def build(home: Path, store: ReleaseStore, folder: Path, run_id: str = "run") -> int:
    said = {"approved_by": "ana", "run_id": run_id, "git_revision": "abc", "environment": "def"}
    return release.build(home, candidate(folder), **said, store=store)


def test_a_release_of_one_machine_is_fetched_by_another(url: str, tmp_path: Path) -> None:
    store = ReleaseStore(url)
    assert store.numbers() == []
    assert build(tmp_path / "one", store, tmp_path) == 1
    assert store.numbers() == [1]
    other = ReleaseStore(url)
    other.fetch(tmp_path / "other", 1)
    other.fetch(tmp_path / "other", 1)
    assert release.verify(tmp_path / "other", 1) == release.verify(tmp_path / "one", 1) == store.manifest(1)
    assert build(tmp_path / "third", other, tmp_path, "another run") == 2
    assert store.numbers() == [1, 2]


def test_a_repeated_build_publishes_what_it_had_not(url: str, tmp_path: Path) -> None:
    store = ReleaseStore(url)
    assert build(tmp_path / "home", store, tmp_path) == 1
    store.delete(1)
    assert store.numbers() == []
    assert build(tmp_path / "home", store, tmp_path) == 1
    assert store.numbers() == [1]
    store.delete(1)
    assert store.claim(1) == 2  # a number is never given twice


def test_builders_on_several_machines_get_numbers_of_their_own(url: str, tmp_path: Path) -> None:
    numbers: list[int] = []

    def make(machine: int) -> None:
        numbers.append(build(tmp_path / f"home{machine}", ReleaseStore(url), tmp_path / f"{machine}", f"run {machine}"))

    machines = [threading.Thread(target=make, args=(machine,)) for machine in range(4)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert sorted(numbers) == [1, 2, 3, 4] == ReleaseStore(url).numbers()


def test_a_number_that_many_claim_at_once_goes_to_one(url: str) -> None:
    stores = [ReleaseStore(url) for _ in range(8)]
    barrier = threading.Barrier(len(stores))

    def claim(store: ReleaseStore) -> list[int]:
        found = []
        for least in range(1, 9):
            barrier.wait()
            found.append(store.claim(least))
        return found

    with ThreadPoolExecutor(len(stores)) as pool:
        claimed = [number for numbers in pool.map(claim, stores) for number in numbers]
    assert len(set(claimed)) == len(claimed) == 64


def test_a_release_whose_manifest_is_not_there_is_none(url: str, tmp_path: Path) -> None:
    store = ReleaseStore(url)
    build(tmp_path / "home", store, tmp_path)
    store._files.rm_file(f"{store._root}/1/manifest.json")  # as a killed publisher leaves it
    assert store.numbers() == []
    with pytest.raises(ReleaseError, match=r"has no release 1; it has: none"):
        store.fetch(tmp_path / "other", 1)


def test_what_is_not_what_was_published_is_not_taken(url: str, tmp_path: Path) -> None:
    store = ReleaseStore(url)
    build(tmp_path / "home", store, tmp_path)
    store._files.pipe_file(f"{store._root}/1/weights.json", b"{}")
    with pytest.raises(ReleaseError, match=r"weights\.json was changed"):
        store.fetch(tmp_path / "other", 1)
    assert release.releases(tmp_path / "other") == []
    assert [left.name for left in (tmp_path / "other" / "releases").iterdir()] == [".lock"]
    path = release.directory(tmp_path / "home", 1) / "manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"abc"', '"xyz"'))
    with pytest.raises(ReleaseError, match="another release 1"):
        store.publish(path.parent, 1)


def test_a_store_that_is_away_says_so(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ReleaseError, match=r"release store s3://bucket/releases does not answer: .*run it again"):
        build(tmp_path / "home", ReleaseStore("s3://bucket/releases"), tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    with pytest.raises(ReleaseError, match="bucket does not exist"):  # and is not made: its name may be a slip
        build(tmp_path / "home", ReleaseStore("s3://bucket/releases"), tmp_path)
    assert release.releases(tmp_path / "home") == []
    with pytest.raises(ReleaseError, match="release store gone://bucket"):
        ReleaseStore("gone://bucket")


@pytest.mark.parametrize("stored", [False, True])
def test_the_newest_are_kept_and_those_in_use(tmp_path: Path, stored: bool) -> None:
    home, store = tmp_path / "home", ReleaseStore(str(tmp_path / "store")) if stored else None
    for number in range(1, 10):
        made = candidate(tmp_path / str(number))
        verdict = json.loads((made.verdict / "verdict.json").read_text()) | {"champion": number - 1 or None}
        (made.verdict / "verdict.json").write_text(json.dumps(verdict))
        said = {"approved_by": "ana", "run_id": f"run {number}", "git_revision": "abc", "environment": "def"}
        release.build(home, made, **said, store=store)
    document = Routing(champion=6, challenger=9, previous=(2, 4), share=0.1, salt="6:9")
    if stored:
        shutil.rmtree(release.directory(home, 6))  # another machine's
    # live: 6 and 9; a rollback goes to 4; their parents are 5, 8 and 3
    assert release.prune(home, document, 1, store) == [1, 2, 7]
    kept = [3, 4, 5, 6, 8, 9]
    assert release.releases(home) == [number for number in kept if not stored or number != 6]
    assert store is None or store.numbers() == kept
    assert release.prune(home, document, 1, store) == []
    with pytest.raises(ReleaseError, match="at least one release is kept"):
        release.prune(home, document, 0, store)


def test_without_the_manifest_of_a_release_in_use_nothing_is_deleted(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for run in "abc":
        said = {"approved_by": "ana", "run_id": run, "git_revision": "abc", "environment": "def"}
        release.build(home, candidate(tmp_path), **said)
    (release.directory(home, 3) / "manifest.json").unlink()
    with pytest.raises(ReleaseError, match="not readable"):
        release.prune(home, Routing(champion=3), 1)
    assert release.releases(home) == [1, 2, 3]
