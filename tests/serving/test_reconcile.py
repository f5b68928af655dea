from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from penstock import release, routing
from penstock.release_store import ReleaseStore
from penstock.routing import Routing
from serving import reconcile, rollout
from serving.model_client import ModelClient
from serving.rollout import RolloutError, Servers
from tests.serving.conftest import System, build

PAIR = routing.canary(Routing(champion=1), 2, 0.5)


@pytest.fixture
def at(system: System) -> Servers:
    at = Servers(system.address)
    rollout.canary(system.home, 2, 0.5, by="ana", at=at)
    return at


def found(system: System, at: Servers) -> dict[str, tuple[str, str]]:
    return {one.what: (one.found, one.expected) for one in reconcile.differences(system.home, at)}


def mended(system: System, at: Servers) -> bool:
    reconcile.mend(system.home, at)
    return found(system, at) == {}


def test_after_an_act_there_is_no_difference(system: System, at: Servers) -> None:
    assert found(system, at) == {}
    for act in (rollout.withdraw, rollout.canary, rollout.promote, rollout.rollback):
        words = {"canary": {"number": 2, "share": 0.1}, "promote": {"number": 2}}.get(act.__name__, {})
        act(system.home, **words, by="ana", reason="a test", at=at)
        left = found(system, at)
        # a withdrawn release stays loaded until the next act: requests that run are finished by it
        assert set(left) <= {"models/recall", "models/rank"}, (act.__name__, left)


def test_what_the_model_server_lost_is_found_and_loaded_again(system: System, at: Servers) -> None:
    base_paths = {model: release.base_path(system.home, model) for model in release.MODELS}
    with ModelClient(at.model_server) as client:
        client.load(base_paths, (1,), labels={"stable": 1})
    assert found(system, at) == {
        "model server, release 2": ("not loaded", "loaded"),
        "model server, label canary of recall": ("none", "2"),
        "model server, label canary of rank": ("none", "2"),
    }
    assert mended(system, at)


def test_a_label_that_was_moved_is_found(system: System, at: Servers) -> None:
    base_paths = {model: release.base_path(system.home, model) for model in release.MODELS}
    with ModelClient(at.model_server) as client:
        client.load(base_paths, (1, 2), labels={"stable": 2, "canary": 1})
    assert found(system, at)["model server, label stable of rank"] == ("2", "1")
    assert mended(system, at)


def test_another_model_under_the_number_is_found(system: System, at: Servers) -> None:
    with ModelClient(at.model_server) as client:
        base_paths = {model: release.base_path(system.home, model) for model in release.MODELS}
        client.load(base_paths, (1,))
        shutil.copytree(release.directory(system.home, 2), system.home / "aside", symlinks=True)
        try:
            link = release.base_path(system.home, "rank") / "2"
            link.unlink()
            link.symlink_to(release.directory(system.home, 1) / "rank")
            client.load(base_paths, (1, 2), labels={"stable": 1, "canary": 2})
            (what,) = found(system, at).items()
            assert what[0] == "model server, release 2"
            assert "is not that release: rank click differ" in what[1][0]
        finally:
            shutil.rmtree(system.home / "aside")
            client.load(base_paths, (1,))
    assert mended(system, at)


def test_links_and_a_damaged_document_are_mended(system: System, at: Servers) -> None:
    (release.base_path(system.home, "recall") / "2").unlink()
    release.link(system.home, 3)
    (system.home / "routing.json").write_text('{"champion": 7,')
    left = found(system, at)
    assert left["routing.json"] == ("damaged", "champion 1, by the journal")
    assert left["models/recall"] == ("with 3 too", "versions 1, 2")
    assert mended(system, at)
    assert routing.read(system.home / "routing.json").challenger == 2


def test_releases_are_brought_to_the_store_and_back(system: System, at: Servers, tmp_path: Path) -> None:
    stored = Servers(at.model_server, str(tmp_path / "store"))
    number = build(system.home, tmp_path / "made")
    try:
        rollout.canary(system.home, number, 0.5, by="ana", at=at)
        assert {what for what in found(system, stored) if what.startswith("release")} == {
            "release 1",
            f"release {number}",
        }
        assert mended(system, stored)
        assert ReleaseStore(stored.releases).numbers() == [1, number]
        damaged = release.directory(system.home, number) / "weights.json"
        damaged.chmod(0o644)
        damaged.write_text("{}")
        assert "weights.json was changed" in found(system, stored)[f"release {number}"][0]
        with pytest.raises(RolloutError, match=r"weights\.json was changed"):
            reconcile.mend(system.home, at)  # no store to fetch it from
        assert mended(system, stored)
        release.verify(system.home, number)
    finally:
        rollout.withdraw(system.home, by="ana", reason="the end", at=at)
        shutil.rmtree(release.directory(system.home, number))


def test_a_server_that_is_away_is_told(system: System, at: Servers) -> None:
    away = Servers("127.0.0.1:1")
    (what,) = found(system, away).items()
    assert what[0] == "model server"
    assert "does not answer" in what[1][0]
    with pytest.raises(RolloutError, match="what is live is not loaded again"):
        reconcile.mend(system.home, away)
