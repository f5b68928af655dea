"""The feature vectors that answers were made of, as the rank model was given them: what a replay holds offline ones to.

A directory of JSON lines (`penstock.json_lines`), a line a request:

    {"arrived_ms", "request_id", "user_id", "time_ms", "scenario", "device", "release", "service", "features_us",
     "items": [item id, …], "user": {feature: value}, "of_items": {feature: [value, …]}}

`user` has what is the same for all items of the slate, `of_items` a value for each. A float32 is written as the float64
of the same value, and comes back to the bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from penstock.events import TIME
from penstock.features import ON_DEMAND, VIEWS, Column, Ragged
from penstock.json_lines import DailyLines, LineReader, day_files

FEATURES = {feature.name: feature.dtype for group in (*VIEWS, *ON_DEMAND) for feature in group.features}


class ServedLog:
    """The one writer of a directory of served vectors; safe for many threads.

    Args:
        share: the part of the requests that are kept.
    """

    def __init__(self, directory: Path, share: float) -> None:
        self._lines = DailyLines(directory)
        self._share = share

    def wants(self, request_id: int) -> bool:
        """Whether a request is one of the kept: by the low bits of its id, which is random."""
        return request_id % 2**20 < self._share * 2**20

    def keep(
        self,
        request_id: int,
        user_id: int,
        items: Sequence[int],
        *,
        time_ms: int,
        scenario: int,
        device: int,
        release: int,
        service: str,
        features_us: int,
        user: Mapping[str, Column],
        of_items: Mapping[str, Column],
    ) -> None:
        """Keeps the vectors of a slate: `user` of one row, `of_items` of a row an item."""
        arrived_ms = time.time_ns() // 1_000_000
        record = {
            "arrived_ms": arrived_ms,
            "request_id": request_id,
            "user_id": user_id,
            "time_ms": time_ms,
            "scenario": scenario,
            "device": device,
            "release": release,
            "service": service,
            "features_us": features_us,
            "items": list(items),
            "user": {name: _values(column)[0] for name, column in user.items()},
            "of_items": {name: _values(column) for name, column in of_items.items()},
        }
        self._lines.append(record, arrived_ms)

    def close(self) -> None:
        """Puts everything on the disk."""
        self._lines.close()


def _values(column: Column) -> list[Any]:
    return [row.tolist() for row in column.lists()] if isinstance(column, Ragged) else column.tolist()


def read_served(directory: Path, newest: int | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The kept requests in order of arrival: a row a request, and a row a request and item, in displayed order.

    With `newest` only the last so many requests, and no day before theirs is read.

    Of requests request_id, user_id, scenario, device, release, service, event_time, features_time (the cutoff of the
    materialisation that was served) and the features that all items share; of items request_id, item_id and the others.
    Features that a request was not given are null, and those that there are no more are left out.

    Raises:
        LineError: a line that is no record, but for a torn last one.
    """
    records: deque[dict[str, Any]] = deque()
    for path in reversed(day_files(directory)):
        if newest is None or len(records) < newest:
            records.extendleft(reversed(list(LineReader(path).read())))
    while newest is not None and len(records) > newest:
        records.popleft()
    shared = {name: dtype for name, dtype in FEATURES.items() if any(name in record["user"] for record in records)}
    own = {name: dtype for name, dtype in FEATURES.items() if any(name in record["of_items"] for record in records)}
    requests = pl.DataFrame(
        [{**record, **record["user"]} for record in records],
        schema={
            **dict.fromkeys(("request_id", "user_id", "scenario", "device", "release"), pl.Int64()),
            "service": pl.String(),
            **dict.fromkeys(("time_ms", "features_us"), pl.Int64()),
            **shared,
        },
    )
    items = pl.DataFrame(
        [
            {"request_id": record["request_id"], "item_id": record["items"]}
            | {name: record["of_items"].get(name, [None] * len(record["items"])) for name in own}
            for record in records
        ],
        schema={
            "request_id": pl.Int64(),
            "item_id": pl.List(pl.Int64),
            **{name: pl.List(dtype) for name, dtype in own.items()},
        },
    )
    times = {"event_time": pl.col("time_ms") * 1000, "features_time": pl.col("features_us")}
    return (
        requests.with_columns(us.cast(TIME).alias(name) for name, us in times.items()).drop("time_ms", "features_us"),
        items.explode("item_id", *own).drop_nulls("item_id"),
    )
