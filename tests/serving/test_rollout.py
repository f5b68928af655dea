from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import release, routing
from penstock.routing import Routing
from serving import rollout
from serving.model_client import ModelClient
from serving.model_server import ModelServer
from serving.rollout import RolloutError, Servers
from tests.serving.conftest import System, build

ROOT = Path(__file__).resolve().parents[2]


def live(system: System) -> Routing:
    return routing.read(system.home / "routing.json")


def loaded(system: System) -> set[int]:
    served = system.server.servables.served
    assert served["recall"] == served["rank"]
    return set(served["recall"])


def linked(system: System) -> set[int]:
    return {int(path.name) for path in release.base_path(system.home, "recall").iterdir()}


def test_a_release_goes_through_canary_and_promotion_and_back(system: System) -> None:
    pair = rollout.canary(system.home, 2, 0.25, by="ana", reason="try")
    assert pair == live(system)
    assert (pair.champion, pair.challenger, pair.share, pair.by, pair.reason) == (1, 2, 0.25, "ana", "try")
    assert loaded(system) == linked(system) == {1, 2}
    promoted = rollout.promote(system.home, 2, by="ben", reason="better")
    assert (promoted.champion, promoted.challenger, promoted.previous) == (2, None, (1,))
    assert loaded(system) == {1, 2}
    back = rollout.rollback(system.home, by="cem", reason="worse")
    assert (back.champion, back.previous, back.by) == (1, (), "cem")
    assert back == live(system)
    assert back.updated_at > promoted.updated_at
    rollout.promote(system.home, 1, by="cem", reason="again")
    assert loaded(system) == linked(system) == {1}


def test_a_promotion_deletes_what_is_old_and_a_rollback_does_not(system: System, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(system.home / "releases", home / "releases")
    routing.write(home / "routing.json", Routing(champion=1))
    assert build(home, tmp_path / "made") == 4
    server = ModelServer(home, 0, 0)
    server.start()
    try:
        at = Servers(f"127.0.0.1:{server.grpc_port}", keep=1)
        first = rollout.promote(home, 2, by="ana", reason="better", at=at)
        assert release.releases(home) == [1, 2, 4]  # what is live, what it can go back to, and the newest
        second = rollout.promote(home, 4, by="ana", reason="better still", at=at)
        assert release.releases(home) == [2, 4]
        assert (first.previous, second.previous) == ((1,), (2,))
        assert routing.read(home / "routing.json") == second
        assert build(home, tmp_path / "another") == 5
        for _ in range(2):
            assert rollout.rollback(home, by="ben", reason="worse", leaving=4, at=at).champion == 2
        assert release.releases(home) == [2, 4, 5]
    finally:
        server.stop()


def test_withdrawing_needs_no_model_server(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout.canary(system.home, 2, 0.25, by="ana")
    monkeypatch.setenv("PENSTOCK_MODEL_SERVER", "127.0.0.1:1")
    after = rollout.withdraw(system.home, by="ben", reason="clicks fell")
    assert (after.champion, after.challenger, after.share, after.reason) == (1, None, 0.0, "clicks fell")
    assert rollout.withdraw(system.home, by="cem", reason="again") == after == live(system)


def test_a_rollback_without_a_former_release_is_refused(system: System) -> None:
    with pytest.raises(RolloutError, match="no former release to roll back to: release 1 is the first"):
        rollout.rollback(system.home, by="ana", reason="worse")
    assert live(system) == Routing(champion=1)


@pytest.mark.parametrize("act", ["promote", "canary", "load"])
def test_without_a_model_server_nothing_changes(system: System, act: str) -> None:
    words: dict = {"at": Servers("127.0.0.1:1")}
    words |= {} if act == "load" else {"by": "ana", "reason": "x"}
    words |= {"share": 0.5} if act == "canary" else {}
    with pytest.raises(RolloutError, match=r"127\.0\.0\.1:1: the model server does not answer"):
        getattr(rollout, act)(system.home, 2, **words)
    assert live(system) == Routing(champion=1)


def test_a_release_with_scores_that_are_not_finite_does_not_go_live(system: System) -> None:
    for act in (
        lambda: rollout.promote(system.home, 3, by="ana", reason="x"),
        lambda: rollout.canary(system.home, 3, 0.1, by="ana"),
        lambda: rollout.load(system.home, 3),
    ):
        with pytest.raises(RolloutError, match="rank of release 3 gives no finite click; do not use it"):
            act()
    assert live(system) == Routing(champion=1)


def test_a_tampered_release_does_not_go_live(system: System, tmp_path: Path) -> None:
    number = build(system.home, tmp_path)
    path = release.directory(system.home, number)
    try:
        (path / "weights.json").chmod(0o644)
        (path / "weights.json").write_text("{}")
        with pytest.raises(RolloutError, match=r"weights\.json was changed"):
            rollout.promote(system.home, number, by="ana", reason="x")
        assert live(system) == Routing(champion=1)
        assert loaded(system) == {1}
    finally:
        shutil.rmtree(path)
    with pytest.raises(RolloutError, match=f"there is no release {number}"):
        rollout.promote(system.home, number, by="ana", reason="x")


def test_loading_leaves_the_document_alone(system: System) -> None:
    rollout.load(system.home, 2)
    assert loaded(system) == {1, 2}
    assert live(system) == Routing(champion=1)


def test_a_former_release_that_is_gone_stops_nobody(system: System) -> None:
    routing.write(system.home / "routing.json", Routing(champion=1, previous=(99,)))
    assert rollout.promote(system.home, 2, by="ana", reason="x").previous == (99, 1)


def command(home: Path, *words: str, address: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving.rollout", "--home", str(home), *words],
        cwd=ROOT,
        env=os.environ | {"PENSTOCK_MODEL_SERVER": address or "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_acts_or_says_why_not(system: System) -> None:
    done = command(system.home, "promote", "2", "--by", "ana", "--reason", "better", address=system.address)
    assert done.returncode == 0, done.stderr
    assert '"champion": 2' in done.stdout
    failed = command(system.home, "rollback", "--by", "ana", "--reason", "worse")
    assert failed.returncode == 1
    assert failed.stderr.startswith("rollout: nothing was changed: ")
    assert failed.stderr.count("\n") == 1
    assert '"champion": 2' in command(system.home, "show").stdout


def test_a_client_needs_no_tensorflow() -> None:
    code = (
        "import sys, serving.rollout\n"
        "assert not any(name.split('.')[0] == 'tensorflow' for name in sys.modules), 'TensorFlow was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_metadata_is_asked_for_once(system: System) -> None:
    with ModelClient(system.address) as client:
        assert client.signature("rank", 1) is client.signature("rank", 1)
        assert client.signature("recall", 1).inputs["k"].rank == 0
        assert client.ready("recall", 1)
        assert not client.ready("recall", 42)
