"""What requests were served, and what a probe is, against what the offline store gives for the same entity and time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from feature_repo.online import Online, Request
from feature_repo.store import EPOCH, apply, historical, write_tables
from penstock import release as releases
from penstock.events import ITEMS, USERS, event_files, read_table
from penstock.features import Column, Ragged, feature_tables, log_end
from penstock.feedback import FeedbackReader, read_feedback, read_sequence
from penstock.replay import (
    ITEM,
    REQUEST,
    Replay,
    Vectors,
    behind,
    compare,
    features_of,
    log_of_now,
    of_items,
    replayable,
)
from penstock.served import FEATURES, read_served

PROBED_USERS = 200
ITEMS_OF_EACH = 5
SETTLED_MS = 10_000
"""A probe leaves out users of whom something arrived so lately: it may still be on its way online."""

JOINED_AT_ONCE = 20_000
"""(request, item) pairs that are joined together: some 100 MB of what on-demand features read."""


def replay(home: Path, log: Path, release: int, scratch: Path, *, newest: int, goal: float) -> Replay:
    """Replays logged requests and a probe for a release.

    Args:
        log: the validated log that the release was trained on.
        scratch: an empty directory: feature tables are made here of that log and the feedback since.
        newest: how many of the last logged requests are replayed, at most.
        goal: the share of equal vectors that is asked for.

    Raises:
        StoreError: the feature store cannot answer.
        LogError, LineError: the log, the feedback or the served vectors cannot be read.
        ReleaseError: there is no such release.
    """
    service = releases.manifest(home, release)["feature_services"]["rank"]
    features = features_of(service)
    logged, of_others = served_vectors(home, service, newest)
    began_ms = time.time_ns() // 1_000_000
    now = log_of_now(log, home / "feedback", scratch / "log")
    tables = feature_tables(now)
    after_ms = tables["user_activity"].select(pl.col("event_timestamp").dt.epoch("ms").max()).item() or 0
    probe = probed_vectors(home, log, service, after_ms=after_ms, since_ms=began_ms, seed=release)
    with _files_as_stores():
        write_tables(scratch, tables)
        apply(scratch)
        kept, left_out = replayable(logged.requests, log, now)
        served = logged.of(kept)
        offline = offline_vectors(scratch, served, service)
        fresh = offline_vectors(scratch, served, service, fresh=True)
        if isinstance(probe, Vectors):
            settled, _ = replayable(probe.requests, log, now)
            probe = probe.of(settled)
            probed = compare(probe, offline_vectors(scratch, probe, service), features)
    return Replay(
        release=release,
        service=service,
        log=str(log),
        log_end=(EPOCH + timedelta(microseconds=log_end(log))).isoformat(),
        goal=goal,
        served=compare(served, offline, features),
        left_out=left_out | ({"ranked by the features of another service": of_others} if of_others else {}),
        behind=behind(served, offline, tables["user_activity"]),
        probe=probed if isinstance(probe, Vectors) else None,
        no_probe="" if isinstance(probe, Vectors) else probe,
        stale=compare(fresh, offline, features),
    )


def served_vectors(home: Path, service: str, newest: int) -> tuple[Vectors, int]:
    """The vectors of the last `newest` logged requests, and how many of them another service's features are."""
    requests, items = read_served(home / "feedback" / "served", newest)
    kept = requests.filter(pl.col("service") == service)
    shared, own = _sides(service)
    vectors = Vectors(_with(kept, shared).select(*REQUEST, *shared), _with(items, own).select(*ITEM, *own))
    return vectors.of(pl.repeat(True, kept.height, dtype=pl.Boolean(), eager=True)), requests.height - kept.height


def _with(frame: pl.DataFrame, features: Sequence[str]) -> pl.DataFrame:
    """`frame` with nulls for those of the features that nothing in it was given."""
    missing = [name for name in features if name not in frame.columns]
    return frame.with_columns(pl.lit(None, FEATURES[name]).alias(name) for name in missing)


def _sides(service: str) -> tuple[list[str], list[str]]:
    """The features of a service that the items of a request share, and those of each item."""
    own = of_items(service)
    return [name for name in features_of(service) if name not in own], [
        name for name in features_of(service) if name in own
    ]


