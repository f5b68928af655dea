"""Our point-in-time join against the joins that Feast brings, on the same files in the same run.

`python -m benchmarks.offline_join [ROWS]` prints the table. ROWS entity rows ask four views of ROWS source rows each,
ten a key, a tenth of them late; one view has two columns of lists of mean length 20. Every engine runs in a process of
its own and is told to leave out what had not arrived, so that all are asked for the same.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, FeastType, Float64, Int64, String

OURS = "feature_repo.offline_store.PointInTimeOfflineStore"
PEERS = {"Feast, DuckDB with the flag": "duckdb", "Feast, default (dask) with the flag": "file"}
VIEWS: dict[str, tuple[str, dict[str, FeastType]]] = {
    "user_lists": ("user", {"items": Array(Int64), "kinds": Array(Int64), "length": Int64}),
    "user_numbers": ("user", {f"user_number_{n}": Float64 for n in range(6)}),
    "item_numbers": ("item", {f"item_number_{n}": Float64 for n in range(6)}),
    "item_words": ("item", {"word": String, "count": Int64}),
}
ROWS_A_KEY = 10
START_US = int(datetime(2024, 5, 1, tzinfo=UTC).timestamp()) * 1_000_000
SPAN_US = 30 * 24 * 3600 * 1_000_000
MEMORY_LIMIT = 12 << 30
"""Bytes at which an engine is stopped."""

SECONDS_LIMIT = 600


@dataclass(frozen=True)
class Run:
    """A join by one engine: seconds, those of the processor, the MiB its process held at most, and how it ended."""

    seconds: float
    processor: float
    memory: float
    finished: bool


def compare(rows: int) -> list[dict[str, Any]]:
    """Seconds, memory and right rows of our join and of each peer: rows of the table that every benchmark writes.

    `ratio` is ours / peer. Of a peer that was stopped at a limit there are the seconds until then: at least that many.
    """
    shape = f"{rows:,} rows × {len(VIEWS)} views"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), rows)
        ours = _alone(OURS, folder)
        if not ours.finished:
            raise RuntimeError(f"our join was stopped after {ours.seconds:.0f} s")
        truth = pq.read_table(Path(folder) / f"{OURS}.parquet")
        for name, engine in PEERS.items():
            peer = _alone(engine, folder)
            if not peer.finished:
                found.append(_row(f"point-in-time join, {shape}", ours.seconds, peer.seconds, f"{name}, stopped", "s"))
                continue
            right = _equal_rows(truth, pq.read_table(Path(folder) / f"{engine}.parquet"))
            found += [
                _row(f"point-in-time join, {shape}", ours.seconds, peer.seconds, name, "s"),
                _row(f"the same, processor time, {shape}", ours.processor, peer.processor, name, "s"),
                _row(f"peak memory of its process, {shape}", ours.memory, peer.memory, name, "MiB"),
                _row(f"rows given back right, {shape}", truth.num_rows, right, name, "rows", more_is_better=True),
            ]
    return found


def _row(measure: str, ours: float, peer: float, name: str, unit: str, more_is_better: bool = False) -> dict[str, Any]:
    ratio = ours / peer if peer else float("inf")
    return {
        "measure": measure,
        "ours": round(ours, 2),
        "peer": round(peer, 2),
        "peer_name": name,
        "unit": unit,
        "ratio": ratio,
        "goal": "ratio >= 1" if more_is_better else "ratio <= 1",
        "holds": ratio >= 1 if more_is_better else ratio <= 1,
    }


def _alone(engine: str, folder: str) -> Run:
    """The join in a fresh process, which is stopped at the limits."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_join, args=(engine, folder, sender))
    process.start()
    sender.close()
    begun, stopped = time.monotonic(), False
    while process.is_alive():
        process.join(0.2)
        with contextlib.suppress(psutil.NoSuchProcess):
            used = psutil.Process(process.pid).memory_info().rss
            if used > MEMORY_LIMIT or time.monotonic() - begun > SECONDS_LIMIT:
                stopped = True
                process.kill()
    if stopped:
        return Run(time.monotonic() - begun, 0, 0, finished=False)
    if process.exitcode:
        raise RuntimeError(f"the join by {engine} ended with exit status {process.exitcode}: see its words above")
    seconds, processor, memory = receiver.recv()
    return Run(seconds, processor, memory, finished=True)


