from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.layers.position_bias import PACE, PositionBias


def _filled(positions, devices, tasks=1, **arguments):
    """A layer with random curves."""
    layer = PositionBias(positions, devices, tasks, **arguments)
    layer.build()
    random = np.random.default_rng(0)
    layer.shared.assign(random.normal(size=layer.shared.shape))
    layer.own.assign(random.normal(size=layer.own.shape))
    return layer


def _curve(layer, device, share):
    """b of a device by loops, `[positions][tasks]`."""
    c = PACE * (np.asarray(layer.shared) + np.asarray(layer.own)[device])
    mean = sum(share[position] * c[position] for position in range(layer.positions))
    return [c[position] - mean for position in range(layer.positions)]


def test_before_it_learns_no_position_counts():
    layer = PositionBias(3, 2, 4)
    np.testing.assert_array_equal(layer(np.array([0, 1, 2]), np.array([0, 1, 1]), training=True), np.zeros((3, 4)))


def test_the_logit_is_the_curve_less_its_mean_where_rows_were_shown():
    layer = PositionBias(2, 1)
    layer.adapt(np.array([0, 0, 0, 1, -1]), np.zeros(5, int))
    layer.shared.assign([[4.0 / PACE], [0.0]])
    np.testing.assert_allclose(layer(np.array([0, 1]), np.zeros(2, int)), [[1.0], [-3.0]], rtol=1e-6)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("tasks", [1, 2])
def test_equals_the_loops(positions, devices, tasks):
    random = np.random.default_rng(1)
    layer = _filled(positions, devices, tasks)
    shown, by = random.integers(-1, positions + 2, 60), random.integers(0, devices, 60)
    layer.adapt(shown, by)
    position, device = random.integers(-1, positions + 2, 30), random.integers(0, devices, 30)
    found = np.asarray(layer(position, device))
    for row in range(30):
        seen = [place for place, other in zip(shown, by, strict=True) if other == device[row] and place >= 0]
        of = [min(place, positions - 1) for place in seen]
        share = [of.count(place) / len(of) for place in range(positions)]
        curve = _curve(layer, device[row], share)
        expected = curve[min(position[row], positions - 1)] if position[row] >= 0 else np.zeros(tasks)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)
    for each in range(devices):
        np.testing.assert_allclose(layer.curve(each), layer(np.arange(positions), np.full(positions, each)), rtol=1e-6)


def test_a_missing_position_is_neutral_and_teaches_nothing():
    layer = _filled(4, 2, 2)
    variables = [layer.shared.value, layer.own.value]
    with tf.GradientTape() as tape:
        logits = layer(np.array([-1, -7]), np.array([0, 1]), training=True)
        total = tf.reduce_sum(logits)
    np.testing.assert_array_equal(logits, np.zeros((2, 2)))
    assert not any(np.any(tf.convert_to_tensor(gradient)) for gradient in tape.gradient(total, variables))


def test_the_gradient_is_of_the_position_less_the_share_of_each():
    layer = _filled(3, 2)
    layer.adapt(np.array([0, 1, 1, 2, 0]), np.array([1, 1, 1, 1, 0]))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(np.array([1, 1]), np.array([1, 1])))
    shared, own = tape.gradient(total, [layer.shared.value, layer.own.value])
    assert not isinstance(own, tf.IndexedSlices)
    np.testing.assert_allclose(shared[:, 0], PACE * 2.0 * np.array([-0.25, 0.5, -0.25]), atol=1e-6)
    np.testing.assert_allclose(own[1], shared, atol=1e-6)
    assert not own[0].numpy().any()


def test_a_device_without_rows_has_the_positions_of_all():
    layer = _filled(2, 3)
    layer.adapt(np.array([0, 0, 0, 1, -1]), np.array([0, 0, 0, 1, 2]))
    np.testing.assert_allclose(layer.share, [[1.0, 0.0], [0.0, 1.0], [0.75, 0.25]])


def test_without_any_position_all_count_alike():
    layer = _filled(4, 2)
    layer.adapt(np.full(5, -1), np.zeros(5, int))
    np.testing.assert_array_equal(layer.share, np.full((2, 4), 0.25))


def test_a_share_of_the_rows_has_no_position_in_training():
    layer = _filled(3, 1, seed=2)
    position, device = np.zeros(20_000, int), np.zeros(20_000, int)
    logits = np.asarray(layer(position, device, training=True))[:, 0]
    assert np.mean(logits == 0.0) == pytest.approx(0.1, abs=0.01)
    assert set(np.unique(logits)) == {0.0, layer.curve(0)[0, 0]}
    assert (np.asarray(layer(position, device)) != 0.0).all()


