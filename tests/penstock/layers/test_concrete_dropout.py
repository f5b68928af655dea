from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.layers.concrete_dropout import ConcreteDropout


def _entropy(rate):
    return -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "width"), [(10, 4), (1000, 64)])
def test_what_it_adds_is_the_entropy_of_the_rate_and_its_gradient_the_closed_form(rate, rows, width):
    layer = ConcreteDropout(rows, rate)
    layer.build((None, width))
    with tf.GradientTape() as tape:
        layer(np.ones((3, width), np.float32), training=True)
        (loss,) = layer.losses
    assert float(loss) == pytest.approx(-width / rows * _entropy(rate), rel=1e-4)
    # dH/dlogit p = −logit p · p (1 − p)
    expected = width / rows * np.log(rate / (1 - rate)) * rate * (1 - rate)
    assert float(tape.gradient(loss, layer.logit.value)) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_it_changes_nothing_and_adds_nothing_when_not_training():
    layer = ConcreteDropout(10, 0.4)
    inputs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for training in (False, None):
        np.testing.assert_array_equal(np.asarray(layer(inputs, training=training)), inputs)
        assert layer.losses == []


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_so_many_are_dropped_and_the_mean_stays(rate):
    keras.utils.set_random_seed(0)
    masks = np.asarray(ConcreteDropout(10, rate)(np.ones((1000, 200), np.float32), training=True))
    kept = masks * (1 - rate)
    assert (kept < 0.5).mean() == pytest.approx(rate, abs=0.005)
    assert masks.mean() == pytest.approx(1.0, abs=0.02)
    assert ((kept < 0.05) | (kept > 0.95)).mean() > 0.8  # nearly all or nothing


def test_a_rate_near_zero_is_no_dropout():
    inputs = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    np.testing.assert_allclose(ConcreteDropout(10, 1e-9)(inputs, training=True), inputs, rtol=1e-3)


def test_noise_that_harms_lowers_the_rate_and_noise_that_does_not_raises_it_to_a_half():
    inputs = tf.ones((64, 16))

    def learned(harm):
        keras.utils.set_random_seed(2)
        layer = ConcreteDropout(1000, 0.2)
        optimizer = keras.optimizers.Adam(0.05)
        layer.build(inputs.shape)
        optimizer.build([layer.logit])

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                outputs = layer(inputs, training=True)
                loss = harm * tf.reduce_mean(tf.square(outputs - inputs)) + layer.losses[0]
            optimizer.apply_gradients([(tape.gradient(loss, layer.logit.value), layer.logit)])

        for _ in range(150):
            step()
        return float(keras.ops.sigmoid(layer.logit))

    assert learned(1.0) < 0.02
    assert learned(0.0) == pytest.approx(0.5, abs=0.02)


@given(seed=st.integers(0, 100), rate=st.floats(0.01, 0.9))
@settings(max_examples=20, deadline=None)
def test_a_number_never_changes_its_sign_nor_grows_beyond_its_share(seed, rate):
    inputs = np.random.default_rng(seed).normal(size=(4, 5)).astype(np.float32)
    outputs = np.asarray(ConcreteDropout(10, rate)(inputs, training=True))
    assert np.all(outputs * inputs >= 0)
    assert np.all(np.abs(outputs) <= np.abs(inputs) / (1 - rate) * (1 + 1e-5))


def test_half_precision_is_finite():
    layer = ConcreteDropout(10, 0.5, dtype="mixed_float16")
    inputs = tf.ones((500, 200), tf.float16)
    layer.build(inputs.shape)
    with tf.GradientTape() as tape:
        outputs = layer(inputs, training=True)
        total = tf.reduce_mean(tf.cast(outputs, tf.float32))
    assert outputs.dtype == tf.float16
    assert np.isfinite(float(tape.gradient(total, layer.logit.value)))


def test_it_comes_back_from_its_config():
    layer = ConcreteDropout.from_config(ConcreteDropout(70, 0.25).get_config())
    layer.build((None, 3))
    assert layer.rows == 70
    assert float(keras.ops.sigmoid(layer.logit)) == pytest.approx(0.25)


def test_rates_and_rows_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="starts inside"):
        ConcreteDropout(10, 0.0)
    with pytest.raises(ValueError, match="rows is how many"):
        ConcreteDropout(0)
