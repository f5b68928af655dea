"""How sure a figure is: estimates on test rows whose users, not rows, are independent, and differences of them.

Two scores are compared on the same rows, so that what is hard for both takes nothing from the difference. AUCs have
DeLong's variance with users as clusters, in closed form; averages over users and sessions are drawn again by user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from penstock import metrics
from penstock.metrics import Array, Integers, MetricError


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float


class Figure(Protocol):
    """An estimate that can be held against another of its kind, on the same users."""

    @property
    def value(self) -> float: ...

    def __sub__(self, other: Any, /) -> Figure: ...

    def interval(self, confidence: float) -> Interval: ...


@dataclass(frozen=True)
class Estimate:
    """A figure whose error is a sum over users, near enough to normal.

    Attributes:
        influence: what each user adds to the error, `[users]`; the variance is Σ_u influence_u².
    """

    value: float
    influence: Array

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.influence - other.influence)

    @property
    def deviation(self) -> float:
        """The standard error."""
        return float(np.sqrt(np.square(self.influence).sum()))

    @property
    def p_value(self) -> float:
        """Of the value being 0, two-sided; 1 for a 0 without error."""
        if not self.deviation:
            return float(self.value == 0)
        return 2 * NormalDist().cdf(-abs(self.value) / self.deviation)

    def interval(self, confidence: float) -> Interval:
        """The normal interval."""
        half = NormalDist().inv_cdf(0.5 + confidence / 2) * self.deviation
        return Interval(self.value, self.value - half, self.value + half)


@dataclass(frozen=True)
class Resampled:
    """Σ_t c_t Σ_u a_tu / Σ_u b_tu: averages over users, whose error is found by drawing users with replacement.

    Attributes:
        terms: for each average its factor c, and a and b `[users]`; the users are the same of all.
        replicates, seed: how often users are drawn, and from which start: the same interval each time.
    """

    terms: tuple[tuple[float, Array, Array], ...]
    replicates: int
    seed: int

    @property
    def value(self) -> float:
        return sum(factor * float(a.sum()) / float(b.sum()) for factor, a, b in self.terms)

    def __sub__(self, other: Resampled) -> Resampled:
        negative = tuple((-factor, a, b) for factor, a, b in other.terms)
        return Resampled((*self.terms, *negative), self.replicates, self.seed)

    def interval(self, confidence: float) -> Interval:
        """The percentile interval.

        Raises:
            MetricError: a draw in which nobody counts: too few users.
        """
        users = self.terms[0][1].size
        generator = np.random.default_rng(self.seed)
        stacked = np.stack([part for _, a, b in self.terms for part in (a, b)], axis=1)
        sums = np.stack(
            [
                np.bincount(generator.integers(0, users, users), minlength=users) @ stacked
                for _ in range(self.replicates)
            ]
        )
        if not sums[:, 1::2].all():
            raise MetricError("a bootstrap draw of users left nobody to average over: too few users")
        drawn = (sums[:, ::2] / sums[:, 1::2]) @ np.array([factor for factor, _, _ in self.terms])
        low, high = np.quantile(drawn, (0.5 - confidence / 2, 0.5 + confidence / 2))
        return Interval(self.value, float(low), float(high))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of figures on the same users."""
    values = [estimate.value for estimate in estimates]
    return Estimate(float(np.mean(values)), np.mean([estimate.influence for estimate in estimates], axis=0))


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike) -> Estimate:
    """AUC, a tie counting half, with users as clusters: Obuchowski (Biometrics 1997), eqs. 3 to 5.

    With X_i the share of negatives below positive i and Y_j the share of positives above negative j (DeLong, DeLong and
    Clarke-Pearson 1988; by the midranks of Sun and Xu 2014, O(n log n)), a user adds Σ (X_i - AUC) / m over its
    positives and Σ (Y_j - AUC) / (n - m) over its negatives. With one row a user the variance is DeLong's.

    Raises:
        MetricError: what `metrics.auc` refuses, or a class of fewer than two users.
    """
    positive, values = metrics.checked(labels, scores)
    codes, count = _codes(users, positive.size)
    ranks = metrics.midranks(values)
    m = int(positive.sum())
    above = (ranks[positive] - metrics.midranks(values[positive])) / (positive.size - m)
    below = 1 - (ranks[~positive] - metrics.midranks(values[~positive])) / m
    area = float(above.mean())
    influence = np.zeros(count)
    for placements, of in ((above, codes[positive]), (below, codes[~positive])):
        clusters = np.unique(of).size
        if clusters < 2:
            raise MetricError("the variance of an AUC needs at least two users with a positive and two with a negative")
        scale = (clusters / (clusters - 1)) ** 0.5 / placements.size
        influence += scale * np.bincount(of, weights=placements - area, minlength=count)
    return Estimate(area, influence)


