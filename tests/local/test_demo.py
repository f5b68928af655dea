from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from local import supervisor
from local.demo import DAYS, decide, remember_day, run, some_users, source_of
from local.place import ROOT, LocalError, Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "home").mkdir()
    return Place(tmp_path / "home", {})


def test_without_data_the_simulator_is_a_day_older_for_each_day_lived(place: Place) -> None:
    first = source_of("", place, {"users": 5})
    assert (first.name, first.options, first.day) == ("simulator", {"users": 5, "days": DAYS}, DAYS)
    remember_day(place)
    remember_day(place)
    assert source_of("", place, {}).options == {"days": DAYS + 2}
    assert source_of("", place, {"days": 3}).day == 5


def test_a_directory_is_known_by_its_layout(place: Place, tmp_path: Path) -> None:
    (tmp_path / "own" / "events").mkdir(parents=True)
    assert source_of(str(tmp_path / "own"), place, {}).name == "canonical"

    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    (folder / "log_standard_4_08_to_4_21_pure.csv").touch()
    found = source_of(str(folder.parent), place, {})
    assert (found.name, found.options, found.day) == ("kuairand", {"path": str(folder.parent)}, None)
    assert source_of(str(folder), place, {}).name == "kuairand"


def test_data_that_is_no_log_says_what_one_is(place: Place, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="no such directory"):
        source_of(str(tmp_path / "nowhere"), place, {})
    with pytest.raises(LocalError, match=r"neither KuaiRand-Pure .* nor a log in the layout"):
        source_of(str(tmp_path), place, {})


def test_a_challenger_is_turned_down_by_the_evidence_alone() -> None:
    even = {"click": {"result": "not told apart"}, "watch_time": {"result": "better"}}
    assert decide(even)[0] == "Approve"
    assert decide(even | {"long_view": {"result": "not steady"}})[0] == "Approve"
    assert decide(even | {"watch_time": {"result": "worse"}}) == (
        "Reject",
        "watch time: worse than the champion's, with confidence",
    )
    assert decide({}) == ("Approve", "the gate approved it; too few have seen it yet")


def test_users_are_shown_as_they_were_at_the_logs_end(tmp_path: Path) -> None:
    times = [datetime(2026, 1, 2, hour, tzinfo=UTC) for hour in (1, 2, 3, 4)]
    rows = {
        "user_id": [1, 2, 1, 3],
        "event_time": times,
        "history_items": [[1, 2, 3], [4, 5, 6, 7], [1, 2, 3, 8], [9]],
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "test.parquet")
    items = {"item_id": [8, 9], "category": [4, 5], "title": ["a walk", ""]}
    pl.DataFrame(items).write_parquet(tmp_path / "items.parquet")
    (tmp_path / "window.json").write_text(json.dumps({"test_end": "2026-01-02T05:00:00+00:00"}))

    end_ms, users, lines = some_users(tmp_path)

    assert end_ms == datetime(2026, 1, 2, 5, tzinfo=UTC).timestamp() * 1000
    assert users == [(1, [2, 3, 8]), (2, [5, 6, 7])]
    assert lines == {8: "a walk [4]", 9: "item 9 [5]"}


def test_a_second_demo_says_that_one_runs(place: Place) -> None:
    with supervisor.locked(place.home, "demo.lock") as free:
        assert free
        done = subprocess.run(
            [sys.executable, "-m", "local", "demo"],
            cwd=ROOT,
            env={"PENSTOCK_HOME": str(place.home)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "already (process" in done.stderr


def test_data_that_is_none_leaves_no_home_behind(tmp_path: Path) -> None:
    place = Place(tmp_path / "home", {})
    with pytest.raises(LocalError, match="no such directory"):
        run(place, str(tmp_path / "nowhere"), keep=False)
    assert not place.home.exists()
