"""Samples a second of training YouTubeDNN with a sampled softmax: ours beside peers, by the size of the vocabulary.

`make bench-recall-speed` prints the tables and writes build/bench/recall_speed.json; QUICK=1 is a smaller form of it.
Every variant trains on the same rows in a process of its own, one after another, on two cores. With KERAS_BACKEND=jax
ours runs on JAX, and where the time goes is not told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.recall_data import BATCH, DIM, FIRST, HISTORY, POWER, SAMPLE, Made, draw, popularity
from benchmarks.table import Comparison, machine, show, show_columns, write
from penstock.samplers import alias_table

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "build" / "peers"
CORES = 2
BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
SPEED_AT, SPEED_GOAL, FLAT_GOAL = 1_000_000, 2.0, 0.8


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        copies: how many tables of the weights' size a step needs beside the weights and the optimizer's state.
    """

    name: str
    command: Sequence[str | Path]
    optimizers: Sequence[str]
    copies: int = 1

    def gigabytes(self, vocabulary: int, optimizer: str) -> float:
        """About what the process needs."""
        tables = 2 * 4 * DIM * vocabulary / 1e9
        return 1.5 + tables * (2 + (optimizer == "adam") + 0.5 * self.copies)

    @property
    def missing(self) -> bool:
        return not Path(self.command[0]).exists()


OURS = Variant(f"Penstock ({BACKEND})", (sys.executable, "-m", "benchmarks.recall_steps", "ours"), ("adagrad", "adam"))
PEER_VARIANTS = (
    Variant(
        "PyTorch, sparse gradients",
        (PEERS / "torch" / "bin" / "python", ROOT / "benchmarks" / "torch_peer.py"),
        ("adagrad", "adam"),
    ),
    Variant(
        "DeepMatch",
        (PEERS / "deepmatch" / "bin" / "python", ROOT / "benchmarks" / "deepmatch_peer.py"),
        ("adagrad", "adam"),
        copies=4,
    ),
    Variant("Keras", (sys.executable, "-m", "benchmarks.recall_steps", "keras"), ("adagrad", "adam"), copies=4),
)
PROFILE = (sys.executable, "-m", "benchmarks.recall_steps", "profile")


@dataclass(frozen=True)
class Size:
    """How much is measured; vocabularies larger than the sample: up to its size ours takes the exact softmax.

    Attributes:
        warm_up, steps: steps of a process that are left out, and those that are measured.
        rounds: how often each variant has its turn; the median counts.
    """

    vocabularies: Sequence[int]
    optimizers: Sequence[str]
    warm_up: int
    steps: int
    rounds: int
    peers: Sequence[Variant]


FULL = Size((10_000, 100_000, 1_000_000, 10_000_000), ("adagrad", "adam"), 15, 60, 3, PEER_VARIANTS)
QUICK = Size((10_000, 100_000), ("adagrad",), 3, 10, 1, PEER_VARIANTS[:1])


@dataclass(frozen=True)
class Measured:
    """What one variant came to.

    Attributes:
        milliseconds: of a step: the median of the processes' medians.
        loss: the mean of the last ten steps: variants that train the same come to about the same.
    """

    variant: str
    optimizer: str
    vocabulary: int
    milliseconds: float
    loss: float

    @property
    def samples(self) -> float:
        """A second."""
        return 1000.0 * BATCH / self.milliseconds


def make(vocabulary: int, rows: int, seed: int) -> Made:
    """The rows of a vocabulary."""
    random = np.random.default_rng(seed)
    cumulative = np.cumsum(popularity(vocabulary, random))
    counts = np.zeros(vocabulary + FIRST)
    counts[FIRST:] = np.round(np.diff(cumulative, prepend=0.0) * 100 * vocabulary)
    weights = (counts[FIRST:] + 1.0) ** POWER
    keep, alias = alias_table(weights / weights.sum())
    log_q = np.concatenate([np.full(FIRST, -690.0), np.log(weights / weights.sum())]).astype(np.float32)
    history, positives = draw(cumulative, (rows, HISTORY), random), draw(cumulative, (rows,), random)
    return Made(history, positives, counts, keep, alias, log_q)


def measure(size: Size) -> Iterable[Measured]:
    """Each variant's turn at each vocabulary, in rounds."""
    for vocabulary in size.vocabularies:
        with tempfile.TemporaryDirectory(prefix="penstock-") as name:
            folder = Path(name) / "data"
            make(vocabulary, (size.warm_up + size.steps) * BATCH, vocabulary).write(folder)
            for optimizer in size.optimizers:
                variants = [
                    variant
                    for variant in (OURS, *size.peers)
                    if optimizer in variant.optimizers and _has_room(variant, vocabulary, optimizer)
                ]
                yield from _rounds(variants, folder, optimizer, vocabulary, size)


