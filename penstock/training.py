"""The one loop that fits a model: seeds, batches, progress, early stopping."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import polars as pl
import tensorflow as tf

import penstock
from penstock.examples import Schema, encode_ids, labels_of, read_slice
from penstock.optimizers import Adam

RECALL_LABEL = "long_view"
"""What a recall model retrieves: items that will be long-viewed, as the histories it reads are of long views."""


class TrainingError(ValueError):
    """Data or parameters that cannot be trained on; the message says which and why."""


@dataclass(frozen=True)
class Settings:
    """How long and how fast to fit."""

    epochs: int
    batch_size: int
    learning_rate: float
    patience: int = 1


def batches(
    inputs: Mapping[str, np.ndarray], targets: Any, batch_size: int, *, shuffle_seed: int | None = None
) -> tf.data.Dataset:
    """Batches of `(inputs, targets)` taken from arrays in memory; each epoch in another order if a seed is given."""
    rows = len(next(iter(inputs.values())))
    held = tf.nest.map_structure(tf.constant, (dict(inputs), targets))
    order = tf.data.Dataset.range(rows)
    if shuffle_seed is not None:
        order = order.shuffle(rows, seed=shuffle_seed, reshuffle_each_iteration=True)

    def take(index: tf.Tensor) -> Any:
        return tf.nest.map_structure(lambda array: tf.gather(array, index), held)

    return order.batch(batch_size).map(take, num_parallel_calls=2).prefetch(2)


def check(inputs: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> None:
    """Refuses what cannot be learnt from.

    Raises:
        TrainingError: no rows, a number that is not finite, or a label of one class.
    """
    if not len(next(iter(inputs.values()))):
        raise TrainingError("there are no training rows")
    for name, values in inputs.items():
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise TrainingError(f"feature {name} has values that are not finite")
    for name, values in labels.items():
        if values.min() == values.max():
            raise TrainingError(f"label {name} has one class only ({values.min():g} in every training row)")


class _Progress(keras.callbacks.Callback):
    """One line an epoch: losses and the time left."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self._epochs = epochs
        self._started = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        left = (time.monotonic() - self._started) / (epoch + 1) * (self._epochs - epoch - 1)
        figures = "  ".join(
            f"{name} {value:.4f}" for name, value in (logs or {}).items() if name in ("loss", "val_loss")
        )
        print(f"epoch {epoch + 1}/{self._epochs}  {figures}  {left:.0f} s left at most", flush=True)


def fit(
    model: keras.Model, train: tf.data.Dataset, validation: tf.data.Dataset, settings: Settings
) -> list[dict[str, float]]:
    """Fits a compiled model, keeps the weights of its best epoch by `val_loss`, and returns one row an epoch.

    Raises:
        TrainingError: the loss is not finite.
    """
    stop = keras.callbacks.EarlyStopping("val_loss", patience=settings.patience, restore_best_weights=True)
    history = model.fit(
        train,
        validation_data=validation,
        epochs=settings.epochs,
        callbacks=[stop, keras.callbacks.TerminateOnNaN(), _Progress(settings.epochs)],
        shuffle=False,  # the batches are shuffled already
        verbose=0,
    )
    rows = [
        {
            "epoch": epoch + 1,
            **{name: float(values[at]) for name, values in history.history.items() if at < len(values)},
        }
        for at, epoch in enumerate(history.epoch)
    ]
    if not rows or not all(np.isfinite(value) for row in rows for value in row.values()):
        raise TrainingError("the loss is not finite: lower the learning rate, or look at the features")
    return rows


