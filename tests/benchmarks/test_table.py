"""What benchmarks write: the ratio, and whether a goal holds, are computed from the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.table import Comparison, show, show_columns, write


@pytest.mark.parametrize(
    ("at_most", "at_least", "goal", "holds"),
    [
        (0.15, None, "ratio <= 0.15", False),
        (0.25, None, "ratio <= 0.25", True),
        (None, 0.25, "ratio >= 0.25", True),
        (None, 1, "ratio >= 1", False),
        (None, None, None, None),
    ],
)
def test_a_goal_is_held_against_ours_by_the_peers(
    at_most: float | None, at_least: float | None, goal: str | None, holds: bool | None
) -> None:
    row = Comparison("p50", 2.0, 8.0, "Feast", "ms", at_most, at_least)
    assert (row.ratio, row.goal, row.holds) == (0.25, goal, holds)


def test_rows_are_written_with_all_that_the_house_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BUILD", tmp_path / "bench")
    path = write("some", [Comparison("p50", 2.0, 8.0, "Feast", "ms", at_most=0.3)])
    assert path == tmp_path / "bench" / "some.json"
    assert json.loads(path.read_text()) == [
        {
            "measure": "p50",
            "ours": 2.0,
            "peer": 8.0,
            "peer_name": "Feast",
            "unit": "ms",
            "ratio": 0.25,
            "goal": "ratio <= 0.3",
            "holds": True,
        }
    ]


def test_tables_show_figures_and_whether_goals_hold(capsys: pytest.CaptureFixture[str]) -> None:
    show("Speed", [Comparison("p50", 1234.5, 8.0, "Feast", "ms", at_most=1), Comparison("p99", 0.5, 8, "Feast", "ms")])
    show_columns("Steps", {"step": ["SQL"], "%": [12.345]})
    first, second, *_ = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("p")]
    assert first == ["p50", "1,234", "8", "Feast", "ms", "154.3", "ratio", "<=", "1", "FAILS"]
    assert second == ["p99", "0.5", "8", "Feast", "ms", "0.0625"]
