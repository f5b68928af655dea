"""Features for a request and for training: our stores beside plain Feast, in one run.

`make bench-features` prints the tables and writes build/bench/features.json; QUICK=1 is a smaller form of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.offline_join import DASK, DUCKDB, MadeUp, OfHome, Question, compare
from benchmarks.online_features import ITEMS, SERVICE, Stores, materialise, push, retrieve, where_time_goes
from benchmarks.table import machine, show, show_columns, write
from feature_repo.store import refresh
from penstock.datasets import simulator
from tests.servers import redis_server


@dataclass(frozen=True)
class Join:
    """A point-in-time join: of how many entity rows, with which peers, of what."""

    rows: int
    peers: Sequence[str]
    lists: bool = True
    made_up: bool = False

    def question(self, folder: Path, home: Path, log: Path) -> Question:
        if self.made_up:
            return MadeUp(folder, self.rows)
        return OfHome(folder, self.rows, home, log, self.lists)


@dataclass(frozen=True)
class Size:
    """How much is measured: requests for stored features, for all of the service, pushes, requests profiled, joins.

    Attributes:
        join_seconds: when a join of a peer is stopped.
    """

    log: simulator.Config
    requests: int
    wholes: int
    pushes: int
    profiled: int
    joins: Sequence[Join]
    join_seconds: float


FULL = Size(
    simulator.Config(),
    requests=1000,
    wholes=100,
    pushes=200,
    profiled=50,
    joins=(
        Join(1_000_000, (DUCKDB, DASK)),
        Join(100_000, (DUCKDB,)),
        Join(10_000, (DUCKDB, DASK), lists=False),
        Join(1_000_000, (DUCKDB, DASK), made_up=True),
    ),
    join_seconds=90,
)
QUICK = Size(
    simulator.Config(users=1000, items=400, items_per_day=20, days=5),
    requests=60,
    wholes=10,
    pushes=20,
    profiled=5,
    joins=(Join(1000, (DUCKDB, DASK)),),
    join_seconds=10,
)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute")
    size = QUICK if parser.parse_args().quick else FULL
    print(machine())
    with tempfile.TemporaryDirectory(prefix="penstock-") as name, redis_server() as redis:
        folder = Path(name)
        home, log, peers = folder / "home", folder / "log", folder / "peers"
        simulator.write_log(size.log, log)
        refresh(home, log, home / "out")
        peers.mkdir()
        stores = Stores(home, log, peers, redis.address)
        online = [*materialise(stores), *push(stores, size.pushes), *retrieve(stores, size.requests, size.wholes)]
        show(f"Online: {SERVICE}, a request of 1 user + {ITEMS} items, one thread; values identical", online)
        for store, columns in where_time_goes(stores, size.profiled).items():
            show_columns(f"Where the time goes: {store}", columns)
        offline = []
        for number, join in enumerate(size.joins):
            offline += compare(join.question(folder / f"join-{number}", home, log), join.peers, size.join_seconds)
        show("Offline: the point-in-time join; what had not arrived is left out", offline)
    print(f"written to {write('features', [*online, *offline])}")


if __name__ == "__main__":
    main()
