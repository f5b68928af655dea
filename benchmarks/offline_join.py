"""Our point-in-time join beside the joins that Feast brings, on the same files.

Every engine runs in a process of its own and is told to leave out what had not arrived, so that all are asked for the
same: the features of a home at times of its log, or made-up views with as many source rows as there are entity rows.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, FeastType, Float64, Int64, String

from benchmarks.plain_feast import plain_feast
from benchmarks.table import Comparison
from penstock.events import read_events
from penstock.features import VIEWS

OURS = "feature_repo.offline_store.PointInTimeOfflineStore"
DUCKDB, DASK = "Feast, DuckDB", "Feast, default (dask)"
ENGINES = {DUCKDB: "duckdb", DASK: "file"}
MADE_UP: dict[str, tuple[str, dict[str, FeastType]]] = {
    "user_lists": ("user", {"items": Array(Int64), "kinds": Array(Int64), "length": Int64}),
    "user_numbers": ("user", {f"user_number_{n}": Float64 for n in range(6)}),
    "item_numbers": ("item", {f"item_number_{n}": Float64 for n in range(6)}),
    "item_words": ("item", {"word": String, "count": Int64}),
}
ROWS_A_KEY = 10
START_US = int(datetime(2024, 5, 1, tzinfo=UTC).timestamp()) * 1_000_000
SPAN_US = 30 * 24 * 3600 * 1_000_000
SEED = 20240501
MEMORY_LIMIT = 12 << 30
"""Bytes at which an engine is stopped."""


@dataclass(frozen=True)
class Question(ABC):
    """What is joined: some features to the rows of FOLDER/entities.parquet, which are numbered in the column `row`.

    Attributes:
        rows: how many entity rows.
    """

    folder: Path
    rows: int

    @property
    @abstractmethod
    def shape(self) -> str:
        """In words."""

    @property
    @abstractmethod
    def features(self) -> Mapping[str, Sequence[str]]:
        """View → features of it; one of the last view's shows that an engine works."""

    @property
    @abstractmethod
    def compared(self) -> Sequence[str]:
        """The features whose values are compared: one of each view at least."""

    @abstractmethod
    def write(self) -> None:
        """Writes the entity rows, and what else is asked for."""

    @abstractmethod
    def store(self, engine: str) -> FeatureStore:
        """A store that joins with an engine."""


@dataclass(frozen=True)
class OfHome(Question):
    """A home's features for rows of its log, each at any time of it.

    Attributes:
        lists: whether features that are lists are among them; Feast's default engine takes minutes for a few rows then.
    """

    home: Path
    log: Path
    lists: bool = True

    @property
    def shape(self) -> str:
        return f"{self.rows:,} rows × {len(VIEWS)} views" + ("" if self.lists else " without lists")

    @property
    def features(self) -> dict[str, list[str]]:
        return {
            view.name: [f.name for f in view.features if self.lists or not isinstance(f.dtype, pl.List)]
            for view in VIEWS
        }

    @property
    def compared(self) -> list[str]:
        wanted = ["feedback_sequence", "upload_time_ms", "item_impressions_7d", "scenario_impressions_7d"]
        return [
            *wanted,
            self.features["user_profile"][0],
            *(["history_items", "hour_impressions"] if self.lists else []),
        ]

    def write(self) -> None:
        chance = np.random.default_rng(SEED)
        events = read_events(self.log)
        first, last = (int(us) for us in events.select(pl.col("event_time").dt.epoch("us")).to_series().sort()[[0, -1]])
        keys = events[chance.integers(0, events.height, self.rows)].select("user_id", "item_id", "scenario")
        times = pl.Series("event_timestamp", chance.integers(first, last, self.rows)).cast(pl.Datetime("us", "UTC"))
        keys.with_columns(times).with_row_index("row").write_parquet(self.folder / "entities.parquet")

    def store(self, engine: str) -> FeatureStore:
        online = {"type": "sqlite", "path": str(self.folder / "online.db")}
        return plain_feast(self.home, self.folder, offline={"type": engine}, online=online)


@dataclass(frozen=True)
class MadeUp(Question):
    """Four views of as many source rows, ten a key, a tenth of them late; two features are lists of mean length 20."""

    @property
    def shape(self) -> str:
        return f"{self.rows:,} rows × {len(MADE_UP)} made-up views"

    @property
    def features(self) -> dict[str, list[str]]:
        return {view: list(fields) for view, (_, fields) in MADE_UP.items()}

    @property
    def compared(self) -> list[str]:
        return ["length", "user_number_0", "item_number_0", "count"]

    def write(self) -> None:
        # no two source rows have equal stamps by any likelihood
        chance, rows = np.random.default_rng(SEED), self.rows
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
        pq.write_table(pa.table(entities), self.folder / "entities.parquet")
        for view, (entity, fields) in MADE_UP.items():
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
            pq.write_table(pa.table(columns), self.folder / f"{view}.parquet")

    def store(self, engine: str) -> FeatureStore:
        config = RepoConfig(
            project="benchmark",
            provider="local",
            registry=str(self.folder / f"{engine}.registry"),
            offline_store={"type": engine},
            online_store={"type": "sqlite", "path": str(self.folder / "online.db")},
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
                    path=str(self.folder / f"{view}.parquet"),
                    timestamp_field="event_timestamp",
                    created_timestamp_column="created_timestamp",
                ),
            )
            for view, (entity, fields) in MADE_UP.items()
        ]
        store = FeatureStore(config=config)
        store.apply([*entities.values(), *views])
        return store


