"""Training on several devices, of one host or of several, by `tf.distribute`.

Each replica, a device, holds all weights and takes an equal part of each batch; gradients are summed over the replicas
before weights change, so that a step is the one that one device would make of the whole batch. With a single device
nothing here does anything; another backend than TensorFlow trains on its first.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras

from penstock import backends


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """What is built and fitted within is so on all devices: of the workers in `TF_CONFIG`, or else of this host's GPUs.

    A strategy that is in force stays. TensorFlow connects workers before it computes anything, and waits for all; none
    leaves before the chief does, which the others' connections are made by.

    Raises:
        RuntimeError: there are several workers, and this one has computed something before, or is not of TensorFlow.
    """
    strategy = _strategy()
    if strategy is None:
        yield
        return
    with strategy.scope():
        yield
        of_chief({"ends": 1.0})


def _strategy() -> Any:
    """The strategy that the process is to have; None if it has one or needs none."""
    if keras.config.backend() != "tensorflow":
        if "TF_CONFIG" in os.environ:
            raise RuntimeError("TF_CONFIG is of several workers, which only KERAS_BACKEND=tensorflow has")
        return None
    import tensorflow as tf  # its strategies alone are meant

    cluster = tf.distribute.cluster_resolver.TFConfigClusterResolver().cluster_spec()
    workers = sum(cluster.num_tasks(job) for job in cluster.jobs if job in ("chief", "worker"))
    if tf.distribute.has_strategy():
        return None
    if workers > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return None


def replicas() -> int:
    """How many devices share a batch."""
    if keras.config.backend() != "tensorflow":
        return 1
    import tensorflow as tf  # its strategies alone are meant

    return tf.distribute.get_strategy().num_replicas_in_sync


def share(loss: Any) -> Any:
    """What a replica's mean loss adds to that of the whole batch, `[]`: parts are equal."""
    return loss / replicas() if replicas() > 1 else loss


def gathered(values: Any) -> Any:
    """Within a step: the rows of all replicas, `[rows, …]` → `[replicas rows, …]`; no gradient is meant to flow."""
    return _context().all_gather(values, axis=0) if replicas() > 1 else values


def summed(values: Any) -> Any:
    """Within a step: the sum over the replicas."""
    return _context().all_reduce("SUM", values) if replicas() > 1 else values


def place() -> Any:
    """Within a step: which replica this is; its rows stand at that place in what is `gathered`."""
    return _context().replica_id_in_sync_group if replicas() > 1 else 0


def batches(of_worker: Callable[[int, int], Any]) -> Any:
    """A data set for all replicas of those that each worker makes for its own, of how many there are and its number."""
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    return strategy.distribute_datasets_from_function(
        lambda context: of_worker(context.num_input_pipelines, context.input_pipeline_id)
    )


def is_chief() -> bool:
    """Whether this process is the one that decides and writes: the first worker, or the only one."""
    if replicas() == 1:
        return True
    import tensorflow as tf

    return bool(tf.distribute.get_strategy().extended.should_checkpoint)


@contextlib.contextmanager
def written(out: Path) -> Iterator[Path]:
    """Where to write what belongs into a directory: there, if this is the chief; others do alike, and keep nothing.

    All write, since Keras makes variables while it saves, and what is made under a strategy is made by all.
    """
    if is_chief():
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="penstock-") as nowhere:
        yield Path(nowhere)


def of_chief(figures: Mapping[str, float]) -> dict[str, float]:
    """The chief's figures, on every worker; none goes on before all are there.

    Each worker computes them, of the same weights; but threads sum in any order, and what decides must be the same for
    all to the last digit, or they wait for each other for ever.
    """
    if replicas() == 1:
        return dict(figures)
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    own = tf.constant([float(value) for value in figures.values()], tf.float64)
    every = strategy.gather(strategy.run(lambda: tf.identity(own)), axis=0)
    return dict(zip(figures, every.numpy()[: len(figures)].tolist(), strict=True))  # the chief is the first replica


class Model(keras.Model):
    """A model that trains on any number of devices; its `compute_loss` returns a `share` of the batch's.

    Keras's trainer does the steps, several of them a call where there is one replica. What it cannot do with several
    workers is done here: both are held by a test.
    """

    def compile(self, *args: Any, **settings: Any) -> None:
        at_once = backends.STEPS_AT_ONCE if replicas() == 1 else 1
        super().compile(*args, **{"steps_per_execution": at_once, **settings})

    def _maybe_symbolic_build(self, *args: Any, **kwargs: Any) -> None:
        # Keras would reduce a batch over the workers to see its shapes, and a batch of several inputs cannot be
        if replicas() == 1:
            super()._maybe_symbolic_build(*args, **kwargs)
        elif not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        found = super().compute_metrics(x, y, y_pred, sample_weight)
        # Keras's trainer takes the mean over several workers along an axis, which a number does not have
        return {name: value[None] for name, value in found.items()} if _several_workers() else found


def _several_workers() -> bool:
    if replicas() == 1:
        return False
    import tensorflow as tf

    return isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)


def _context() -> Any:
    import tensorflow as tf

    return tf.distribute.get_replica_context()
