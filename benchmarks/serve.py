"""Recommendations under load: the gateway beside the two raw calls of its models in process, in one run.

`make bench-serve` prints the tables, writes build/bench/serve.json and draws docs/images/serving.png; QUICK=1 is a
smaller form of it. The home is made once (`benchmarks.serving_home`). Gateway and model server are processes of their
own, and so are the raw calls: both signatures of the release, loaded and called with the features of the same users, as
a program would that had them in hand. Gateway and raw calls take turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import serving_home
from benchmarks.load import ROOT, Measured, Servers, closed_loop, open_loop, serve
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from penstock import release

FOLDER = BUILD.parent / "serve"
PICTURE = ROOT / "docs" / "images" / "serving.png"
CANDIDATES = 200
RAW = "raw calls"
P50_GOAL, P99_GOAL = 2.0, 3.0


@dataclass(frozen=True)
class Size:
    """How much is measured: rounds of gateway and raw calls in turn, of so many seconds each, and seconds of a load."""

    home: serving_home.Size
    rounds: int
    seconds: float
    load_seconds: float
    warm_seconds: float


FULL = Size(serving_home.FULL, 10, 6.0, 20.0, 10.0)
QUICK = Size(serving_home.QUICK, 2, 1.5, 1.0, 1.0)


def _raw_calls(home: Path, users: int, connection: Connection) -> None:
    """Answers seconds to measure for with the seconds of each call, recall and rank; None ends it."""
    import tensorflow as tf

    from feature_repo.online import Online, Request
    from serving.model_client import Input
    from serving.recommender import as_input

    loaded = {model: tf.saved_model.load(str(release.directory(home, 1) / model)) for model in release.MODELS}
    calls = {model: module.signatures["serving_default"] for model, module in loaded.items()}
    wanted = {
        model: {
            name: Input(np.dtype(spec.dtype.as_numpy_dtype), spec.shape.rank)
            for name, spec in call.structured_input_signature[1].items()
        }
        for model, call in calls.items()
    }
    online, random = Online(home), np.random.default_rng(2)
    connection.send("ready")
    while (seconds := connection.recv()) is not None:
        took: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            request = Request(time.time_ns() // 1_000_000, int(random.integers(3)), 0)
            user_id = int(random.integers(users))
            user = online.user(user_id, "rank_v3", request)
            columns = {**user, "user_id": np.array([user_id]), **request.columns()}
            asked = {**columns, "k": np.array(CANDIDATES, np.int32), "exclude": user["history_items"]}
            inputs = {name: tf.constant(as_input(asked[name], spec, 1)) for name, spec in wanted["recall"].items()}
            began = time.perf_counter()
            ids = calls["recall"](**inputs)["ids"].numpy()[0]
            recalled = time.perf_counter() - began
            columns |= {**online.items(ids, "rank_v3", user, request), "item_id": ids}
            rows = len(ids)
            inputs = {name: tf.constant(as_input(columns[name], spec, rows)) for name, spec in wanted["rank"].items()}
            began = time.perf_counter()
            for output in calls["rank"](**inputs).values():
                output.numpy()
            took.append((recalled, time.perf_counter() - began))
        connection.send(took)


class Raw:
    """The raw calls in a process of their own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def measure(self, seconds: float) -> list[tuple[float, float]]:
        """Seconds of recall and of rank for each of the calls made."""
        self._connection.send(seconds)
        found: list[tuple[float, float]] = self._connection.recv()
        return found


