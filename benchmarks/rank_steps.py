"""The steps that `benchmarks.rank_speed` measures in processes of their own: ours, and our profile.

Prints a line of JSON: milliseconds of each measured step and the mean loss of the last ten, or those of each part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.rank_data import (
    BATCH,
    DIM,
    DROPOUT,
    EMBEDDING_SCALE,
    EXPERT_UNITS,
    EXPERTS,
    GATE_DROPOUT,
    LEARNING_RATE,
    MATCH,
    NUMBERS,
    TASKS,
    TOWER_UNITS,
    Made,
)
from benchmarks.recall_steps import Clock, median_milliseconds
from penstock import optimizers
from penstock.examples import FEATURES, FIRST, Schema
from penstock.fitting import Rows
from penstock.rank import mmoe
from penstock.ranking import SIDES, Ranking

CONFIG = mmoe.Config(
    dim=DIM,
    embedding_scale=EMBEDDING_SCALE,
    match=MATCH,
    experts=EXPERTS,
    own=False,  # as the peers'
    expert_units=EXPERT_UNITS,
    tower_units=(TOWER_UNITS,),
    dropout=DROPOUT,
    gate_dropout=GATE_DROPOUT,
    id_dropout=0.0,
    loss_weights={},
    tasks=tuple(TASKS),
    batch_size=BATCH,
    learning_rate=LEARNING_RATE,
)


def schema_of(made: Made) -> Schema:
    features = tuple(feature for feature in FEATURES if feature.side in SIDES)
    scales = {column.name: (0.0, 1.0) for column in made.columns if column.kind in NUMBERS}
    return Schema(features, {name: np.arange(size - FIRST) for name, size in made.sizes.items()}, scales)


def ours(made: Made) -> Ranking:
    """MMoE as the product trains it."""
    schema = schema_of(made)
    model = Ranking(mmoe.build(CONFIG, schema), CONFIG, devices=schema.size("device"))
    model.build()
    model.compile(optimizers.build("adam", LEARNING_RATE))
    return model


def fit(model: Ranking, made: Made, warm_up: int, steps: int) -> dict[str, Any]:
    """Fits as `penstock.fitting` does, one epoch of so many batches."""
    rows = Rows(made.inputs, dict(made.labels), BATCH)
    order = np.random.default_rng(0).permutation(rows.count)[: (warm_up + steps) * BATCH]
    clock = Clock()
    model.fit(rows.batches(order), callbacks=[clock], shuffle=False, verbose=0)
    return clock.result(warm_up)


def profile(made: Made, warm_up: int, steps: int) -> dict[str, float]:
    """Milliseconds of the parts of a step, by what each adds to those before it; the median of `steps`."""
    import tensorflow as tf  # the one backend that can be taken apart so

    model = ours(made)
    model.optimizer.build(model.trainable_variables)
    batches = iter(Rows(made.inputs, dict(made.labels), BATCH).batches().repeat())
    inputs, labels = next(batches)
    read = keras.Model(model.shared.inputs, model.shared.output[0])

    def joined() -> Any:
        return read(inputs, training=True)

    def shared() -> Any:
        return model(inputs, training=True)

    def forward() -> Any:
        return model.compute_loss(inputs, labels, model(inputs, training=True))

    def backward() -> list[Any]:
        with tf.GradientTape() as tape:
            loss = forward()
        return tape.gradient(loss, model.trainable_variables)

    def step() -> None:
        model.optimizer.apply(backward(), model.trainable_variables)

    def alone(function: Callable[[], Any]) -> float:
        return median_milliseconds(tf.function(function, jit_compile=False), warm_up, steps)

    looked_up, mixed, lost, gradients, whole = map(alone, (joined, shared, forward, backward, step))
    fitted = float(np.median(fit(model, made, warm_up, steps)["milliseconds"]))
    return {
        "look-ups, numbers and their product": looked_up,
        "experts": mixed - looked_up,
        "gates, towers and losses": lost - mixed,
        "backward": gradients - lost,
        "optimiser": whole - gradients,
        "Keras's fit and the batch": fitted - whole,
        "a step": fitted,
        "batches alone (made while a step runs)": median_milliseconds(lambda: next(batches), warm_up, steps),
    }


def main(variant: str, folder: Path, warm_up: int, steps: int) -> None:
    keras.utils.set_random_seed(0)
    made = Made.read(folder)
    result = profile(made, warm_up, steps) if variant == "profile" else fit(ours(made), made, warm_up, steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
