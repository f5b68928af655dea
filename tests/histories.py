"""Histories of made-up entities, as bad as sources get, and what was known of each at a time, by plain loops.

A history is the source rows of one entity (late, backfilled, out of order, with equal stamps, stamped by a clock that
went back) and the entity rows that ask about it (twice, before everything, at exactly a row's stamps). Among them are
rows of no entity and questions about unknown ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

START = datetime(2024, 5, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SPAN = 20
"""Minutes in which everything happens: few, so that times often meet."""

UNKNOWN = 10**9
TIME = pl.Datetime("us", "UTC")
SOURCE = {"entity_id": pl.Int64(), "event": TIME, "created": TIME, "value": pl.Int64()}
ASKED = {"entity_id": pl.Int64(), "event_timestamp": TIME}

Row = dict[str, Any]


def histories(count: int, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Source rows (SOURCE) and entity rows (ASKED) of `count` entities, all shuffled; `value` is a row's own number."""
    chance = random.Random(seed)
    source: list[Row] = []
    asked: list[Row] = []
    for entity in range(count):
        rows = [_source_row(chance, entity) for _ in range(chance.randint(0, 7))]
        rows += [dict(row) for row in rows if chance.random() < 0.2]
        times = [_asked_time(chance, rows) for _ in range(chance.randint(1, 5))]
        times += [time for time in times if chance.random() < 0.2]
        source += rows
        if chance.random() < 0.02:
            source.append(_source_row(chance, entity) | {"entity_id": None})
        asked += [{"entity_id": entity, "event_timestamp": time} for time in times]
        if chance.random() < 0.1:
            asked.append({"entity_id": chance.choice([UNKNOWN + entity, None]), "event_timestamp": times[0]})
    chance.shuffle(source)
    chance.shuffle(asked)
    for number, row in enumerate(source):
        row["value"] = number
    return pl.DataFrame(source, schema=SOURCE), pl.DataFrame(asked, schema=ASKED)


def _source_row(chance: random.Random, entity: int) -> Row:
    event = START + chance.randint(0, SPAN) * MINUTE
    delay = chance.choice([0, 0, 0, 0, chance.randint(1, 3), chance.randint(1, SPAN), -chance.randint(1, 5)])
    return {"entity_id": entity, "event": event, "created": event + delay * MINUTE}


def _asked_time(chance: random.Random, rows: list[Row]) -> datetime:
    kind = chance.randint(0, 9)
    if kind == 0 or not rows:
        return START - chance.randint(1, SPAN) * MINUTE
    if kind < 6:
        exact: datetime = chance.choice(rows)[chance.choice(["event", "created"])]
        return exact + chance.choice([0, 0, 0, -1, 1]) * timedelta(microseconds=1)
    return START + chance.randint(0, 2 * SPAN) * MINUTE


def known(
    source: Iterable[Row], asked: Iterable[Row], *, created: bool = True, ttl: timedelta | None = None
) -> list[int | None]:
    """The `value` that was in force for each entity row: the oracle."""
    of: dict[int, list[Row]] = {}
    for row in source:
        if row["entity_id"] is not None:
            of.setdefault(row["entity_id"], []).append(row)
    found: list[int | None] = []
    for question in asked:
        time, best = question["event_timestamp"], None
        for row in of.get(question["entity_id"], []):
            if row["event"] > time or (created and row["created"] > time):
                continue
            newer = best is None or row["event"] > best["event"]
            if newer or (row["event"] == best["event"] and (not created or row["created"] >= best["created"])):
                best = row
        if best is not None and ttl and best["event"] < time - ttl:
            best = None
        found.append(best["value"] if best else None)
    return found
