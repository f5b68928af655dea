"""What users do becomes their features at once: the gateway's feedback log, followed into the online store.

The log is the buffer, and its numbers say how far the store is: each user's stored row names the last record that is in
it. So records may be read and pushed any number of times, and none counts twice: at a start, after the store was away,
and after a materialisation, which writes all rows anew as of the last record that its log held. The position needs no
place of its own.

A user's row is read, changed and written under the lock that a materialisation holds while it replaces the rows.
"""

from __future__ import annotations

import fcntl
import sqlite3
import sys
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from feature_repo.configuration import StoreError
from feature_repo.online import Online
from feature_repo.store import locked
from penstock.activity import UNKNOWN_AUTHOR, Action, Activity, kinds_of
from penstock.events import DAY_MS
from penstock.feedback import FeedbackLog, FeedbackReader

OUTCOME_DAYS = 7
"""How long outcomes may come after their impressions; later ones enter with the next materialisation."""

BATCH = 500
"""Records that are pushed together: of each user, the row is read and written once."""

LOOK_SECONDS = 0.2
"""How often a new materialisation is looked for."""

GATHER_SECONDS = 0.05
"""How long records that nobody waits for are gathered: a push takes as long for many as for one."""

LOCKED_SECONDS = 0.02
BACK_OFF_SECONDS = (0.1, 5.0)


@dataclass(frozen=True)
class Step:
    """What one record does to one user's activity.

    Attributes:
        time_ms, scenario: of the slate.
        shown: how many items were shown by it.
        outcomes: (item, kinds told before, kinds told by now).
    """

    sequence: int
    user_id: int
    time_ms: int
    scenario: int
    shown: int = 0
    outcomes: tuple[tuple[int, int, int], ...] = ()


