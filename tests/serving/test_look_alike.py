"""The table from feedback to answers, on the system of `conftest`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from feature_repo.online import Online
from penstock import release, routing
from penstock.feedback import FeedbackLog
from penstock.look_alike import LENT, LookAlikeError, Scorer, Table, model_path, table_path, tower_of
from penstock.routing import Routing
from penstock.seeds import SeedBuffer
from serving import look_alike
from serving.gateway import create_app
from serving.recommender import _explored
from tests.penstock.test_seeds import likes
from tests.serving.conftest import CROWD, KNOWN_USER, OFTEN, System, serving

NEW = (2005, 2006)
"""Items that release 1 does not know, and whoever is asked has not seen."""

STRANGER = 555

ROOT = Path(__file__).resolve().parents[2]


def scorer() -> Scorer:
    """A model of the tiny recall models' two numbers that leaves them as they are."""
    ones = np.eye(2, dtype=np.float32)
    zeros = np.zeros((2, 1), np.float32)
    return Scorer(
        ones, zeros[:, 0], zeros, zeros[0], ones, np.float32(0.3), np.float32(0.7), zeros[:, 0], np.float32(0)
    )


@pytest.fixture
def alike(system: System, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """Release 1 is live and has a look-alike model; two seeds are enough."""
    monkeypatch.setattr(look_alike, "LEAST_SEEDS", 2)
    scorer().save(model_path(system.home, 1), tower_of(release.manifest(system.home, 1)))
    yield system
    shutil.rmtree(system.home / "look_alike")


def give(system: System, *pairs: tuple[int, int], start: int = 1) -> None:
    with SeedBuffer(look_alike.buffer_path(system.home)) as buffer:
        buffer.take(likes(pairs, start))


def refreshed(system: System) -> look_alike.Refreshed:
    return look_alike.refresh(system.home, 1, system.address)


def read(system: System) -> Table:
    return Table.read(system.home, 1, tower_of(release.manifest(system.home, 1)))


def ask(gateway: httpx.Client, k: int = 5) -> dict:
    body = {"user_id": KNOWN_USER, "k": k, "explain": True, "preview": True}
    answer = gateway.post("/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_catalogue_is_what_was_materialised(system):
    items = Online(system.home).catalogue()
    assert {1000, 2005, 3039, OFTEN} <= set(items["item_id"].to_list())
    assert items.columns == ["item_id", "author_id", "category", "music_id", "tags"]


def test_an_item_is_the_users_who_liked_it_as_the_release_sees_them(alike):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]))
    refreshed(alike)
    item = read(alike).items()[NEW[0]]
    seeds = item.seeds[item.counts > 0]
    assert sorted(seeds.tolist()) == [[1.0, 0.0], [1.0, 3.0]]
    assert item.own == 2


def test_what_did_not_change_is_taken_over_and_no_version_is_spent(alike):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]))
    first = refreshed(alike)
    assert refreshed(alike) == replace(first, changed=0)
    give(alike, (KNOWN_USER, 1005), (CROWD, 1005), start=100)
    second = refreshed(alike)
    assert (second.changed, second.version, second.items) == (1, 2, first.items + 1)


def test_users_of_whom_nothing_is_known_are_no_seeds(alike):
    strangers = range(STRANGER, STRANGER + 5)
    give(alike, *((stranger, item) for stranger in strangers for item in (1005, 1006, 1007, NEW[0])))
    give(alike, (KNOWN_USER, 1006), (KNOWN_USER, 1007), (CROWD, 1007), (KNOWN_USER, NEW[0]), start=100)
    refreshed(alike)
    items = read(alike).items()
    assert {1005, 1006}.isdisjoint(items)  # recall knows them, and nobody or one is too few
    assert (items[1007].own, items[1007].counts.sum()) == (2, 2)
    assert items[NEW[0]].own == 1


def test_an_item_that_is_gone_from_the_catalogue_leaves_the_table(alike):
    gone = 77_777
    give(alike, (KNOWN_USER, gone), (CROWD, gone), (KNOWN_USER, 1005), (CROWD, 1005))
    refreshed(alike)
    former = read(alike)
    assert gone not in former.ids
    items = former.items()
    Table.of(1, former.tower, 7, former.sequence, former.scorer, {**items, gone: items[1005]}).publish(alike.home)
    assert refreshed(alike) == look_alike.Refreshed(1, len(items), 0, 8)
    assert read(alike).ids.tolist() == former.ids.tolist()


