from __future__ import annotations

import json
import os
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from penstock import release, routing
from penstock.release import Candidate, ReleaseError
from penstock.routing import Routing


def candidate(folder: Path, *, approved: bool = True) -> Candidate:
    """The outputs of a run with stand-ins for the SavedModels: releasing them only copies bytes."""
    verdict = {
        "approved": approved,
        "sentence": "better",
        "champion": 1,
        "heads": {},
        "data_window": {"train_start": "2022-05-01T00:00:00+00:00", "test_end": "2022-05-08T00:00:00+00:00"},
    }
    files = {
        "recall/saved_model/saved_model.pb": "recall graph",
        "recall/saved_model/variables/variables.index": "recall variables",
        "recall/items.parquet": "vectors",
        "recall/popular.parquet": "items",
        "recall/config.json": '{"model": "youtube_dnn", "config": {"dim": 8}, "seed": 1}',
        "recall/metrics.json": '{"inputs": ["age"], "validation": {}, "test": {"recall@50": 0.5}}',
        "rank/saved_model/saved_model.pb": "rank graph",
        "rank/config.json": '{"model": "mmoe", "config": {}, "seed": 1}',
        "rank/metrics.json": '{"inputs": ["hour"], "validation": {}, "test": {"auc_click": 0.7}}',
        "weights/weights.json": '{"fusion": "weighted_sum", "weights": {"click": 0.5, "long_view": 1, "like": 0}}',
        "verdict/verdict.json": json.dumps(verdict),
        "rehearsal/probe.json": '{"recall": {"ids": [7], "scores": [1.0]}, "rank": {"click": [0.5]}}',
        "report.html": "<p>report</p>",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    parts = ("recall", "rank", "weights", "verdict", "rehearsal", "report.html")
    return Candidate(*(folder / part for part in parts))


def build(home: Path, made: Candidate, run_id: str = "run") -> int:
    return release.build(home, made, approved_by="a person", run_id=run_id, git_revision="abc", environment="def")


def test_a_release_is_what_its_manifest_says(tmp_path: Path) -> None:
    number = build(tmp_path / "home", candidate(tmp_path))
    path = release.directory(tmp_path / "home", number)
    manifest = release.verify(tmp_path / "home", number)
    assert number == 1
    assert manifest["files"].keys() == {
        "recall/saved_model.pb",
        "recall/variables/variables.index",
        "rank/saved_model.pb",
        "items.parquet",
        "popular.parquet",
        "weights.json",
        "verdict.json",
        "probe.json",
        "report.html",
    }
    assert manifest["files"]["report.html"] == sha256(b"<p>report</p>").hexdigest()
    assert manifest["weights"] == {"click": 0.5, "long_view": 1, "like": 0}
    assert manifest["recall"]["model"] == "youtube_dnn"
    assert manifest["metrics"]["rank"] == {"auc_click": 0.7}
    assert manifest["parent"] == 1
    assert manifest["inputs"] == {"recall": ["age"], "rank": ["hour"]}
    assert manifest["forced"] is None
    assert manifest["data_window"]["test_end"] == "2022-05-08T00:00:00+00:00"
    said = {key: manifest[key] for key in ("approved_by", "run_id", "git_revision", "environment")}
    assert said == {"approved_by": "a person", "run_id": "run", "git_revision": "abc", "environment": "def"}
    assert all(os.stat(file).st_mode & 0o222 == 0 for file in path.rglob("*") if file.is_file())
    assert [left.name for left in path.parent.iterdir() if left.name != ".lock"] == ["1"]


def _change(path: Path) -> None:
    file = path / "rank" / "saved_model.pb"
    file.chmod(0o644)
    file.write_text("rank grapH")


def _reweight(path: Path) -> None:
    file = path / "manifest.json"
    file.chmod(0o644)
    file.write_text(file.read_text().replace('"long_view": 1', '"long_view": 0'))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_change, "rank/saved_model.pb was changed"),
        (lambda path: (path / "items.parquet").unlink(), "items.parquet is missing"),
        (lambda path: (path / "recall" / "extra").write_text(""), "recall/extra is not in the manifest"),
        (lambda path: (path / "recall" / "link").symlink_to("/tmp"), "recall/link is not in the manifest"),
        (_reweight, "weights are not those of weights.json"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: not readable"),
        (lambda path: path.rename(path.parent / "2"), "there is no release 1; there are: 2"),
    ],
)
def test_a_tampered_release_is_refused(tmp_path: Path, tamper, message: str) -> None:
    build(tmp_path / "home", candidate(tmp_path))
    tamper(release.directory(tmp_path / "home", 1))
    with pytest.raises(ReleaseError, match=message):
        release.verify(tmp_path / "home", 1)


