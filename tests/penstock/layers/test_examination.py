from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from penstock.layers.examination import Examination
from penstock.layers.position_bias import PACE, PositionBias


def _filled(positions, devices, **arguments):
    """A layer with random curves."""
    layer = Examination(positions, devices, **arguments)
    layer.build()
    random = np.random.default_rng(0)
    layer.shared.assign(random.normal(size=layer.shared.shape) / PACE)
    layer.own.assign(random.normal(size=layer.own.shape) / PACE)
    return layer


def test_before_it_learns_every_place_is_looked_at():
    layer = Examination(3, 2)
    np.testing.assert_array_equal(layer(np.array([0, 2, -1]), np.array([0, 1, 1]), training=True), np.zeros((3, 1)))


def test_the_place_that_is_looked_at_most_has_one():
    layer = Examination(3, 1)
    layer.build()
    layer.shared.assign(np.log([[0.5], [2.0], [1.0]]) / PACE)
    np.testing.assert_allclose(layer.curve(0), [0.25, 1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("devices", [1, 3])
def test_equals_the_loops(positions, devices):
    random = np.random.default_rng(1)
    layer = _filled(positions, devices)
    shown, by = random.integers(-1, positions + 2, 60), random.integers(0, devices, 60)
    layer.adapt(shown, by)
    position, device = random.integers(-1, positions + 2, 30), random.integers(0, devices, 30)
    found = np.exp(np.asarray(layer(position, device)))[:, 0]
    for row in range(30):
        c = PACE * (np.asarray(layer.shared) + np.asarray(layer.own)[device[row]])[:, 0]
        e = np.exp(c - max(c))
        seen = [place for place, other in zip(shown, by, strict=True) if other == device[row] and place >= 0]
        mean = sum(e[min(place, positions - 1)] for place in seen) / len(seen)
        expected = e[min(position[row], positions - 1)] if position[row] >= 0 else mean
        assert found[row] == pytest.approx(expected, rel=1e-5)
    for each in range(devices):
        at_all = np.exp(np.asarray(layer(np.arange(positions), np.full(positions, each))))[:, 0]
        np.testing.assert_allclose(layer.curve(each), at_all, rtol=1e-6)


@given(st.floats(-12.0, 12.0), st.floats(1e-4, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_logit_is_that_of_the_product(r, e):
    found = float(Examination(2, 1).applied(np.float32(r), np.float32(np.log(e))))
    # the least that is missed keeps the logit below 13.8
    assert found == pytest.approx(logit(np.clip(e * expit(r), 0.0, 1.0 - 1e-6)), rel=1e-2, abs=1e-2)


def test_where_all_is_looked_at_the_logit_is_as_it_was():
    r = np.linspace(-8.0, 8.0, 9, dtype=np.float32)
    np.testing.assert_allclose(Examination(2, 1).applied(r, np.zeros(9, np.float32)), r, atol=5e-3)


def test_gradients_are_those_of_the_closed_form():
    """d logit(e σ)/dr = (1 − σ) / (1 − e σ), d/d log e = 1 / (1 − e σ)."""
    r = tf.constant(np.linspace(-5.0, 5.0, 11), tf.float32)
    log_e = tf.constant(np.linspace(-3.0, -0.01, 11), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([r, log_e])
        total = tf.reduce_sum(Examination(2, 1).applied(r, log_e))
    of_r, of_e = tape.gradient(total, [r, log_e])
    sigma, e = expit(r.numpy()), np.exp(log_e.numpy())
    np.testing.assert_allclose(of_r, (1.0 - sigma) / (1.0 - e * sigma), rtol=1e-3)
    np.testing.assert_allclose(of_e, 1.0 / (1.0 - e * sigma), rtol=1e-3)


@pytest.mark.parametrize("log_e", [0.0, -1e-9, -80.0])
@pytest.mark.parametrize("r", [-80.0, 0.0, 80.0])
def test_the_ends_have_finite_gradients(log_e, r):
    values = [tf.constant([r]), tf.constant([log_e])]
    with tf.GradientTape() as tape:
        tape.watch(values)
        found = Examination(2, 1).applied(*values)
    assert np.isfinite(found).all()
    assert all(np.isfinite(gradient).all() for gradient in tape.gradient(found, values))


def test_a_missing_position_teaches_nothing():
    layer = _filled(4, 2)
    variables = [layer.shared.value, layer.own.value]
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(np.array([-1, -7]), np.array([0, 1]), training=True))
    assert all(gradient is None or not np.any(gradient) for gradient in tape.gradient(total, variables))


def test_a_share_of_the_rows_has_the_mean_in_training():
    layer = _filled(3, 1, seed=2)
    found = np.asarray(layer(np.zeros(20_000, int), np.zeros(20_000, int), training=True))[:, 0]
    mean = np.log(layer.curve(0).mean())
    assert np.mean(np.isclose(found, mean)) == pytest.approx(0.1, abs=0.01)
    assert np.isclose(found, mean).sum() + np.isclose(found, np.log(layer.curve(0)[0])).sum() == 20_000


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 1), "at least 1, not 0"), ((3, 1, 1.0), "a share of the rows below 1, not 1.0")]
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Examination(*arguments)


def test_a_copy_from_its_config_is_the_same_layer():
    layer = Examination(5, 2, 0.2, seed=1)
    copy = keras.layers.deserialize(keras.layers.serialize(layer))
    assert isinstance(copy, Examination)
    assert copy.get_config() == layer.get_config()


def _fit(layer, features, position, device, click):
    """Logistic regression with a layer beside it: the probability of a click where everybody looks, `[rows]`."""
    variables = [keras.Variable(np.zeros((features.shape[1], 1), np.float32)), layer.shared, layer.own]
    optimizer = keras.optimizers.Adam(0.03)
    optimizer.build(variables)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = tf.matmul(features, variables[0].value)[:, 0]
            shown = layer.applied(logits, layer(position, device, training=True)[:, 0])
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(click, shown))
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        optimizer.apply(gradients, variables)

    for _ in range(400):
        step()
    logits = features @ np.asarray(variables[0])[:, 0]
    return np.asarray(layer.applied(logits, layer(np.zeros(len(logits), int), device)[:, 0]))


