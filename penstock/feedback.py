"""What was shown and what users did with it, kept as it arrives and read back in the layout of the log.

A feedback directory holds one JSON-lines file a day of arrival, one line a request or a feedback:

    {"kind": "impressions", "arrived_ms", "request_id", "user_id", "time_ms", "scenario", "device", "release",
     "variant", "items": [item id, …]}
    {"kind": "outcomes", "arrived_ms", "request_id", "events": [{"item_id", "click", …, "watch_time_ms"}, …]}

A line is written whole and flushed before the request is answered: a killed process loses nothing that was answered.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Self

import polars as pl

from penstock.events import EVENTS, TIME, USERS, conform, read_table, write_events

OUTCOMES = tuple(EVENTS.names("label"))
MAX_SLATE = 128
"""Longest slate: event ids are request_id * 128 + position, which fits 63 bits as request ids are below 2**53."""


class FeedbackError(ValueError):
    """A feedback directory that another process writes to, or that cannot be read; the message says what to do."""


def new_request_id() -> int:
    """A random id below 2**53, which JSON clients keep exactly, and above 2**52, which no counted log reaches."""
    return 2**52 + secrets.randbits(52)


class FeedbackLog:
    """The one writer of a feedback directory.

    Raises:
        FeedbackError: another process writes to it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._write = Lock()
        self._day = ""
        self._file: int | None = None
        self._held = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._held)
            raise FeedbackError(f"{directory}: another gateway writes feedback here; stop it first") from None

    def impressions(
        self,
        request_id: int,
        user_id: int,
        items: Sequence[int],
        *,
        time_ms: int | None,
        scenario: int,
        device: int,
        release: int,
        variant: str,
    ) -> None:
        """Keeps a slate that is about to be answered; `items` in displayed order, `time_ms` None means now."""
        if len(items) > MAX_SLATE:
            raise FeedbackError(f"a slate holds at most {MAX_SLATE} items, not {len(items)}")
        arrived_ms = time.time_ns() // 1_000_000
        self._append(
            {
                "kind": "impressions",
                "arrived_ms": arrived_ms,
                "request_id": request_id,
                "user_id": user_id,
                "time_ms": arrived_ms if time_ms is None else time_ms,
                "scenario": scenario,
                "device": device,
                "release": release,
                "variant": variant,
                "items": list(items),
            }
        )

    def outcomes(self, request_id: int, events: Sequence[Mapping[str, int]]) -> None:
        """Keeps what the user did with items of a request: item_id and any of `OUTCOMES`."""
        arrived_ms = time.time_ns() // 1_000_000
        self._append({"kind": "outcomes", "arrived_ms": arrived_ms, "request_id": request_id, "events": list(events)})

    def close(self) -> None:
        """Lets another process write."""
        with self._write:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            os.close(self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._write:
            day = datetime.fromtimestamp(record["arrived_ms"] / 1000, UTC).date().isoformat()
            if self._file is None or day != self._day:
                if self._file is not None:
                    os.close(self._file)
                self._file = _open_for_append(self.directory / f"{day}.jsonl")
                self._day = day
            start = os.lseek(self._file, 0, os.SEEK_END)
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(
                        f"{self.directory}: only {written} of {len(line)} bytes were written; is the disk full?"
                    )
            except OSError:
                os.ftruncate(self._file, start)  # half a line would spoil the next one
                raise


def _open_for_append(path: Path) -> int:
    """Opens `path` at the end of its last whole line: what a killed process left of a line was never answered."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
    end = os.lseek(descriptor, 0, os.SEEK_END)
    whole = end
    while whole > 0:
        start = max(0, whole - 65536)
        newline = os.pread(descriptor, whole - start, start).rfind(b"\n")
        if newline >= 0:
            whole = start + newline + 1
            break
        whole = start
    if whole < end:
        os.ftruncate(descriptor, whole)
    return descriptor


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of one file; a torn last line is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise FeedbackError(f"{path}, line {number}: not a feedback record; move the file away") from error


def append_feedback(log: Path, directory: Path) -> int:
    """Adds the feedback to a log as its part "feedback"; the number of rows.

    Whoever the gateway answered from a cold start gets a row in the users table that says nothing but the id: the
    log's own rule is that every event is of a known user.
    """
    rows = read_feedback(directory)
    if rows.is_empty():
        return 0
    write_events(rows, log, "feedback")
    users = read_table(log / "users.parquet", USERS)
    new = (
        rows.filter(~pl.col("user_id").is_in(users["user_id"].implode()))
        .group_by("user_id", maintain_order=True)
        .agg(pl.col("event_time", "created_time").min())
        .with_columns(pl.lit(0, pl.Int64).alias(name) for name in USERS.names("attribute") if name != "traits")
        .with_columns(traits=pl.lit([], pl.List(pl.Int64)))
    )
    pl.concat([users, new.select(*USERS.schema)]).write_parquet(log / "users.parquet")
    return rows.height


SEQUENCE_FILE = "feedback.json"


def read_sequence(log: Path) -> int:
    """The number of the last feedback record that a log holds; 0 if it holds none."""
    path = log / SEQUENCE_FILE
    return int(json.loads(path.read_text())["sequence"]) if path.exists() else 0


def read_feedback(directory: Path) -> pl.DataFrame:
    """Every impression as one row of EVENTS, with what the user did with it, in order of time.

    Outcomes are merged by (request_id, item_id): of several, the largest label and watch time. Those of no impression
    are left out. created_time is when the row arrived: event_time plus the delay of its last feedback, so that a
    replay of another time keeps the delays it had.

    Raises:
        FeedbackError: a line that is not a feedback record, but for a torn last one.
    """
    impressions: list[dict[str, Any]] = []
    outcomes: list[dict[str, Any]] = []
    for path in sorted(directory.glob("*.jsonl")):
        for record in _records(path):
            if record.get("kind") == "impressions":
                impressions.append(record)
            elif record.get("kind") == "outcomes":
                known = {"request_id": record["request_id"], "outcome_ms": record["arrived_ms"]}
                outcomes += [known | event for event in record["events"]]
    ids = {"request_id": pl.Int64, "item_id": pl.Int64}
    shown = pl.DataFrame(
        impressions,
        schema={
            "request_id": pl.Int64,
            "user_id": pl.Int64,
            "time_ms": pl.Int64,
            "arrived_ms": pl.Int64,
            "scenario": pl.Int64,
            "device": pl.Int64,
            "release": pl.Int64,
            "variant": pl.String,
            "items": pl.List(pl.Int64),
        },
    )
    shown = (
        shown.unique("request_id", keep="first", maintain_order=True)
        .with_columns(position=pl.int_ranges(pl.col("items").list.len()))
        .explode("items", "position")
        .drop_nulls("items")
        .rename({"items": "item_id"})
    )
    done = pl.DataFrame(outcomes, schema=ids | {"outcome_ms": pl.Int64} | dict.fromkeys(OUTCOMES, pl.Int64))
    done = done.group_by(*ids).agg(pl.all().max())
    rows = shown.join(done, on=list(ids), how="left")
    event_us = pl.col("time_ms") * 1000
    delay_us = (pl.col("outcome_ms").fill_null(pl.col("arrived_ms")) - pl.col("arrived_ms")).clip(0) * 1000
    rows = rows.with_columns(
        event_id=pl.col("request_id") * MAX_SLATE + pl.col("position"),
        event_time=event_us.cast(TIME),
        created_time=(event_us + delay_us).cast(TIME),
        session_id=pl.lit(None, pl.Int64),
        **{name: pl.col(name).fill_null(0) for name in OUTCOMES},
    )
    return conform(rows.select(*EVENTS.schema), EVENTS, str(directory)).sort("event_time", "event_id")
