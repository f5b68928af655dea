"""What every variant of the rank training benchmark trains on: the same rows of the same features.

NumPy alone: the peers read it in environments of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCH, DIM, MATCH, EXPERTS, EXPERT_UNITS, TOWER_UNITS = 512, 32, 48, 4, (96, 48), 24
DROPOUT, GATE_DROPOUT, EMBEDDING_SCALE, LEARNING_RATE = 0.1, 0.1, 0.2, 0.002
TASKS = {"click": 0.0, "long_view": -1.0, "like": -4.0, "profile_enter": -4.0}
"""What is learnt, and the logit of its rate, about."""

SIDES = ("user", "item", "context")
NUMBERS = ("count", "number")


@dataclass(frozen=True)
class Column:
    """A feature, as `penstock.examples.Feature` says it: of a side, an `id`, `ids`, or one of `NUMBERS`."""

    name: str
    side: str
    kind: str
    vocabulary: str
    length: int


@dataclass(frozen=True)
class Made:
    """Rows of features that tell the labels, as models read them.

    Attributes:
        columns: in order.
        sizes: indices of each vocabulary; 0 is padding.
        inputs: by name, int32 `[rows]` or `[rows, length]`, float32 `[rows]`.
        labels: by task, float32 `[rows]`, 0 or 1.
    """

    columns: Sequence[Column]
    sizes: Mapping[str, int]
    inputs: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        np.savez(folder / "inputs.npz", allow_pickle=False, **self.inputs)
        np.savez(folder / "labels.npz", allow_pickle=False, **self.labels)
        about = {"columns": [vars(column) for column in self.columns], "sizes": dict(self.sizes)}
        (folder / "about.json").write_text(json.dumps(about))

    @staticmethod
    def read(folder: Path) -> Made:
        about = json.loads((folder / "about.json").read_text())
        with np.load(folder / "inputs.npz") as inputs, np.load(folder / "labels.npz") as labels:
            return Made([Column(**column) for column in about["columns"]], about["sizes"], dict(inputs), dict(labels))

    def of(self, side: str, *kinds: str) -> list[Column]:
        """The features of a side that are of some kinds."""
        return [column for column in self.columns if column.side == side and column.kind in kinds]


def make(columns: Sequence[Column], sizes: Mapping[str, int], rows: int, seed: int) -> Made:
    """Rows whose ids follow a power law; labels follow the numbers, the user and the item."""
    random = np.random.default_rng(seed)
    inputs: dict[str, np.ndarray] = {}
    told = np.zeros(rows)
    for column in columns:
        if column.kind in NUMBERS:
            inputs[column.name] = random.standard_normal(rows).astype(np.float32)
            told += random.normal(0.0, 0.1) * inputs[column.name]
            continue
        size = sizes[column.vocabulary]
        shape = (rows, column.length) if column.length else (rows,)
        # of 1/(rank + 10) the distribution's inverse; the first two indices are no ids
        ids = 10.0 * ((size + 8) / 10.0) ** random.random(shape) - 10.0
        indices = (2 + np.minimum(ids.astype(np.int32), size - 3)).astype(np.int32)
        if column.length:
            indices[np.arange(column.length) >= random.integers(0, column.length + 1, (rows, 1))] = 0
        else:
            told += random.normal(0.0, 0.5, size)[indices]
        inputs[column.name] = indices
    labels = {
        task: (random.random(rows) < 1.0 / (1.0 + np.exp(-told - intercept))).astype(np.float32)
        for task, intercept in TASKS.items()
    }
    return Made(columns, sizes, inputs, labels)
