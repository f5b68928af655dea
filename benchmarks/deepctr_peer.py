"""The rank training benchmark in DeepCTR; runs in an environment of its own, with the TensorFlow that it is made for.

Its own MMOE, without its penalty on embeddings, which would touch every row; it has no product of user and item and no
dropout of gates. Prints what `rank_torch_peer` prints.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from deepctr.feature_column import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr.models import MMOE
from rank_data import (
    BATCH,
    DIM,
    DROPOUT,
    EMBEDDING_SCALE,
    EXPERT_UNITS,
    EXPERTS,
    LEARNING_RATE,
    NUMBERS,
    SIDES,
    TASKS,
    TOWER_UNITS,
    Made,
)


class Clock(tf.keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.ends = [time.perf_counter()]
        self.losses: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(float(logs["loss"]))


def main(folder: Path, warm_up: int, steps: int) -> None:
    tf.random.set_seed(0)
    made = Made.read(folder)
    count = (warm_up + steps) * BATCH
    order = np.random.default_rng(0).permutation(count)
    inputs, features, numbers = {}, [], []
    for side in SIDES:
        numbers += made.of(side, *NUMBERS)
        for column in made.of(side, "id", "ids"):
            start = tf.keras.initializers.RandomUniform(-EMBEDDING_SCALE, EMBEDDING_SCALE)
            one = SparseFeat(column.name, made.sizes[column.vocabulary], DIM, False, embedding_name=column.vocabulary)
            one = one._replace(embeddings_initializer=start)
            features.append(VarLenSparseFeat(one, column.length, "mean") if column.length else one)
            inputs[column.name] = made.inputs[column.name][order]
    features.append(DenseFeat("numbers", len(numbers)))
    inputs["numbers"] = np.stack([made.inputs[column.name][order] for column in numbers], axis=1)
    model = MMOE(
        features,
        EXPERTS,
        EXPERT_UNITS,
        (TOWER_UNITS,),
        l2_reg_embedding=0.0,
        dnn_dropout=DROPOUT,
        task_types=("binary",) * len(TASKS),
        task_names=tuple(TASKS),
    )
    model.compile(tf.keras.optimizers.Adam(LEARNING_RATE), "binary_crossentropy")
    clock = Clock()
    labels = [made.labels[task][order] for task in TASKS]
    model.fit(inputs, labels, BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[clock])
    # Keras reports the mean since the epoch's start
    sums = np.array(clock.losses) * np.arange(1, len(clock.losses) + 1)
    last = min(10, len(sums) - 1)
    milliseconds = (1000 * np.diff(clock.ends))[warm_up:]
    print(json.dumps({"milliseconds": milliseconds.tolist(), "loss": float(sums[-1] - sums[-1 - last]) / last}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