@dataclass(frozen=True)
class Run:
    """A join by one engine: seconds, those of the processors, the MiB its process held at most; why it was stopped."""

    seconds: float
    processor: float
    memory: float
    stopped: str = ""


def compare(question: Question, peers: Sequence[str], seconds_limit: float) -> list[Comparison]:
    """Seconds, memory and right rows of our join and of each peer, which is stopped at a limit.

    Of one that was stopped there are the seconds until then: its join takes longer, and the ratio is less.
    """
    question.folder.mkdir(parents=True, exist_ok=True)
    question.write()
    ours = _alone(question, OURS, float("inf"))
    if ours.stopped:
        raise RuntimeError(f"our join was stopped {ours.stopped}")
    truth = pl.read_parquet(_result(question, OURS))
    found = []
    for name in peers:
        peer = _alone(question, ENGINES[name], seconds_limit)
        if peer.stopped:
            name = f"{name}, stopped {peer.stopped}"
            found.append(Comparison(f"join, {question.shape}", ours.seconds, peer.seconds, name, "s", at_most=1))
            continue
        right = equal_rows(truth, pl.read_parquet(_result(question, ENGINES[name])))
        found += [
            Comparison(f"join, {question.shape}", ours.seconds, peer.seconds, name, "s", at_most=1),
            Comparison(" … time of the processors", ours.processor, peer.processor, name, "s", at_most=1),
            Comparison(" … most memory of its process", ours.memory, peer.memory, name, "MiB", at_most=1),
            Comparison(" … rows given back right", truth.height, right, name, "rows", at_least=1),
        ]
    return found


def _alone(question: Question, engine: str, seconds_limit: float) -> Run:
    """The join in a fresh process, which is stopped at the limits."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_join, args=(question, engine, sender))
    process.start()
    sender.close()
    begun, stopped = float("inf"), ""
    while process.is_alive():
        process.join(0.2)
        if begun == float("inf") and receiver.poll():
            receiver.recv()  # what it needs is imported
            begun = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(process.pid).memory_info().rss > MEMORY_LIMIT:
                stopped = f"at {MEMORY_LIMIT >> 30} GiB"
            elif time.monotonic() - begun > seconds_limit:
                stopped = f"after {seconds_limit:.0f} s"
            if stopped:
                process.kill()
                process.join()
    if stopped:
        return Run(max(time.monotonic() - begun, 0), 0, 0, stopped)
    if process.exitcode:
        raise RuntimeError(f"the join by {engine} ended with exit status {process.exitcode}: see its words above")
    while not isinstance(found := receiver.recv(), Run):
        pass
    return found


def _join(question: Question, engine: str, sender: Connection) -> None:
    """Joins, times it, and leaves the values that are compared in a file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DuckDB's progress bar
    warnings.simplefilter("ignore")
    store = question.store(engine)
    rows = pq.read_table(question.folder / "entities.parquet").to_pandas()
    features = [f"{view}:{name}" for view, names in question.features.items() for name in names]
    store.get_historical_features(rows[:10], features[-1:], filter_by_created_timestamp=True).to_arrow()
    sender.send("begun")
    begun, processor = time.perf_counter(), time.process_time()
    table = store.get_historical_features(rows, features, filter_by_created_timestamp=True).to_arrow()
    seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    peak = _peak()
    pq.write_table(table.select(["row", *question.compared]), _result(question, engine))
    sender.send(Run(seconds, processor, peak))


def _peak() -> float:
    """MiB that this process has held at most; ru_maxrss would count what its parent held when it was started."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def _result(question: Question, engine: str) -> Path:
    return question.folder / f"{engine}.parquet"


def equal_rows(truth: pl.DataFrame, other: pl.DataFrame) -> int:
    """How many of the rows are in both tables with the same values, null like null."""
    same = truth[other["row"].cast(pl.Int64)]
    equal = pl.repeat(True, other.height, eager=True)
    for name in truth.columns[1:]:
        theirs = other[name].fill_nan(None) if other[name].dtype.is_float() else other[name]
        equal &= theirs.eq_missing(same[name].cast(theirs.dtype))
    return int(equal.sum())
