"""The one loop that fits a model: batches, epochs, progress, early stopping, and going on after a stop.

What an epoch does follows from the seed, the number of the epoch and the state at its start, so that a fit that was
killed and goes on from its last epoch ends as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from penstock import backends, distribution
from penstock.durable import sync_file

PROGRESS_SECONDS = 10.0

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
"""Keras's names: `mixed_…` computes in half the bits, with weights, moments and losses in float32."""


class TrainingError(ValueError):
    """Data or parameters that cannot be trained on; the message says which and why."""


@dataclass(frozen=True)
class Settings:
    """How long and how fast to fit; `patience` is how many epochs may pass without a better one."""

    epochs: int
    batch_size: int
    learning_rate: float
    patience: int = 1


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Layers that are made within compute in a precision of `PRECISIONS`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}: there are {', '.join(PRECISIONS)}")
    former = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(former)


class Rows:
    """Rows in memory, given out in batches of `(inputs, targets)`.

    Args:
        inputs: by name, `[rows, …]`.
        targets: `[rows]`, or several by name.
    """

    def __init__(self, inputs: Mapping[str, np.ndarray], targets: Any, batch_size: int) -> None:
        self._held = backends.hold((dict(inputs), targets))
        self.batch_size = batch_size
        self.count = len(next(iter(inputs.values())))

    @property
    def steps(self) -> int:
        """Batches of an epoch; the last may be smaller."""
        return -(-self.count // self.batch_size)

    def batches(self, order: np.ndarray | None = None) -> Any:
        """The batches, as Keras and a loop take them, with the rows in some order `[rows]` or their own."""
        rows = np.arange(self.count) if order is None else order
        starts = np.arange(0, len(rows), self.batch_size)
        return backends.cut(self._held, rows, starts, np.minimum(starts + self.batch_size, len(rows)))

    def shared(self, order: np.ndarray) -> Any:
        """The batches of an epoch, each in equal parts for the replicas in force; whole for a single one.

        The last is filled up from the first rows of the epoch until it can be shared.

        Raises:
            TrainingError: a batch cannot be shared evenly.
        """
        replicas = distribution.replicas()
        if replicas == 1:
            return self.batches(order)
        if self.batch_size % replicas:
            raise TrainingError(f"a batch_size of {self.batch_size} cannot be shared evenly by {replicas} devices")
        rows = np.resize(order, -(-len(order) // replicas) * replicas)
        starts = np.arange(0, len(rows), self.batch_size)[:, None]
        parts = (np.minimum(starts + self.batch_size, len(rows)) - starts) // replicas
        starts = starts + parts * np.arange(replicas)

        def of_worker(pipelines: int, place: int) -> Any:
            here = replicas // pipelines
            mine = slice(place * here, (place + 1) * here)
            return backends.cut(self._held, rows, starts[:, mine].ravel(), (starts + parts)[:, mine].ravel())

        return distribution.batches(of_worker)


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


@dataclass(frozen=True)
class Measure:
    """What tells a good epoch from a bad one on the validation slice.

    Attributes:
        name: the figure that is compared, among those `figures` gives.
        figures: called after each epoch, by name.
        sign: 1 if more is better, -1 if less is.
    """

    name: str
    figures: Callable[[], Mapping[str, float]]
    sign: int


class _Progress(keras.callbacks.Callback):
    """A line every few seconds within an epoch: steps, loss, speed, time left."""

    def __init__(self, title: str, train: Rows) -> None:
        super().__init__()
        self._title, self._steps, self._batch_size = title, train.steps, train.batch_size
        self._started = self._said = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        now = time.monotonic()
        if now - self._said < PROGRESS_SECONDS:
            return
        self._said = now
        done = min(batch + 1, self._steps)  # the last call of several steps may be of fewer than Keras says
        each = (now - self._started) / done
        print(
            f"{self._title}  step {done}/{self._steps}  loss {(logs or {}).get('loss', 0.0):.4f}"
            f"  {self._batch_size / each:,.0f} rows/s  {each * (self._steps - done):.0f} s left",
            flush=True,
        )


class Checkpoint:
    """The state of a fit at the end of its last epoch, in a directory that survives the process.

    Args:
        identity: what the fit is of: the state of another is not taken.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._former = folder.with_name(f".{folder.name}.former")
        self._identity = json.dumps(identity, sort_keys=True)

    def save(self, model: keras.Model, best: list[np.ndarray], history: list[dict[str, float]]) -> None:
        """Takes the place of the former state, whole or not at all."""
        work = self._folder.with_name(f".{self._folder.name}.part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        np.savez(work / "state.npz", allow_pickle=False, **_numbered(_state(model)))
        np.savez(work / "best.npz", allow_pickle=False, **_numbered(best))
        (work / "about.json").write_text(json.dumps({"identity": self._identity, "history": history}))
        for path in work.iterdir():
            sync_file(path)
        shutil.rmtree(self._former, ignore_errors=True)
        if self._folder.exists():
            self._folder.rename(self._former)
        work.rename(self._folder)
        shutil.rmtree(self._former, ignore_errors=True)

    def restore(self, model: keras.Model) -> tuple[list[np.ndarray], list[dict[str, float]]]:
        """Puts the saved state into a built model and optimizer; best weights and history, both [] if there is none."""
        folder = self._folder if self._folder.exists() else self._former  # killed between two renames
        try:
            about = json.loads((folder / "about.json").read_text())
        except (OSError, ValueError):
            return [], []
        if about["identity"] != self._identity:
            return [], []
        for variable, value in zip(_variables(model), _listed(folder / "state.npz"), strict=True):
            variable.assign(value)
        return _listed(folder / "best.npz"), about["history"]


def fit(
    model: keras.Model, train: Rows, measure: Measure, settings: Settings, seed: int, checkpoint: Checkpoint | None
) -> list[dict[str, float]]:
    """Fits a compiled model, keeps the weights of its best epoch by `measure`, and returns one row an epoch.

    Of several workers all call it alike; the chief's figures decide for all, and the chief alone writes the checkpoint,
    which all read.

    Raises:
        TrainingError: the loss is not finite, or a worker does not see the chief's checkpoint.
    """
    model.optimizer.build(model.trainable_variables)  # a step that makes variables is traced twice
    best, history = checkpoint.restore(model) if checkpoint else ([], [])
    if distribution.of_chief({"epochs": len(history)}) != {"epochs": len(history)}:
        raise TrainingError("this worker has another checkpoint than the chief: workers share its directory")
    if history:
        print(f"goes on after epoch {len(history)} of {settings.epochs}", flush=True)
    for epoch in range(len(history), settings.epochs):
        if history and len(history) - _best(history, measure) >= settings.patience:
            break
        started = time.monotonic()
        order = np.random.default_rng([seed, epoch]).permutation(train.count)
        title = f"epoch {epoch + 1}/{settings.epochs}"
        progress = _Progress(title, train)
        fitted = model.fit(train.shared(order), callbacks=[progress], shuffle=False, verbose=0)
        row = {name: float(values[0]) for name, values in fitted.history.items()}
        row |= {name: float(value) for name, value in measure.figures().items()}
        row = {"epoch": epoch + 1, **distribution.of_chief(row)}
        if not all(np.isfinite(value) for value in row.values()):
            raise TrainingError("the loss is not finite: lower the learning rate, or look at the features")
        history = [*history, row]
        if _best(history, measure) == len(history):
            best = [np.array(weight) for weight in model.get_weights()]
        if checkpoint and distribution.is_chief():
            checkpoint.save(model, best, history)
        each = time.monotonic() - started
        print(
            f"{title}  loss {row['loss']:.4f}  {measure.name} {row[measure.name]:.4f}"
            f"  {each * (settings.epochs - epoch - 1):.0f} s left at most",
            flush=True,
        )
    model.set_weights(best)
    return history


def _best(history: list[dict[str, float]], measure: Measure) -> int:
    """The number of the best epoch, the first of equals."""
    return 1 + int(np.argmax([measure.sign * row[measure.name] for row in history]))


def _variables(model: keras.Model) -> list[keras.Variable]:
    """All that a step reads or changes: weights, the state of random numbers, moments of the optimizer."""
    return [*model.variables, *model.optimizer.variables]


def _state(model: keras.Model) -> list[np.ndarray]:
    return [np.array(ops.convert_to_numpy(variable)) for variable in _variables(model)]


def _numbered(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{place:06d}": array for place, array in enumerate(arrays)}


def _listed(path: Path) -> list[np.ndarray]:
    with np.load(path) as stored:
        return [stored[name] for name in sorted(stored.files)]
