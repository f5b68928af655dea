from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.layers.concrete_dropout import ConcreteDropout
from penstock.losses.uncertain import (
    binary_uncertainty,
    bounded,
    gaussian_nll,
    logit_normal_nll,
    logit_normal_probability,
    normal_quantiles,
    regression_uncertainty,
)


def _normal(random, *shape):
    return random.normal(size=shape).astype(np.float32)


# --- a mean with a variance


def test_the_gaussian_of_unit_variance_is_half_the_squared_error():
    losses = gaussian_nll(np.array([3.0, 1.0]), np.array([1.0, 1.0]), np.zeros(2))
    np.testing.assert_allclose(losses, [2.0, 0.0])


@pytest.mark.parametrize("seed", range(3))
def test_the_gaussian_and_its_gradients_equal_the_loops(seed):
    random = np.random.default_rng(seed)
    target, mean, log_variance = _normal(random, 6), _normal(random, 6), _normal(random, 6)
    expected, to_mean, to_log_variance = [], [], []
    for y, m, s in zip(target, mean, log_variance, strict=True):
        variance = np.exp(s)
        density = np.exp(-((y - m) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        expected.append(-np.log(density) - 0.5 * np.log(2 * np.pi))
        to_mean.append((m - y) / variance)
        to_log_variance.append(0.5 - (y - m) ** 2 / (2 * variance))
    variables = [tf.Variable(mean), tf.Variable(log_variance)]
    with tf.GradientTape() as tape:
        losses = gaussian_nll(target, *variables)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    for ours, slopes in zip(tape.gradient(losses, variables), (to_mean, to_log_variance), strict=True):
        np.testing.assert_allclose(ours, slopes, rtol=1e-4, atol=1e-5)


@given(squared_error=st.floats(1e-4, 1e4))
@settings(max_examples=30, deadline=None)
def test_the_gaussian_is_smallest_where_the_variance_is_the_squared_error(squared_error):
    def loss(variance):
        return float(gaussian_nll(np.float32(np.sqrt(squared_error)), np.float32(0.0), np.float32(np.log(variance))))

    assert loss(squared_error) <= min(loss(0.8 * squared_error), loss(1.25 * squared_error))


def test_bounds_hold_and_leave_a_slope_and_what_lies_between_as_it_is():
    values = tf.Variable([-40.0, -8.0, 0.0, 2.0, 9.0, 40.0])
    with tf.GradientTape() as tape:
        held = bounded(values)
    slopes = tape.gradient(held, values).numpy()
    # the upper bound is passed first, and gives way to the lower one by softplus(lowest − highest)
    assert held.numpy().min() >= -6.0
    assert held.numpy().max() <= 6.0 + 1e-4
    assert np.all(slopes[1:-1] > 0.03)
    assert np.all(np.diff(held.numpy()) >= 0)
    np.testing.assert_allclose(held[2:4], [0.0, 2.0], atol=0.02)
    np.testing.assert_allclose(bounded(np.array([-2.0, 3.0], np.float32), -30.0, 30.0), [-2.0, 3.0], atol=1e-5)


def test_a_constant_target_stays_at_the_bound():
    raw = tf.Variable(0.0)
    for _ in range(400):
        with tf.GradientTape() as tape:
            loss = gaussian_nll(1.0, 1.0, bounded(raw))
        raw.assign_sub(tf.sign(tape.gradient(loss, raw)) * 0.1)
    assert float(bounded(raw)) == pytest.approx(-6.0, abs=0.01)
    assert float(loss) == pytest.approx(-3.0, abs=0.01)


# --- a logit with a variance


def _logistic_oracle(labels, mean, log_variance, noise):
    losses = []
    for row in range(len(labels)):
        total = 0.0
        for draw in range(len(noise)):
            logit = mean[row] + np.sqrt(np.exp(log_variance[row])) * noise[draw, row]
            probability = 1 / (1 + np.exp(-logit))
            total += probability if labels[row] else 1 - probability
        losses.append(-np.log(total / len(noise)))
    return losses


@pytest.mark.parametrize("draws", [1, 2, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_integral_equals_the_loops(draws, seed):
    random = np.random.default_rng(seed)
    labels, mean, log_variance = random.integers(0, 2, 5).astype(np.float32), _normal(random, 5), _normal(random, 5)
    noise = _normal(random, draws, 5)
    losses = logit_normal_nll(labels, mean, log_variance, noise)
    np.testing.assert_allclose(losses, _logistic_oracle(labels, mean, log_variance, noise), rtol=1e-4)
    probability = np.asarray(logit_normal_probability(mean, log_variance, noise))
    np.testing.assert_allclose(losses, -np.log(np.where(labels == 1, probability, 1 - probability)), rtol=1e-4)


def test_its_gradient_is_that_of_differences():
    random = np.random.default_rng(2)
    labels, noise = np.array([1.0, 0.0, 1.0], np.float32), _normal(random, 8, 3)
    values = [_normal(random, 3), _normal(random, 3)]
    variables = [tf.Variable(value) for value in values]
    with tf.GradientTape() as tape:
        losses = logit_normal_nll(labels, *variables, noise)
    for place, gradient in enumerate(tape.gradient(losses, variables)):
        above, below = (
            _logistic_oracle(labels, *(v + (step if n == place else 0.0) for n, v in enumerate(values)), noise)
            for step in (1e-3, -1e-3)
        )
        np.testing.assert_allclose(gradient, (np.array(above) - below) / 2e-3, rtol=0.01, atol=1e-4)


def test_without_noise_it_is_the_logistic_loss():
    labels, mean = np.array([1.0, 0.0, 1.0], np.float32), np.array([2.0, -1.0, 0.3], np.float32)
    losses = logit_normal_nll(labels, mean, np.full(3, -60.0, np.float32), normal_quantiles(10))
    np.testing.assert_allclose(losses, np.log1p(np.exp(-(2 * labels - 1) * mean)), rtol=1e-5)


def test_logits_beyond_an_exponential_have_a_loss():
    losses = logit_normal_nll(
        np.array([1.0, 0.0]), np.array([-400.0, 400.0]), np.zeros(2), np.zeros((3, 1), np.float32)
    )
    np.testing.assert_allclose(losses, [400.0, 400.0], rtol=1e-5)


def test_few_quantiles_integrate_as_well_as_many_draws():
    quantiles = normal_quantiles(20)
    assert quantiles.shape == (20, 1)
    assert quantiles.mean() == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(quantiles[[9, 10, 19], 0], [-0.0627, 0.0627, 1.9600], atol=1e-4)
    mean, log_variance = np.array([-3.0, 0.0, 1.5], np.float32), np.array([0.0, 1.0, -1.0], np.float32)
    drawn = logit_normal_probability(mean, log_variance, _normal(np.random.default_rng(3), 100_000, 3))
    np.testing.assert_allclose(logit_normal_probability(mean, log_variance, quantiles), drawn, atol=3e-3)


def test_noise_draws_probabilities_to_a_half_and_odd_ones_least():
    mean = np.array([2.0, 2.0, -2.0, 0.0], np.float32)
    log_variance = np.array([-60.0, 2.0, 2.0, 2.0], np.float32)
    sure, unsure, low, even = np.asarray(logit_normal_probability(mean, log_variance, normal_quantiles(50)))
    assert 0.5 < unsure < sure - 0.1
    assert unsure + low == pytest.approx(1.0, abs=1e-5)
    assert even == pytest.approx(0.5, abs=1e-5)


# --- what several passes say


def test_passes_that_agree_have_noise_alone_and_passes_without_noise_disagreement_alone():
    agree = regression_uncertainty(np.full((4, 2), 3.0, np.float32), np.full((4, 2), 0.5, np.float32))
    np.testing.assert_allclose(np.stack(agree), [[3.0, 3.0], [0.0, 0.0], [0.5, 0.5]])
    disagree = regression_uncertainty(np.array([[1.0], [5.0]], np.float32), np.zeros((2, 1), np.float32))
    np.testing.assert_allclose(np.stack(disagree), [[3.0], [4.0], [0.0]])
    certain = binary_uncertainty(np.array([[0.0], [1.0]], np.float32))
    np.testing.assert_allclose(np.stack(certain), [[0.5], [0.25], [0.0]])


@pytest.mark.parametrize(("draws", "rows"), [(1, 3), (7, 1), (30, 5)])
def test_the_parts_equal_the_loops(draws, rows):
    random = np.random.default_rng(draws)
    means, variances = _normal(random, draws, rows), np.exp(_normal(random, draws, rows))
    found = np.stack(regression_uncertainty(means, variances))
    for row in range(rows):
        mean = sum(means[:, row]) / draws
        assert found[0, row] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        squares = sum(value**2 for value in means[:, row]) / draws
        assert found[1, row] == pytest.approx(squares - mean**2, rel=1e-3, abs=1e-5)
        assert found[2, row] == pytest.approx(sum(variances[:, row]) / draws, rel=1e-4)


@given(seed=st.integers(0, 1000), draws=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_the_parts_of_a_label_are_its_variance(seed, draws):
    probabilities = np.random.default_rng(seed).random((draws, 3)).astype(np.float32)
    mean, epistemic, aleatoric = (np.asarray(part) for part in binary_uncertainty(probabilities))
    assert epistemic.min() >= 0.0
    np.testing.assert_allclose(epistemic + aleatoric, mean * (1 - mean), rtol=1e-4, atol=1e-6)


def test_the_variance_of_large_means_is_not_lost():
    found = regression_uncertainty(np.array([[10_000.0], [10_001.0]], np.float32), np.zeros((2, 1), np.float32))
    assert float(found.epistemic[0]) == pytest.approx(0.25)


# --- a regression whose noise is known: more data takes away the epistemic part alone


def _mean_of(x):
    return np.sin(2 * x)


def _noise_of(x):
    return 0.1 + 0.3 * np.abs(np.sin(x))


def _uncertainty_after(rows, seed, dropout):
    """Of a net with a layer of `dropout(rows)` after each hidden one, at points inside the data."""
    keras.utils.set_random_seed(seed)
    random = np.random.default_rng(seed)
    x = random.uniform(-2, 2, rows)
    y = tf.constant(_mean_of(x) + _noise_of(x) * random.normal(size=rows), tf.float32)
    x = tf.constant(x[:, None], tf.float32)
    hidden = inputs = keras.Input((1,))
    for _ in range(2):
        hidden = dropout(rows)(keras.layers.Dense(64, "relu")(hidden))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 1000))
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function
    def fit(order):
        for places in order:
            with tf.GradientTape() as tape:
                output = model(tf.gather(x, places), training=True)
                loss = tf.reduce_mean(gaussian_nll(tf.gather(y, places), output[:, 0], output[:, 1]))
                loss += sum(model.losses)
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    fit(tf.constant(random.integers(0, rows, (1000, 64))))
    points = np.linspace(-1.9, 1.9, 60, dtype=np.float32)[:, None]
    outputs = np.asarray(model(np.tile(points, (200, 1)), training=True)).reshape(200, 60, 2)
    found = regression_uncertainty(outputs[..., 0], np.exp(outputs[..., 1]))
    truth = np.square(_noise_of(points[:, 0])).mean()
    return float(np.mean(found.epistemic)), float(np.mean(found.aleatoric) / truth)


def test_the_total_falls_with_more_data_only_in_its_epistemic_part():
    few, many = (
        np.array([_uncertainty_after(rows, seed, ConcreteDropout) for seed in range(3)]) for rows in (500, 8000)
    )
    assert np.all(many[:, 0] < 0.6 * few[:, 0])
    assert few[:, 1].mean() == pytest.approx(1.0, abs=0.2)
    assert many[:, 1] == pytest.approx(np.ones(3), abs=0.1)


def test_dropout_at_a_fixed_rate_does_not_know_how_much_it_has_seen():
    few, many = (_uncertainty_after(rows, 0, lambda rows: keras.layers.Dropout(0.1)) for rows in (500, 8000))
    assert many[0] > 0.7 * few[0]
