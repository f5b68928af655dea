"""The most popular items by segment: what is answered when no model can be asked.

`popular.parquet` of a release holds, a row an item and segment, `segment`, `rank` (from 0) and `item_id`. Segments are

    scenario=S/new, scenario=S/returning    requests in scenario S, by users without and with a history
    scenario=S                              all of them
    (the empty text)                        everybody
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl

from penstock.examples import read_slice

FILE = "popular.parquet"
VIEWED = "long_view"
"""Popular is what has most of these: what recall models retrieve."""
DAYS = 7
"""So many days before the end of the examples count."""
SIZE = 500
"""Items of a segment: the longest slate, and what its user has seen of them, are fewer."""
LEAST = 100
"""A segment with fewer long views says little: a larger one stands for it."""

SCHEMA = {"segment": pl.String(), "rank": pl.Int32(), "item_id": pl.Int64()}


def popular(rows: pl.DataFrame, size: int = SIZE, least: int = LEAST) -> pl.DataFrame:
    """The items with most long views in each segment, `SCHEMA`; ties go to the smaller id.

    Args:
        rows: of examples, of at least a segment's time.
        least: long views of a segment that there must be; that of everybody is always there if anything is.
    """
    since = pl.col("event_time").max() - timedelta(days=DAYS)
    viewed = rows.filter((pl.col("event_time") > since) & (pl.col(VIEWED) == 1))
    scenario = pl.format("scenario={}", "scenario")
    kind = pl.when(pl.col("history_items").list.len() > 0).then(pl.lit("returning")).otherwise(pl.lit("new"))
    parts = [
        _most(viewed.select("item_id", segment=segment), size).filter(pl.col("of") >= wanted)
        for segment, wanted in (
            (pl.lit(""), 0),
            (scenario, least),
            (pl.format("{}/{}", scenario, kind), least),
        )
    ]
    return pl.concat(parts).select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


def _most(viewed: pl.DataFrame, size: int) -> pl.DataFrame:
    """The first items of each segment, with how many long views the segment has, `of`."""
    counted = viewed.group_by("segment", "item_id").len("views")
    return (
        counted.sort(["segment", "views", "item_id"], descending=[False, True, False])
        .with_columns(
            rank=pl.int_range(pl.len()).over("segment"),
            of=pl.col("views").sum().over("segment"),
        )
        .filter(pl.col("rank") < size)
    )


def write_popular(examples: Path, out: Path) -> None:
    """Writes `popular.parquet` of all slices of an examples directory: what is newest counts."""
    columns = ("item_id", "event_time", "scenario", "history_items", VIEWED)
    rows = pl.concat([read_slice(examples, part).select(columns) for part in ("train", "validation", "test")])
    popular(rows).write_parquet(out / FILE)


@dataclass(frozen=True)
class Popular:
    """Popular items by segment, best first, int64 `[items]`."""

    segments: Mapping[str, np.ndarray]

    @staticmethod
    def read(path: Path) -> Popular:
        """The file of a release.

        Raises:
            OSError: it is not there.
            polars.exceptions.PolarsError: it is no such file.
        """
        rows = pl.read_parquet(path, columns=list(SCHEMA)).sort("segment", "rank")
        return Popular(
            {segment: part["item_id"].to_numpy() for (segment,), part in rows.group_by("segment", maintain_order=True)}
        )

    def best(self, scenario: int, new: bool | None, seen: np.ndarray, k: int) -> np.ndarray:
        """The `k` most popular items that were not seen, best first; larger segments go on where a smaller ends.

        Args:
            new: whether the user has no history; None if that is not known.
        """
        chosen = np.empty(0, np.int64)
        for segment in _segments(scenario, new):
            found = self.segments.get(segment)
            if found is None:
                continue
            chosen = np.concatenate([chosen, found[~np.isin(found, np.concatenate([seen, chosen]))]])
            if len(chosen) >= k:
                break
        return chosen[:k]


def _segments(scenario: int, new: bool | None) -> Iterator[str]:
    """From the smallest to everybody."""
    if new is not None:
        yield f"scenario={scenario}/{'new' if new else 'returning'}"
    yield f"scenario={scenario}"
    yield ""