def calibration_ratio(labels: npt.ArrayLike, probabilities: npt.ArrayLike, users: npt.ArrayLike) -> Estimate:
    """What is predicted over what happened, R = Σ p / Σ y; 1 is calibrated in the large. A user adds Σ (p − R y) / Σ y.

    Raises:
        MetricError: one class only, or no probabilities.
    """
    positive, _ = metrics.checked(labels, probabilities)
    p = metrics.probabilities_of(probabilities, positive.size)
    codes, count = _codes(users, positive.size)
    m = int(positive.sum())
    ratio = float(p.sum() / m)
    influence: Array = np.bincount(codes, weights=p - ratio * positive, minlength=count) / m
    return Estimate(ratio, influence)


def calibration_slope(labels: npt.ArrayLike, probabilities: npt.ArrayLike, users: npt.ArrayLike) -> Estimate:
    """The slope b of logit P(y = 1) = a + b logit(p) by maximum likelihood (Cox, Biometrika 1958); 1 is calibrated.

    Below 1 the probabilities are too extreme, above 1 too timid. p is kept 1e-6 away from 0 and 1. With users as
    clusters: b's part of H⁻¹ Σ x (y − f), the sandwich of Liang and Zeger (Biometrika 1986), eq. 7.

    Raises:
        MetricError: one class only, or no probabilities.
    """
    positive, _ = metrics.checked(labels, probabilities)
    p = np.clip(metrics.probabilities_of(probabilities, positive.size), 1e-6, 1 - 1e-6)
    codes, count = _codes(users, positive.size)
    design = np.stack([np.ones(p.size), np.log(p) - np.log1p(-p)])
    beta = np.array([0.0, 1.0])
    for _ in range(100):  # Newton's method, its steps bounded: it goes off where a label is nearly separated
        residual = positive - 1 / (1 + np.exp(-(beta @ design)))
        spread = (design * ((positive - residual) * (1 - positive + residual))) @ design.T
        step = np.linalg.lstsq(spread, design @ residual, rcond=None)[0]
        if np.abs(step).max() < 1e-8:
            break
        beta = beta + np.clip(step, -1.0, 1.0)
    of_rows: Array = np.linalg.lstsq(spread, design * residual, rcond=None)[0][1]
    influence: Array = np.bincount(codes, weights=of_rows, minlength=count).astype(np.float64)
    return Estimate(float(beta[1]), influence)


def gauc(
    labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike, *, replicates: int, seed: int
) -> Resampled:
    """`metrics.gauc`, users drawn again.

    Raises:
        MetricError: what it refuses.
    """
    areas, impressions, of = metrics.auc_by_group(labels, scores, users)
    codes, count = _codes(users, np.size(labels))
    return _average(areas * impressions, impressions.astype(np.float64), codes[of], count, replicates, seed)


def ndcg(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    sessions: npt.ArrayLike,
    users: npt.ArrayLike,
    *,
    k: int,
    replicates: int,
    seed: int,
) -> Resampled:
    """`metrics.session_ndcg`, users drawn again with all of their sessions.

    Raises:
        MetricError: what it refuses.
    """
    values, of = metrics.ndcg_by_session(labels, scores, sessions, k)
    codes, count = _codes(users, np.size(labels))
    return _average(values, np.ones(values.size), codes[of], count, replicates, seed)


def average(values: npt.ArrayLike, *, replicates: int, seed: int) -> Resampled:
    """The mean of `values`, one a user; NaN where a user has none."""
    found = np.asarray(values, dtype=np.float64)
    some = np.isfinite(found)
    if not some.any():
        raise MetricError("no user has a value to average")
    return Resampled(((1.0, np.where(some, found, 0.0), some.astype(np.float64)),), replicates, seed)


def _average(values: Array, weights: Array, codes: Integers, count: int, replicates: int, seed: int) -> Resampled:
    a = np.bincount(codes, weights=values, minlength=count).astype(np.float64)
    b = np.bincount(codes, weights=weights, minlength=count).astype(np.float64)
    return Resampled(((1.0, a, b),), replicates, seed)


def _codes(users: npt.ArrayLike, rows: int) -> tuple[Integers, int]:
    distinct, codes = np.unique(np.asarray(users), return_inverse=True)
    if codes.size != rows:
        raise MetricError(f"{codes.size} users for {rows} labels")
    return codes.reshape(-1), distinct.size
