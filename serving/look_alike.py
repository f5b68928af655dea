"""The look-alike table kept up to date: feedback → seeds → items of releases that answer, without any training.

An item changes when its seeds do; what did not change is taken over from the table before. An item that the release's
recall model does not know and that has fewer than `LEAST_SEEDS` is known by the seeds of the items most like it by
content too, as many as are lacking. Every table is written whole or not at all: until the next is there, the former one
answers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from feature_repo.online import Online, Request
from penstock import release
from penstock.look_alike import (
    LEAST_SEEDS,
    Content,
    Item,
    LookAlikeError,
    Scorer,
    Table,
    item_of,
    model_path,
    tower_of,
)
from penstock.seeds import Config, SeedBuffer
from serving.model_client import ModelClient
from serving.recommender import PADDING, as_input, is_known

USERS_AT_ONCE = 256
LENDERS = 10
"""So many items at most lend their seeds to one that has too few."""


@dataclass(frozen=True)
class Refreshed:
    """What became of a release's table.

    Attributes:
        items: how many it has.
        changed: how many of them were made anew.
        version: of the table that answers.
    """

    release: int
    items: int
    changed: int
    version: int


def buffer_path(home: Path) -> Path:
    """Where the seeds of a home lie."""
    return home / "look_alike" / "seeds.sqlite"


def trained(home: Path, number: int) -> bool:
    """Whether there is a look-alike model of a release's query tower."""
    try:
        Scorer.read(model_path(home, number), tower_of(release.manifest(home, number)))
    except (OSError, LookAlikeError):
        return False
    return True


def adopt(home: Path, number: int, model: Path) -> None:
    """Makes a trained model that of a release.

    Raises:
        LookAlikeError: it was trained on another tower.
    """
    tower = tower_of(release.manifest(home, number))
    Scorer.read(model, tower).save(model_path(home, number), tower)


def follow(home: Path, config: Config | None = None) -> int:
    """Takes the feedback that came since into the seeds; the number of its last record."""
    with SeedBuffer(buffer_path(home), config) as buffer:
        return buffer.follow(home / "feedback")


def refresh(home: Path, number: int, model_server: str, config: Config | None = None) -> Refreshed:
    """Brings the table of a release up to date with the seeds.

    Raises:
        StoreError: the feature store cannot be read.
        ModelError: the model server does not answer.
        OSError: the release has no look-alike model.
        LookAlikeError: its model is of another tower, or it is of before query towers told users' vectors.
    """
    manifest = release.manifest(home, number)
    tower = tower_of(manifest)
    scorer = Scorer.read(model_path(home, number), tower)
    online = Online(home)
    with SeedBuffer(buffer_path(home), config) as buffer, ModelClient(model_server, timeout_seconds=30.0) as client:
        users = Vectors(online, client, number, str(manifest["feature_services"]["rank"]))
        return _refresh(home, number, tower, scorer, online.catalogue(), buffer, users)


def _refresh(
    home: Path, number: int, tower: str, scorer: Scorer, catalogue: pl.DataFrame, buffer: SeedBuffer, users: Vectors
) -> Refreshed:
    before = _before(home, number, tower, scorer)
    sequence, counts = buffer.sequence, buffer.counts()
    known = pl.read_parquet(release.directory(home, number) / "items.parquet", columns=["item_id"])["item_id"]
    there = set(catalogue["item_id"].to_list())
    new = there - set(known.to_list())
    enough = {item for item, count in counts.items() if count >= LEAST_SEEDS} & there
    wanted = enough | new
    items = {item: of for item, of in (before.items() if before else {}).items() if item in wanted}
    taken_over = len(items)
    changed = set(buffer.changed(before.sequence if before else 0))
    stale = sorted(item for item in wanted if item in changed or item not in items)
    lenders = Lenders(buffer, catalogue, np.array(sorted(enough), np.int64))
    for item in stale:
        items.pop(item, None)
        found = _made(item, buffer, users, lenders if item in new else None, scorer)
        if found is not None:
            items[item] = found
    made = len([item for item in stale if item in items])
    if before is not None and not made and taken_over == len(items) == len(before.ids):
        return Refreshed(number, len(items), 0, before.version)
    table = Table.of(number, tower, before.version + 1 if before else 1, sequence, scorer, items)
    table.publish(home)
    return Refreshed(number, len(items), made, table.version)


