from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.layers.latent_cross import LatentCross, latent_cross


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _filled(sizes, hidden, contexts):
    """A layer with weights far from 0."""
    layer = LatentCross(sizes)
    layer(hidden, contexts)
    layer.set_weights([_normal(place, *weight.shape) for place, weight in enumerate(layer.get_weights())])
    return layer


def test_multiplies_by_one_and_the_sum_of_the_contexts():
    hidden = np.array([[2.0, 3.0]], np.float32)
    contexts = [np.array([[0.5, -1.0]], np.float32), np.array([[0.25, 2.0]], np.float32)]
    np.testing.assert_allclose(latent_cross(hidden, contexts), [[2.0 * 1.75, 3.0 * 2.0]])


def test_without_context_or_with_contexts_of_zero_nothing_changes():
    hidden = _normal(0, 4, 3)
    np.testing.assert_array_equal(latent_cross(hidden, []), hidden)
    np.testing.assert_array_equal(latent_cross(hidden, [np.zeros((4, 3), np.float32)] * 2), hidden)


def test_a_number_of_zero_changes_nothing():
    hidden = _normal(0, 4, 3)
    layer = _filled((0,), hidden, [np.ones(4, np.float32)])
    np.testing.assert_array_equal(layer(hidden, [np.zeros(4, np.float32)]), hidden)


def test_it_starts_as_next_to_nothing():
    keras.utils.set_random_seed(0)
    layer, hidden = LatentCross((50, 0)), np.ones((1000, 8), np.float32)
    ids, numbers = np.arange(1000) % 50, _normal(1, 1000)
    factors = np.asarray(layer(hidden, [ids, numbers]))
    assert np.abs(factors - 1.0).max() < 0.1
    table = np.asarray(layer.parts[0].table)
    assert table.mean() == pytest.approx(0.0, abs=0.002)
    assert table.std() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("length", [None, 1, 5])
@pytest.mark.parametrize("by_place", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_loops(batch, length, by_place):
    random = np.random.default_rng(2)
    hidden = _normal(0, batch, length, 4) if length else _normal(0, batch, 4)
    shape = (batch, length) if length and by_place else (batch,)
    contexts = [
        random.integers(0, 6, shape),
        random.normal(size=shape).astype(np.float32),
        random.integers(0, 2, shape),
    ]
    layer = _filled((6, 0, 2), hidden, contexts)
    first, number, last = (np.asarray(weight) for weight in layer.get_weights())
    found = np.asarray(layer(hidden, contexts))
    for row in range(batch):
        for place in range(length or 1):
            at = (row, place) if length and by_place else (row,)
            vector = first[contexts[0][at]] + contexts[1][at] * number[0] + last[contexts[2][at]]
            of = (row, place) if length else (row,)
            np.testing.assert_allclose(found[of], hidden[of] * (1.0 + vector), rtol=1e-4, atol=1e-5)


def test_the_gradients():
    hidden, ids, numbers = tf.Variable(_normal(0, 4, 3)), np.array([1, 0, 1, 1]), _normal(3, 4)
    layer, weights = _filled((3, 0), hidden.numpy(), [ids, numbers]), _normal(4, 4, 3)
    table, kernel = layer.parts[0].table, layer.parts[1].kernel
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(hidden, [ids, numbers]) * weights)
    of_hidden, of_table, of_kernel = tape.gradient(loss, [hidden, table.value, kernel.value])
    factor = 1.0 + np.asarray(table)[ids] + numbers[:, None] * np.asarray(kernel)
    np.testing.assert_allclose(of_hidden, weights * factor, rtol=1e-4, atol=1e-6)
    expected = np.zeros((3, 3))
    np.add.at(expected, ids, weights * hidden.numpy())
    np.testing.assert_allclose(tf.convert_to_tensor(of_table), expected, rtol=1e-4, atol=1e-6)
    expected = (weights * hidden.numpy() * numbers[:, None]).sum(axis=0, keepdims=True)
    np.testing.assert_allclose(of_kernel, expected, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_contexts_add_up_in_any_order(seed):
    hidden, first, second = (_normal(seed + place, 3, 4) for place in range(3))
    both = np.asarray(latent_cross(hidden, [first, second]))
    np.testing.assert_allclose(both, latent_cross(hidden, [second, first]), rtol=1e-4, atol=1e-5)
    one, other = np.asarray(latent_cross(hidden, [first])), np.asarray(latent_cross(hidden, [second]))
    np.testing.assert_allclose(both, one + other - hidden, rtol=1e-4, atol=1e-5)


def test_a_functional_model_of_a_sequence_and_contexts_of_the_request():
    hidden, device, idle = keras.Input((None, 3)), keras.Input((), dtype="int32"), keras.Input((None,))
    model = keras.Model([hidden, device, idle], LatentCross((4, 0))(hidden, [device, idle]))
    assert model.output_shape == (None, None, 3)
    values = [_normal(0, 2, 5, 3), np.array([3, 0], np.int32), _normal(1, 2, 5)]
    expected = model.layers[-1](values[0], values[1:])
    np.testing.assert_allclose(model(values), expected)


def test_a_copy_from_its_config_is_the_same_layer():
    layer = LatentCross((4, 0), 0.05)
    copy = keras.layers.deserialize(keras.layers.serialize(layer))
    assert copy.get_config() == layer.get_config()


def _unexplained(model, inputs, targets, steps):
    """The share of the variance that is left after so many steps on all rows."""
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs)[:, 0] - targets))
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply([tf.convert_to_tensor(gradient) for gradient in gradients])
        return loss

    for _ in range(steps):
        loss = step()
    return float(loss) / float(np.var(targets))


def test_products_with_context_are_hard_for_a_network_of_sums_of_the_same_size():
    keras.utils.set_random_seed(0)
    latent, context = _normal(1, 2000, 12), np.random.default_rng(0).integers(0, 20, 2000)
    targets = np.sum(latent * _normal(2, 20, 12)[context], axis=1)
    inputs = [keras.Input((12,)), keras.Input((), dtype="int32")]
    crossed = keras.Model(inputs, keras.layers.Dense(1)(LatentCross((20,))(inputs[0], inputs[1:])))
    beside = keras.layers.Concatenate()([inputs[0], keras.layers.Embedding(20, 4)(inputs[1])])
    summed = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(10, "relu")(beside)))
    assert summed.count_params() > crossed.count_params()
    rows = [tf.constant(latent), tf.constant(context, tf.int32)]
    assert _unexplained(crossed, rows, targets, 300) < 0.001
    assert _unexplained(summed, rows, targets, 300) > 0.1