def test_a_new_item_with_few_seeds_is_known_by_items_like_it(alike):
    give(alike, (KNOWN_USER, 1005), (CROWD, 1005), (CROWD, NEW[0]))
    refreshed(alike)
    items = read(alike).items()
    assert items[NEW[0]].own == 1
    assert sorted(items[NEW[0]].counts[:2].tolist()) == [LENT, 1]
    assert items[NEW[1]].own == 0
    assert items[NEW[1]].counts.sum() == LENT
    assert 1006 not in items  # recall knows it, and nobody liked it: nothing is borrowed


def test_the_most_alike_lend_first_their_latest_and_none_of_them_all(alike):
    catalogue = pl.DataFrame({"item_id": [1, 2, 3, 4], "author_id": [7, 7, 8, 9], "category": [1, 1, 1, 2]})
    give(alike, *((user, item) for item in (2, 3, 4) for user in range(10 * item, 10 * item + 9)), (21, 1))
    with SeedBuffer(look_alike.buffer_path(alike.home)) as buffer:
        lenders = look_alike.Lenders(buffer, catalogue, np.array([2, 3, 4]))
        own = buffer.users(1)
        assert lenders.to(1, own, 5).tolist() == [28, 27, 26, 38, 37]
        assert lenders.to(1, own, 2).tolist() == [28, 38]
        assert sorted(lenders.to(1, own, 99).tolist()) == [20, *range(22, 29), *range(30, 39)]
        assert lenders.to(99, own, 5).tolist() == []
        assert look_alike.Lenders(buffer, catalogue, np.array([], np.int64)).to(1, own, 5).tolist() == []


def test_a_run_that_fails_leaves_the_former_table(alike, monkeypatch):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]))
    refreshed(alike)
    give(alike, (KNOWN_USER, 1005), (CROWD, 1005), start=100)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(look_alike, "item_of", killed)
        with pytest.raises(KeyboardInterrupt):
            refreshed(alike)
    assert read(alike).version == 1
    assert refreshed(alike).version == 2
    assert 1005 in read(alike).ids


def test_runs_that_are_killed_leave_the_former_table_and_the_next_makes_the_right_one(alike, tmp_path):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]))
    refreshed(alike)
    former = table_path(alike.home, 1).read_bytes()
    give(alike, (KNOWN_USER, 1005), (CROWD, 1005), (KNOWN_USER, 1006), (CROWD, 1006), start=100)
    refreshed(alike)
    never_killed = read(alike)
    table_path(alike.home, 1).write_bytes(former)
    with FeedbackLog(tmp_path / "feedback") as log:
        context = {"time_ms": 1, "scenario": 0, "device": 0, "release": 1, "variant": "champion", "features_us": None}
        log.impressions(70, KNOWN_USER, [5, 6], **context)
        log.outcomes(70, [{"item_id": 5, "long_view": 1}, {"item_id": 6, "long_view": 1}])
    command = [sys.executable, "-m", "tests.serving.killed", str(alike.home), alike.address, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout).values()) == {"SIGKILL"}, done.stdout + done.stderr

    assert read(alike).version == 1
    with serving(create_app(alike.settings)) as gateway:
        answer = ask(gateway, k=100)
    assert answer["degraded"] == []
    assert NEW[0] in [item["item_id"] for item in answer["items"]]
    assert refreshed(alike).version == 2
    folder = table_path(alike.home, 1).parent
    assert sorted(path.name for path in folder.iterdir()) == ["model.npz", "table.npz"]
    assert {1005, 1006} < set(never_killed.ids.tolist())
    for name in ("version", "sequence", "ids", "seeds", "counts", "summaries", "own"):
        np.testing.assert_array_equal(getattr(read(alike), name), getattr(never_killed, name))

    with SeedBuffer(look_alike.buffer_path(tmp_path)) as buffer:
        assert (buffer.counts(), buffer.sequence) == ({}, 0)
    assert look_alike.follow(tmp_path) == 2
    with SeedBuffer(look_alike.buffer_path(tmp_path)) as buffer:
        assert buffer.counts() == {5: 1, 6: 1}


RUNS = """
import json
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb
initdb()
run = DagBag("dags").dags["look_alike"].test()
ended = {f"{task.task_id} {task.rendered_map_index or task.map_index}": task.state for task in run.get_task_instances()}
print(json.dumps({"run": run.state, **ended}))
"""


