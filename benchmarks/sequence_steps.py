"""The steps of our SASRec that `benchmarks.sequence_speed` measures in a process of its own.

Prints a line of JSON: milliseconds of each measured step, the mean loss of the last ten, and the peak of memory in MB.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.recall_steps import Clock
from benchmarks.sequence_data import BATCH, BLOCKS, DIM, DROPOUT, FIRST, HEADS, LEARNING_RATE, LENGTH, SAMPLE, Histories
from penstock import objectives, optimizers
from penstock.catalogue import Catalogue
from penstock.examples import Feature, Schema
from penstock.fitting import Rows
from penstock.recall import sasrec
from penstock.retrieval import Retrieval

LOSS = {"full": "softmax", "sampled": "sampled_softmax"}


def ours(made: Histories, loss: str) -> Retrieval:
    """SASRec as the product trains it."""
    config = sasrec.Config(
        dim=DIM,
        blocks=BLOCKS,
        heads=HEADS,
        dropout=DROPOUT,
        batch_size=BATCH,
        loss=LOSS[loss],
        sampler="uniform",
        sample=SAMPLE,
    )
    history = Feature("history_items", "user", "ids", vocabulary="item_id", length=LENGTH)
    schema = Schema((history,), {"item_id": np.arange(made.vocabulary)}, {})
    catalogue = Catalogue(schema.vocabularies["item_id"], made.vocabulary, {}, ())
    counts = np.bincount(made.items.ravel(), minlength=made.vocabulary + FIRST)
    model = Retrieval(sasrec.build(config, schema, catalogue), objectives.build(config, counts, 0))
    model.build()
    model.compile(optimizers.build("adam", LEARNING_RATE))
    return model


def behind(made: Histories) -> np.ndarray:
    """Histories with their padding behind them, as examples have it, `[rows, LENGTH]`."""
    histories = made.items[:, :-1]
    lengths = np.sum(histories != 0, axis=1, keepdims=True)
    places = np.arange(LENGTH)
    return np.where(places < lengths, np.take_along_axis(histories, (places - lengths) % LENGTH, axis=1), 0)


def fit(model: Retrieval, made: Histories, warm_up: int, steps: int) -> dict[str, Any]:
    """Fits as `penstock.fitting` does, one epoch of so many batches."""
    rows = Rows({"history_items": behind(made)}, made.items[:, -1], BATCH)
    clock = Clock()
    model.fit(rows.batches(np.arange((warm_up + steps) * BATCH)), callbacks=[clock], shuffle=False, verbose=0)
    return clock.result(warm_up) | {"megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main(folder: Path, loss: str, warm_up: int, steps: int) -> None:
    keras.utils.set_random_seed(0)
    made = Histories.read(folder)
    print(json.dumps(fit(ours(made, loss), made, warm_up, steps)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
