"""Who liked which item lately: a rolling buffer of seeds for each item, fed by the feedback log.

The buffer is a file of SQLite's own beside the online store. The feedback log is followed from the record that the file
names, and seeds and that number are written in one transaction: a record counts once, whenever a process was killed. A
user is one seed of an item however often he liked it, and of no more than so many items, the last: neither a flood from
one user nor one who likes everything weighs more than that.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from penstock.events import DAY_MS
from penstock.feedback import FeedbackReader, last_sequence

LIKED = "long_view"
"""The outcome that makes a seed: what recall models retrieve."""

OUTCOME_DAYS = 7
"""How long outcomes may come after their impressions."""

BATCH = 5000
"""Records of a transaction."""

_TABLES = """
CREATE TABLE IF NOT EXISTS position (before INTEGER, sequence INTEGER);
CREATE TABLE IF NOT EXISTS slates (request_id INTEGER PRIMARY KEY, user_id INTEGER, arrived_ms INTEGER);
CREATE INDEX IF NOT EXISTS slates_by_arrival ON slates (arrived_ms);
CREATE TABLE IF NOT EXISTS items (
    item_id INTEGER PRIMARY KEY, seen INTEGER, held INTEGER, changed INTEGER
);
CREATE TABLE IF NOT EXISTS seeds (
    item_id INTEGER, user_id INTEGER, sequence INTEGER, PRIMARY KEY (item_id, user_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS seeds_by_age ON seeds (item_id, sequence);
CREATE INDEX IF NOT EXISTS seeds_by_user ON seeds (user_id, sequence);
"""


@dataclass(frozen=True)
class Config:
    """What a buffer keeps.

    Attributes:
        per_item: users at most of an item.
        keep: `latest`, those who liked it last; `reservoir`, a uniform sample of all who ever did (Vitter 1985,
            algorithm R).
        per_user: items at most that a user is a seed of, the last.
    """

    per_item: int = 10_000
    keep: Literal["latest", "reservoir"] = "latest"
    per_user: int = 200


class SeedBuffer:
    """The seeds of a home; one process at a time writes, any number read.

    Raises:
        ValueError: a config that keeps nothing.
    """

    def __init__(self, path: Path, config: Config | None = None) -> None:
        self.config = config or Config()
        if min(self.config.per_item, self.config.per_user) < 1 or self.config.keep not in ("latest", "reservoir"):
            raise ValueError(f"a buffer keeps one seed or more, the latest or a reservoir of them, not {self.config}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = sqlite3.connect(path, isolation_level=None, timeout=60.0)
        self._rows.execute("PRAGMA journal_mode = WAL")
        self._rows.executescript(_TABLES)

    def close(self) -> None:
        """Lets go of the file."""
        self._rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def sequence(self) -> int:
        """The number of the last record that is in it; records of a new log count on from those of the former."""
        return sum(self._position())

    def _position(self) -> tuple[int, int]:
        """The last number of former logs, and the last record of the log that is followed."""
        return self._rows.execute("SELECT before, sequence FROM position").fetchone() or (0, 0)

    def follow(self, directory: Path) -> int:
        """Takes in what a feedback directory has more; the number of the last record that is in it then.

        A log that is shorter than what was read of it is a new one, and is read from its beginning.
        """
        before, after = self._position()
        if after > last_sequence(directory):
            self._rows.execute("UPDATE position SET before = ?, sequence = 0", (before + after,))
            after = 0
        records = (record for record in FeedbackReader(directory, after).read() if record["sequence"] > after)
        while batch := list(islice(records, BATCH)):
            self.take(batch)
        return self.sequence

    def take(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes in records of a feedback log, all or, if that fails, none."""
        rows = self._rows
        rows.execute("BEGIN IMMEDIATE")
        try:
            before, last = self._position()
            for record in records:
                last = record["sequence"]
                if record["kind"] == "impressions":
                    arrived = record["arrived_ms"]
                    rows.execute("DELETE FROM slates WHERE arrived_ms < ?", (arrived - OUTCOME_DAYS * DAY_MS,))
                    slate = (record["request_id"], record["user_id"], arrived)
                    rows.execute("INSERT OR IGNORE INTO slates VALUES (?, ?, ?)", slate)
                    continue
                asked = (record["request_id"],)
                slate = rows.execute("SELECT user_id FROM slates WHERE request_id = ?", asked).fetchone()
                for event in record["events"] if slate else ():
                    if event.get(LIKED):
                        self._add(event["item_id"], slate[0], before + last)
            rows.execute("DELETE FROM position")
            rows.execute("INSERT INTO position VALUES (?, ?)", (before, last))
            rows.execute("COMMIT")
        except BaseException:
            rows.execute("ROLLBACK")
            raise

    def _add(self, item: int, user: int, sequence: int) -> None:
        rows = self._rows
        key = (item, user)
        if rows.execute("SELECT 1 FROM seeds WHERE item_id = ? AND user_id = ?", key).fetchone():
            rows.execute("UPDATE seeds SET sequence = ? WHERE item_id = ? AND user_id = ?", (sequence, *key))
            return
        new = "INSERT INTO items VALUES (?, 1, 0, ?) ON CONFLICT (item_id) DO UPDATE SET seen = seen + 1"
        rows.execute(new, (item, sequence))
        seen, held = rows.execute("SELECT seen, held FROM items WHERE item_id = ?", (item,)).fetchone()
        if held >= self.config.per_item:
            place = 0
            if self.config.keep == "reservoir":
                place = random.Random(f"{item} {seen}").randrange(seen)
                if place >= held:
                    return
            oldest = "SELECT user_id FROM seeds WHERE item_id = ? ORDER BY sequence LIMIT 1 OFFSET ?"
            (gone,) = rows.execute(oldest, (item, place)).fetchone()
            self._remove(item, gone, sequence)
        rows.execute("INSERT INTO seeds VALUES (?, ?, ?)", (*key, sequence))
        rows.execute("UPDATE items SET held = held + 1, changed = ? WHERE item_id = ?", (sequence, item))
        beyond = "SELECT item_id FROM seeds WHERE user_id = ? ORDER BY sequence DESC LIMIT -1 OFFSET ?"
        for (other,) in rows.execute(beyond, (user, self.config.per_user)).fetchall():
            self._remove(other, user, sequence)

    def _remove(self, item: int, user: int, sequence: int) -> None:
        self._rows.execute("DELETE FROM seeds WHERE item_id = ? AND user_id = ?", (item, user))
        self._rows.execute("UPDATE items SET held = held - 1, changed = ? WHERE item_id = ?", (sequence, item))

    def changed(self, after: int) -> list[int]:
        """The items whose seeds are others than at a record, in order of their ids."""
        query = "SELECT item_id FROM items WHERE changed > ? ORDER BY item_id"
        return [item for (item,) in self._rows.execute(query, (after,))]

    def counts(self) -> dict[int, int]:
        """How many seeds each item has."""
        return dict(self._rows.execute("SELECT item_id, held FROM items WHERE held > 0"))

    def users(self, item: int) -> np.ndarray:
        """The seeds of an item, the latest first, int64."""
        query = "SELECT user_id FROM seeds WHERE item_id = ? ORDER BY sequence DESC"
        return np.array([user for (user,) in self._rows.execute(query, (item,))], np.int64)
