from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from penstock.losses.multitask import binary_cross_entropy, min_norm, pareto, unweighted_logits

_compiled = tf.function(min_norm)


def _norm(gram, weights):
    return float(np.asarray(weights) @ gram @ np.asarray(weights))


def _gram(gradients):
    return np.asarray(gradients, np.float64) @ np.asarray(gradients, np.float64).T


# --- the loss of a binary label


def test_the_loss_of_even_odds_is_log_two_and_of_a_positive_as_often_as_it_weighs():
    losses = binary_cross_entropy(np.array([0.0, 1.0]), np.zeros(2), positive_weight=3.0)
    np.testing.assert_allclose(losses, [np.log(2), 3 * np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.2, 7.0])
@pytest.mark.parametrize("rows", [1, 9])
def test_it_and_its_gradient_equal_the_loops(weight, rows):
    random = np.random.default_rng(rows)
    labels, logits = random.integers(0, 2, rows).astype(np.float32), random.normal(size=rows).astype(np.float32) * 3
    expected, slopes = [], []
    for label, logit in zip(labels, logits, strict=True):
        probability = 1 / (1 + np.exp(-logit))
        expected.append(-weight * label * np.log(probability) - (1 - label) * np.log(1 - probability))
        slopes.append(-weight * label * (1 - probability) + (1 - label) * probability)
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        losses = binary_cross_entropy(labels, variable, weight)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(tape.gradient(losses, variable), slopes, rtol=1e-4, atol=1e-6)


