"""Samples a second of training SASRec, a sample being a whole history: ours beside plain PyTorch, and their memory.

`make bench-sequence-speed` prints the tables and writes build/bench/sequence_speed.json; QUICK=1 is a smaller form of
it. Both train on the same rows, in processes of their own, by turns, on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.recall_speed import CORES, PEERS, ROOT, run
from benchmarks.sequence_data import BATCH, DIM, LENGTH, LOSSES, SAMPLE, Histories
from benchmarks.table import Comparison, machine, show, show_columns, write

GOAL = 1.3
FULL_LENGTH, LIKE_BEAUTY = f"{LENGTH} of {LENGTH} places", "as long as on Beauty"
COMMANDS: dict[str, tuple[str | Path, ...]] = {
    "Penstock": (sys.executable, "-m", "benchmarks.sequence_steps"),
    "PyTorch": (PEERS / "torch" / "bin" / "python", ROOT / "benchmarks" / "sequence_torch_peer.py"),
}
OURS, PEER = COMMANDS


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        warm_up, steps: steps of a process that are left out, and those that are measured.
        rounds: how often each variant has its turn; the median counts.
    """

    vocabulary: int
    warm_up: int
    steps: int
    rounds: int


FULL = Size(54_542, 5, 25, 3)
QUICK = Size(8_000, 2, 5, 1)


@dataclass(frozen=True)
class Measured:
    """What one variant came to.

    Attributes:
        milliseconds: of a step: the median of the processes' medians.
        loss: the mean of the last ten steps: variants that train the same come to about the same.
        megabytes: the largest resident set of a process.
    """

    variant: str
    histories: str
    of: str
    milliseconds: float
    loss: float
    megabytes: float

    @property
    def samples(self) -> float:
        """A second."""
        return 1000.0 * BATCH / self.milliseconds


def measure(size: Size) -> Iterable[Measured]:
    """Each variant's turn with each loss and each kind of histories, in rounds."""
    with tempfile.TemporaryDirectory(prefix="penstock-") as name:
        for histories, loss in itertools.product((FULL_LENGTH, LIKE_BEAUTY), LOSSES):
            folder = Path(name) / histories
            if not folder.exists():
                rows = (size.warm_up + size.steps) * BATCH
                Histories.make(size.vocabulary, rows, 1, short=histories == LIKE_BEAUTY).write(folder)
            found: dict[str, list[dict[str, float]]] = {variant: [] for variant in COMMANDS}
            for _ in range(size.rounds):
                for variant, command in COMMANDS.items():
                    told = run([*command, folder, loss, str(size.warm_up), str(size.steps)])
                    told["milliseconds"] = float(np.median(told["milliseconds"]))
                    found[variant].append(told)
                    print(f"{variant}, {histories}, {loss}: {told['milliseconds']:.0f} ms", flush=True)
            for variant, turns in found.items():
                milliseconds = float(np.median([turn["milliseconds"] for turn in turns]))
                megabytes = max(turn["megabytes"] for turn in turns)
                yield Measured(variant, histories, loss, milliseconds, turns[-1]["loss"], megabytes)


def compare(measured: Sequence[Measured]) -> list[Comparison]:
    """Ours beside the peer with each loss: speed, and memory; the goal is for histories of full length."""
    rows = []
    for histories, loss in dict.fromkeys((one.histories, one.of) for one in measured):
        ours, peer = (
            next(o for o in measured if (o.histories, o.of, o.variant) == (histories, loss, name))
            for name in (OURS, PEER)
        )
        title = f"{histories}, {loss} cross-entropy"
        goal = GOAL if histories == FULL_LENGTH else None
        rows.append(Comparison(title, ours.samples, peer.samples, PEER, "samples/s", at_least=goal))
        rows.append(Comparison(f"{title}, peak of memory", ours.megabytes, peer.megabytes, PEER, "MB"))
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute")
    size = QUICK if parser.parse_args().quick else FULL
    print(machine())
    measured = list(measure(size))
    show_columns(
        f"Steps: batch {BATCH}, {DIM} dimensions, {size.vocabulary:,} items, {SAMPLE:,} negatives if"
        f" sampled, {CORES} cores",
        {
            "variant": [one.variant for one in measured],
            "histories": [one.histories for one in measured],
            "loss": [one.of for one in measured],
            "ms a step": [one.milliseconds for one in measured],
            "loss after": [one.loss for one in measured],
            "MB": [one.megabytes for one in measured],
        },
    )
    rows = compare(measured)
    show("Samples a second", rows)
    print(f"written to {write('sequence_speed', rows)}")


if __name__ == "__main__":
    main()
