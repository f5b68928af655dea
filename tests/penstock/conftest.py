"""Small examples that the model tests share."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock.events import EVENTS, ITEMS
from penstock.examples import FEATURES, write_examples


def joined_rows(rows: int = 3000, users: int = 60, items: int = 40, seed: int = 0) -> pl.DataFrame:
    """Rows as the feature join gives them, over eight days: a user likes the items of its own parity."""
    random = np.random.default_rng(seed)
    user, item = random.integers(0, users, rows), random.integers(0, items, rows)
    good = (user + item) % 2 == 0
    start = datetime(2024, 5, 1, tzinfo=UTC)
    times = np.sort(random.integers(0, 8 * 24 * 3600, rows))
    columns: dict[str, object] = {
        "event_id": np.arange(rows),
        "request_id": np.arange(rows) // 10,
        "user_id": user,
        "item_id": item * 10,
        "event_time": [start + timedelta(seconds=int(second)) for second in times],
        "created_time": [start + timedelta(seconds=int(second)) for second in times],
        "outcome_time": pl.Series([None] * rows, dtype=pl.Datetime("us", "UTC")),
        "session_id": pl.Series([None] * rows, dtype=pl.Int64),
        "position": pl.Series([None] * rows, dtype=pl.Int64),
        "release": pl.Series([None] * rows, dtype=pl.Int64),
        "variant": pl.Series([None] * rows, dtype=pl.String),
        "features_time": pl.Series([None] * rows, dtype=pl.Datetime("us", "UTC")),
    }
    for label, rate in (("click", 0.8), ("long_view", 0.6), ("like", 0.3)):
        columns[label] = (good & (random.random(rows) < rate)).astype(np.int8)
    for feature in FEATURES:
        if feature.name in columns or feature.side == "sequence":
            continue
        if feature.kind in ("id", "count"):
            columns[feature.name] = random.integers(0, 5, rows)
        elif feature.kind == "number":
            columns[feature.name] = random.random(rows).astype(np.float32)
        elif feature.name == "history_items":
            lengths = random.integers(0, 6, rows)
            columns[feature.name] = [
                (10 * ((2 * random.integers(0, max(items // 2, 1), length) + u % 2) % items)).tolist()
                for u, length in zip(user, lengths, strict=True)
            ]
        else:
            columns[feature.name] = [random.integers(0, 9, random.integers(0, 4)).tolist() for _ in range(rows)]
    lengths = [len(items) for items in columns["history_items"]]
    ends_ms = [int((start.timestamp() + second) * 1000) for second in times]
    columns["history_times"] = [
        np.sort(end - random.integers(1, 3 * 24 * 3_600_000, length)).tolist()
        for end, length in zip(ends_ms, lengths, strict=True)
    ]
    columns["history_sessions"] = [np.sort(random.integers(-1, 3, length)).tolist() for length in lengths]
    columns["profile_enter"] = (good & (random.random(rows) < 0.2)).astype(np.int8)
    columns["watch_time_ms"] = (good * random.exponential(20_000, rows)).astype(np.int64)
    frame = pl.DataFrame(columns)
    ordered = [*EVENTS.schema, *(name for name in frame.columns if name not in EVENTS.schema)]
    return frame.with_columns(pl.col("event_time", "created_time").cast(pl.Datetime("us", "UTC"))).select(ordered)


def catalogue(items: int = 40) -> pl.DataFrame:
    """The ITEMS of `joined_rows`, whose titles say what there is to learn."""
    start = datetime(2024, 4, 1, tzinfo=UTC)
    values = {
        name: [0] * items if dtype == pl.Int64() else [""] * items if dtype == pl.String() else [[]] * items
        for name, dtype in ITEMS.schema.items()
    }
    values |= {"item_id": [10 * item for item in range(items)]}
    values |= {"title": [f"{('even', 'odd')[item % 2]} number {item}" for item in range(items)]}
    values |= {"event_time": [start] * items, "created_time": [start] * items}
    return pl.DataFrame(values, schema=ITEMS.schema)


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An examples directory with something to learn in it."""
    out = tmp_path_factory.mktemp("examples")
    write_examples(joined_rows(), catalogue(), out)
    return out
