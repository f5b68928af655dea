"""What was shown and what users did with it, kept as it arrives and read back in the layout of the log.

A feedback directory holds JSON lines (`penstock.json_lines`), a file a day of arrival, a line a request or a feedback:

    {"sequence", "kind": "impressions", "arrived_ms", "request_id", "user_id", "time_ms", "scenario", "device",
     "release", "variant", "features_us", "degraded": [stage, …], "items": [item id, …]}
    {"sequence", "kind": "outcomes", "arrived_ms", "request_id",
     "events": [{"item_id", "click", …, "watch_time_ms"}, …]}

The sequence is 1, 2, 3, … over all files, in their order, so that whoever follows the directory knows how far he is and
can go back: it is the only buffer there is. `features_us` is the cutoff of the materialisation that the answer was made
of, µs since 1970, null of one without features; `degraded` names the stages that were left out of it. Records of before
there were numbers and cutoffs have neither; their number is their place.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from itertools import islice
from pathlib import Path
from threading import Condition
from typing import Any, Self

import polars as pl

from penstock.events import EVENTS, TIME, USERS, conform, read_table, write_events
from penstock.json_lines import DailyLines, LineReader, day_files

OUTCOMES = tuple(EVENTS.names("label"))
MAX_SLATE = 128
"""Longest slate: event ids are request_id * 128 + position, which fits 63 bits as request ids are below 2**53."""


class FeedbackError(ValueError):
    """A feedback directory that another process writes to; the message says what to do."""


def new_request_id() -> int:
    """A random id below 2**53, which JSON clients keep exactly, and above 2**52, which no counted log reaches."""
    return 2**52 + secrets.randbits(52)


class FeedbackLog:
    """The one writer of a feedback directory; safe for many threads.

    Attributes:
        sequence: the number of the last record.

    Raises:
        FeedbackError: another process writes to it.
        LineError: it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._held = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.sequence = last_sequence(directory)
        except BlockingIOError:
            os.close(self._held)
            raise FeedbackError(f"{directory}: another gateway writes feedback here; stop it first") from None
        except BaseException:
            os.close(self._held)
            raise
        self._lines = DailyLines(directory)
        self._appended = Condition()

    def impressions(
        self,
        request_id: int,
        user_id: int,
        items: Sequence[int],
        *,
        time_ms: int,
        scenario: int,
        device: int,
        release: int,
        variant: str,
        features_us: int | None,
        degraded: Sequence[str] = (),
    ) -> int:
        """Keeps a slate that is about to be answered, `items` in displayed order; the record's number."""
        if len(items) > MAX_SLATE:
            raise FeedbackError(f"a slate holds at most {MAX_SLATE} items, not {len(items)}")
        return self._append(
            "impressions",
            {
                "request_id": request_id,
                "user_id": user_id,
                "time_ms": time_ms,
                "scenario": scenario,
                "device": device,
                "release": release,
                "variant": variant,
                "features_us": features_us,
                "degraded": list(degraded),
                "items": list(items),
            },
        )

    def outcomes(self, request_id: int, events: Sequence[Mapping[str, int]]) -> int:
        """Keeps what the user did with items of a request, item_id and any of `OUTCOMES`; the record's number."""
        return self._append("outcomes", {"request_id": request_id, "events": list(events)})

    def wait(self, after: int, seconds: float) -> bool:
        """Returns when there is a record of a larger number, or the time is over: whether there is one."""
        with self._appended:
            return self._appended.wait_for(lambda: self.sequence > after, seconds)

    def close(self) -> None:
        """Lets another process write."""
        self._lines.close()
        os.close(self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, kind: str, record: Mapping[str, Any]) -> int:
        with self._appended:
            arrived_ms = time.time_ns() // 1_000_000
            number = self.sequence + 1
            self._lines.append({"sequence": number, "kind": kind, "arrived_ms": arrived_ms, **record}, arrived_ms)
            self.sequence = number
            self._appended.notify_all()
            return number


