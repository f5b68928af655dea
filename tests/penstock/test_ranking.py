from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock import calibration
from penstock.layers.position_bias import PACE
from penstock.ranking import BINARY, TASKS, WATCH_TIME, RankConfig, Ranking, Trunk, check_tasks

PARTS = ("epistemic", "aleatoric")
SECONDS = 12.5
ROWS = 40


def _ranking(config: RankConfig, own: bool = False) -> Ranking:
    """A linear trunk of two numbers; of each task's own numbers if so asked."""
    inputs = {"x": keras.Input((2,), name="x")}
    shared = {task: keras.layers.Dense(3)(inputs["x"]) for task in config.tasks} if own else inputs["x"] * 1.0
    trunk = Trunk(keras.Model(inputs, shared), {task: keras.layers.Dense(4, "tanh") for task in config.tasks})
    model = Ranking(trunk, config, SECONDS)
    model.build()
    return model


@pytest.fixture
def rows():
    random = np.random.default_rng(3)
    targets = {task: (random.random(ROWS) < 0.4).astype(np.float32) for task in BINARY}
    targets[WATCH_TIME] = random.exponential(20.0, ROWS).astype(np.float32)
    return {"x": random.normal(size=(ROWS, 2)).astype(np.float32)}, targets


def _log_sigmoid(logits: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-logits))


@pytest.mark.parametrize(
    ("loss_weights", "positive_weights"), [({}, {}), ({"like": 3.0, WATCH_TIME: 0.25}, {"like": 5.0, "click": 0.5})]
)
def test_the_loss_is_that_of_the_tasks(rows, loss_weights, positive_weights):
    model = _ranking(RankConfig(loss_weights=loss_weights, positive_weights=positive_weights))
    inputs, targets = rows
    logits = {task: np.asarray(head.mean, np.float64) for task, head in model.heads_of(inputs["x"]).items()}
    expected = 0.0
    for task in TASKS:
        target = targets[task] / SECONDS if task == WATCH_TIME else targets[task]
        # watch time: every row is a negative once, and a positive as often as the unit goes into its seconds
        negative = 1.0 if task == WATCH_TIME else 1.0 - target
        positive = target * positive_weights.get(task, 1.0)
        loss = -np.mean(positive * _log_sigmoid(logits[task]) + negative * _log_sigmoid(-logits[task]))
        expected += loss_weights.get(task, 1.0) * loss
    found = model.compute_loss(x=inputs, y=targets, y_pred=model(inputs))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_what_a_layer_adds_to_the_loss_counts(rows):
    inputs, targets = rows
    plain = _ranking(RankConfig())
    value = float(plain.compute_loss(x=inputs, y=targets, y_pred=plain(inputs)))

    class Adds(keras.layers.Layer):
        def call(self, vectors):
            self.add_loss(0.75 + 0.0 * keras.ops.sum(vectors))
            return vectors

    x = keras.Input((2,), name="x")
    trunk = Trunk(keras.Model({"x": x}, Adds()(x)), plain.towers)
    model = Ranking(trunk, RankConfig(), SECONDS)
    model.heads = plain.heads
    assert float(model.compute_loss(x=inputs, y=targets, y_pred=model(inputs))) == pytest.approx(value + 0.75, rel=1e-5)


def test_scores_are_probabilities_and_seconds(rows):
    weights = {"like": 8.0}
    model = _ranking(RankConfig(positive_weights=weights))
    inputs, _ = rows
    logits = {task: head.mean for task, head in model.heads_of(inputs["x"]).items()}
    scores = model.scores(inputs)
    assert list(scores) == list(TASKS)
    for task in BINARY:
        odds = np.exp(np.asarray(logits[task], np.float64)) / weights.get(task, 1.0)
        np.testing.assert_allclose(scores[task], odds / (1.0 + odds), rtol=1e-5)
    np.testing.assert_allclose(scores[WATCH_TIME], SECONDS * np.exp(np.asarray(logits[WATCH_TIME])), rtol=1e-5)


def test_seconds_are_learnt_whatever_their_unit():
    """Of rows that are alike the expectation is the mean, and the probability the rate, weighted or not."""
    random = np.random.default_rng(0)
    inputs = {"x": np.zeros((200, 2), np.float32)}
    targets = {task: (random.random(200) < 0.3).astype(np.float32) for task in BINARY}
    targets[WATCH_TIME] = random.exponential(30.0, 200).astype(np.float32)
    model = _ranking(RankConfig(positive_weights={"like": 4.0}))
    model.compile(keras.optimizers.Adam(0.05))
    model.fit(tf.data.Dataset.from_tensors((inputs, targets)).repeat(400), shuffle=False, verbose=0)
    for task, scores in model.scores(inputs).items():
        assert float(scores[0]) == pytest.approx(targets[task].mean(), rel=0.01), task


