"""Half an hour of requests at 70 % of the throughput: does the memory of gateway and model server stay flat?

`make soak` prints the table, writes build/bench/soak.json and draws docs/images/soak.png; QUICK=1 lasts half a minute.
The throughput is that of a closed loop of 8 clients at the start. A part of the requests is told about by feedback. The
first sixth of the time is left out: caches fill.

Flat is a memory whose slope, by Theil and Sen over the samples, has a 95 % interval that begins at no more than 1 % of
the memory an hour: it does not grow, or not by more than that as far as can be told.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from scipy.stats import theilslopes

from benchmarks import serving_home
from benchmarks.load import ROOT, Measured, Servers, closed_loop, open_loop, serve
from benchmarks.serve import FOLDER
from benchmarks.table import Comparison, machine, show, show_columns, write

PICTURE = ROOT / "docs" / "images" / "soak.png"
SHARE = 0.7
SLOPE = 0.01
"""Growth in an hour that counts as none, as a share of the memory."""


@dataclass(frozen=True)
class Size:
    """How long, in seconds, memory sampled so often."""

    home: serving_home.Size
    seconds: float
    every: float
    warm_seconds: float


FULL = Size(serving_home.FULL, 1800.0, 5.0, 20.0)
QUICK = Size(serving_home.QUICK, 30.0, 0.5, 5.0)


class Sampler(threading.Thread):
    """Reads the private memory of each process, in MB, until it is stopped."""

    def __init__(self, servers: Servers, every: float) -> None:
        super().__init__(daemon=True)
        self._processes = {name: psutil.Process(of.pid) for name, of in servers.processes.items()}
        self._every = every
        self._ended = threading.Event()
        self.seconds: list[float] = []
        self.megabytes: dict[str, list[float]] = {name: [] for name in self._processes}

    def run(self) -> None:
        """Samples."""
        began = time.monotonic()
        while not self._ended.wait(self._every):
            self.seconds.append(time.monotonic() - began)
            for name, process in self._processes.items():
                # what is mapped from files, the tables of features, is the system's to take back
                self.megabytes[name].append(process.memory_full_info().uss / 1e6)

    def stop(self) -> None:
        """Ends it."""
        self._ended.set()
        self.join()


class Telling(threading.Thread):
    """Asks for a slate and tells what was done with it, so often a second, until it is stopped."""

    def __init__(self, port: int, rate: float, users: int) -> None:
        super().__init__(daemon=True)
        self._port, self._rate, self._users = port, rate, users
        self._ended = threading.Event()

    def run(self) -> None:
        """Tells."""
        random = np.random.default_rng(3)
        while not self._ended.wait(float(random.exponential(1 / self._rate))):
            slate = self._post("/recommend", {"user_id": int(random.integers(self._users)), "k": 10})
            item = slate["items"][int(random.integers(len(slate["items"])))]["item_id"]
            event = {"item_id": item, "click": 1, "long_view": 1, "watch_time_ms": 20_000}
            self._post("/feedback", {"request_id": slate["request_id"], "events": [event]})

    def stop(self) -> None:
        """Ends it."""
        self._ended.set()
        self.join()

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self._port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def flat(seconds: list[float], megabytes: list[float]) -> tuple[float, float, float, float]:
    """Mean MB, and the growth an hour in MB with the ends of its 95 % interval, the first sixth left out."""
    start = len(seconds) // 6
    values, times = np.array(megabytes[start:]), np.array(seconds[start:]) / 3600
    slope, _, low, high = theilslopes(values, times, alpha=0.95)
    return float(values.mean()), float(slope), float(low), float(high)


def _draw(sampler: Sampler, title: str) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.8))
    for name, megabytes in sampler.megabytes.items():
        axes.plot(np.array(sampler.seconds) / 60, megabytes, label=name)
    axes.set_xlabel("minutes")
    axes.set_ylabel("private memory, MB")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Measures, prints, draws and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="half a minute, of a smaller home")
    parser.add_argument("--minutes", type=float, help="instead of 30")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    seconds = arguments.minutes * 60 if arguments.minutes else size.seconds
    where = machine()
    print(where)
    home = serving_home.home(FOLDER, size.home)
    with serve(home, FOLDER / "logs") as servers:
        rate = SHARE * closed_loop(servers.port, 8, size.warm_seconds, size.home.users).rate
        print(f"soak: {rate:.0f} requests a second for {seconds / 60:.1f} minutes …", flush=True)
        sampler, telling = Sampler(servers, size.every), Telling(servers.port, rate / 20, size.home.users)
        sampler.start()
        telling.start()
        parts = max(round(seconds / 60), 1)
        loads = []
        for part in range(parts):
            loads.append(open_loop(servers.port, rate * 0.95, seconds / parts, size.home.users, part))
            memory = ", ".join(f"{name} {values[-1]:.0f} MB" for name, values in sampler.megabytes.items())
            print(f"minute {part + 1} of {parts}: p50 {loads[-1].ms(50):.1f} ms, {memory}", flush=True)
        telling.stop()
        sampler.stop()
    rows: list[Comparison] = []
    columns: dict[str, Any] = {"process": [], "mean MB": [], "MB an hour": [], "low": [], "high": []}
    for name, megabytes in sampler.megabytes.items():
        mean, *growth = flat(sampler.seconds, megabytes)
        for column, value in zip(columns.values(), (name, mean, *growth), strict=True):
            column.append(value)
        goal = None if arguments.quick else SLOPE
        measure = f"{name}: growth an hour (low end of 95 %)"
        rows.append(Comparison(measure, growth[1], mean, "its memory", "MB", at_most=goal))
    show_columns(f"Private memory, {seconds / 60:.1f} minutes at {rate:.0f} requests a second", columns)
    whole = Measured()
    for load in loads:
        whole += load
    rows.append(Comparison("p99, last minute", loads[-1].ms(99), loads[0].ms(99), "first minute", "ms"))
    show(f"Soak; {len(whole.seconds):,} requests, {whole.failed} failed, {whole.degraded} degraded", rows)
    if not arguments.quick:
        _draw(sampler, f"{rate:.0f} requests a second, {SHARE:.0%} of the throughput; {where}")
    print(f"written to {write('soak', rows)}")


if __name__ == "__main__":
    main()
