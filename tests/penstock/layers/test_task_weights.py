from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.layers.task_weights import HomoscedasticWeights

KINDS = {"watch_time": "regression", "click": "classification", "stay": "likelihood"}


def _losses(**values):
    return {task: tf.constant(value, tf.float32) for task, value in values.items()}


def test_at_the_start_sigma_is_one():
    layer = HomoscedasticWeights(KINDS)
    total = layer(_losses(watch_time=3.0, click=0.5, stay=-2.0))
    assert float(total) == pytest.approx(3.0 / 2 + 0.5 - 2.0)
    assert layer.by_task() == {"watch_time": 0.5, "click": 1.0, "stay": 1.0}


@pytest.mark.parametrize("seed", range(3))
def test_the_total_and_its_gradients_equal_the_loops(seed):
    random = np.random.default_rng(seed)
    kinds = {f"task{place}": kind for place, kind in enumerate(["regression", "classification", "likelihood"] * 2)}
    values = {task: float(random.uniform(0.1, 3)) for task in kinds}
    layer = HomoscedasticWeights(kinds)
    layer.build()
    log_variances = random.normal(size=4).astype(np.float32)
    layer.log_variances.assign(log_variances)
    total, slopes, weights, learned = 0.0, [], {}, iter(log_variances)
    for task, kind in kinds.items():
        if kind == "likelihood":
            total, weights[task] = total + values[task], 1.0
            continue
        variance = np.exp(next(learned))
        weights[task] = 1 / (2 * variance) if kind == "regression" else 1 / variance
        total += weights[task] * values[task] + np.log(np.sqrt(variance))
        slopes.append(-weights[task] * values[task] + 0.5)
    variables = {task: tf.Variable(value, dtype=tf.float32) for task, value in values.items()}
    with tf.GradientTape(persistent=True) as tape:
        ours = layer({task: tf.convert_to_tensor(variable) for task, variable in variables.items()})
    assert float(ours) == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(tape.gradient(ours, layer.log_variances.value), slopes, rtol=1e-4, atol=1e-6)
    assert layer.by_task() == pytest.approx(weights, rel=1e-5)
    for task, variable in variables.items():
        assert float(tape.gradient(ours, variable)) == pytest.approx(weights[task], rel=1e-5)


@given(loss=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_it_is_smallest_at_the_closed_form_and_its_gradient_there_is_that_of_half_the_log(loss):
    layer = HomoscedasticWeights({"regression": "regression", "classification": "classification"})
    layer.build()
    layer.log_variances.assign(np.log([loss, 2 * loss]))
    variables = [tf.Variable(loss, dtype=tf.float32), tf.Variable(loss, dtype=tf.float32)]
    with tf.GradientTape(persistent=True) as tape:
        losses = [tf.convert_to_tensor(variable) for variable in variables]
        total = layer(dict(zip(("regression", "classification"), losses, strict=True)))
    np.testing.assert_allclose(tape.gradient(total, layer.log_variances.value), [0.0, 0.0], atol=1e-5)
    for variable in variables:
        assert float(tape.gradient(total, variable)) == pytest.approx(0.5 / loss, rel=1e-4)
    expected = 0.5 + 0.5 * np.log(loss) + 0.5 + 0.5 * np.log(2 * loss)
    assert float(total) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_learning_sigma_alone_gets_there():
    losses = _losses(watch_time=4.0, click=0.1, stay=-5.0)
    layer = HomoscedasticWeights(KINDS)
    layer.build()
    optimizer = keras.optimizers.Adam(0.1)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            total = layer(losses)
        optimizer.apply_gradients([(tape.gradient(total, layer.log_variances.value), layer.log_variances)])

    optimizer.build([layer.log_variances])
    for _ in range(250):
        step()
    np.testing.assert_allclose(np.exp(layer.log_variances.numpy()), [4.0, 0.2], rtol=0.01)
    assert layer.by_task() == pytest.approx({"watch_time": 1 / 8, "click": 5.0, "stay": 1.0}, rel=0.01)


def test_likelihoods_alone_are_their_sum():
    layer = HomoscedasticWeights({"one": "likelihood", "two": "likelihood"})
    assert float(layer(_losses(one=1.5, two=-4.0))) == pytest.approx(-2.5)
    assert layer.by_task() == {"one": 1.0, "two": 1.0}


def test_the_order_of_the_losses_does_not_matter():
    layer = HomoscedasticWeights(KINDS)
    layer.build()
    layer.log_variances.assign([1.0, -1.0])
    ordered = layer(_losses(watch_time=3.0, click=0.5, stay=1.0))
    assert float(layer(_losses(stay=1.0, click=0.5, watch_time=3.0))) == pytest.approx(float(ordered))


def test_half_precision_keeps_the_sum_whole():
    layer = HomoscedasticWeights(KINDS, dtype="mixed_float16")
    total = layer(_losses(watch_time=200_000.0, click=0.5, stay=1.0))
    assert float(total) == pytest.approx(100_001.5)


def test_it_comes_back_from_its_config():
    layer = HomoscedasticWeights.from_config(HomoscedasticWeights(KINDS).get_config())
    assert layer.kinds == KINDS


def test_kinds_and_tasks_that_it_does_not_know_are_refused():
    with pytest.raises(ValueError, match="the kind of task click is one of regression, classification, likelihood"):
        HomoscedasticWeights({"click": "binary"})
    with pytest.raises(ValueError, match="the tasks are watch_time, click, stay"):
        HomoscedasticWeights(KINDS)(_losses(click=1.0))
