"""What both variants of the benchmark of SASRec's training learn from.

NumPy alone: the peer reads it in an environment of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIRST = 2
"""Index of the first item: 0 is padding, 1 unknown."""

LENGTH, DIM, BLOCKS, HEADS, BATCH, SAMPLE = 50, 64, 2, 1, 128, 3000
DROPOUT, LEARNING_RATE = 0.2, 0.001
LOSSES = ("full", "sampled")

SHORT = {0.25: 2, 0.5: 3, 0.75: 6, 0.9: 11, 0.95: 17, 0.99: 38, 1.0: 50}
"""How many of the histories of Amazon Beauty, as it is split, are of so many items at most; none has fewer than 2."""


@dataclass(frozen=True)
class Histories:
    """Histories and what came next.

    Attributes:
        items: `[rows, LENGTH + 1]`, int32; the last column is what came next, and before a history's first stands 0.
        vocabulary: how many items there are.
    """

    items: np.ndarray
    vocabulary: int

    @staticmethod
    def make(vocabulary: int, rows: int, seed: int, short: bool) -> Histories:
        """Items by a power law, 1 / (rank + 10); histories of full length, or as long as `SHORT` says."""
        random = np.random.default_rng(seed)
        weights = 1.0 / (random.permutation(vocabulary) + 10.0)
        drawn = FIRST + random.choice(vocabulary, (rows, LENGTH + 1), p=weights / weights.sum())
        share = random.random(rows) if short else np.ones(rows)
        lengths = np.interp(share, [0.0, *SHORT], [2, *SHORT.values()]).round()
        there = np.arange(LENGTH, -1, -1) <= lengths[:, None]
        return Histories(np.where(there, drawn, 0).astype(np.int32), vocabulary)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        np.savez(folder / "histories.npz", items=self.items, vocabulary=self.vocabulary)

    @staticmethod
    def read(folder: Path) -> Histories:
        with np.load(folder / "histories.npz") as stored:
            return Histories(stored["items"], int(stored["vocabulary"]))
