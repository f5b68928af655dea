from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.popular import FILE, SCHEMA, Popular, popular, write_popular

END = datetime(2026, 3, 20, tzinfo=UTC)


def rows(seed: int, count: int = 300) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "item_id": random.integers(100, 115, count),
            "event_time": [END - timedelta(hours=int(hours)) for hours in random.integers(0, 12 * 24, count)],
            "scenario": random.integers(0, 3, count),
            "history_items": [[1] * int(length) for length in random.integers(0, 3, count)],
            "long_view": (random.random(count) < 0.6).astype(np.int8),
        },
        schema_overrides={"event_time": pl.Datetime("us", "UTC"), "history_items": pl.List(pl.Int64)},
    )


def oracle(frame: pl.DataFrame, size: int, least: int) -> dict[str, list[int]]:
    """By loops over the rows."""
    viewed = [row for row in frame.iter_rows(named=True) if row["long_view"]]
    last = frame["event_time"].max()
    counts: dict[str, Counter[int]] = {}
    for row in viewed:
        if row["event_time"] > last - timedelta(days=7):
            kind = "returning" if row["history_items"] else "new"
            for segment in ("", f"scenario={row['scenario']}", f"scenario={row['scenario']}/{kind}"):
                counts.setdefault(segment, Counter())[row["item_id"]] += 1
    return {
        segment: sorted(of, key=lambda item: (-of[item], item))[:size]
        for segment, of in counts.items()
        if of.total() >= least or not segment
    }


def by_segment(frame: pl.DataFrame) -> dict[str, list[int]]:
    assert dict(frame.schema) == SCHEMA
    found: dict[str, list[int]] = {}
    for segment, rank, item in frame.sort("segment", "rank").iter_rows():
        found.setdefault(segment, []).append(item)
        assert rank == len(found[segment]) - 1
    return found


@pytest.mark.parametrize("least", [1, 20, 40, 10_000])
@pytest.mark.parametrize("size", [1, 6, 500])
def test_it_is_what_was_viewed_most(least: int, size: int) -> None:
    for seed in range(3):
        assert by_segment(popular(rows(seed), size, least)) == oracle(rows(seed), size, least)


def test_without_a_long_view_nothing_is_popular() -> None:
    assert popular(rows(1).with_columns(long_view=pl.lit(0))).height == 0


SEGMENTS = Popular(
    {
        "": np.array([1, 2, 3, 4, 5, 6]),
        "scenario=1": np.array([4, 3, 9]),
        "scenario=1/new": np.array([9, 8]),
    }
)


@pytest.mark.parametrize(
    ("scenario", "new", "seen", "k", "best"),
    [
        (1, True, [], 2, [9, 8]),
        (1, True, [], 5, [9, 8, 4, 3, 1]),  # a larger segment goes on where a smaller ends
        (1, False, [], 3, [4, 3, 9]),
        (1, None, [], 3, [4, 3, 9]),
        (7, True, [], 3, [1, 2, 3]),
        (1, True, [9, 4, 1, 2], 4, [8, 3, 5, 6]),
        (1, True, [1, 2, 3, 4, 5, 6, 8, 9], 4, []),
        (7, None, [], 99, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_smallest_segment_answers(
    scenario: int, new: bool | None, seen: list[int], k: int, best: list[int]
) -> None:
    assert SEGMENTS.best(scenario, new, np.array(seen, np.int64), k).tolist() == best


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.none() | st.booleans(), st.integers(0, 30))
def test_no_item_twice_and_none_that_was_seen(seed: int, scenario: int, new: bool | None, k: int) -> None:
    random = np.random.default_rng(seed)
    seen = random.integers(100, 115, 4)
    of = Popular({name: np.array(items) for name, items in by_segment(popular(rows(seed), 9, 20)).items()})
    found = of.best(scenario, new, seen, k).tolist()
    assert len(found) == len(set(found)) <= k
    assert not set(found) & set(seen.tolist())
    assert len(found) == k or set(of.segments[""].tolist()) <= {*found, *seen.tolist()}


def test_the_file_holds_all_slices(tmp_path: Path) -> None:
    frame = rows(3)
    for place, part in enumerate(("train", "validation", "test")):
        frame[place::3].write_parquet(tmp_path / f"{part}.parquet")
    write_popular(tmp_path, tmp_path)
    assert by_segment(pl.read_parquet(tmp_path / FILE)) == oracle(frame, 500, 100)
    read = Popular.read(tmp_path / FILE)
    assert {name: items.tolist() for name, items in read.segments.items()} == oracle(frame, 500, 100)