def compare(measured: Sequence[Measured]) -> list[Comparison]:
    """Ours beside each peer at each vocabulary, and beside itself at the smallest."""
    rows = []
    ours = {(one.optimizer, one.vocabulary): one.samples for one in measured if one.variant == OURS.name}
    for (optimizer, vocabulary), samples in ours.items():
        peers = [
            one
            for one in measured
            if (one.optimizer, one.vocabulary) == (optimizer, vocabulary) and one.variant != OURS.name
        ]
        for peer in sorted(peers, key=lambda one: -one.samples):
            goal = SPEED_GOAL if vocabulary == SPEED_AT and peer.samples == max(p.samples for p in peers) else None
            measure = f"{optimizer}, {vocabulary:,} items"
            rows.append(Comparison(measure, samples, peer.samples, peer.variant, "samples/s", at_least=goal))
    for optimizer in dict.fromkeys(optimizer for optimizer, _ in ours):
        sizes = sorted(vocabulary for name, vocabulary in ours if name == optimizer)
        if len(sizes) > 1:
            small, large = (ours[optimizer, vocabulary] for vocabulary in (sizes[0], sizes[-1]))
            name = f"ours at {sizes[0]:,}"
            rows.append(
                Comparison(f"{optimizer}, {sizes[-1]:,} items", large, small, name, "samples/s", at_least=FLAT_GOAL)
            )
    return rows


def run(command: Sequence[str | Path]) -> dict[str, Any]:
    """Runs a variant's process on two cores and reads its last line."""
    # JAX stands beside our environment, and is not a peer's
    path = os.pathsep.join(sys.path) if command[0] == sys.executable else str(ROOT)
    environment = os.environ | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": str(CORES)}
    cores = set(sorted(os.sched_getaffinity(0))[:CORES])
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rounds(
    variants: Sequence[Variant], folder: Path, optimizer: str, vocabulary: int, size: Size
) -> Iterable[Measured]:
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    losses: dict[str, float] = {}
    for _ in range(size.rounds):
        for variant in variants:
            found = run([*variant.command, folder, optimizer, str(size.warm_up), str(size.steps)])
            times[variant.name].append(float(np.median(found["milliseconds"])))
            losses[variant.name] = float(np.mean(found["loss"]))
            print(f"{variant.name}, {optimizer}, {vocabulary:,} items: {times[variant.name][-1]:.1f} ms", flush=True)
    for name, found_times in times.items():
        yield Measured(name, optimizer, vocabulary, float(np.median(found_times)), losses[name])


def _has_room(variant: Variant, vocabulary: int, optimizer: str) -> bool:
    """Says why not."""
    needed, free = variant.gigabytes(vocabulary, optimizer), psutil.virtual_memory().available / 1e9
    title = f"{variant.name}, {optimizer}, {vocabulary:,} items: left out"
    if variant.missing:
        print(f"{title}: {variant.command[0]} is not installed", flush=True)
    elif needed > free:
        print(f"{title}: needs {needed:.0f} GB of memory, {free:.0f} are free", flush=True)
    else:
        return True
    return False


def profile(size: Size, show_profile: Callable[[str, dict[str, Sequence[str | float]]], None]) -> None:
    """Where a step's time goes, at the largest vocabulary that is not the last."""
    vocabulary = size.vocabularies[-2]
    with tempfile.TemporaryDirectory(prefix="penstock-") as name:
        folder = Path(name) / "data"
        make(vocabulary, (size.warm_up + size.steps) * BATCH, vocabulary).write(folder)
        for optimizer in size.optimizers:
            parts = run([*PROFILE, folder, optimizer, str(size.warm_up), str(size.steps)])
            shares = [f"{100 * float(value) / float(parts['a step']):.0f} %" for value in parts.values()]
            title = f"Where the time goes: {optimizer}, {vocabulary:,} items"
            show_profile(title, {"part": list(parts), "ms": [float(v) for v in parts.values()], "of a step": shares})


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute")
    size = QUICK if parser.parse_args().quick else FULL
    print(machine())
    measured = list(measure(size))
    show_columns(
        f"Steps: batch {BATCH:,}, {SAMPLE:,} shared negatives, {DIM} dimensions, history {HISTORY}, {CORES} cores",
        {
            "variant": [one.variant for one in measured],
            "optimizer": [one.optimizer for one in measured],
            "items": [one.vocabulary for one in measured],
            "ms a step": [one.milliseconds for one in measured],
            "loss after": [one.loss for one in measured],
        },
    )
    if BACKEND == "tensorflow":
        profile(size, show_columns)
    rows = compare(measured)
    show("Samples a second", rows)
    print(f"written to {write('recall_speed', rows)}")


if __name__ == "__main__":
    main()
