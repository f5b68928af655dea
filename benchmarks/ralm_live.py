"""How soon look-alike's table follows what users do: on a home of `benchmarks.serving_home`, with gateway and server.

The release is real as far as serving sees it, with weights that are not trained; the look-alike model leaves vectors as
they are. Items have 100 seeds each, drawn among the users. One has 99, which are the users most like one that is asked
for; recall does not find it for him. His answer holds it once the last seed was told, followed, grouped and read.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from benchmarks import serving_home
from benchmarks.kept import ROOT
from feature_repo.online import Online
from penstock import release
from penstock.look_alike import LEAST_SEEDS, Scorer, model_path, tower_of
from penstock.seeds import LIKED, Config, SeedBuffer
from serving import look_alike
from serving.gateway import create_app
from serving.model_client import ModelClient
from serving.model_server import ModelServer
from serving.settings import Settings

CHANGED = (1, 10, 100)
K = 100
LIMIT_SECONDS = 300.0
BUFFER = Config(per_user=100_000)
"""There are fewer users than there would be."""

TASKS = """
import sys
from pathlib import Path
from serving import look_alike
look_alike.follow(Path(sys.argv[1]))
look_alike.refresh(Path(sys.argv[1]), 1, sys.argv[2])
"""
"""What `follow` and `refresh` of the DAG do, in a process that has yet to import it all."""


@dataclass(frozen=True)
class Size:
    """Items of the home, its users, and how many of the items have seeds."""

    home: serving_home.Size
    items: int


FULL = Size(serving_home.Size(30_000, 1_000, "shared_bottom"), 10_000)
QUICK = Size(serving_home.Size(1_000, 200, "shared_bottom"), 110)


@dataclass(frozen=True)
class Measured:
    """Seconds.

    Attributes:
        told: from sending the 100th long view to its answer.
        tasks: of following and refreshing, in a process of their own.
        answered: from there to the answer that holds the item.
        of_fewer: of refreshing a table of a tenth of the items, ten of which changed.
        refreshes: of one of all of them, by how many changed.
    """

    told: float
    tasks: float
    answered: float
    of_fewer: float
    refreshes: Mapping[int, float]


def live(build: Path, size: Size) -> Measured:
    """Measures on the home of a size below `build`, which is made if it is not there."""
    home = serving_home.home(build, size.home)
    for name in ("feedback", "look_alike"):
        shutil.rmtree(home / name, ignore_errors=True)
    _leave_vectors_as_they_are().save(model_path(home, 1), tower_of(release.manifest(home, 1)))
    with _serving(home) as (gateway, address):
        users, vectors = _users(home, address, size.home.users)
        asked, *nearest = users[np.argsort(-_cosines(vectors, vectors[0]), kind="stable")[: LEAST_SEEDS + 1]].tolist()
        recalled = {one["item_id"] for one in _items(gateway, asked)}
        item, *others = [one for one in range(size.home.items) if one not in recalled][: size.items + 1]
        random, numbers = np.random.default_rng(0), count(1)

        def give(items: Sequence[int], seeds: int) -> None:
            given = [(one, user) for one in items for user in random.permutation(users)[:seeds].tolist()]
            _take(home, given, numbers)

        def changes(among: Sequence[int], how_many: int) -> float:
            give(random.choice(among, how_many, replace=False).tolist(), LEAST_SEEDS + 1)
            return _refresh(home, address)

        fewer = size.items // 10
        give(others[:fewer], LEAST_SEEDS)
        _refresh(home, address)
        of_fewer = changes(others[:fewer], 10)
        give(others[fewer:], LEAST_SEEDS)
        _take(home, [(item, user) for user in nearest[1:]], numbers)
        _refresh(home, address)
        refreshes = {changed: changes(others, changed) for changed in CHANGED}
        followed = _followed(home, gateway, address, asked, nearest[0], item)
        return Measured(*followed, of_fewer, refreshes)


@contextmanager
def _serving(home: Path) -> Iterator[tuple[httpx.Client, str]]:
    """A client of the gateway, and the model server's address: both in this process, which has loaded TensorFlow."""
    server = ModelServer(home, 0, 0)
    server.start()
    address = f"127.0.0.1:{server.grpc_port}"
    settings = Settings(home=home, model_server=address, exploration_share=0.5, deadline_seconds=30.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # requests wait from here on
        gateway = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
        thread = threading.Thread(target=gateway.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                yield client, address
        finally:
            gateway.should_exit = True
            thread.join()
            server.stop()


def _leave_vectors_as_they_are() -> Scorer:
    same, nothing = np.eye(serving_home.DIM, dtype=np.float32), np.zeros((serving_home.DIM, 1), np.float32)
    alpha, beta, prior = (np.array(value, np.float32) for value in (0.3, 0.7, 0.0))
    return Scorer(same, nothing[:, 0], nothing, nothing[0], same, alpha, beta, nothing[:, 0], prior)


def _users(home: Path, address: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of whom something is known, and their vectors by the release's query tower."""
    with ModelClient(address, timeout_seconds=30.0) as client:
        vectors = look_alike.Vectors(Online(home), client, 1, release.FEATURE_SERVICES["rank"])
        vectors.of(np.arange(count))  # asks for many at once; what follows is known then
        of = {user: vectors.of(np.array([user])) for user in range(count)}
    known = [user for user, vector in of.items() if len(vector)]
    return np.array(known), np.concatenate([of[user] for user in known])


def _cosines(vectors: np.ndarray, to: np.ndarray) -> np.ndarray:
    return (vectors @ to) / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(to))


def _take(home: Path, pairs: Sequence[tuple[int, int]], numbers: Iterator[int]) -> None:
    """Makes users seeds of items, as the feedback log would."""
    records: list[dict[str, Any]] = []
    for item, user in pairs:
        shown = next(numbers)
        records += [
            {"sequence": shown, "kind": "impressions", "arrived_ms": 0, "request_id": shown, "user_id": user},
            {"sequence": next(numbers), "kind": "outcomes", "request_id": shown, "events": [_liked(item)]},
        ]
    with SeedBuffer(look_alike.buffer_path(home), BUFFER) as buffer:
        buffer.take(records)


def _liked(item: int) -> dict[str, int]:
    return {"item_id": item, "click": 1, LIKED: 1}


def _refresh(home: Path, address: str) -> float:
    began = time.perf_counter()
    look_alike.refresh(home, 1, address, BUFFER)
    return time.perf_counter() - began


def _followed(
    home: Path, gateway: httpx.Client, address: str, asked: int, user: int, item: int
) -> tuple[float, float, float]:
    """The first three of `Measured`: a user's long view makes an item known to another, who is asked for."""

    def answered() -> bool:
        return item in {one["item_id"] for one in _items(gateway, asked)}

    if answered():
        raise RuntimeError(f"item {item} is answered before its {LEAST_SEEDS}th seed")
    shown = gateway.post("/recommend", json={"user_id": user}).raise_for_status().json()["request_id"]
    times = [time.perf_counter()]
    gateway.post("/feedback", json={"request_id": shown, "events": [_liked(item)]}).raise_for_status()
    times.append(time.perf_counter())
    subprocess.run([sys.executable, "-W", "ignore", "-c", TASKS, home, address], cwd=ROOT, check=True)
    times.append(time.perf_counter())
    while not answered():
        if time.perf_counter() - times[0] > LIMIT_SECONDS:
            raise RuntimeError(f"item {item} is not answered {LIMIT_SECONDS:.0f} s after its {LEAST_SEEDS}th seed")
    times.append(time.perf_counter())
    told, tasks, found = np.diff(times).tolist()
    return told, tasks, found


def _items(gateway: httpx.Client, user: int) -> list[dict[str, Any]]:
    body = {"user_id": user, "k": K, "preview": True}
    items: list[dict[str, Any]] = gateway.post("/recommend", json=body).raise_for_status().json()["items"]
    return items