def test_logits_beyond_an_exponential_have_a_loss():
    losses = binary_cross_entropy(np.array([1.0, 0.0, 1.0, 0.0]), np.array([-500.0, 500.0, 500.0, -500.0]), 2.0)
    np.testing.assert_allclose(losses, [1000.0, 500.0, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("weight", [0.25, 1.0, 12.0])
def test_the_learned_odds_are_those_of_the_data_times_the_weight_and_the_correction_takes_it_off(weight):
    labels = (np.arange(40) < 6).astype(np.float32)
    logit = tf.Variable(np.float32(np.log(weight * 6 / 34)))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(binary_cross_entropy(labels, tf.fill([40], logit), weight))
    assert float(tape.gradient(loss, logit)) == pytest.approx(0.0, abs=1e-6)
    assert float(tf.sigmoid(unweighted_logits(logit, weight))) == pytest.approx(6 / 40, rel=1e-5)


# --- the point of least norm


@pytest.mark.parametrize(
    ("gram", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        ([[4.0, 0.0], [0.0, 1.0]], [0.2, 0.8]),
        ([[1.0, 2.0], [2.0, 9.0]], [1.0, 0.0]),  # the shorter has no part of the longer against it
        ([[9.0, 2.0], [2.0, 1.0]], [0.0, 1.0]),
        ([[1.0, -2.0], [-2.0, 4.0]], [2 / 3, 1 / 3]),  # opposite: no step helps both
    ],
)
def test_two_tasks_are_the_closed_form(gram, expected):
    np.testing.assert_allclose(min_norm(np.array(gram)), expected, atol=1e-6)


def test_two_tasks_are_equation_four_over_a_grid_of_scales():
    random = np.random.default_rng(0)
    for scale in (1e-4, 1e-2, 1.0, 1e3):
        one, two = random.normal(size=5), scale * random.normal(size=5)
        expected = np.clip((two - one) @ two / ((one - two) @ (one - two)), 0, 1)
        np.testing.assert_allclose(min_norm(_gram([one, two])), [expected, 1 - expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tasks", "parts"), [(2, 60), (3, 40), (4, 20)])
@pytest.mark.parametrize("seed", range(3))
def test_no_point_of_a_grid_over_the_simplex_is_shorter(tasks, parts, seed):
    gram = _gram(np.random.default_rng(seed).normal(size=(tasks, 4)) + 0.3)
    points = [
        [*point, parts - sum(point)]
        for point in itertools.product(range(parts + 1), repeat=tasks - 1)
        if sum(point) <= parts
    ]
    points = np.array(points) / parts
    shortest = np.einsum("pi,ij,pj->p", points, gram, points).min()
    ours = _norm(gram, min_norm(gram))
    assert ours <= shortest * (1 + 1e-9)
    assert ours >= shortest - 3 * tasks / parts * gram.max()


@pytest.mark.parametrize("tasks", [3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_where_a_solver_of_constrained_problems_ends(tasks, seed):
    gram = _gram(np.random.default_rng(seed).normal(size=(tasks, 12)))
    found = minimize(
        lambda weights: weights @ gram @ weights,
        np.full(tasks, 1 / tasks),
        jac=lambda weights: 2 * gram @ weights,
        bounds=[(0, 1)] * tasks,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert _norm(gram, min_norm(gram)) == pytest.approx(found.fun, rel=1e-5)
    np.testing.assert_allclose(min_norm(gram), found.x, atol=1e-3)


def test_one_task_has_all_the_weight():
    assert np.asarray(min_norm(np.array([[3.0]]))).tolist() == [1.0]


def test_gradients_that_are_alike_or_all_zero_keep_equal_weights():
    np.testing.assert_allclose(min_norm(np.full((4, 4), 2.5)), np.full(4, 0.25))
    np.testing.assert_allclose(min_norm(np.zeros((3, 3))), np.full(3, 1 / 3))


@pytest.mark.parametrize("seed", range(5))
def test_a_gradient_of_zero_gets_all_the_weight_since_no_step_is_shorter(seed):
    gradients = np.random.default_rng(seed).normal(size=(5, 6))
    gradients[2] = 0.0
    np.testing.assert_allclose(min_norm(_gram(gradients)), [0, 0, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_have_weights_that_are_not(value):
    gram = np.eye(3)
    gram[1, 1] = value
    assert not np.all(np.isfinite(np.asarray(min_norm(gram))))


def test_tasks_that_are_alike_share_a_weight():
    gradients = np.array([[3.0, 0.0], [0.0, 4.0], [3.0, 0.0]])
    np.testing.assert_allclose(min_norm(_gram(gradients)), [0.32, 0.36, 0.32], atol=1e-4)


def test_more_tasks_than_sets_can_be_solved_are_refused():
    with pytest.raises(ValueError, match="sets of 11 tasks"):
        min_norm(np.eye(11))


def test_gradients_around_zero_are_pareto_stationary():
    angles = 2 * np.pi * np.arange(5) / 5
    gram = _gram(np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [3.0], [0.1], [20.0], [7.0]]))
    assert _norm(gram, min_norm(gram)) < 1e-9 * gram.diagonal().min()


@given(
    seed=st.integers(0, 10_000),
    tasks=st.integers(2, 6),
    dim=st.integers(1, 8),
    shared=st.sampled_from([0.0, 1.0, 5.0]),
    scales=st.lists(st.sampled_from([1e-3, 1e-1, 1.0, 1e2]), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_a_step_along_it_makes_no_task_worse(seed, tasks, dim, shared, scales):
    random = np.random.default_rng(seed)
    gradients = (random.normal(size=(tasks, dim)) + shared * random.normal(size=dim)) * np.array(scales[:tasks])[
        :, None
    ]
    gram = _gram(gradients)
    weights = np.asarray(_compiled(tf.constant(gram)))
    assert weights.min() >= 0.0
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    norm, smallest = _norm(gram, weights), gram.diagonal().min()
    assert norm <= smallest * (1 + 1e-6)
    assert np.all(gram @ weights >= norm - 1e-4 * np.sqrt(smallest * gram.diagonal()))


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-12, 1e-6, 1e6]))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_all_losses_does_not_matter_nor_does_their_order(seed, scale):
    gram = _gram(np.random.default_rng(seed).normal(size=(4, 9)))
    weights = np.asarray(_compiled(tf.constant(gram)))
    np.testing.assert_allclose(_compiled(tf.constant(gram * scale)), weights, atol=1e-6)
    np.testing.assert_allclose(np.asarray(_compiled(tf.constant(gram[::-1, ::-1].copy())))[::-1], weights, atol=1e-4)


# --- the sum that no task loses by


def _two_towers(seed=0):
    """Two linear tasks of what a linear map shares, and a label that no map serves both with."""
    random = np.random.default_rng(seed)
    rows = tf.constant(random.normal(size=(64, 3)), tf.float32)
    targets = {
        "one": tf.constant(rows.numpy() @ [1.0, 0.5, 0.0], tf.float32),
        "two": tf.constant(rows.numpy() @ [-1.0, 0.5, 1.0], tf.float32),
    }
    bottom = tf.Variable(random.normal(size=(3, 2)), dtype=tf.float32)
    towers = {name: tf.constant(random.normal(size=(2, 1)), tf.float32) for name in targets}
    return rows, targets, bottom, towers


def _losses_of(targets, towers):
    def losses(shared):
        return {
            name: tf.reduce_mean(tf.square(tf.matmul(shared, towers[name])[:, 0] - targets[name])) for name in targets
        }

    return losses


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradients_are_those_of_the_weighted_sum_with_the_weights_held(compiled):
    rows, targets, bottom, start = _two_towers()
    towers = {name: tf.Variable(value) for name, value in start.items()}
    variables = [bottom, *towers.values()]

    def ours():
        with tf.GradientTape() as tape:
            total, weights = pareto(_losses_of(targets, towers), tf.matmul(rows, bottom))
        return total, weights, tape.gradient(total, variables)

    total, weights, gradients = (tf.function(ours) if compiled else ours)()
    alpha = {name: float(value) for name, value in weights.items()}
    assert sum(alpha.values()) == pytest.approx(1.0)
    assert 0.05 < alpha["one"] < 0.95
    with tf.GradientTape() as tape:
        losses = _losses_of(targets, towers)(tf.matmul(rows, bottom))
        expected = sum(alpha[name] * loss for name, loss in losses.items())
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(gradients, tape.gradient(expected, variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_weights_are_those_of_the_gradients_to_what_is_shared_in_however_many_pieces():
    rows, targets, bottom, towers = _two_towers(1)
    shared = tf.matmul(rows, bottom)
    gradients = []
    for name in targets:
        residual = (shared.numpy() @ towers[name].numpy())[:, 0] - targets[name].numpy()
        gradients.append((2 / 64 * residual[:, None] * towers[name].numpy()[:, 0]).ravel())
    expected = np.asarray(min_norm(_gram(gradients)))
    losses = _losses_of(targets, towers)
    _, whole = pareto(losses, shared)
    _, pieces = pareto(lambda parts: losses(tf.stack(parts, axis=1)), [shared[:, 0], shared[:, 1]])
    assert list(whole) == ["one", "two"]
    np.testing.assert_allclose(list(whole.values()), expected, atol=1e-4)
    np.testing.assert_allclose(list(pieces.values()), expected, atol=1e-4)


def test_a_task_may_leave_part_of_what_is_shared_alone_but_not_all_of_it():
    one, two = tf.constant([[1.0]]), tf.constant([[2.0]])
    total, weights = pareto(
        lambda parts: {"both": tf.reduce_sum(parts[0] + parts[1]), "second": tf.reduce_sum(parts[1])}, [one, two]
    )
    assert [float(value) for value in weights.values()] == pytest.approx([0.0, 1.0], abs=1e-6)
    assert float(total) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="the loss of alone does not depend"):
        pareto(lambda shared: {"task": tf.reduce_sum(shared), "alone": tf.constant(1.0)}, one)


def test_tasks_with_parts_of_their_own_weigh_by_the_length_of_their_gradients_alone():
    parts = {"one": tf.constant([[1.0]]), "two": tf.constant([[2.0]])}
    factors = {"one": 1.0, "two": -3.0}
    _, weights = pareto(lambda own: {task: factors[task] * tf.reduce_sum(own[task]) for task in own}, parts)
    assert {task: float(value) for task, value in weights.items()} == pytest.approx({"one": 0.9, "two": 0.1})


def _gradients_to_the_bottom(rows, targets, bottom, towers):
    with tf.GradientTape(persistent=True) as tape:
        losses = _losses_of(targets, towers)(tf.matmul(rows, bottom))
    return np.stack([np.ravel(tape.gradient(loss, bottom)) for loss in losses.values()]), losses


class TwoTasks(keras.Model):  # no underscore: Keras makes a scope of the name
    """A model whose loss is the Pareto sum, so that Keras's own loop trains it."""

    def __init__(self, bottom, towers):
        super().__init__()
        self.bottom = keras.layers.Dense(2, use_bias=False)
        self.bottom.build((None, 3))
        self.bottom.kernel.assign(bottom)
        self.towers = towers

    def call(self, inputs):
        return self.bottom(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return pareto(_losses_of(y, self.towers), y_pred)[0]


@pytest.mark.parametrize("seed", [0, 2])
def test_training_by_it_falls_for_both_tasks_and_ends_where_no_step_helps_both(seed):
    rows, targets, bottom, towers = _two_towers(seed)
    # the same tower for both, so that what is shared cannot serve both
    towers = dict.fromkeys(towers, towers["one"])
    start, before = _gradients_to_the_bottom(rows, targets, bottom, towers)
    assert _norm(_gram(start), min_norm(_gram(start))) > 1e-2
    model = TwoTasks(bottom, towers)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    model.fit(tf.data.Dataset.from_tensors((rows, targets)).repeat(300), shuffle=False, verbose=0)
    end, after = _gradients_to_the_bottom(rows, targets, model.bottom.kernel.value, towers)
    assert _norm(_gram(end), min_norm(_gram(end))) < 1e-6
    assert np.linalg.norm(end, axis=1).min() > 1e-3  # neither task alone is at its best
    assert all(float(after[name]) < float(before[name]) for name in targets)
