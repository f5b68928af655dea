"""Examples a second of training MMoE: ours beside PyTorch and DeepCTR, on KuaiRand-Pure's features.

`make bench-rank-speed` prints the tables and writes build/bench/rank_speed.json; QUICK=1 is a smaller form of it. Every
variant trains on the same made-up rows in a process of its own, one after another, on two cores. With KERAS_BACKEND=jax
ours runs on JAX, and where the time goes is not told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.rank_data import BATCH, DIM, EXPERT_UNITS, EXPERTS, SIDES, TASKS, Column, make
from benchmarks.recall_speed import BACKEND, CORES, PEERS, ROOT, run
from benchmarks.table import Comparison, machine, show, show_columns, write
from penstock.examples import FEATURES, FIRST

GOAL = 1.5

SIZES = {
    "user_id": 17_845,
    "activity_level": 9,
    "is_creator": 2,
    "traits": 2_125,
    "item_id": 7_126,
    "author_id": 4_208,
    "category": 43,
    "tags": 46,
    "music_id": 4_361,
    "item_type": 12,
    "scenario": 15,
    "device": 1,
    "hour": 24,
    "weekday": 7,
}
"""Known ids in the training slice of KuaiRand-Pure."""


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    name: str
    command: Sequence[str | Path]

    @property
    def missing(self) -> bool:
        return not Path(self.command[0]).exists()


OURS = Variant(f"Penstock ({BACKEND})", (sys.executable, "-m", "benchmarks.rank_steps", "ours"))
PROFILE = (sys.executable, "-m", "benchmarks.rank_steps", "profile")
_TORCH = (PEERS / "torch" / "bin" / "python", ROOT / "benchmarks" / "rank_torch_peer.py")
PEER_VARIANTS = (
    Variant("PyTorch, tuned", (*_TORCH, "tuned")),
    Variant("PyTorch", (*_TORCH, "written")),
    Variant("DeepCTR", (PEERS / "deepmatch" / "bin" / "python", ROOT / "benchmarks" / "deepctr_peer.py")),
)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        warm_up, steps: steps of a process that are left out, and those that are measured.
        rounds: how often each variant has its turn; the median counts.
    """

    warm_up: int
    steps: int
    rounds: int
    peers: Sequence[Variant]


FULL = Size(30, 270, 5, PEER_VARIANTS)
QUICK = Size(5, 20, 1, PEER_VARIANTS[:1])


@dataclass(frozen=True)
class Measured:
    """What one variant came to.

    Attributes:
        milliseconds: of a step: the median of the processes' medians.
        loss: the mean of the last ten steps: variants that train the same come to about the same.
    """

    variant: str
    milliseconds: float
    loss: float

    @property
    def examples(self) -> float:
        """A second."""
        return 1000.0 * BATCH / self.milliseconds


def columns() -> list[Column]:
    """The features that rank models read."""
    return [
        Column(feature.name, feature.side, feature.kind, feature.vocabulary, feature.length)
        for feature in FEATURES
        if feature.side in SIDES
    ]


def write_rows(folder: Path, size: Size) -> None:
    """The rows of all variants."""
    sizes = {name: known + FIRST for name, known in SIZES.items()}
    make(columns(), sizes, (size.warm_up + size.steps) * BATCH, 0).write(folder)


def measure(folder: Path, size: Size) -> Iterable[Measured]:
    """Each variant's turn, in rounds."""
    variants = []
    for variant in (OURS, *size.peers):
        if variant.missing:
            print(f"{variant.name}: left out: {variant.command[0]} is not installed", flush=True)
        else:
            variants.append(variant)
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    losses: dict[str, float] = {}
    for _ in range(size.rounds):
        for variant in variants:
            found = run([*variant.command, folder, str(size.warm_up), str(size.steps)])
            times[variant.name].append(float(np.median(found["milliseconds"])))
            losses[variant.name] = float(found["loss"])
            print(f"{variant.name}: {times[variant.name][-1]:.1f} ms", flush=True)
    for name, found_times in times.items():
        yield Measured(name, float(np.median(found_times)), losses[name])


def compare(measured: Sequence[Measured]) -> list[Comparison]:
    """Ours beside each peer; the goal is of the best."""
    ours = next(one for one in measured if one.variant == OURS.name)
    peers = sorted((one for one in measured if one is not ours), key=lambda one: -one.examples)
    return [
        Comparison(
            "training MMoE", ours.examples, peer.examples, peer.variant, "examples/s", at_least=None if place else GOAL
        )
        for place, peer in enumerate(peers)
    ]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute")
    size = QUICK if parser.parse_args().quick else FULL
    print(machine())
    with tempfile.TemporaryDirectory(prefix="penstock-") as name:
        folder = Path(name) / "data"
        write_rows(folder, size)
        measured = list(measure(folder, size))
        profiled: list[str | Path] = [*PROFILE, folder, str(size.warm_up), str(size.steps)]
        parts = run(profiled) if BACKEND == "tensorflow" else {}
    show_columns(
        f"Steps: batch {BATCH}, {EXPERTS} experts {EXPERT_UNITS}, {len(TASKS)} tasks, {len(columns())} features, "
        f"{DIM} dimensions, {CORES} cores",
        {
            "variant": [one.variant for one in measured],
            "ms a step": [one.milliseconds for one in measured],
            "loss after": [one.loss for one in measured],
        },
    )
    if parts:
        shares = [f"{100 * float(value) / float(parts['a step']):.0f} %" for value in parts.values()]
        milliseconds = [float(value) for value in parts.values()]
        show_columns("Where the time goes", {"part": list(parts), "ms": milliseconds, "of a step": shares})
    rows = compare(measured)
    show("Examples a second", rows)
    print(f"written to {write('rank_speed', rows)}")


if __name__ == "__main__":
    main()
