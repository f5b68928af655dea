"""What the gateway holds in memory of the releases that answer."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from penstock import popular, release
from penstock.look_alike import LookAlikeError, Table, table_path, tower_of
from penstock.popular import Popular
from penstock.routing import Routing
from serving.deadline import Breaker


class ItemVectors:
    """The item vectors of a release: float32 `[items, dim]` by id."""

    def __init__(self, path: Path) -> None:
        rows = pl.read_parquet(path, columns=["item_id", "vector"]).sort("item_id")
        self._ids = rows["item_id"].to_numpy()
        width = len(rows["vector"][0]) if rows.height else 0
        self._vectors = rows["vector"].explode(empty_as_null=False).to_numpy().reshape(rows.height, width)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of some items, zeros of one that there is not: `[len(ids), dim]`."""
        if not len(self._ids):
            return np.zeros((len(ids), 1), np.float32)
        places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        found = self._vectors[places]
        found[self._ids[places] != ids] = 0.0
        return found


class LookAlikeFile:
    """The look-alike table of a release, read again whenever it was replaced.

    Args:
        tower: the query tower of the release: the table of another is refused.
    """

    def __init__(self, home: Path, number: int, tower: str) -> None:
        self._home, self._number, self._tower = home, number, tower
        self._seen: tuple[int, int] | None = None
        self._table: Table | None = None
        self._error: LookAlikeError | None = None
        self._reading = threading.Lock()

    def current(self) -> Table | None:
        """The newest table, or the one before it while another thread reads; None if there is none.

        Raises:
            LookAlikeError: it is of another tower, or damaged.
            OSError: it cannot be read.
        """
        try:
            status = table_path(self._home, self._number).stat()
            seen = (status.st_ino, status.st_mtime_ns)
        except FileNotFoundError:
            return None
        if seen != self._seen and self._reading.acquire(blocking=False):
            try:
                self._table, self._error = Table.read(self._home, self._number, self._tower), None
            except LookAlikeError as error:
                self._table, self._error = None, error
            finally:
                self._seen = seen
                self._reading.release()
        if self._error is not None:
            raise self._error
        return self._table


@dataclass
class Held:
    """One release: its manifest, what is popular (None of a release without it), and its item vectors when asked for.

    Attributes:
        look_alike: its items by those who liked them.
        vectors: None until they are read, which takes a second or two for a million items.
    """

    number: int
    manifest: dict[str, Any]
    popular: Popular | None
    look_alike: LookAlikeFile
    vectors: ItemVectors | None = None
    breakers: dict[str, Breaker] = field(default_factory=lambda: {model: Breaker() for model in release.MODELS})


class Releases:
    """The releases of a home, each read once and let go when the routing document names it no more.

    Args:
        with_vectors: whether item vectors are read, by a thread of their own.
    """

    def __init__(self, home: Path, *, with_vectors: bool) -> None:
        self._home = home
        self._with_vectors = with_vectors
        self._held: dict[int, Held] = {}
        self._routing: Routing | None = None
        self._reading = threading.Lock()

    def follow(self, routing: Routing) -> None:
        """Lets go of what `routing` does not name."""
        if routing is not self._routing:
            with self._reading:
                self._held = {number: held for number, held in self._held.items() if number in routing.releases}
                self._routing = routing

    def get(self, number: int) -> Held:
        """One of them.

        Raises:
            ReleaseError: there is no such release, or its manifest cannot be read.
        """
        held = self._held.get(number)
        if held is None:
            with self._reading:
                held = self._held.get(number)
                if held is None:
                    held = self._held[number] = self._read(number)
        return held

    def _read(self, number: int) -> Held:
        manifest = release.manifest(self._home, number)
        alike = LookAlikeFile(self._home, number, tower_of(manifest))
        held = Held(number, manifest, self._popular(number), alike)
        if self._with_vectors:
            threading.Thread(target=self._read_vectors, args=(held,), name=f"vectors {number}", daemon=True).start()
        return held

    def _popular(self, number: int) -> Popular | None:
        try:
            return Popular.read(release.directory(self._home, number) / popular.FILE)
        except FileNotFoundError:
            return None
        except (OSError, pl.exceptions.PolarsError) as error:
            print(f"gateway: what is popular of release {number} cannot be read: {error}", file=sys.stderr, flush=True)
            return None

    def _read_vectors(self, held: Held) -> None:
        path = release.directory(self._home, held.number) / "items.parquet"
        try:
            held.vectors = ItemVectors(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            print(f"gateway: {path}: no item vectors to diversify by: {error}", file=sys.stderr, flush=True)
