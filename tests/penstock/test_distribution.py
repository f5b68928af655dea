"""Training on several devices and hosts is training on one: the same losses, whoever is killed on the way.

Replicas sum in another order than one device, which changes the last digits of a float32: 1e-7 of a loss was seen, and
3e-6 of a weight. `CLOSE` is above that, and far below what a wrong share, a row that is counted twice, or negatives of
another replica would change. `HALF` is five times the 4e-3 that a number of bfloat16 is rounded by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock import distribution, export, optimizers, training
from penstock.catalogue import Catalogue
from penstock.examples import write_examples
from penstock.fitting import PRECISIONS, Rows, precision
from penstock.ranking import RankConfig
from tests.penstock.conftest import catalogue, joined_rows
from tests.penstock.test_models import thin
from tests.penstock.test_objectives import BATCH, CONFIG, KNOWN, _model
from tests.penstock.test_ranking import ROWS, _ranking

ROOT = Path(__file__).resolve().parents[2]
CLOSE = 1e-5
HALF = 0.02
WAYS = {"epochs": 4, "patience": 9, "batch_size": 64, "dropout": 0.0, "sample": 16}


def train(examples: Path, out: Path, state: Path, precision: str = "float32") -> None:
    training.train_recall(examples, "youtube_dnn", WAYS | {"precision": precision}, 3, out, state)


def history(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "history.json").read_text())


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Examples of few rows and features."""
    out = tmp_path_factory.mktemp("few")
    write_examples(joined_rows(rows=1200), catalogue(), out)
    return thin(out)


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory) -> Path:
    """What one process with one device trains."""
    folder = tmp_path_factory.mktemp("alone")
    train(few, folder / "trained", folder / "state")
    return folder / "trained"