def offline_vectors(home: Path, asked: Vectors, service: str, *, fresh: bool = False) -> Vectors:
    """The offline vectors of the requests and items in `asked`, as their answers could know them.

    Args:
        fresh: materialised features at the request's own time and not at the snapshot the answer was made of.
    """
    keys = asked.requests.select(*REQUEST)
    pairs = asked.items.select(*ITEM).join(keys, on="request_id", how="left", maintain_order="left")

    def joined(rows: pl.DataFrame, wanted: list[str]) -> pl.DataFrame:
        found = historical(home, rows.drop("features_time") if fresh else rows, service)
        return found.select(wanted)

    shared, own = _sides(service)
    requests = joined(keys.with_columns(item_id=pl.lit(0, pl.Int64)), shared)  # whatever the item
    parts = [joined(part, own) for part in pairs.iter_slices(JOINED_AT_ONCE)] or [asked.items.select(own)]
    return Vectors(
        pl.concat([keys, requests], how="horizontal"),
        pl.concat([asked.items.select(*ITEM), pl.concat(parts)], how="horizontal"),
    )


def probed_vectors(home: Path, log: Path, service: str, *, after_ms: int, since_ms: int, seed: int) -> Vectors | str:
    """What the gateway would answer some users by, or why that says nothing.

    Half of the users are of the feedback, as far as there are any, the others of the log.

    Args:
        after_ms: when the last thing became visible that is held against it: the time of the request is just after.
        since_ms: when that was read: users of whom more came since, or was just on its way, are left out.

    Raises:
        StoreError: the online store cannot answer.
    """
    online = Online(home)
    materialised = online.materialised()
    if (materialised.cutoff_us, materialised.sequence) != (log_end(log), read_sequence(log)):
        return "the store has been filled from another log since"
    time_ms = max(materialised.cutoff_us // 1000, after_ms) + 1
    rng = np.random.default_rng(seed)

    def drawn(ids: pl.Series, count: int) -> list[int]:
        return [int(one) for one in rng.permutation(ids.unique().sort().to_numpy())[:count]]

    met = drawn(read_feedback(home / "feedback")["user_id"], PROBED_USERS // 2)
    others = read_table(log / "users.parquet", USERS)["user_id"]
    users = met + drawn(others.filter(~others.is_in(met)), PROBED_USERS - len(met))
    items = drawn(read_table(log / "items.parquet", ITEMS)["item_id"], PROBED_USERS * ITEMS_OF_EACH)
    scenarios = _scenarios(log)
    of_each = np.array_split(items, len(users))
    requests = [Request(time_ms, scenarios[number % len(scenarios)], 0) for number in range(len(users))]
    read = [online.user(user, service, request) for user, request in zip(users, requests, strict=True)]
    of_items = [
        online.items(ids, service, user, request) for ids, user, request in zip(of_each, read, requests, strict=True)
    ]
    if online.materialised() != materialised:
        return "the store has been filled from another log meanwhile"
    shared, own = _sides(service)
    keys = pl.DataFrame(
        {
            "request_id": range(len(users)),
            "user_id": users,
            "scenario": [request.scenario for request in requests],
            "event_time": [EPOCH + timedelta(milliseconds=time_ms)] * len(users),
            "features_time": [EPOCH + timedelta(microseconds=materialised.cutoff_us)] * len(users),
        },
        schema=REQUEST,
    )
    pairs = pl.DataFrame(
        {"request_id": np.repeat(np.arange(len(users)), [len(ids) for ids in of_each]), "item_id": items}, schema=ITEM
    )
    vectors = Vectors(keys.with_columns(_series(read, shared)), pairs.with_columns(_series(of_items, own)))
    return vectors.of(~keys["user_id"].is_in(_met_since(home / "feedback", since_ms - SETTLED_MS)))


def _series(parts: Sequence[Mapping[str, Column]], names: Sequence[str]) -> list[pl.Series]:
    """Features of several reads, one below the other."""

    def values(column: Column) -> list[Any]:
        return [row.tolist() for row in column.lists()] if isinstance(column, Ragged) else column.tolist()

    return [pl.Series(name, [one for part in parts for one in values(part[name])], FEATURES[name]) for name in names]


def _scenarios(log: Path) -> list[int]:
    found = pl.concat(pl.read_parquet(path, columns=["scenario"]).unique() for path in event_files(log))
    return [int(scenario) for scenario in found["scenario"].unique().sort()]


def _met_since(feedback: Path, arrived_ms: int) -> list[int]:
    """The users of whom a record arrived since."""
    users: dict[int, int] = {}
    met = set()
    for record in FeedbackReader(feedback).read():
        if record["kind"] == "impressions":
            users[record["request_id"]] = record["user_id"]
        if record["arrived_ms"] >= arrived_ms and record["request_id"] in users:
            met.add(users[record["request_id"]])
    return sorted(met)


@contextmanager
def _files_as_stores() -> Iterator[None]:
    """The stores of a scratch home are files, whatever the environment names: a server has one home only."""
    name = "PENSTOCK_FEATURE_STORE"
    said = os.environ.pop(name, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[name] = said