def _join(engine: str, folder: str, sender: Connection) -> None:
    """Joins, times it, and leaves one number of each view in FOLDER/<engine>.parquet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DuckDB's progress bar
    warnings.simplefilter("ignore")
    store = _store(engine, Path(folder))
    rows = pq.read_table(Path(folder) / "entities.parquet").to_pandas()
    features = [f"{view}:{name}" for view, (_, fields) in VIEWS.items() for name in fields]
    store.get_historical_features(rows[:10], features, filter_by_created_timestamp=True).to_arrow()  # imports and pools
    begun, processor = time.perf_counter(), time.process_time()
    table = store.get_historical_features(rows, features, filter_by_created_timestamp=True).to_arrow()
    seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    kept = table.select(["row", "length", "user_number_0", "item_number_0", "count"])
    pq.write_table(kept, Path(folder) / f"{engine}.parquet")
    sender.send((seconds, processor, peak))


def _equal_rows(truth: pa.Table, other: pa.Table) -> int:
    """How many of the rows are in both tables with the same values, null like null."""
    other = other.sort_by("row")
    row = other["row"].cast(pa.int64())
    same = truth.take(row)
    equal = np.ones(other.num_rows, bool)
    for name in truth.column_names[1:]:
        ours, theirs = (pc.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy() for table in (same, other))
        equal &= (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    return int(equal.sum())


def _store(engine: str, folder: Path) -> FeatureStore:
    config = RepoConfig(
        project="benchmark",
        provider="local",
        registry=str(folder / f"{engine}.registry"),
        offline_store={"type": engine},
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        entity_key_serialization_version=3,
    )
    entities = {
        name: Entity(name=name, join_keys=[f"{name}_id"], value_type=ValueType.INT64) for name in ("user", "item")
    }
    views = [
        FeatureView(
            name=view,
            entities=[entities[entity]],
            schema=[
                Field(name=f"{entity}_id", dtype=Int64),
                *(Field(name=name, dtype=dtype) for name, dtype in fields.items()),
            ],
            source=FileSource(
                name=f"{view}_source",
                path=str(folder / f"{view}.parquet"),
                timestamp_field="event_timestamp",
                created_timestamp_column="created_timestamp",
            ),
        )
        for view, (entity, fields) in VIEWS.items()
    ]
    store = FeatureStore(config=config)
    store.apply([*entities.values(), *views])
    return store


def _write(folder: Path, rows: int) -> None:
    """The entity rows and the source of each view; no two source rows have equal stamps by any likelihood."""
    chance = np.random.default_rng(20240501)
    keys = max(rows // ROWS_A_KEY, 1)

    def times(stamps: np.ndarray) -> pa.Array:
        return pa.array(START_US + stamps).cast(pa.timestamp("us", "UTC"))

    entities = {
        "row": pa.array(np.arange(rows)),
        "user_id": chance.integers(0, keys, rows),
        "item_id": chance.integers(0, keys, rows),
        "event_timestamp": times(chance.integers(0, SPAN_US, rows)),
        "click": chance.integers(0, 2, rows),
    }
    pq.write_table(pa.table(entities), folder / "entities.parquet")
    for view, (entity, fields) in VIEWS.items():
        event = chance.integers(0, SPAN_US, rows)
        late = np.where(chance.random(rows) < 0.1, chance.integers(0, SPAN_US // 10, rows), 0)
        offsets = np.concatenate([[0], np.cumsum(chance.integers(0, 41, rows))]).astype(np.int32)
        columns: dict[str, Any] = {f"{entity}_id": chance.integers(0, keys, rows)}
        for name, dtype in fields.items():
            if dtype == Array(Int64):
                columns[name] = pa.ListArray.from_arrays(offsets, chance.integers(0, 10**6, offsets[-1]))
            elif dtype == String:
                columns[name] = pa.array(chance.integers(0, 1000, rows)).cast(pa.string())
            else:
                columns[name] = chance.random(rows) if dtype == Float64 else chance.integers(0, 10**6, rows)
        columns |= {"event_timestamp": times(event), "created_timestamp": times(event + late)}
        pq.write_table(pa.table(columns), folder / f"{view}.parquet")


if __name__ == "__main__":
    for line in compare(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000):
        print(
            f"{line['measure']:<55} {line['ours']:>12,} {line['peer']:>12,} {line['unit']:<5} {line['peer_name']:<36}"
            f" {line['ratio']:>7.3f} {'holds' if line['holds'] else 'FAILS'}"
        )