def _start(call: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """A function of this module in a process of its own."""
    code = f"import sys; from pathlib import Path; from tests.penstock import test_distribution as t; t.{call}"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def _workers(examples: Path, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two, on loopback; each would write into a directory of its own."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        hosts = [f"127.0.0.1:{one.getsockname()[1]}" for one in taken]
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(2):
            named = json.dumps({"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}})
            call = "train(*map(Path, sys.argv[1:]))"
            process = _start(call, examples, folder / f"worker{index}", folder / "state", TF_CONFIG=named)
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield started


@pytest.fixture(scope="module")
def resumed(few, tmp_path_factory) -> tuple[Path, str]:
    """What two workers left, started again after one was killed past the first epoch, and what the chief said."""
    folder = tmp_path_factory.mktemp("workers")
    with _workers(few, folder) as (chief, other):
        for line in chief.stdout:  # who has written its checkpoint by then
            if line.startswith("epoch 1/4"):
                other.send_signal(signal.SIGKILL)
                break
        said = chief.communicate(timeout=180)[0]
        assert chief.returncode != 0, said  # a batch without the other's part is none
    with _workers(few, folder) as (chief, other):
        said = chief.communicate(timeout=180)[0]
        assert (chief.returncode, other.wait(60)) == (0, 0), said
    return folder, said


def test_two_workers_of_which_one_was_killed_train_as_one_process_does(alone, resumed):
    folder, said = resumed
    assert "goes on after epoch" in said  # the first, or what a slow machine let pass before the kill
    for row, expected in zip(history(folder / "worker0"), history(alone), strict=True):
        assert row == pytest.approx(expected, rel=CLOSE)


def test_the_chief_alone_writes(alone, resumed):
    folder, _ = resumed
    assert sorted(path.name for path in folder.iterdir()) == ["state", "worker0"]
    assert sorted(path.name for path in (folder / "worker0").iterdir()) == sorted(p.name for p in alone.iterdir())


def replicas() -> None:
    """Prints what two devices of one process come to beside one: a line of JSON."""
    processor = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found = {}
    for name, case in CASES.items():
        with two.scope():
            of_two = case()
        found[name] = [[np.asarray(part, np.float64).tolist() for part in parts] for parts in (case(), of_two)]
    with two.scope():
        found["overflow"] = _overflow(two)
    print(json.dumps(found))


def _fitted(model: keras.Model, rows: Rows, optimizer: str, scaled: bool = False) -> list[Any]:
    """The loss of an epoch, and the weights after it."""
    model.compile(optimizers.build(optimizer, 0.05, scaled), run_eagerly=True)
    order = np.random.default_rng(0).permutation(rows.count)
    return [model.fit(rows.shared(order), shuffle=False, verbose=0).history["loss"], *model.get_weights()]


def _recall(loss: str) -> list[Any]:
    users = np.arange(60) % KNOWN
    targets = {"item": (users + 2).astype(np.int32), "row": np.arange(60, dtype=np.int32)}
    counts = np.array([0, 0, *[5] * KNOWN])
    model = _model(dataclasses.replace(CONFIG, loss=loss), counts)
    return _fitted(model, Rows({"user": users.astype(np.int32)}, targets, BATCH), "adagrad")


def _ranked(weighting: str, name: str = "float32") -> list[Any]:
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(3)
    with precision(name):
        model = _ranking(RankConfig(weighting=weighting))
    targets = {task: (random.random(ROWS) < 0.4).astype(np.float32) for task in model.config.tasks}
    rows = Rows({"x": random.normal(size=(ROWS, 2)).astype(np.float32)}, targets, 16)
    return _fitted(model, rows, "adam", scaled=name == "mixed_float16")


def _rows() -> list[Any]:
    """The rows of each batch, one replica's after the other's."""
    rows = Rows({"x": np.arange(23)}, (), 8)
    order = np.random.default_rng(0).permutation(23)
    local = tf.distribute.get_strategy().experimental_local_results
    return [np.concatenate([part.numpy() for part in local(inputs["x"])]) for inputs, _ in rows.shared(order)]


CASES: dict[str, Callable[[], list[Any]]] = {
    "rows": _rows,
    **{loss: lambda loss=loss: _recall(loss) for loss in ("sampled_softmax", "in_batch", "sogram", "sagram")},
    "pareto": lambda: _ranked("pareto"),
}


def _overflow(strategy: tf.distribute.Strategy) -> list[float]:
    """Two weights and the scale, after a step whose gradient one replica found no number."""
    weight = keras.Variable([1.0, 2.0])
    optimizer = optimizers.build("adagrad", 0.1, scaled=True)
    optimizer.build([weight])

    @tf.function
    def step() -> None:
        def on_replica() -> None:
            found = tf.where(distribution.place() == 1, np.inf, 1.0)
            optimizer.apply([tf.fill([2], tf.cast(found, tf.float32))], [weight])

        strategy.run(on_replica)

    step()
    return [*np.asarray(weight).tolist(), float(np.asarray(optimizer.dynamic_scale))]


@pytest.fixture(scope="module")
def mirrored() -> dict[str, Any]:
    with _start("replicas()") as process:
        said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("name", [name for name in CASES if name != "rows"])
def test_two_devices_make_the_steps_that_one_makes(name, mirrored):
    for one, two in zip(*mirrored[name], strict=True):
        np.testing.assert_allclose(two, one, rtol=CLOSE, atol=1e-6)


def test_a_batch_is_shared_evenly_and_the_last_filled_up_from_the_first_rows(mirrored):
    one, two = mirrored["rows"]
    assert [len(batch) for batch in one] == [8, 8, 7]
    assert two == [*one[:2], [*one[2], one[0][0]]]


def test_a_step_that_overflows_on_one_device_is_left_out_on_all(mirrored):
    assert mirrored["overflow"] == [1.0, 2.0, 2.0**14]


def test_a_process_with_one_device_has_no_strategy(monkeypatch):
    one = {"cluster": {"worker": ["127.0.0.1:1"]}, "task": {"type": "worker", "index": 0}}
    for named in ("{}", json.dumps(one)):
        monkeypatch.setenv("TF_CONFIG", named)
        with distribution.scope():
            assert not tf.distribute.has_strategy()
            assert distribution.is_chief()
            assert distribution.of_chief({"loss": 0.1}) == {"loss": 0.1}


def test_half_the_bits_train_about_the_same_model_which_is_served_in_float32(alone, few, tmp_path):
    train(few, tmp_path / "trained", tmp_path / "state", "mixed_bfloat16")
    for row, expected in zip(history(tmp_path / "trained"), history(alone), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=HALF)
        assert row["loss"] != expected["loss"]
    kinds: set[str] = set()
    with h5py.File(tmp_path / "trained" / "model.weights.h5") as file:
        file.visititems(lambda _, node: kinds.add(str(getattr(node, "dtype", "group"))))
    assert kinds == {"float32", "int64", "group"}
    model, schema = training.load_recall(few, tmp_path / "trained")
    export.export_recall(model, schema, Catalogue.read(few, schema), tmp_path / "out")
    signature = tf.saved_model.load(str(tmp_path / "out" / "saved_model")).signatures["serving_default"]
    specs = [*signature.structured_input_signature[1].values(), *signature.structured_outputs.values()]
    assert {spec.dtype for spec in specs} <= {tf.float32, tf.int64, tf.int32}


def test_a_rank_model_learns_about_the_same_in_each_precision():
    losses, *weights = zip(*(_ranked("uncertainty", name) for name in PRECISIONS), strict=True)
    for of_half in losses[1:]:
        assert of_half == pytest.approx(losses[0], rel=HALF)
        assert of_half != losses[0]
    assert {weight.dtype for of_all in weights for weight in of_all} == {np.dtype("float32")}


def test_a_precision_holds_for_what_is_made_within(monkeypatch):
    with precision("mixed_bfloat16"):
        inside = keras.layers.Dense(1)
    assert inside.compute_dtype == "bfloat16"
    assert keras.layers.Dense(1).compute_dtype == "float32"
    with (
        pytest.raises(ValueError, match=f"unknown precision 'float8': there are {', '.join(PRECISIONS)}"),
        precision("float8"),
    ):
        pass