@contextmanager
def raw_calls(home: Path, users: int) -> Iterator[Raw]:
    """The process until the block ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_raw_calls, args=(home, users, theirs))
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield Raw(ours)
        ours.send(None)
    finally:
        ours.close()
        process.join(30)


def _stages(before: Mapping[str, float], after: Mapping[str, float], client: Measured) -> dict[str, float]:
    """Mean milliseconds of a request by stage: what the gateway timed, what of it is in no stage, and the way there."""

    def mean(name: str, labels: str) -> float:
        count = after.get(f"{name}_count{labels}", 0.0) - before.get(f"{name}_count{labels}", 0.0)
        total = after.get(f"{name}_sum{labels}", 0.0) - before.get(f"{name}_sum{labels}", 0.0)
        return 1e3 * total / count if count else 0.0

    stages = {
        stage: mean("penstock_stage_seconds", f'{{stage="{stage}"}}')
        for stage in ("features", "recall", "items", "rank", "fuse", "diversity", "log")
    }
    whole = mean("penstock_request_seconds", '{route="/recommend",status="200",variant="champion"}')
    stages["HTTP, JSON, threads"] = whole - sum(stages.values())
    stages["client and socket"] = 1e3 * float(np.mean(client.seconds)) - whole
    return stages


def _in_turn(servers: Servers, raw: Raw, size: Size) -> tuple[Measured, np.ndarray, dict[str, float], list[float]]:
    """One client, the raw calls `[calls, 2]`, mean milliseconds by stage, and the ratio of the p50s of each round."""
    ours, calls, ratios = Measured(), [], []
    before = servers.counters()
    for number in range(size.rounds):
        part, taken = closed_loop(servers.port, 1, size.seconds, size.home.users, number), raw.measure(size.seconds)
        ours += part
        calls += taken
        ratios.append(part.ms(50) / (1e3 * float(np.median(np.sum(taken, axis=1)))))
        print(f"round {number + 1} of {size.rounds}: p50 {part.ms(50):.2f} ms, {ratios[-1]:.2f} × raw", flush=True)
    return ours, np.array(calls), _stages(before, servers.counters(), ours), ratios


def _loads(servers: Servers, size: Size) -> dict[str, Measured]:
    """By name: closed loops of several clients, and open ones at shares of the throughput that these reach."""
    found: dict[str, Measured] = {}
    for clients in (2, 4, 8, 16):
        found[f"{clients} clients"] = closed_loop(servers.port, clients, size.load_seconds, size.home.users)
    throughput = max(one.rate for one in found.values())
    for share in (0.3, 0.5, 0.7, 0.9):
        found[f"open, {share:.0%} of that"] = open_loop(
            servers.port, share * throughput, size.load_seconds, size.home.users
        )
    return found


def _draw(stages: Mapping[str, float], raw: Mapping[str, float], title: str) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.6))
    colours = {name: f"C{place}" for place, name in enumerate(stages)}
    for row, of in enumerate((raw, stages)):
        left = 0.0
        for name, value in of.items():
            axes.barh(row, value, left=left, color=colours[name], label=name if row else None)
            left += value
        axes.text(left, row, f" {left:.1f} ms", va="center")
    axes.set_yticks([0, 1], [RAW, "gateway"])
    axes.set_xlabel("mean ms of a request, one client")
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.12)
    axes.legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.45, -0.3), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130, bbox_inches="tight")
    plt.close(figure)


def compare(ours: Measured, raw: np.ndarray, loads: Mapping[str, Measured], goals: bool) -> list[Comparison]:
    """The gateway beside the raw calls."""
    calls = Measured(raw.sum(axis=1).tolist(), 0, float(raw.sum()))
    rows = [
        Comparison("p50, one client", ours.ms(50), calls.ms(50), RAW, "ms", at_most=P50_GOAL if goals else None),
        Comparison("p99, one client", ours.ms(99), calls.ms(99), RAW, "ms", at_most=P99_GOAL if goals else None),
    ]
    best = max(loads.values(), key=lambda one: one.rate)
    rows.append(Comparison("throughput", best.rate, calls.rate, f"{RAW}, one thread", "/s"))
    for name, one in loads.items():
        rows += [Comparison(f"p{p}, {name}", one.ms(p), calls.ms(p), RAW, "ms") for p in (50, 99)]
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute once its home is made")
    size = QUICK if parser.parse_args().quick else FULL
    where = machine()
    print(where)
    home = serving_home.home(FOLDER, size.home)
    with serve(home, FOLDER / "logs") as servers, raw_calls(home, size.home.users) as raw:
        closed_loop(servers.port, 4, size.warm_seconds, size.home.users, 99)
        raw.measure(size.warm_seconds / 2)
        ours, calls, stages, ratios = _in_turn(servers, raw, size)
        loads = _loads(servers, size)
    title = f"{size.home.items:,} items, {CANDIDATES} ranked candidates ({size.home.rank}), {where}"
    in_process = dict(zip(release.MODELS, 1e3 * calls.mean(axis=0), strict=True))
    show_columns(
        "Where the time goes: one client, mean",
        {
            "stage": list(stages),
            "ms": list(stages.values()),
            "in process": [in_process.get(stage, 0.0) for stage in stages],
        },
    )
    columns: dict[str, Any] = {"load": ["1 client", *loads]}
    every = [ours, *loads.values()]
    columns["/s"] = [one.rate for one in every]
    columns |= {f"p{p} ms": [one.ms(p) for one in every] for p in (50, 90, 99)}
    columns |= {"failed": [one.failed for one in every], "degraded": [one.degraded for one in every]}
    show_columns("Load on /recommend, impressions logged", columns)
    rows = compare(ours, calls, loads, goals=size is FULL)
    show(f"{title}; p50 × raw by round: {min(ratios):.2f} to {max(ratios):.2f}", rows)
    if size is FULL:
        _draw(stages, in_process, title)
    print(f"written to {write('serve', rows)}")


if __name__ == "__main__":
    main()
