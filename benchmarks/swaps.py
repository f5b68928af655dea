"""Releases swapped under load: what users notice while what answers them is replaced twenty times.

`make bench-swaps` prints the table and writes build/bench/swaps.json; QUICK=1 is a smaller form of it. The home is that
of `make bench-serve`, with two more releases of the same models, so that each promotion loads one anew and unloads one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

from benchmarks import load, serving_home
from benchmarks.load import Measured, open_loop
from benchmarks.serve import FOLDER
from benchmarks.table import Comparison, machine, show, show_columns, write
from penstock import release, routing
from penstock.routing import Routing
from serving import probe, rollout
from serving.model_client import ModelClient

RELEASES = (1, 2, 3)
SEGMENT_SECONDS = 5.0
PAUSE_SECONDS = 2.0
"""Between two swaps: a release is live for a while at least."""


@dataclass(frozen=True)
class Size:
    """How often, in which home, and under how many requests a second."""

    home: serving_home.Size
    swaps: int
    steady_seconds: float
    rate: float


FULL = Size(serving_home.FULL, 20, 60.0, 30.0)
QUICK = Size(serving_home.QUICK, 3, 10.0, 20.0)


@contextmanager
def _releases(home: Path, at: rollout.Servers) -> Iterator[None]:
    """Releases 2 and 3 beside the first, of the same models, and release 1 live; as it was when the block ends."""
    kept = release.directory(home, 1).with_name("1.kept")
    shutil.copytree(release.directory(home, 1), kept, copy_function=os.link)
    with ModelClient(at.model_server, timeout_seconds=60.0) as client:
        known = probe.answers(client, 1)
    first = release.manifest(home, 1)
    for number in RELEASES:
        place = release.directory(home, number)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(kept, place, copy_function=os.link, ignore=shutil.ignore_patterns(release.MANIFEST))
        (place / release.PROBE).write_text(json.dumps(known))
        (place / "weights.json").write_text(json.dumps({"weights": first["weights"]}))
        manifest = first | {"release": number, "parent": 1, "files": release.hashes(place)}
        (place / release.MANIFEST).write_text(json.dumps(manifest))
    try:
        yield
    finally:
        routing.write(home / "routing.json", Routing(champion=1))
        release.unlink_all_but(home, (1,))
        for number in RELEASES:
            shutil.rmtree(release.directory(home, number))
        kept.rename(release.directory(home, 1))


class Swaps:
    """Promotions one after the other; `seconds` is what each took, and the last is a rollback.

    Args:
        process: of one worker, which acts as a person's command or a DAG's task would: not in the clients' process.
    """

    def __init__(self, home: Path, at: rollout.Servers, count: int, process: Executor) -> None:
        self.seconds: list[float] = []
        self.error = ""
        self._home, self._at, self._count, self._process = home, at, count, process
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether there is more to come."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            for number in islice(cycle((2, 3, 1)), self._count):
                self._timed(partial(rollout.promote, self._home, number))
                time.sleep(PAUSE_SECONDS)
            self._timed(partial(rollout.rollback, self._home))
        except rollout.RolloutError as error:
            self.error = str(error)

    def _timed(self, act: Callable[..., Routing]) -> None:
        began = time.perf_counter()
        self._process.submit(act, by="ana", reason="a swap", at=self._at).result()
        self.seconds.append(time.perf_counter() - began)
        print(f"swap {len(self.seconds)} of {self._count + 1}: {self.seconds[-1]:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller home, three swaps")
    size = QUICK if parser.parse_args().quick else FULL
    print(machine())
    home = serving_home.home(FOLDER, size.home)
    with load.serve(home, FOLDER / "logs") as servers, ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(rollout.servers, {}).result()  # it has imported what it needs before anybody asks
        at = rollout.Servers(f"127.0.0.1:{servers.grpc_port}")
        with _releases(home, at):
            open_loop(servers.port, size.rate, SEGMENT_SECONDS, size.home.users)
            steady = open_loop(servers.port, size.rate, size.steady_seconds, size.home.users, seed=1)
            swaps, swapping = Swaps(home, at, size.swaps, process), Measured()
            swaps.start()
            segment = 2
            while swaps.running:
                swapping += open_loop(servers.port, size.rate, SEGMENT_SECONDS, size.home.users, seed=segment)
                segment += 1
    if swaps.error:
        raise SystemExit(f"bench-swaps: {swaps.error}")
    show_columns(
        f"latency at {size.rate:g} requests a second, ms",
        {
            "": ["steady", "while releases are swapped"],
            "requests": [len(steady.seconds), len(swapping.seconds)],
            "failed": [steady.failed, swapping.failed],
            "degraded": [steady.degraded, swapping.degraded],
            "p50": [steady.ms(50), swapping.ms(50)],
            "p99": [steady.ms(99), swapping.ms(99)],
            "worst": [steady.ms(100), swapping.ms(100)],
        },
    )
    rows = [
        Comparison("failed requests", swapping.failed, len(swapping.seconds), "all", "requests", at_most=0.0),
        Comparison("degraded requests", swapping.degraded, len(swapping.seconds), "all", "requests", at_most=0.0),
        Comparison("p99 while swapping", swapping.ms(99), steady.ms(99), "steady", "ms", at_most=2.0),
        Comparison("a promotion, slowest", max(swaps.seconds[:-1]), 5.0, "5 s", "s"),
        Comparison("a rollback", swaps.seconds[-1], 5.0, "5 s", "s", at_most=1.0),
    ]
    show("swaps", rows)
    print(write("swaps", rows))


if __name__ == "__main__":
    main()
