from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score, roc_curve

from penstock import metrics
from penstock.metrics import MetricError

GRID = [(rows, share, levels) for rows in (2, 7, 50, 1000) for share in (0.02, 0.5, 0.9) for levels in (1, 2, 5, 10**9)]


def sample(rows: int, share: float, levels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both classes and scores on at most `levels` values, better than chance."""
    generator = np.random.default_rng([rows, int(share * 100), levels, seed])
    labels = (generator.random(rows) < share).astype(np.int8)
    labels[:2] = (0, 1)
    scores = np.floor(1 / (1 + np.exp(-generator.normal(labels))) * levels) / levels
    return labels, scores


# AUC


def test_auc_closed_forms() -> None:
    assert metrics.auc([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]) == 1
    assert metrics.auc([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]) == 0
    assert metrics.auc([0, 1, 0, 1], [0.1, 0.4, 0.35, 0.35]) == (1 + 1 + 1 + 0.5) / 4
    assert metrics.auc([0, 1, 1], [5, 5, 5]) == 0.5


@pytest.mark.parametrize(("rows", "share", "levels"), GRID)
def test_auc_equals_scikit_learn(rows: int, share: float, levels: int) -> None:
    labels, scores = sample(rows, share, levels)
    assert metrics.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


labelled = st.integers(2, 40).flatmap(
    lambda rows: st.tuples(
        hnp.arrays(np.int8, rows, elements=st.integers(0, 1)).filter(lambda y: 0 < y.sum() < y.size),
        hnp.arrays(np.float64, rows, elements=st.integers(-5, 5).map(float)),
    )
)


@given(labelled)
def test_auc_ignores_any_increasing_transform_and_turns_with_the_sign(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    value = metrics.auc(labels, scores)
    assert metrics.auc(labels, np.exp(scores / 3) + 7) == value
    assert metrics.auc(labels, -scores) == pytest.approx(1 - value, abs=1e-12)
    assert metrics.auc(1 - labels, scores) == pytest.approx(1 - value, abs=1e-12)


@given(labelled)
def test_auc_is_the_area_under_the_roc_curve(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    curve = metrics.roc(labels, scores)
    area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
    assert area == pytest.approx(metrics.auc(labels, scores), abs=1e-12)


def test_roc_points_equal_scikit_learn() -> None:
    labels, scores = sample(300, 0.3, 20)
    curve = metrics.roc(labels, scores)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive_rate, fpr)
    np.testing.assert_allclose(curve.true_positive_rate, tpr)


@pytest.mark.parametrize(
    ("labels", "scores", "says"),
    [
        ([1, 1], [0.1, 0.2], "all 2 labels are 1"),
        ([0, 0], [0.1, 0.2], "all 2 labels are 0"),
        ([], [], "non-empty"),
        ([0, 1], [0.1, float("nan")], "1 of 2 scores are NaN"),
        ([0, 1], [0.1, float("inf")], "1 of 2 scores are NaN or infinite"),
        ([0, 2], [0.1, 0.2], "0 or 1"),
        ([0, 1], [0.1], "shape"),
    ],
)
def test_auc_refuses_what_has_no_auc(labels: list[int], scores: list[float], says: str) -> None:
    for function in (metrics.auc, metrics.roc, metrics.checked):
        with pytest.raises(MetricError, match=says):
            function(labels, scores)


# GAUC


def gauc_by_loop(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    total = weight = 0.0
    for user in np.unique(users):
        rows = users == user
        if 0 < labels[rows].sum() < rows.sum():
            total += rows.sum() * roc_auc_score(labels[rows], scores[rows])
            weight += rows.sum()
    return total / weight


@pytest.mark.parametrize("levels", [2, 5, 10**9])
@pytest.mark.parametrize("users", [1, 3, 60])
def test_gauc_equals_a_loop_over_users(users: int, levels: int) -> None:
    labels, scores = sample(400, 0.3, levels)
    ids = np.random.default_rng(1).integers(0, users, 400) * 1_000_003
    assert metrics.gauc(labels, scores, ids) == pytest.approx(gauc_by_loop(labels, scores, ids), abs=1e-12)


def test_gauc_of_one_user_is_auc_and_ignores_what_is_added_per_user() -> None:
    labels, scores = sample(200, 0.4, 50)
    assert metrics.gauc(labels, scores, np.zeros(200)) == pytest.approx(metrics.auc(labels, scores), abs=1e-12)
    users = np.arange(200) % 7
    assert metrics.gauc(labels, scores + users * 100, users) == pytest.approx(metrics.gauc(labels, scores, users))


def test_gauc_without_a_mixed_user_is_refused() -> None:
    with pytest.raises(MetricError, match="no user has both"):
        metrics.gauc([0, 0, 1, 1], [1, 2, 3, 4], [1, 1, 2, 2])


# Lists


def test_recall_and_ndcg_closed_forms() -> None:
    ranked = [[10, 20, 30], [1, 2, -1], [5, 6, 7]]
    relevant = [[20, 99], [2, 1], []]  # the third user acted on nothing: left out
    assert metrics.recall_at_k(ranked, relevant) == (1 / 2 + 2 / 2) / 2
    first = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    assert metrics.ndcg_at_k(ranked, relevant) == pytest.approx((first + 1) / 2)


def test_repeats_and_empty_places_never_count() -> None:
    assert metrics.recall_at_k([[4, 4, 4]], [[4, 4, 5]]) == 1 / 2
    assert metrics.ndcg_at_k([[4, 4, 4]], [[4, 5]]) < 1
    assert metrics.recall_at_k([[-1, -1]], [[-1, 3]]) == 0


def test_lists_equal_oracles() -> None:
    generator = np.random.default_rng(5)
    ranked = np.argsort(generator.random((30, 100)), axis=1)[:, :12] + 10**12
    relevant = [np.flatnonzero(generator.random(100) < 0.1) + 10**12 for _ in range(30)]
    kept = [(row, items) for row, items in zip(ranked, relevant, strict=True) if items.size]
    recall = [len(set(row) & set(items)) / len(items) for row, items in kept]
    assert metrics.recall_at_k(ranked, relevant) == pytest.approx(np.mean(recall))
    gains = np.zeros((len(kept), 100))
    scores = np.zeros((len(kept), 100))
    for place, (row, items) in enumerate(kept):
        gains[place, items - 10**12] = 1
        scores[place, row - 10**12] = np.arange(12, 0, -1)
    assert metrics.ndcg_at_k(ranked, relevant) == pytest.approx(ndcg_score(gains, scores, k=12, ignore_ties=True))


def test_lists_of_nothing_are_refused() -> None:
    with pytest.raises(MetricError, match="no user has a relevant item"):
        metrics.recall_at_k([[1, 2]], [[]])
    with pytest.raises(MetricError, match="2 ranked lists for 1"):
        metrics.ndcg_at_k([[1], [2]], [[1]])


# Probabilities


def test_log_loss_equals_scikit_learn_and_stays_finite_at_the_ends() -> None:
    labels, scores = sample(500, 0.2, 10**9)
    assert metrics.log_loss(labels, scores) == pytest.approx(sklearn_log_loss(labels, scores))
    assert metrics.log_loss([0, 1], [0, 1]) == pytest.approx(0, abs=1e-12)
    assert math.isfinite(metrics.log_loss([1], [0]))
    with pytest.raises(MetricError, match="outside 0 to 1"):
        metrics.log_loss([0, 1], [0.2, 1.2])


def test_calibration_of_the_true_probability_is_near_nought_and_of_a_shifted_one_is_the_shift() -> None:
    generator = np.random.default_rng(2)
    truth = generator.uniform(0.1, 0.7, 100_000)
    labels = generator.random(100_000) < truth
    good = metrics.calibration(labels, truth, bins=20)
    assert good.error < 0.01
    assert good.count.sum() == 100_000
    assert good.count.min() > 4_500
    assert metrics.calibration(labels, truth + 0.2, bins=20).error == pytest.approx(0.2, abs=0.01)


def test_calibration_in_one_bin_is_the_difference_of_means_and_ties_stay_together() -> None:
    labels, scores = sample(100, 0.3, 4)
    whole = metrics.calibration(labels, scores, bins=1)
    assert whole.error == pytest.approx(abs(labels.mean() - scores.mean()))
    split = metrics.calibration(labels, scores, bins=50)
    assert split.count.size == np.unique(scores).size
    assert metrics.calibration(labels[::-1], scores[::-1], bins=3).error == pytest.approx(
        metrics.calibration(labels, scores, bins=3).error
    )


def test_coverage_is_the_share_of_items_that_stand_in_a_list():
    ranked = np.array([[1, 2, -1], [2, 5, 7]])
    assert metrics.coverage(ranked, [1, 5, 9, 9]) == pytest.approx(2 / 3)
    assert np.isnan(metrics.coverage(ranked, []))


@pytest.mark.parametrize("levels", [1, 3, 10**9])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_session_ndcg_equals_scikit_learn_ties_included(levels: int, k: int) -> None:
    labels, scores = sample(400, 0.3, levels)
    sessions = np.random.default_rng(2).integers(0, 60, 400)
    expected = [
        ndcg_score([labels[sessions == one]], [scores[sessions == one]], k=k)
        for one in range(60)
        if labels[sessions == one].any() and (sessions == one).sum() > 1
    ]
    alone = [one for one in range(60) if (sessions == one).sum() == 1 and labels[sessions == one].any()]
    value = metrics.session_ndcg(labels, scores, sessions, k)
    assert value == pytest.approx((sum(expected) + len(alone)) / (len(expected) + len(alone)), abs=1e-12)


def test_session_ndcg_closed_forms() -> None:
    # one session, the positive second of three: 1 / log2(3); beyond k it counts nothing
    assert metrics.session_ndcg([0, 1, 0], [3, 2, 1], [7, 7, 7], 3) == pytest.approx(1 / math.log2(3))
    assert metrics.session_ndcg([0, 1, 0], [3, 2, 1], [7, 7, 7], 1) == 0
    # all tie: the mean discount of three places
    mean = (1 + 1 / math.log2(3) + 1 / 2) / 3
    assert metrics.session_ndcg([0, 1, 0], [5, 5, 5], [7, 7, 7], 3) == pytest.approx(mean)
    with pytest.raises(MetricError, match="no session has a positive"):
        metrics.session_ndcg([0, 0], [1, 2], [1, 1], 3)