def test_a_release_that_cannot_be_trained_is_named_and_leaves_the_others_alone(alike, tmp_path):
    """As Airflow runs it: release 2 has no model, and there are no examples to train one of."""
    alike.put(routing.canary(Routing(champion=1), 2, 0.5))
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]))
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PENSTOCK_HOME": str(alike.home),
        "PENSTOCK_MODEL_SERVER": alike.address,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "run": "failed",
        "follow -1": "success",
        "train release 1": "success",
        "train release 2": "failed",
        "refresh release 1": "success",
        "refresh 1": "upstream_failed",
    }
    assert "release 2: there are no examples yet: trigger the DAG `prepare` first" in done.stdout + done.stderr
    assert NEW[0] in read(alike).ids
    assert not table_path(alike.home, 2).exists()


def test_a_damaged_table_is_made_anew(alike):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]))
    refreshed(alike)
    table_path(alike.home, 1).write_bytes(b"none")
    assert refreshed(alike).items == len(read(alike).ids)


def test_a_release_without_a_model_has_no_table_and_a_model_of_another_tower_is_refused(alike, tmp_path):
    model_path(alike.home, 1).unlink()
    assert not look_alike.trained(alike.home, 1)
    with pytest.raises(FileNotFoundError):
        refreshed(alike)
    scorer().save(tmp_path / "model.npz", "another")
    with pytest.raises(LookAlikeError, match="another query tower"):
        look_alike.adopt(alike.home, 1, tmp_path / "model.npz")
    scorer().save(tmp_path / "model.npz", tower_of(release.manifest(alike.home, 1)))
    look_alike.adopt(alike.home, 1, tmp_path / "model.npz")
    assert look_alike.trained(alike.home, 1)


def test_what_look_alike_finds_is_ranked_and_said(alike):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]), (KNOWN_USER, 1005), (CROWD, 1005))
    refreshed(alike)
    with serving(create_app(alike.settings)) as gateway:
        answer = ask(gateway, k=100)
        assert answer["degraded"] == []
        said = {item["item_id"]: item for item in answer["explanation"]["items"]}
        table = read(alike)
        for item in (NEW[0], 1005):
            row = table.ids.tolist().index(item)
            (score,) = table.scorer.score(
                np.array([1.0, 3.0]), table.seeds[[row]], table.counts[[row]], table.summaries[[row]]
            )
            assert said[item]["look_alike_score"] == pytest.approx(score, rel=1e-5)
        assert said[NEW[0]]["recall_score"] is None
        assert said[NEW[0]]["recall_rank"] is None
        assert said[1005]["recall_rank"] is not None
        assert said[1004]["look_alike_score"] is None
        assert said[NEW[0]]["features"]


def test_the_share_of_exploration_is_kept_for_what_look_alike_alone_finds(alike):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]), (KNOWN_USER, NEW[1]))
    refreshed(alike)
    shown = {}
    for share in (0.0, 0.2, 0.4):
        with serving(create_app(replace(alike.settings, exploration_share=share))) as gateway:
            answer = ask(gateway)
            shown[share] = [item["item_id"] // 1000 for item in answer["items"]]
            assert len({item["item_id"] for item in answer["items"]}) == 5
    assert shown[0.0] == [1, 1, 1, 1, 1]
    assert shown[0.2] == [1, 1, 1, 1, 2]
    assert sorted(shown[0.4]) == [1, 1, 1, 2, 2]


def test_a_table_of_another_tower_is_refused_and_a_new_one_is_taken_up(alike):
    give(alike, (KNOWN_USER, NEW[0]), (CROWD, NEW[0]))
    with serving(create_app(alike.settings)) as gateway:
        assert ask(gateway)["degraded"] == []
        Table.of(1, "another", 1, 0, scorer(), {}).publish(alike.home)
        answer = ask(gateway, k=60)
        assert answer["degraded"] == ["look_alike"]
        assert "another query tower" in answer["explanation"]["why"]
        refreshed(alike)
        answer = ask(gateway, k=100)
        assert answer["degraded"] == []
        assert NEW[0] in [item["item_id"] for item in answer["items"]]


def test_places_of_exploration_are_spread_and_filled_as_far_as_there_is_something():
    best = np.arange(10)
    found = np.arange(14) >= 10
    assert _explored(best, found, 0) is best
    assert _explored(best, found, 2).tolist() == [0, 1, 2, 3, 10, 4, 5, 6, 7, 11]
    assert _explored(best, found[:11], 5).tolist() == [*range(9), 10]
    already = np.array([0, 1, 12, 2, 3])
    assert _explored(already, found, 1) is already
    assert _explored(already, found, 2).tolist() == [0, 1, 12, 2, 10]