def test_the_same_seed_withholds_the_same():
    position, device = np.zeros(200, int), np.zeros(200, int)
    first, same, other = (_filled(3, 1, dropout=0.5, seed=seed) for seed in (4, 4, 5))
    one, two = ([np.asarray(layer(position, device, training=True)) for _ in range(2)] for layer in (first, same))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(*one)
    assert not np.array_equal(one[0], other(position, device, training=True))


@given(st.lists(st.tuples(st.integers(-2, 9), st.integers(0, 2)), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_the_mean_over_the_rows_it_was_made_for_is_zero(rows):
    position, device = np.array(rows).T
    layer = _filled(6, 3, 2)
    layer.adapt(position, device)
    logits = np.asarray(layer(position, device))
    for each in range(3):
        mine = logits[device == each]
        np.testing.assert_allclose(mine.sum(axis=0), 0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1), "at least 1, not 0"), ((3, 1, 1, 1.0), "below 1, not 1.0"), ((3, 1, 1, -0.1), "below 1, not -0.1")],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PositionBias(*arguments)


def test_a_copy_from_its_config_is_the_same_layer():
    layer = PositionBias(5, 2, 3, 0.2, seed=1)
    copy = keras.layers.deserialize(keras.layers.serialize(layer))
    assert copy.get_config() == layer.get_config()


def _log(seed, rows=20_000, positions=8):
    """Impressions of a policy that sees relevance darkly and puts what it takes for the best on top.

    The click is by relevance, examination by position falls more slowly on device 1.
    """
    random = np.random.default_rng(seed)
    weights = np.array([1.0, -0.7, 0.5])
    features = random.normal(size=(rows // positions, positions, 3))
    relevance = features @ weights
    order = np.argsort(-(features @ np.array([1.0, 0.6, 0.2]) + random.normal(size=relevance.shape)), axis=1)
    features = np.take_along_axis(features, order[:, :, None], axis=1).reshape(-1, 3)
    position = np.tile(np.arange(positions), rows // positions)
    device = np.repeat(random.integers(0, 2, rows // positions), positions)
    truth = np.stack([-1.2 * np.log1p(np.arange(positions)), -0.6 * np.log1p(np.arange(positions))])
    chance = 1.0 / (1.0 + np.exp(-(features @ weights + truth[device, position])))
    click = random.random(len(chance)) < chance
    return features.astype(np.float32), position, device, click.astype(np.float32), weights, truth


def _fit(features, position, device, click, tower):
    """Logistic regression on features and device, with or without the tower: weights, and what it predicts alone."""
    features = np.concatenate([features, np.eye(2, dtype=np.float32)[device]], axis=1)
    weights = tf.Variable(tf.zeros((5, 1)))
    variables = [weights, *([tower.shared.value, tower.own.value] if tower else [])]
    moments = [tf.Variable(tf.zeros_like(variable)) for variable in variables]

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = tf.matmul(features, weights)[:, 0]
            if tower:
                logits += tower(position, device, training=True)[:, 0]
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(click, logits))
        for variable, moment, gradient in zip(variables, moments, tape.gradient(loss, variables), strict=True):
            moment.assign(0.9 * moment + gradient)
            variable.assign_sub(2.0 * moment)

    for _ in range(300):
        step()
    return weights.numpy()[:3, 0], tf.sigmoid(tf.matmul(features, weights)).numpy()[:, 0]


def test_the_tower_finds_the_curves_and_leaves_the_rest_to_relevance():
    features, position, device, click, weights, truth = _log(0)
    tower = PositionBias(8, 2, dropout=0.1, seed=0)
    tower.adapt(position, device)
    with_tower, served = _fit(features, position, device, click, tower)
    without, _ = _fit(features, position, device, click, None)
    for each in range(2):
        learned = tower.curve(each)[:, 0]
        assert np.corrcoef(learned, truth[each])[0, 1] > 0.98
        np.testing.assert_allclose(learned, truth[each] - truth[each].mean(), atol=0.25)
    assert np.linalg.norm(with_tower - weights) < 0.5 * np.linalg.norm(without - weights)
    # without a position the prediction is that of an average place: about as high as the clicks are
    for each in range(2):
        assert served[device == each].mean() == pytest.approx(click[device == each].mean(), abs=0.03)