class FeedbackReader:
    """The records of a feedback directory in order, and those that come later.

    Args:
        after: a record's number: the files before the one that holds the next are left out,
        days_before: but for those of so many days before it.
    """

    def __init__(self, directory: Path, after: int = 0, days_before: int = 0) -> None:
        self._directory = directory
        self._last = 0
        self._lines: LineReader | None = None
        files = [
            (path, record.get("sequence", 0))
            for path in day_files(directory)
            for record in islice(LineReader(path).read(), 1)
        ]
        if not files:
            return
        start = max((place for place, (_, number) in enumerate(files) if 0 < number <= after + 1), default=0)
        earliest = (date.fromisoformat(files[start][0].stem) - timedelta(days_before)).isoformat()
        start = next(place for place, (path, _) in enumerate(files) if path.stem >= earliest)
        if files[start][1] == 0:
            start = 0  # records without a number are counted from the first
        self._lines = LineReader(files[start][0])

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that were not read before.

        Raises:
            LineError: a line that is none.
        """
        while True:
            # looked up first: a file that has a later one is complete
            later = [path for path in day_files(self._directory) if self._lines is None or path > self._lines.path]
            for record in self._lines.read() if self._lines else ():
                self._last = record.setdefault("sequence", self._last + 1)
                yield record
            if not later:
                return
            self._lines = LineReader(later[0])


def last_sequence(directory: Path) -> int:
    """The number of the last record; 0 if there is none."""
    return max((record["sequence"] for record in FeedbackReader(directory, after=2**63).read()), default=0)


SEQUENCE_FILE = "feedback.json"
WRITTEN_US = 1_000_000
"""By then what has arrived is written, also where many write at once."""


def append_feedback(log: Path, directory: Path) -> int:
    """Adds the feedback to a log as its part "feedback"; the number of rows.

    Whoever the gateway answered from a cold start gets a row in the users table that says nothing but the id: the
    log's own rule is that every event is of a known user. LOG/feedback.json tells how far the feedback went: the number
    of its last record, and until when everything that arrived is in it.
    """
    until_us = time.time_ns() // 1000 - WRITTEN_US
    records = list(FeedbackReader(directory).read())
    reach = {"sequence": records[-1]["sequence"] if records else 0, "until_us": until_us}
    (log / SEQUENCE_FILE).write_text(json.dumps(reach))
    rows = _rows(records, str(directory))
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


def read_sequence(log: Path) -> int:
    """The number of the last feedback record that a log holds; 0 if it holds none."""
    return _reach(log).get("sequence", 0)


def read_until(log: Path) -> int:
    """Until when everything that arrived at the gateway is in a log, µs since 1970; 0 if it is not said."""
    return _reach(log).get("until_us", 0)


def _reach(log: Path) -> dict[str, int]:
    path = log / SEQUENCE_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def copy_reach(log: Path, other: Path) -> None:
    """Tells of `other`, a log made of `log`, how far the feedback in it goes."""
    if _reach(log):
        (other / SEQUENCE_FILE).write_text(json.dumps(_reach(log)))


def read_feedback(directory: Path) -> pl.DataFrame:
    """Every impression as one row of EVENTS, with what the user did with it, in order of time.

    Outcomes are merged by (request_id, item_id): of several, the largest label and watch time. Those of no impression
    are left out. A row arrived when it was shown, and what the user did so much later as the last of its labels was
    first told after the impression: telling it again changes nothing, and a replay of another time keeps the delays.

    Raises:
        LineError: a line that is no record, but for a torn last one.
    """
    return _rows(FeedbackReader(directory).read(), str(directory))


def _rows(records: Iterable[Mapping[str, Any]], source: str) -> pl.DataFrame:
    impressions: list[Mapping[str, Any]] = []
    outcomes: list[Mapping[str, Any]] = []
    for record in records:
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
            "features_us": pl.Int64,
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
    first_told = [pl.col("outcome_ms").filter(pl.col(name) == 1).min() for name in OUTCOMES if name != "watch_time_ms"]
    done = done.group_by(*ids).agg(
        pl.max_horizontal(first_told).fill_null(pl.col("outcome_ms").max()), *(pl.col(name).max() for name in OUTCOMES)
    )
    event_us = pl.col("time_ms") * 1000
    delay_us = (pl.col("outcome_ms") - pl.col("arrived_ms")).clip(0) * 1000
    rows = shown.join(done, on=list(ids), how="left").with_columns(
        event_id=pl.col("request_id") * MAX_SLATE + pl.col("position"),
        event_time=event_us.cast(TIME),
        created_time=event_us.cast(TIME),
        outcome_time=(event_us + delay_us).cast(TIME),
        # a request of another time than now can be earlier than what is materialised
        features_time=pl.when(pl.col("features_us").is_not_null())
        .then(pl.min_horizontal("features_us", event_us))
        .cast(TIME),
        session_id=pl.lit(None, pl.Int64),
        **{name: pl.col(name).fill_null(0) for name in OUTCOMES},
    )
    return conform(rows.select(*EVENTS.schema), EVENTS, source).sort("event_time", "event_id")