def test_it_finds_who_looks_where_and_what_is_worth_it():
    """Users of a device look less far down, and policies put what they think the best on top."""
    random = np.random.default_rng(0)
    rows, positions = 40_000, 8
    weights = np.array([1.6, -1.0, 0.8])
    features = random.normal(size=(rows // positions, positions, 3))
    order = np.argsort(-(features @ np.array([1.0, 0.6, 0.2]) + random.normal(size=features.shape[:2])), axis=1)
    features = np.take_along_axis(features, order[:, :, None], axis=1).reshape(-1, 3)
    position = np.tile(np.arange(positions), rows // positions)
    device = np.repeat(random.integers(0, 2, rows // positions), positions)
    truth = (1.0 + np.arange(positions)) ** -np.array([[0.8], [0.3]])
    relevance = expit(features @ weights + 0.5)
    click = (random.random(rows) < truth[device, position] * relevance).astype(np.float32)
    features = np.concatenate([features, np.ones((rows, 1))], axis=1).astype(np.float32)
    layer = Examination(positions, 2, seed=0)
    layer.adapt(position, device)
    found = expit(_fit(layer, features, position, device, click))
    for each in range(2):
        np.testing.assert_allclose(layer.curve(each), truth[each], atol=0.05)
    added = PositionBias(positions, 2, seed=0)
    added.adapt(position, device)
    with_logit = expit(_fit(added, features, position, device, click))

    def error(predicted):
        return np.sqrt(np.mean((predicted - relevance) ** 2))

    # a term of the logit is no factor of the probability
    assert error(found) < 0.03 < error(with_logit)
