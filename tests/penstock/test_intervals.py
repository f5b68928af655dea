from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from penstock import intervals, metrics
from penstock.intervals import Interval
from penstock.metrics import MetricError
from tests.penstock.test_metrics import GRID, sample


def delong_by_pairs(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs and their covariance from all m (n - m) comparisons, as in DeLong et al. (1988)."""
    parts = []
    for scores in (first, second):
        difference = scores[labels == 1][:, None] - scores[labels == 0][None, :]
        parts.append((difference > 0) + 0.5 * (difference == 0))
    above = np.stack([part.mean(axis=1) for part in parts])
    below = np.stack([part.mean(axis=0) for part in parts])
    return above.mean(axis=1), np.cov(above) / above.shape[1] + np.cov(below) / below.shape[1]


@pytest.mark.parametrize(("rows", "share", "levels"), [case for case in GRID if case[0] > 7])
def test_with_one_row_a_user_an_auc_is_delongs(rows: int, share: float, levels: int) -> None:
    labels, first = sample(rows, share, levels)
    labels[2:4] = (0, 1)  # two of each class at the least
    second = np.where(np.arange(rows) % 3, first, sample(rows, share, levels, seed=1)[1])
    values, covariance = delong_by_pairs(labels, first, second)
    users = np.random.default_rng(0).permutation(rows)
    ours = [intervals.auc(labels, scores, users) for scores in (first, second)]
    assert [one.value for one in ours] == pytest.approx(list(values), abs=1e-12)
    assert ours[0].deviation ** 2 == pytest.approx(covariance[0, 0], abs=1e-12)
    difference = ours[0] - ours[1]
    variance = max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert difference.deviation**2 == pytest.approx(variance, abs=1e-12)
    half = 1.959963984540054 * difference.deviation
    assert difference.interval(0.95).low == pytest.approx(difference.value - half, abs=1e-9)
    if difference.deviation:
        chance = math.erfc(abs(difference.value) / difference.deviation / math.sqrt(2))
        assert difference.p_value == pytest.approx(chance, abs=1e-9)


def obuchowski(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """The variance of a clustered AUC by the loops of the paper."""
    positives, negatives = scores[labels == 1], scores[labels == 0]

    def kernel(one: float, other: float) -> float:
        return float(one > other) + 0.5 * float(one == other)

    m, n = len(positives), len(negatives)
    area = np.mean([kernel(one, other) for one in positives for other in negatives])
    x = [np.mean([kernel(one, other) for other in negatives]) for one in positives]
    y = [np.mean([kernel(one, other) for one in positives]) for other in negatives]
    names = np.unique(users)
    of_x = {u: sum(v - area for v, w in zip(x, users[labels == 1], strict=True) if w == u) for u in names}
    of_y = {u: sum(v - area for v, w in zip(y, users[labels == 0], strict=True) if w == u) for u in names}
    i10, i01 = len(np.unique(users[labels == 1])), len(np.unique(users[labels == 0]))
    s10 = i10 / (i10 - 1) * sum(v**2 for v in of_x.values()) / m**2
    s01 = i01 / (i01 - 1) * sum(v**2 for v in of_y.values()) / n**2
    cross = math.sqrt(i10 / (i10 - 1) * i01 / (i01 - 1)) * sum(of_x[u] * of_y[u] for u in names) / (m * n)
    return float(s10 + s01 + 2 * cross)


@pytest.mark.parametrize("levels", [2, 5, 10**9])
def test_the_variance_with_many_rows_a_user_equals_the_loops(levels: int) -> None:
    labels, scores = sample(120, 0.3, levels)
    users = np.random.default_rng(1).integers(0, 25, 120)
    found = intervals.auc(labels, scores, users)
    assert found.value == pytest.approx(metrics.auc(labels, scores), abs=1e-12)
    assert found.deviation**2 == pytest.approx(obuchowski(labels, scores, users), rel=1e-9)


def test_a_score_and_itself_are_no_difference() -> None:
    labels, scores = sample(100, 0.3, 10)
    users = np.arange(100) // 4
    difference = intervals.auc(labels, scores, users) - intervals.auc(labels, np.exp(scores), users)
    assert difference.interval(0.95) == Interval(0, 0, 0)
    assert difference.p_value == 1


def test_the_interval_of_users_with_many_rows_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(6)
    users = np.repeat(np.arange(80), 10)
    truth = 0.5 * (1 + math.erf(1 / 2))  # of N(1, 1) against N(0, 1)
    inside = by_row = 0
    for _ in range(400):
        labels = np.repeat(generator.random(80) < 0.4, 10) ^ (generator.random(800) < 0.1)
        # 0.8 of the variance is the user's, who is the same in all of his rows
        scores = (
            labels
            + math.sqrt(0.8) * np.repeat(generator.normal(size=80), 10)
            + math.sqrt(0.2) * generator.normal(size=800)
        )
        for rows_of, of in (("user", users), ("row", np.arange(800))):
            found = intervals.auc(labels, scores, of).interval(0.95)
            if rows_of == "user":
                inside += found.low <= truth <= found.high
            else:
                by_row += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.98
    assert by_row / 400 < 0.8


@pytest.mark.parametrize(("labels", "users"), [([0, 0, 1, 1], [1, 2, 3, 3]), ([1, 1, 0, 0], [1, 2, 3, 3])])
def test_a_class_of_one_user_is_refused(labels: list[int], users: list[int]) -> None:
    with pytest.raises(MetricError, match="at least two users"):
        intervals.auc(labels, [1, 2, 3, 4], users)


def test_the_mean_of_figures_adds_what_users_add() -> None:
    labels, scores = sample(300, 0.3, 10**9)
    users = np.arange(300) // 3
    one = intervals.auc(labels, scores, users)
    both = intervals.mean_estimate([one, one])
    assert both.value == one.value
    assert both.deviation == pytest.approx(one.deviation)
    against = intervals.mean_estimate([one, intervals.auc(labels, -scores, users)])
    assert against.value == pytest.approx(0.5)
    assert against.deviation == pytest.approx(0.0, abs=1e-12)


SETTINGS = {"replicates": 400, "seed": 3}


def test_averages_over_users_are_the_metrics() -> None:
    labels, scores = sample(600, 0.3, 20)
    generator = np.random.default_rng(4)
    sessions = np.sort(generator.integers(0, 120, 600))
    users = sessions // 3
    gauc = intervals.gauc(labels, scores, users, **SETTINGS)
    assert gauc.value == pytest.approx(metrics.gauc(labels, scores, users), abs=1e-12)
    ndcg = intervals.ndcg(labels, scores, sessions, users, k=5, **SETTINGS)
    assert ndcg.value == pytest.approx(metrics.session_ndcg(labels, scores, sessions, 5), abs=1e-12)
    average = intervals.average([1.0, float("nan"), 3.0], **SETTINGS)
    assert average.value == 2


def test_a_draw_is_of_whole_users() -> None:
    """The interval equals that of replicates made by hand: rows of drawn users, repeated as often as drawn."""
    labels, scores = sample(200, 0.4, 10**9)
    users = np.random.default_rng(5).integers(0, 30, 200)
    found = intervals.gauc(labels, scores, users, replicates=60, seed=9).interval(0.9)
    generator, names = np.random.default_rng(9), np.unique(users)
    drawn = []
    for _ in range(60):
        rows = [np.flatnonzero(users == names[at]) for at in generator.integers(0, names.size, names.size)]
        copies = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        drawn.append(metrics.gauc(labels[np.concatenate(rows)], scores[np.concatenate(rows)], copies))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.05, 0.95))), abs=1e-12)


def test_differences_are_paired_and_the_same_each_time() -> None:
    labels, first = sample(900, 0.4, 10**9)
    users = np.arange(900) // 9
    second = first + np.random.default_rng(1).normal(0, 0.05, 900)
    one, other = (intervals.gauc(labels, scores, users, **SETTINGS) for scores in (first, second))
    difference = (one - other).interval(0.95)
    assert difference == (one - other).interval(0.95)
    assert difference.value == pytest.approx(one.value - other.value)
    alone = one.interval(0.95)
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
    assert (one - one).interval(0.95) == Interval(0, 0, 0)


def test_averages_and_closed_forms_agree_where_both_are_known() -> None:
    """The mean of n independent values has the deviation s / √n."""
    values = np.random.default_rng(2).normal(size=500)
    found = intervals.average(values, replicates=3000, seed=0).interval(0.95)
    half = 1.96 * values.std() / math.sqrt(500)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_too_few_users_are_refused() -> None:
    with pytest.raises(MetricError, match="too few users"):
        intervals.gauc([0, 1, 0, 0], [1, 2, 3, 4], [1, 1, 2, 3], replicates=200, seed=0).interval(0.95)
    with pytest.raises(MetricError, match="no user has a value"):
        intervals.average([float("nan")], replicates=10, seed=0)


def test_calibration_ratio_and_slope_closed_forms() -> None:
    def ratio(labels: list[int], probabilities: list[float]) -> float:
        return intervals.calibration_ratio(labels, probabilities, np.arange(len(labels))).value

    assert ratio([0, 1, 0, 1], [0.2, 0.8, 0.2, 0.8]) == pytest.approx(1.0)
    assert ratio([0, 1, 0, 0], [0.5] * 4) == 2.0
    # two groups of probability .2 and .8 in which .4 and .6 are positive: logit .6 / logit .8
    labels = [1, 1, 0, 0, 0] * 40 + [1, 1, 1, 0, 0] * 40
    probabilities = [0.2] * 200 + [0.8] * 200
    expected = math.log(0.6 / 0.4) / math.log(0.8 / 0.2)
    found = intervals.calibration_slope(labels, probabilities, np.arange(400))
    assert found.value == pytest.approx(expected, abs=1e-9)


def drawn(rows: int, seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the probabilities they were drawn by with logits divided by `scale`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1.0, 1.5, rows)
    labels = (generator.random(rows) < 1 / (1 + np.exp(-logits))).astype(int)
    return labels, 1 / (1 + np.exp(-logits / scale))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_slope_is_what_the_logits_were_divided_by_and_equals_scikit_learn(scale: float) -> None:
    labels, probabilities = drawn(60_000, 1, scale)
    found = intervals.calibration_slope(labels, probabilities, np.arange(60_000)).value
    assert found == pytest.approx(scale, rel=0.03)
    logits = np.log(probabilities / (1 - probabilities))
    peer = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, None], labels)
    assert found == pytest.approx(peer.coef_[0, 0], rel=1e-4)


@pytest.mark.parametrize("figure", [intervals.calibration_ratio, intervals.calibration_slope])
def test_intervals_of_calibration_hold_the_truth_as_often_as_they_say(figure) -> None:
    inside = 0
    for seed in range(300):
        labels, probabilities = drawn(600, seed)
        # each row twice, as of one user: by rows the interval would be too narrow
        found = figure(np.repeat(labels, 2), np.repeat(probabilities, 2), np.repeat(np.arange(600), 2)).interval(0.95)
        inside += found.low <= 1.0 <= found.high
    assert 0.91 <= inside / 300 <= 0.98


def test_the_slope_of_labels_that_are_separated_is_large_and_finite() -> None:
    users = np.arange(4)
    assert intervals.calibration_slope([0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9], users).value > 5
    assert np.isfinite(intervals.calibration_slope([0, 0, 1, 1], [0.0, 0.0, 1.0, 1.0], users).value)
    assert intervals.calibration_slope([0, 1, 1], [0.5, 0.5, 0.5], users[:3]).value == pytest.approx(1.0)
