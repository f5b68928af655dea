from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.evaluation import _sessions

START = datetime(2026, 1, 1, tzinfo=UTC)


def frame(rows: list[tuple[int, int, int | None]]) -> pl.DataFrame:
    """User, minute, and the log's session."""
    return pl.DataFrame(
        {
            "user_id": [user for user, _, _ in rows],
            "event_time": pl.Series(
                [START + timedelta(minutes=minute) for _, minute, _ in rows], dtype=pl.Datetime("us", "UTC")
            ),
            "session_id": pl.Series([session for _, _, session in rows], dtype=pl.Int64),
        }
    )


def groups(rows: list[tuple[int, int, int | None]]) -> list[set[int]]:
    found: dict[int, set[int]] = {}
    for place, session in enumerate(_sessions(frame(rows))):
        found.setdefault(session, set()).add(place)
    return sorted(found.values(), key=min)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1, 0, None), (1, 9, None), (1, 19, None)], [{0, 1}, {2}]),
        ([(1, 0, None), (2, 1, None), (1, 2, None)], [{0, 2}, {1}]),
        ([(1, 0, 5), (1, 60, 5), (1, 61, 6)], [{0, 1}, {2}]),
        ([(1, 0, 5), (1, 1, None), (1, 20, 7)], [{0, 1}, {2}]),
        ([(1, 30, None), (1, 0, None)], [{0}, {1}]),
    ],
)
def test_sessions_are_the_logs_own_or_end_with_a_pause(
    rows: list[tuple[int, int, int | None]], expected: list[set[int]]
) -> None:
    assert groups(rows) == expected


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 90), st.none()), min_size=1, max_size=20))
def test_a_session_is_of_one_user_and_has_no_pause(rows: list[tuple[int, int, None]]) -> None:
    for places in groups(rows):
        assert len({rows[place][0] for place in places}) == 1
        minutes = sorted(rows[place][1] for place in places)
        assert all(after - before < 10 for before, after in itertools.pairwise(minutes))