def test_calibrators_are_what_a_served_score_goes_through(rows):
    model = _ranking(RankConfig())
    inputs, targets = rows
    before = {task: np.asarray(values) for task, values in model.uncalibrated(inputs).items()}
    model.calibrators = {task: calibration.fit("temperature", targets[task], before[task]) for task in BINARY}
    model.calibrators[WATCH_TIME] = calibration.fit("scale", targets[WATCH_TIME], before[WATCH_TIME])
    for task, scores in model.scores(inputs).items():
        np.testing.assert_allclose(scores, model.calibrators[task](before[task]), rtol=1e-5)
        assert np.mean(scores) == pytest.approx(targets[task].mean(), rel=1e-4)


def test_learnt_weights_start_as_none_and_each_task_finds_its_own(rows):
    inputs, targets = rows
    model = _ranking(RankConfig(weighting="uncertainty"))
    losses = model.losses_of(model(inputs), targets, training=False)
    total = model.compute_loss(x=inputs, y=targets, y_pred=model(inputs))
    assert float(total) == pytest.approx(float(sum(losses.values())), rel=1e-5)
    assert any(variable is model.task_weights.log_variances for variable in model.trainable_variables)


def test_pareto_weights_are_a_mean_of_the_tasks(rows):
    inputs, targets = rows
    model = _ranking(RankConfig(weighting="pareto"))
    losses = [float(loss) for loss in model.losses_of(model(inputs), targets, training=False).values()]
    assert min(losses) <= float(model.compute_loss(x=inputs, y=targets, y_pred=model(inputs))) <= max(losses)


@pytest.mark.parametrize("weighting", ["uncertainty", "pareto"])
def test_every_task_gains_from_weighted_steps(rows, weighting):
    inputs, targets = rows
    keras.utils.set_random_seed(1)
    model = _ranking(RankConfig(weighting=weighting))
    before = model.losses_of(model(inputs), targets, training=False)
    model.compile(keras.optimizers.SGD(0.02))
    model.fit(tf.data.Dataset.from_tensors((inputs, targets)).repeat(20), shuffle=False, verbose=0)
    after = model.losses_of(model(inputs), targets, training=False)
    assert all(float(after[task]) < float(before[task]) for task in TASKS)


def test_a_variance_is_learnt_where_the_noise_is():
    """log(1 + seconds) is N(3, 0.2²) on one side and N(3, 1) on the other; labels are certain here and a coin there."""
    random = np.random.default_rng(0)
    side = np.repeat([1.0, -1.0], 1500)
    inputs = {"x": np.stack([side, np.zeros(3000)], axis=1).astype(np.float32)}
    logs = random.normal(3.0, np.where(side > 0, 0.2, 1.0))
    targets = {task: (random.random(3000) < np.where(side > 0, 1.0, 0.5)).astype(np.float32) for task in BINARY}
    targets[WATCH_TIME] = np.expm1(logs).astype(np.float32)
    model = _ranking(RankConfig(variance=True, passes=2))
    model.compile(keras.optimizers.Adam(0.03))
    model.fit(tf.data.Dataset.from_tensors((inputs, targets)).repeat(400), shuffle=False, verbose=0)
    scores = {name: np.asarray(values) for name, values in model.scores(inputs).items()}
    assert scores["watch_time_aleatoric"][0] == pytest.approx(0.04, rel=0.2)
    assert scores["watch_time_aleatoric"][-1] == pytest.approx(1.0, rel=0.2)
    assert scores[WATCH_TIME][-1] == pytest.approx(np.exp(3.5) - 1.0, rel=0.15)
    assert scores["click_aleatoric"][0] < 0.03
    assert scores["click_aleatoric"][-1] == pytest.approx(0.25, abs=0.01)
    # no layer has dropout: all passes say the same
    np.testing.assert_allclose(scores["click_epistemic"], 0.0, atol=1e-9)
    np.testing.assert_allclose(scores["watch_time_epistemic"], 0.0, atol=1e-6)


def test_passes_differ_by_dropout_and_their_mean_is_served(rows):
    inputs, _ = rows
    config = RankConfig(passes=64)
    x = keras.Input((2,), name="x")
    hidden = keras.layers.Dropout(0.5, seed=1)(keras.layers.Dense(64)(x))
    towers = {task: keras.layers.Dense(4) for task in config.tasks}
    model = Ranking(Trunk(keras.Model({"x": x}, hidden), towers), config, SECONDS)
    model.build()
    scores = {name: np.asarray(values) for name, values in model.scores(inputs).items()}
    assert set(scores) == {*TASKS, *(f"{t}_{part}" for t in BINARY for part in PARTS), "watch_time_epistemic"}
    for task in BINARY:
        assert (scores[f"{task}_epistemic"] > 1e-6).all()
        # the law of total variance
        total = scores[f"{task}_epistemic"] + scores[f"{task}_aleatoric"]
        np.testing.assert_allclose(total, scores[task] * (1.0 - scores[task]), rtol=1e-4)