class Slates:
    """The slates of the last `OUTCOME_DAYS`, on the disk: in memory a busy gateway's would take gigabytes.

    They lie in a file of SQLite's own that is gone with the process: the log has all of it.
    """

    def __init__(self) -> None:
        self._slates = sqlite3.connect("", isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE slates (request_id INTEGER PRIMARY KEY, user_id, time_ms, scenario, arrived_ms, items, told)",
            "CREATE INDEX by_arrival ON slates (arrived_ms)",
        ):
            self._slates.execute(statement)

    def close(self) -> None:
        """Removes the file."""
        self._slates.close()

    def step(self, record: Mapping[str, Any]) -> Step | None:
        """What the next record does; None for nothing, or if its slate is not known."""
        return self._shown(record) if record["kind"] == "impressions" else self._told(record)

    def _shown(self, record: Mapping[str, Any]) -> Step | None:
        if not record["items"]:
            return None
        self._slates.execute("DELETE FROM slates WHERE arrived_ms < ?", (record["arrived_ms"] - OUTCOME_DAYS * DAY_MS,))
        items = array("q", record["items"])
        names = ("request_id", "user_id", "time_ms", "scenario", "arrived_ms")
        row = (*(record[name] for name in names), items.tobytes(), bytes(len(items)))
        if not self._slates.execute("INSERT OR IGNORE INTO slates VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount:
            return None
        return Step(record["sequence"], record["user_id"], record["time_ms"], record["scenario"], shown=len(items))

    def _told(self, record: Mapping[str, Any]) -> Step | None:
        asked = (record["request_id"],)
        query = "SELECT user_id, time_ms, scenario, items, told FROM slates WHERE request_id = ?"
        slate = self._slates.execute(query, asked).fetchone()
        if slate is None:
            return None
        user_id, time_ms, scenario, packed, kinds = slate
        items, told = array("q", packed).tolist(), bytearray(kinds)
        places = {item: place for place, item in enumerate(items)}
        outcomes = []
        for event in record["events"]:
            place = places.get(event["item_id"])
            if place is None:
                continue
            before = told[place]
            after = before | kinds_of(event)
            if after != before:
                told[place] = after
                outcomes.append((event["item_id"], before, after))
        if not outcomes:
            return None
        self._slates.execute("UPDATE slates SET told = ? WHERE request_id = ?", (bytes(told), *asked))
        return Step(record["sequence"], user_id, time_ms, scenario, outcomes=tuple(outcomes))


def take(step: Step, activity: Activity, items: Mapping[int, tuple[int, tuple[int, ...]]]) -> None:
    """Brings an activity to a step; `items` has author and tags of those that are known."""
    if step.shown:
        activity.show(step.time_ms, step.scenario, step.shown)
    for item, before, after in step.outcomes:
        author, tags = items.get(item, (UNKNOWN_AUTHOR, ()))
        activity.act(Action(step.time_ms, item, after, author, tags), step.scenario, before)
    activity.sequence = step.sequence


@dataclass(frozen=True)
class Status:
    """How far the online store is behind the feedback.

    Attributes:
        records: the number of the last record.
        waiting: how many of them the online store lacks.
        away_since_ms: since when it does not take them, ms since 1970; None while it does.
        reason: why.
    """

    records: int
    waiting: int
    away_since_ms: int | None = None
    reason: str | None = None


class Pusher:
    """Follows the feedback log in a thread of its own, from `start` to `close`.

    Args:
        online: opens the feature store, or raises whatever it likes.
    """

    def __init__(self, home: Path, log: FeedbackLog, online: Callable[[], Online]) -> None:
        self._home, self._log, self._online = home, log, online
        self._version = 0
        self._after = 0
        self._reader: FeedbackReader
        self._slates: Slates | None = None
        self._steps: list[Step] = []
        self._read = 0
        self._position = 0
        self._moved = threading.Condition()
        self._wanted = 0
        self._late = False
        self._away: Status | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="pusher", daemon=True)

    def start(self) -> None:
        """Begins with what the newest materialisation lacks."""
        self._thread.start()

    def close(self) -> None:
        """Ends after what is under way; what waits stays in the log."""
        self._closing.set()
        self._thread.join()

    def wait(self, sequence: int, seconds: float) -> None:
        """Returns when a record is in the online store or the time is over.

        At once when it was over for another one, or the store is away, and nothing has moved since.
        """
        with self._moved:
            self._wanted = max(self._wanted, sequence)
            self._moved.notify_all()
            if not self._late and not self._moved.wait_for(lambda: self._position >= sequence or self._late, seconds):
                self._late = True

    def status(self) -> Status:
        """How far it is."""
        records, away = self._log.sequence, self._away
        return Status(
            records,
            max(0, records - self._position),
            away.away_since_ms if away else None,
            away.reason if away else None,
        )

    def _follow(self) -> None:
        pause = BACK_OFF_SECONDS[0]
        while not self._closing.is_set():
            try:
                self._step()
            except BlockingIOError:
                self._closing.wait(LOCKED_SECONDS)  # a materialisation replaces the rows
            except Exception as error:  # Feast and its stores raise anything
                if not isinstance(error, StoreError):
                    self._version = 0  # what is wrong with the log may be mended: it is read again
                self._is_away(error)
                self._closing.wait(pause)
                pause = min(2 * pause, BACK_OFF_SECONDS[1])
            else:
                pause = BACK_OFF_SECONDS[0]
                if self._position >= self._log.sequence:
                    self._is_back()
                    if self._log.wait(self._position, LOOK_SECONDS):
                        with self._moved:
                            self._moved.wait_for(lambda: self._wanted > self._position, GATHER_SECONDS)
        if self._slates is not None:
            self._slates.close()

    def _step(self) -> None:
        """Pushes the next records, if there are any."""
        online = self._online()
        materialised = online.materialised()
        if materialised.version != self._version:
            # of a log that was removed since, the numbers mean nothing
            self._after = materialised.sequence if materialised.sequence <= self._log.sequence else 0
            self._reader = FeedbackReader(self._log.directory, self._after, OUTCOME_DAYS)
            if self._slates is not None:
                self._slates.close()
            self._slates = Slates()
            self._steps, self._read = [], 0
            self._version = materialised.version
        assert self._slates is not None
        if not self._steps:
            for record in islice(self._reader.read(), BATCH):
                self._read = record["sequence"]
                step = self._slates.step(record)
                if step is not None and step.sequence > self._after:
                    self._steps.append(step)
        if self._steps:
            with locked(self._home, fcntl.LOCK_SH | fcntl.LOCK_NB):
                if online.materialised().version != self._version:
                    return
                self._push(online)
        self._steps = []
        with self._moved:
            self._position, self._late = max(self._after, self._read), False
            self._moved.notify_all()

    def _push(self, online: Online) -> None:
        activities = online.activity(sorted({step.user_id for step in self._steps}))
        items = online.authors_and_tags(sorted({item for step in self._steps for item, _, _ in step.outcomes}))
        changed = {}
        for step in self._steps:
            activity = activities[step.user_id]
            if activity.sequence > self._log.sequence:
                activity.sequence = 0  # of a log that was removed since
            if activity.sequence < step.sequence:
                take(step, activity, items)
                changed[step.user_id] = activity
        if changed:
            online.push(changed)

    def _is_away(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if self._away is None:
            print(f"gateway: feedback waits in {self._log.directory}: {reason}", file=sys.stderr, flush=True)
            self._away = Status(self._position, 0, time.time_ns() // 1_000_000, reason)
        with self._moved:
            self._late = True
            self._moved.notify_all()

    def _is_back(self) -> None:
        if self._away is not None:
            caught_up = self._position - max(self._away.records, self._after)
            print(f"gateway: the feature store has taken {caught_up} records that waited", file=sys.stderr, flush=True)
            self._away = None