def _before(home: Path, number: int, tower: str, scorer: Scorer) -> Table | None:
    """The table that answers; None if there is none that could be gone on from."""
    try:
        found = Table.read(home, number, tower)
    except FileNotFoundError:
        return None
    except LookAlikeError as error:
        print(f"look-alike: {error}; it is made anew", file=sys.stderr, flush=True)
        return None
    return found if found.scorer.digest == scorer.digest else None


def _made(item: int, buffer: SeedBuffer, users: Vectors, lenders: Lenders | None, scorer: Scorer) -> Item | None:
    """An item by its seeds, with others' where they are few and it may borrow; None if there are too few of them."""
    own = buffer.users(item)
    vectors = users.of(own)
    count = len(vectors)
    if count < LEAST_SEEDS:
        if lenders is None:
            return None
        vectors = users.of(np.concatenate([own, lenders.to(item, own, LEAST_SEEDS - count)]))
    return item_of(vectors, count, scorer) if len(vectors) else None


class Lenders:
    """The items that have seeds enough, for those that have not.

    Args:
        items: their ids.
    """

    def __init__(self, buffer: SeedBuffer, catalogue: pl.DataFrame, items: np.ndarray) -> None:
        self._buffer, self._catalogue, self._items = buffer, catalogue, items

    @cached_property
    def _content(self) -> Content:
        """It takes seconds for a large catalogue, and is not always asked."""
        return Content.of(self._catalogue)

    def to(self, item: int, own: np.ndarray, lacking: int) -> np.ndarray:
        """So many seeds, or as many as there are, of the items most like one, the latest and none of its own."""
        taken = own
        # the most alike lend first, none of them more than half of what is lacking, so that none decides alone
        for lender in self._content.like(item, self._items)[:LENDERS].tolist() if len(self._items) else ():
            of = self._buffer.users(lender)
            left = lacking - (len(taken) - len(own))
            taken = np.concatenate([taken, of[~np.isin(of, taken)][: min(-(-lacking // 2), left)]])
        return taken[len(own) :]


class Vectors:
    """The vectors of users by a release's query tower, as their features are now; each is asked for once."""

    def __init__(self, online: Online, client: ModelClient, number: int, service: str) -> None:
        self._online, self._client, self._number, self._service = online, client, number, service
        self._known: dict[int, np.ndarray | None] = {}

    def of(self, users: np.ndarray) -> np.ndarray:
        """The vectors of some users without those of whom nothing is known, float32 `[known, dim]`."""
        asked = [user for user in users.tolist() if user not in self._known]
        for start in range(0, len(asked), USERS_AT_ONCE):
            self._ask(asked[start : start + USERS_AT_ONCE])
        found = [vector for vector in map(self._known.get, users.tolist()) if vector is not None]
        return np.array(found, np.float32)

    def _ask(self, users: Iterable[int]) -> None:
        request = Request(time.time_ns() // 1_000_000, 0, 0)
        rows: list[Mapping[str, np.ndarray]] = []
        signature = self._client.signature("recall", self._number)
        asked = []
        for user in users:
            columns = self._online.user(user, self._service, request)
            self._known[user] = None
            if is_known(columns):
                given = {**columns, "user_id": np.array([user]), **request.columns()}
                given |= {"exclude": np.array([[PADDING]]), "k": np.array(1, np.int32)}
                rows.append({name: as_input(given[name], spec, 1) for name, spec in signature.inputs.items()})
                asked.append(user)
        if not asked:
            return
        found = self._client.predict("recall", self._number, _stacked(rows))
        if "query" not in found:
            raise LookAlikeError(f"release {self._number} does not tell the vectors of users: release a candidate anew")
        finite = np.isfinite(found["query"]).all(axis=1)
        self._known |= dict(zip(np.array(asked)[finite].tolist(), found["query"][finite], strict=True))


def _stacked(rows: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Inputs of one row each as inputs of all; shorter lists are padded behind."""
    stacked = {}
    for name, first in rows[0].items():
        parts = [row[name] for row in rows]
        if first.ndim == 2:
            width = max(part.shape[1] for part in parts)
            parts = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=PADDING) for part in parts]
        stacked[name] = first if first.ndim == 0 else np.concatenate(parts)
    return stacked