def test_tasks_that_have_each_their_own_share_no_gradient(rows):
    inputs, targets = rows
    model = _ranking(RankConfig(), own=True)
    with tf.GradientTape() as tape:
        losses = model.losses_of(model(inputs), targets, training=True)
    found = tape.gradient(losses["click"], model.trainable_variables)
    touched = {id(v) for v, gradient in zip(model.trainable_variables, found, strict=True) if gradient is not None}
    own = [*model.towers["click"].trainable_variables, *model.heads["click"].trainable_variables]
    assert {id(variable) for variable in own} < touched
    assert len(touched) == len(own) + 2


@pytest.mark.parametrize("form", ["logit", "examination"])
@pytest.mark.parametrize("passes", [0, 2])
def test_what_is_said_of_a_row_is_at_its_place_or_at_an_average_one(rows, form, passes):
    inputs, targets = rows
    model = _ranking(RankConfig(position_bias=form, positions=3, passes=passes))
    inputs = inputs | {"device": np.zeros(ROWS, np.int32)}
    shown = inputs | {"position": np.arange(ROWS) % 3}
    hidden = inputs | {"position": np.full(ROWS, -1)}

    def loss(x):
        return float(model.compute_loss(x=x, y=targets, y_pred=model(x), training=False))

    assert loss(shown) == pytest.approx(loss(inputs))
    model.position_bias.shared.assign(np.outer([0.4, 0.0, -0.4], np.ones(model.position_bias.tasks)))
    assert loss(shown) != pytest.approx(loss(inputs), rel=1e-3)
    assert loss(hidden) == pytest.approx(loss(inputs))
    of_none, of_first, of_last = (
        model.scores(inputs if place is None else inputs | {"position": np.full(ROWS, place)}) for place in (None, 0, 2)
    )
    for task in TASKS:
        low, middle, high = (np.asarray(scores[task]) for scores in (of_last, of_none, of_first))
        assert (low < middle).all()
        assert (middle < high).all()


@pytest.mark.parametrize("config", [{"weighting": "pareto"}, {"variance": True}, {}])
def test_a_bias_is_what_a_head_says_more_where_an_item_is_shown(rows, config):
    inputs, targets = rows
    model = _ranking(RankConfig(position_bias="logit", positions=2, **config))
    shared = model(inputs)
    biases = np.linspace(-1.0, 1.0, ROWS * len(TASKS), dtype=np.float32).reshape(ROWS, -1)
    found = model.losses_of(shared, targets, False, biases)
    for place, (task, head) in enumerate(model.heads_of(shared).items()):
        moved = head._replace(mean=np.asarray(head.mean) + biases[:, place])
        weight = model.config.loss_weights.get(task, 1.0)
        expected = weight * np.mean(model._row_losses(task, moved, targets[task]))
        assert float(found[task]) == pytest.approx(float(expected), rel=1e-5)


def test_examination_is_a_factor_of_each_probability_and_of_the_seconds(rows):
    inputs, _ = rows
    model = _ranking(RankConfig(position_bias="examination", positions=2))
    inputs = inputs | {"device": np.zeros(ROWS, np.int32)}
    model.position_bias.own.assign(np.array([[[0.0], [-0.5]]]))
    e = model.position_bias.curve(0)[1]
    assert e == pytest.approx(np.exp(-0.5 * PACE))
    first, second, served = (
        model.scores(inputs | place)
        for place in ({"position": np.zeros(ROWS, int)}, {"position": np.ones(ROWS, int)}, {})
    )
    for task in TASKS:
        np.testing.assert_allclose(second[task], e * np.asarray(first[task]), rtol=1e-4)
        np.testing.assert_allclose(served[task], (1.0 + e) / 2.0 * np.asarray(first[task]), rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ("click", "long_view")}, "tasks lack like"),
        ({"tasks": ("click", "long_view", "like", "share")}, "unknown task share: there are click"),
        ({"loss_weights": {"clicks": 1.0}}, "unknown task clicks"),
        ({"positive_weights": {"comment": 1.0}}, "unknown task comment"),
        ({"weighting": "gradnorm"}, "unknown weighting 'gradnorm': there are fixed"),
        ({"pretrained": "word2vec"}, "unknown pretraining 'word2vec': there are graph, item2vec"),
        ({"position_bias": "rank"}, "unknown position_bias 'rank': there are none, logit, examination"),
        ({"calibration": "beta"}, "unknown calibration 'beta': there are temperature"),
    ],
)
def test_tasks_that_there_are_not_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(RankConfig(**wrong))