def test_a_release_under_anothers_number_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "home", candidate(tmp_path))
    path = release.directory(tmp_path / "home", 1)
    path.rename(path.parent / "2")
    with pytest.raises(ReleaseError, match="its manifest is of release 1"):
        release.verify(tmp_path / "home", 2)


def test_a_candidate_that_the_gate_rejected_is_not_released(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="did not approve this candidate: better"):
        build(tmp_path / "home", candidate(tmp_path, approved=False))
    assert release.releases(tmp_path / "home") == []


def test_a_rejected_candidate_is_forced_by_a_named_person_with_a_reason(tmp_path: Path) -> None:
    made, home = candidate(tmp_path, approved=False), tmp_path / "home"
    said = {"run_id": "run", "git_revision": "abc", "environment": "def", "approved_by": "ana"}
    assert release.build(home, made, **said, force_reason="the champion recommends what is withdrawn") == 1
    manifest = release.verify(home, 1)
    assert manifest["forced"] == {
        "by": "ana",
        "reason": "the champion recommends what is withdrawn",
        "verdict": "better",
    }
    assert manifest["approved_by"] == "ana"


@pytest.mark.parametrize(
    ("approved", "by", "reason", "message"),
    [
        (False, "ana", "", "did not approve this candidate"),
        (False, "ana", " \n", "this one is blank"),
        (False, "nobody", "it must", "nobody is named"),
        (False, "Nobody ", "it must", "nobody is named"),
        (False, "  ", "it must", "nobody is named"),
        (True, "ana", "it must", "nothing to force"),
        (True, "ana", " ", "nothing to force"),
    ],
)
def test_force_needs_a_rejection_a_name_and_a_reason(
    tmp_path: Path, approved: bool, by: str, reason: str, message: str
) -> None:
    made = candidate(tmp_path, approved=approved)
    said = {"run_id": "run", "git_revision": "abc", "environment": "def", "approved_by": by}
    with pytest.raises(ReleaseError, match=message):
        release.build(tmp_path / "home", made, **said, force_reason=reason)
    assert release.releases(tmp_path / "home") == []


@pytest.mark.parametrize(
    "part", ["recall/items.parquet", "rank/saved_model/saved_model.pb", "rehearsal/probe.json", "report.html"]
)
def test_a_candidate_with_a_part_missing_is_not_released(tmp_path: Path, part: str) -> None:
    made = candidate(tmp_path)
    (tmp_path / part).unlink()
    with pytest.raises(ReleaseError, match=Path(part).name.replace(".", r"\.")):
        build(tmp_path / "home", made)
    assert release.releases(tmp_path / "home") == []


def test_a_candidate_that_does_not_say_where_it_comes_from_is_not_released(tmp_path: Path) -> None:
    made = candidate(tmp_path)
    (tmp_path / "verdict" / "verdict.json").write_text('{"approved": true, "champion": null, "heads": {}}')
    with pytest.raises(ReleaseError, match="do not say its 'sentence'"):
        build(tmp_path / "home", made)
    assert release.releases(tmp_path / "home") == []


def test_a_repeated_step_makes_no_second_release(tmp_path: Path) -> None:
    home, made = tmp_path / "home", candidate(tmp_path)
    assert [build(home, made), build(home, made), build(home, made, "another run")] == [1, 1, 2]


def test_builders_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    home, made = tmp_path / "home", candidate(tmp_path)
    numbers: list[int] = []
    builders = [
        threading.Thread(target=lambda run=run: numbers.append(build(home, made, f"run {run}"))) for run in range(6)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6] == release.releases(home)
    assert all(release.verify(home, number) for number in numbers)


def test_what_a_killed_builder_left_is_no_release_and_is_cleared(tmp_path: Path) -> None:
    home = tmp_path / "home"
    left = home / "releases" / ".building-xyz" / "recall"
    left.mkdir(parents=True)
    assert release.releases(home) == []
    assert build(home, candidate(tmp_path)) == 1
    assert not left.exists()


def test_a_number_that_was_live_is_not_given_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    routing.write(home / "routing.json", Routing(champion=4, previous=(7, 2)))
    assert build(home, candidate(tmp_path)) == 8


def test_links_lead_from_the_base_paths_to_the_models(tmp_path: Path) -> None:
    home, made = tmp_path / "home", candidate(tmp_path)
    for run in "ab":
        release.link(home, build(home, made, run))
    release.link(home, 2)
    moved = home.rename(tmp_path / "moved")
    assert (release.base_path(moved, "recall") / "2" / "saved_model.pb").read_text() == "recall graph"
    assert (release.base_path(moved, "rank") / "1" / "saved_model.pb").read_text() == "rank graph"
    release.unlink_all_but(moved, (2,))
    assert [path.name for path in sorted((moved / "models").glob("*/*"))] == ["2", "2"]
    assert release.releases(moved) == [1, 2]
