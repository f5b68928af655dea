"""The steps that `benchmarks.recall_speed` measures in processes of their own: ours, stock Keras, and our profile.

Prints a line of JSON: milliseconds of each measured step and the mean loss of the last ten, or those of each part.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks.recall_data import BATCH, DIM, FIRST, HIDDEN, HISTORY, LEARNING_RATE, POWER, SAMPLE, Made
from penstock import objectives, optimizers
from penstock.catalogue import Catalogue
from penstock.examples import Feature, Schema
from penstock.fitting import Rows
from penstock.layers.embedding import MaskedMean
from penstock.losses.sampled import distinct
from penstock.recall import youtube_dnn
from penstock.retrieval import Retrieval, Towers

CONFIG = youtube_dnn.Config(
    dim=DIM, hidden=HIDDEN, dropout=0.0, example_age=False, batch_size=BATCH, sample=SAMPLE, power=POWER
)


class Clock(keras.callbacks.Callback):
    """The time and the loss of steps, which may be several a call."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [0]
        self.ends = [time.perf_counter()]
        self.losses = [0.0]

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.steps.append(min(batch + 1, self.params["steps"]))  # the last call may be of fewer steps than it says
        self.ends.append(time.perf_counter())
        self.losses.append(float((logs or {})["loss"]))

    def result(self, warm_up: int) -> dict[str, Any]:
        """Milliseconds of each step after the warm-up, alike in a call; the mean loss of the last ten steps or more."""
        steps = np.array(self.steps)
        sums = np.array(self.losses) * steps  # Keras reports the mean since the epoch's start
        before = max(int(np.searchsorted(steps, steps[-1] - 10, side="right")) - 1, 0)
        milliseconds = np.repeat(1000 * np.diff(self.ends) / np.diff(steps), np.diff(steps))
        return {
            "milliseconds": milliseconds[warm_up:].tolist(),
            "loss": float(sums[-1] - sums[before]) / int(steps[-1] - steps[before]),
        }


def schema_of(made: Made) -> Schema:
    history = Feature("history_items", "user", "ids", vocabulary="item_id", length=HISTORY)
    return Schema((history,), {"item_id": np.arange(made.vocabulary)}, {})


def ours(made: Made, optimizer: str) -> Retrieval:
    """YouTubeDNN as the product trains it."""
    schema = schema_of(made)
    catalogue = Catalogue(schema.vocabularies["item_id"], made.vocabulary, {}, ())
    model = Retrieval(youtube_dnn.build(CONFIG, schema, catalogue), objectives.build(CONFIG, made.counts, 0))
    model.compile(optimizers.build(optimizer, LEARNING_RATE[optimizer]))
    return model


class StockItems(keras.layers.Layer):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weights_of = keras.layers.Embedding(size, DIM, keras.initializers.TruncatedNormal(stddev=DIM**-0.5))
        self.bias_of = keras.layers.Embedding(size, 1, "zeros")

    def call(self, indices: Any) -> Any:
        return ops.concatenate([self.weights_of(indices), self.bias_of(indices)], axis=-1)


def stock_keras(made: Made, optimizer: str) -> Retrieval:
    """The same tower and the same loss on Keras's own embeddings and optimizers."""
    size = made.vocabulary + FIRST
    history = keras.Input((HISTORY,), dtype="int32", name="history_items")
    table = keras.layers.Embedding(size, DIM, keras.initializers.RandomUniform(-0.05, 0.05))
    hidden = MaskedMean()(table(history), history)
    for units in HIDDEN:
        hidden = keras.layers.Dense(units, "relu")(hidden)
    user = keras.layers.Dense(DIM)(hidden)
    query = ops.concatenate([user, ops.ones_like(user[:, :1])], axis=-1)
    model = Retrieval(
        Towers(keras.Model({"history_items": history}, query), StockItems(size)),
        objectives.build(CONFIG, made.counts, 0),
    )
    rate = LEARNING_RATE[optimizer]
    stock = keras.optimizers.Adam(rate) if optimizer == "adam" else keras.optimizers.Adagrad(rate, 1e-20, 0.0)
    model.compile(stock, jit_compile=False)
    return model


def fit(model: Retrieval, made: Made, warm_up: int, steps: int) -> dict[str, Any]:
    """Fits as `penstock.fitting` does, one epoch of so many batches."""
    rows = Rows({"history_items": made.history}, made.positives, BATCH)
    clock = Clock()
    model.fit(rows.batches(np.arange((warm_up + steps) * BATCH)), callbacks=[clock], shuffle=False, verbose=0)
    return clock.result(warm_up)


def profile(made: Made, optimizer: str, warm_up: int, steps: int) -> dict[str, float]:
    """Milliseconds of the parts of a step, by what each adds to those before it; the median of `steps`."""
    import tensorflow as tf  # the one backend that can be taken apart so

    model = ours(made, optimizer)
    model.build()
    model.optimizer.build(model.trainable_variables)
    rows = Rows({"history_items": made.history}, made.positives, BATCH)
    batches = iter(rows.batches().repeat())
    inputs, positives = next(batches)
    drawn = model.objective.sampler

    def towers() -> tuple[Any, Any, Any]:
        negatives, _ = distinct(drawn.draw(SAMPLE))
        return model.query_tower(inputs), model.item_tower(tf.concat([positives, negatives], 0)), negatives

    def forward() -> Any:
        return model.compute_loss(y=positives, y_pred=model.query_tower(inputs))

    def backward() -> list[Any]:
        with tf.GradientTape() as tape:
            loss = forward()
        return tape.gradient(loss, model.trainable_variables)

    def step() -> None:
        model.optimizer.apply(backward(), model.trainable_variables)

    def alone(function: Callable[[], Any]) -> float:
        return median_milliseconds(tf.function(function, jit_compile=False), warm_up, steps)

    looked_up, lost, gradients, whole = alone(towers), alone(forward), alone(backward), alone(step)
    fitted = float(np.median(fit(model, made, warm_up, steps)["milliseconds"]))
    return {
        "look-ups and tower, forward": looked_up,
        "loss, forward": lost - looked_up,
        "backward": gradients - lost,
        "optimiser": whole - gradients,
        "Keras's fit and the batch": fitted - whole,
        "a step": fitted,
        "batches alone (made while a step runs)": median_milliseconds(lambda: next(batches), warm_up, steps),
    }


def median_milliseconds(call: Callable[[], Any], warm_up: int, steps: int) -> float:
    """The median of `steps` calls, those to warm up left out."""
    times = []
    for _ in range(warm_up + steps):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[warm_up:]))


def main(variant: str, folder: Path, optimizer: str, warm_up: int, steps: int) -> None:
    keras.utils.set_random_seed(0)
    made = Made.read(folder)
    if variant == "profile":
        result = profile(made, optimizer, warm_up, steps)
    else:
        result = fit({"ours": ours, "keras": stock_keras}[variant](made, optimizer), made, warm_up, steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