def train_recall(examples: Path, name: str, overrides: Mapping[str, Any], seed: int, out: Path) -> None:
    """Trains `recall/<name>.py` on the long views of the training slice and writes weights, config and history.

    Raises:
        ValueError: an unknown model or parameter.
        TrainingError: data that cannot be learnt from.
    """
    config = penstock.config(penstock.module("recall", name), overrides)
    schema = Schema.load(examples / "schema")
    keras.utils.set_random_seed(seed)
    model = build_recall(name, config, schema, examples, seed)
    names = [tensor.name for tensor in model.query_tower.inputs]
    sets = {}
    for part in ("train", "validation"):
        rows = _positives(examples, part, schema)
        encoded = schema.encode_rows(rows, "user")
        sets[part] = ({name: encoded[name] for name in names}, _items(rows, schema))
    check(sets["train"][0], {})
    model.compile(Adam(config.settings.learning_rate))
    size = config.settings.batch_size
    train = batches(*sets["train"], size, shuffle_seed=seed)
    history = fit(model, train, batches(*sets["validation"], size), config.settings)
    _write(out, model, name, config, seed, history)


def train_rank(examples: Path, name: str, overrides: Mapping[str, Any], seed: int, out: Path) -> None:
    """Trains `rank/<name>.py` on every impression of the training slice and writes weights, config and history.

    Raises:
        ValueError: an unknown model or parameter.
        TrainingError: data that cannot be learnt from.
    """
    module = penstock.module("rank", name)
    config = penstock.config(module, overrides)
    schema = Schema.load(examples / "schema")
    keras.utils.set_random_seed(seed)
    model = module.build(config, schema)
    names = [tensor.name for tensor in model.inputs]
    sets = {}
    for part in ("train", "validation"):
        rows = read_slice(examples, part)
        encoded = schema.encode_rows(rows)
        sets[part] = ({name: encoded[name] for name in names}, labels_of(rows))
    check(*sets["train"])
    model.compile(Adam(config.settings.learning_rate), loss=dict.fromkeys(sets["train"][1], "binary_crossentropy"))
    size = config.settings.batch_size
    train = batches(*sets["train"], size, shuffle_seed=seed)
    history = fit(model, train, batches(*sets["validation"], size), config.settings)
    _write(out, model, name, config, seed, history)


def build_recall(name: str, config: Any, schema: Schema, examples: Path, seed: int) -> Any:
    """A recall model with the positives of the training slice as its sampler's counts."""
    indices = _items(_positives(examples, "train", schema), schema)
    counts = np.bincount(indices, minlength=schema.size("item_id"))
    return penstock.module("recall", name).build(config, schema, counts, seed)


def load_recall(examples: Path, trained: Path) -> tuple[Any, Schema]:
    """The trained recall model of a directory, and the schema it was built for."""
    about = json.loads((trained / "config.json").read_text())
    schema = Schema.load(examples / "schema")
    config = penstock.config(penstock.module("recall", about["model"]), about["config"])
    model = build_recall(about["model"], config, schema, examples, about["seed"])
    model.build()
    model.load_weights(trained / "model.weights.h5")
    return model, schema


def load_rank(examples: Path, trained: Path) -> tuple[keras.Model, Schema]:
    """The trained rank model of a directory, and the schema it was built for."""
    about = json.loads((trained / "config.json").read_text())
    schema = Schema.load(examples / "schema")
    module = penstock.module("rank", about["model"])
    model = module.build(penstock.config(module, about["config"]), schema)
    model.load_weights(trained / "model.weights.h5")
    return model, schema


def _positives(examples: Path, part: str, schema: Schema) -> pl.DataFrame:
    """The long views of known items."""
    rows = read_slice(examples, part).filter(pl.col(RECALL_LABEL) == 1)
    rows = rows.filter(pl.col("item_id").is_in(schema.vocabularies["item_id"].tolist()))
    if rows.is_empty():
        raise TrainingError(f"the {part} slice has no {RECALL_LABEL} of a known item: recall has nothing to learn")
    return rows


def _items(rows: pl.DataFrame, schema: Schema) -> np.ndarray:
    """The item index of each row, `[rows]`."""
    return encode_ids(rows["item_id"].to_numpy(), schema.vocabularies["item_id"])


def _write(out: Path, model: keras.Model, name: str, config: Any, seed: int, history: list[dict[str, float]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_weights(out / "model.weights.h5")
    about = {"model": name, "config": dataclasses.asdict(config), "seed": seed}
    (out / "config.json").write_text(json.dumps(about, indent=1))
    (out / "history.json").write_text(json.dumps(history, indent=1))
