from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from penstock import calibration, metrics
from penstock.calibration import BLOCK, FLATTEST, Isotonic, Scale, Temperature, fit, fit_isotonic, fit_temperature

EXAMPLES = (
    Temperature(1.7, -0.3),
    Isotonic((-2.0, 0.5, 0.75, 3.0), (-4.0, -1.0, 1.5, 1.75), 0.6),
    Scale(0.83),
)


def rows(count: int = 4000, rate: float = 0.2, seed: int = 0, distort=lambda z: z) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the logits of their probabilities, distorted."""
    random = np.random.default_rng(seed)
    z = logit(rate) - 0.4 + random.normal(size=count)
    return (random.random(count) < expit(z)).astype(np.int8), distort(z)


# closed forms


@pytest.mark.parametrize("low_rate", [0.1, 0.3])
def test_of_two_scores_the_fit_is_their_observed_rates(low_rate):
    scores = np.repeat([-1.0, 3.0], [500, 250])
    labels = np.concatenate([np.arange(500) < 500 * low_rate, np.arange(250) < 150])
    for calibrator in (fit_temperature(labels, scores, shrinkage=0.0), fit_isotonic(labels, scores)):
        np.testing.assert_allclose(calibrator([-1.0, 3.0]), [low_rate, 0.6], rtol=1e-10)


def test_two_scores_by_hand():
    found = fit_temperature(np.arange(400) % 4 == 0, np.full(400, 5.0))
    assert (found.slope, found.intercept) == pytest.approx((1.0, np.log(1 / 3) - 5.0))
    labels = np.concatenate([np.arange(100) < 20, np.arange(100) < 50])
    found = fit_temperature(labels, np.repeat([0.0, 2.0], 100), shrinkage=0.0)
    assert (found.slope, found.intercept) == pytest.approx((np.log(4) / 2, np.log(1 / 4)))


def test_a_scale_by_hand():
    assert fit("scale", [0.0, 30.0, 6.0], [8.0, 20.0, 20.0]) == Scale(0.75)
    np.testing.assert_array_equal(Scale(0.75)([4.0, 8.0]), [3.0, 6.0])


def test_a_broken_line_by_hand():
    line = Isotonic((0.0, 2.0, 3.0), (-1.0, 0.0, 4.0), 0.5)
    np.testing.assert_allclose(
        line([[-2.0, 0.0, 1.0], [2.0, 2.25, 5.0]]), expit([[-2.0, -1.0, -0.5], [0.0, 1.0, 5.0]]), rtol=1e-12
    )


# oracles


@pytest.mark.parametrize("rate", [0.02, 0.3])
@pytest.mark.parametrize(("slope", "shift"), [(0.4, 0.0), (1.0, 1.0), (9.0, -7.0)])
def test_temperature_equals_logistic_regression(rate, slope, shift):
    labels, scores = rows(rate=rate, distort=lambda z: z * slope + shift)
    found = fit_temperature(labels, scores, shrinkage=0.0)
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(scores[:, None], labels)
    assert found.slope == pytest.approx(oracle.coef_[0, 0], rel=1e-4)
    assert found.intercept == pytest.approx(oracle.intercept_[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 50.0])
def test_no_point_near_the_fit_is_better(shrinkage):
    labels, scores = rows(300, 0.05)

    def objective(slope, intercept):
        total = shrinkage * (slope - 1.0) ** 2 / 2
        for y, s in zip(labels, scores, strict=True):
            p = expit(slope * s + intercept)
            total -= np.log(p) if y else np.log(1 - p)
        return total

    found = fit_temperature(labels, scores, shrinkage)
    best = objective(found.slope, found.intercept)
    for turn in np.linspace(0, 2 * np.pi, 12):
        assert objective(found.slope + 1e-3 * np.cos(turn), found.intercept + 1e-3 * np.sin(turn)) > best


def pooled(labels, scores):
    """Blocks `[rows, positives]` by the plain algorithm: join neighbours until the rates rise."""
    blocks = [[int((scores == value).sum()), int(labels[scores == value].sum()), value] for value in np.unique(scores)]
    place = 0
    while place < len(blocks) - 1:
        (n, hits, _), (m, more, end) = blocks[place : place + 2]
        if hits / n >= more / m:
            blocks[place : place + 2] = [[n + m, hits + more, end]]
            place = max(place - 1, 0)
        else:
            place += 1
    return blocks


@pytest.mark.parametrize("levels", [6, 25, 100_000])
def test_blocks_are_those_of_the_loops_and_of_scikit_learn(levels, monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK", 1)
    labels, scores = rows(900, 0.3)
    scores = np.round(scores * levels / 10) / levels * 10
    blocks = pooled(labels, scores)
    inner = [block for block in blocks if 0 < block[1] < block[0]]
    found = fit_isotonic(labels, scores)
    for n, hits, _ in inner[1:-1]:
        assert np.isclose(expit(found.values), hits / n, rtol=1e-12).any()
    steps = IsotonicRegression().fit(scores, labels)
    ends = np.array([end for _, _, end in inner[1:-1]])
    np.testing.assert_allclose(steps.predict(ends), [hits / n for n, hits, _ in inner[1:-1]], rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_small_blocks_are_joined_and_the_line_is_through_their_rates(seed):
    labels, scores = rows(5000, 0.1, seed)
    found = fit_isotonic(labels, scores)
    joined, left = [], [0, 0]
    for n, hits, _ in pooled(labels, scores):
        left = [left[0] + n, left[1] + hits]
        if min(left[1], left[0] - left[1]) >= BLOCK:
            joined.append(left)
            left = [0, 0]
    joined[-1] = [joined[-1][0] + left[0], joined[-1][1] + left[1]]
    assert 4 < len(joined) == len(found.values)
    np.testing.assert_allclose(expit(found.values), [hits / n for n, hits in joined], rtol=1e-10)
    straight, order = fit_temperature(labels, scores), np.argsort(scores)
    parts = np.split(straight(scores[order]), np.cumsum([n for n, _ in joined])[:-1])
    np.testing.assert_allclose(straight(found.scores), [part.mean() for part in parts], rtol=1e-10)


# limits


def test_what_is_calibrated_stays_as_it_is():
    labels, scores = rows(60_000, 0.2)
    found = fit_temperature(labels, scores)
    assert found.slope == pytest.approx(1.0, abs=0.03)
    assert found.intercept == pytest.approx(0.0, abs=0.05)
    observed = np.random.default_rng(0).gamma(2.0, 10.0, 60_000)
    assert calibration.fit_scale(observed, np.full(60_000, 20.0)).factor == pytest.approx(1.0, abs=0.02)


def test_unlimited_shrinkage_shifts_alone():
    labels, scores = rows(distort=lambda z: 3 * z + 2)
    found = fit_temperature(labels, scores, shrinkage=1e12)
    assert found.slope == pytest.approx(1.0)
    assert found(scores).mean() == pytest.approx(labels.mean(), rel=1e-9)


def test_a_score_that_separates_the_classes_has_a_finite_slope():
    labels = np.repeat([0, 1], [997, 3])
    found = fit_temperature(labels, np.linspace(-8, -2, 1000))
    assert 1.0 < found.slope < 10.0
    assert found(np.linspace(-8, -2, 1000)).mean() == pytest.approx(0.003, rel=1e-9)


def test_a_score_worse_than_chance_says_nearly_the_rate_in_its_own_order():
    labels, scores = rows(distort=lambda z: -z)
    found = fit_temperature(labels, scores)
    assert found.slope == pytest.approx(FLATTEST / max(scores.std(), 1.0))
    assert found(scores).mean() == pytest.approx(labels.mean(), rel=1e-9)
    assert np.ptp(found(scores)) < 0.02


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_fit_is_found_at_any_size_of_the_logits(size):
    labels, scores = rows(distort=lambda z: z * size)
    found = fit_temperature(labels, scores, shrinkage=0.0)
    assert found.slope * size == pytest.approx(fit_temperature(labels, scores / size, 0.0).slope, rel=1e-6)


@pytest.mark.parametrize("positives", [1, 5, 2 * BLOCK - 1])
def test_with_few_positives_isotonic_is_temperature(positives):
    labels = np.arange(3000) < positives
    scores = np.random.default_rng(0).normal(size=3000) + labels
    assert fit_isotonic(labels, scores) == fit_temperature(labels, scores)


def test_with_few_positives_the_error_is_as_bounded():
    relative = []
    for seed in range(40):
        labels, scores = rows(2000, 0.018, seed)
        if labels.any():
            relative.append(fit_temperature(labels, 2 * scores + 1)(2 * scores + 1).mean() / expit(scores).mean() - 1)
    positives = 2000 * expit(rows(200_000, 0.018)[1]).mean()
    assert np.std(relative) == pytest.approx(positives**-0.5, rel=0.4)


# properties


@pytest.mark.parametrize("name", ["temperature", "isotonic"])
@pytest.mark.parametrize("rate", [0.018, 0.3])
def test_auc_is_kept(name, rate):
    labels, scores = rows(20_000, rate, distort=lambda z: z + 0.3 * z**3)
    found = fit(name, labels, scores)
    assert metrics.auc(labels, found(scores)) == pytest.approx(metrics.auc(labels, scores), abs=1e-12)


tables = st.integers(2, 60).flatmap(
    lambda count: st.tuples(
        arrays.arrays(np.int8, count, elements=st.integers(0, 1)).filter(lambda y: 0 < y.sum() < y.size),
        arrays.arrays(np.float64, count, elements=st.integers(-64, 64).map(lambda value: value / 8)),
    )
)


@pytest.mark.parametrize("block", [1, 3])
@settings(deadline=None, max_examples=60)
@given(case=tables)
def test_probabilities_rise_with_the_score_and_are_never_certain(block, case):
    former, calibration.BLOCK = calibration.BLOCK, block
    try:
        calibrators = [fit(name, *case) for name in ("temperature", "isotonic")]
    finally:
        calibration.BLOCK = former
    grid = np.arange(-9, 9.1, 0.125)
    for calibrator in calibrators:
        found = calibrator(grid)
        assert np.all((found > 0.0) & (found < 1.0))
        assert np.all(np.diff(found) > 0.0)


@pytest.mark.parametrize("rate", [0.018, 0.3])
@pytest.mark.parametrize(
    ("name", "distort"),
    [
        ("temperature", lambda z: 2.5 * z + 1),
        ("isotonic", lambda z: 2.5 * z + 1),
        ("isotonic", lambda z: z + 0.3 * (z + 1) ** 3 + 1),
    ],
)
def test_the_error_on_fresh_rows_falls(name, distort, rate):
    found = fit(name, *rows(20_000, rate, 1, distort))
    labels, scores = rows(20_000, rate, 2, distort)
    before = metrics.calibration(labels, expit(scores)).error
    after = metrics.calibration(labels, found(scores)).error
    assert after < before / 3
    assert metrics.log_loss(labels, found(scores)) < metrics.log_loss(labels, expit(scores))
    assert found(scores).mean() == pytest.approx(labels.mean(), rel=4 * (20_000 * rate) ** -0.5)


def test_the_curve_is_found_that_a_straight_line_cannot_follow():
    distort = lambda z: np.where(z > -1, -1 + 0.3 * (z + 1), z)  # noqa: E731
    labels, scores = rows(40_000, 0.2, 3, distort)
    true = expit(rows(40_000, 0.2, 3)[1])
    errors = {name: np.abs(fit(name, labels, scores)(scores) - true).mean() for name in ("temperature", "isotonic")}
    assert errors["isotonic"] < errors["temperature"] / 2


# graph and file


@pytest.mark.parametrize("calibrator", EXAMPLES, ids=lambda calibrator: calibrator.kind)
def test_the_graph_gives_what_numpy_gives(calibrator):
    values = np.concatenate([np.linspace(-6, 6, 97), [-2.0, 0.5, 0.75, 3.0, -40.0, 40.0]]).astype(np.float32)
    graph = tf.function(calibrator.graph, input_signature=[tf.TensorSpec([None], tf.float32)])
    found = graph(tf.constant(values))
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, calibrator(values), rtol=1e-6, atol=1e-6)
    square = tf.constant(values[:100].reshape(25, 4))
    np.testing.assert_allclose(calibrator.graph(square), calibrator(np.asarray(square)), rtol=1e-6, atol=1e-6)
    assert calibrator.graph(tf.zeros([0])).shape == (0,)


def test_a_saved_model_has_it_in_stock_operations(tmp_path):
    module = tf.Module()
    module.predict = tf.function(
        lambda x: {calibrator.kind: calibrator.graph(x) for calibrator in EXAMPLES},
        input_signature=[tf.TensorSpec([None], tf.float32)],
    )
    tf.saved_model.save(module, str(tmp_path), signatures=module.predict)
    loaded = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    assert not any("Py" in operation.type for operation in loaded.graph.get_operations())
    values = np.linspace(-5, 5, 41).astype(np.float32)
    found = loaded(tf.constant(values))
    for calibrator in EXAMPLES:
        np.testing.assert_allclose(found[calibrator.kind], calibrator(values), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("calibrator", EXAMPLES, ids=lambda calibrator: calibrator.kind)
def test_it_comes_back_from_json_as_it_was(calibrator):
    assert calibration.from_json(json.loads(json.dumps(calibration.to_json(calibrator)))) == calibrator
    with pytest.raises(dataclasses.FrozenInstanceError):
        calibrator.slope = 2.0


def test_fits_come_back_from_json_to_the_last_bit():
    labels, scores = rows()
    for name in ("temperature", "isotonic"):
        found = fit(name, labels, scores)
        again = calibration.from_json(json.loads(json.dumps(calibration.to_json(found))))
        np.testing.assert_array_equal(again(scores), found(scores))


# refusals


@pytest.mark.parametrize(
    ("name", "observed", "predicted", "says"),
    [
        ("plat", [0, 1], [0.0, 1.0], "unknown calibration 'plat': there are temperature, isotonic, scale"),
        ("temperature", [], [], "no rows"),
        ("isotonic", [0, 0, 0], [0.0, 1.0, 2.0], "all 3 labels are 0: calibration needs both classes"),
        ("temperature", [1, 1], [0.0, 1.0], "all 2 labels are 1"),
        ("isotonic", [0, 1, 1], [0.0, np.nan, np.inf], "2 of 3 predicted values are NaN or infinite"),
        ("temperature", [0, 2], [0.0, 1.0], "labels must be 0 or 1"),
        ("temperature", [0, 1], [0.0, 1.0, 2.0], "same rows"),
        ("scale", [], [], "no rows"),
        ("scale", [1.0, np.nan], [1.0, 1.0], "1 of 2 observed"),
        ("scale", [0.0, 0.0], [1.0, 1.0], "observed as 0"),
        ("scale", [1.0, 1.0], [1.0, 0.0], "seconds are positive"),
        ("scale", [-1.0, 1.0], [1.0, 1.0], "seconds are positive"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(name, observed, predicted, says):
    with pytest.raises(ValueError, match=says):
        fit(name, observed, predicted)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown calibration 'plat'"):
        calibration.from_json({"kind": "plat"})
