"""Ranking and probability metrics, exact. NumPy float64 throughout.

Notation: labels `y` [n] in {0, 1}, scores `s` [n], `m` positives, `n - m` negatives. Everything raises MetricError
rather than return a number that means nothing (one class, NaN, no rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


class MetricError(ValueError):
    """A metric that is not defined on what it was given; the message says why."""


@dataclass(frozen=True)
class Calibration:
    """A calibration curve: a bin has `count` rows, their mean probability, and the share of them that are positive.

    `error` is the expected calibration error, Σ_b (count_b / n) |share_b - probability_b|.
    """

    probability: Array
    share: Array
    count: Integers
    error: float


@dataclass(frozen=True)
class Roc:
    """The ROC curve from (0, 0) to (1, 1), one point a distinct score, highest score first."""

    false_positive_rate: Array
    true_positive_rate: Array


def _scores(scores: npt.ArrayLike, rows: int, what: str = "scores") -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (rows,):
        raise MetricError(f"{what} have the shape {values.shape}, not ({rows},) as the labels do")
    if not np.isfinite(values).all():
        raise MetricError(f"{int((~np.isfinite(values)).sum())} of {rows} {what} are NaN or infinite")
    return values


def _labels(labels: npt.ArrayLike, *, both: bool = True) -> Bools:
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0:
        raise MetricError(f"labels must be a non-empty vector, not of shape {values.shape}")
    positive: Bools = values == 1
    if not (positive | (values == 0)).all():
        raise MetricError("labels must be 0 or 1")
    if both and (positive.all() or not positive.any()):
        raise MetricError(f"all {values.size} labels are {int(positive[0])}: AUC needs both classes")
    return positive


def checked(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Bools, Array]:
    """Which rows are positive, and their scores in float64.

    Raises:
        MetricError: no rows, one class only, or scores that are not finite.
    """
    positive = _labels(labels)
    return positive, _scores(scores, positive.size)


def _runs(changed: Bools) -> Integers:
    """Starts of the runs of equal neighbours, and the total length at the end; `changed` [n - 1]."""
    return np.concatenate(([0], np.flatnonzero(changed) + 1, [changed.size + 1]))


def midranks(values: Array) -> Array:
    """Ranks from 1, tied values sharing the mean of their ranks. [n]"""
    order = np.argsort(values)
    ordered = values[order]
    bounds = _runs(ordered[1:] != ordered[:-1])
    ranks = np.empty(values.size)
    ranks[order] = np.repeat((bounds[:-1] + bounds[1:] + 1) / 2, np.diff(bounds))
    return ranks


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The probability that a positive is scored above a negative, a tie counting half.

    AUC = (Σ_{i: y_i = 1} midrank(s_i) - m (m + 1) / 2) / (m (n - m)): Mann and Whitney's U, exact in float64.

    Raises:
        MetricError: no rows, one class only, or scores that are not finite.
    """
    positive, values = checked(labels, scores)
    ranks = midranks(values)
    return _auc_of_ranks(float(ranks[positive].sum()), int(positive.sum()), positive.size)


def _auc_of_ranks(rank_sum: float, positives: int, rows: int) -> float:
    return (rank_sum - positives * (positives + 1) / 2) / (positives * (rows - positives))


def gauc(labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike) -> float:
    """AUC within each user, averaged by the user's impressions: Σ_u n_u AUC_u / Σ_u n_u.

    Users with one class only have no AUC and are left out (Zhou et al., Deep Interest Network, 2018, eq. 7).

    Raises:
        MetricError: no user has both classes, or what `auc` refuses.
    """
    areas, impressions, _ = auc_by_group(labels, scores, users)
    return float(np.average(areas, weights=impressions))


def auc_by_group(
    labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike
) -> tuple[Array, Integers, Integers]:
    """The AUC within each group that has both classes, the group's rows, and one of them: each `[groups]`.

    Raises:
        MetricError: no group has both classes, or what `auc` refuses.
    """
    positive = _labels(labels, both=False)
    values = _scores(scores, positive.size)
    codes = _group_codes(groups, positive.size)
    order = np.lexsort((values, codes))
    group, ordered, hit = codes[order], values[order], positive[order]
    count = np.bincount(group)
    positives = np.bincount(group, weights=hit)
    both = (positives > 0) & (positives < count)
    if not both.any():
        raise MetricError("no user has both a positive and a negative: GAUC is not defined")
    bounds = _runs((ordered[1:] != ordered[:-1]) | (group[1:] != group[:-1]))
    first = np.concatenate(([0], np.cumsum(count)[:-1]))
    ranks = np.repeat((bounds[:-1] + bounds[1:] + 1) / 2, np.diff(bounds)) - first[group]
    rank_sums = np.bincount(group, weights=ranks * hit)
    n, m = count[both], positives[both]
    return (rank_sums[both] - m * (m + 1) / 2) / (m * (n - m)), n, order[first[both]]


def session_ndcg(labels: npt.ArrayLike, scores: npt.ArrayLike, sessions: npt.ArrayLike, k: int) -> float:
    """NDCG@k of the rows of each session, averaged over the sessions with a positive.

    Rows that tie share the mean of the discounts of their places: the expectation over their orders (McSherry and
    Najork, ECIR 2008, section 2.6).

    Raises:
        MetricError: no session has a positive, or what `auc` refuses but for one class.
    """
    return float(ndcg_by_session(labels, scores, sessions, k)[0].mean())


def ndcg_by_session(
    labels: npt.ArrayLike, scores: npt.ArrayLike, sessions: npt.ArrayLike, k: int
) -> tuple[Array, Integers]:
    """`session_ndcg` of each session with a positive, and one of its rows: each `[sessions]`."""
    positive = _labels(labels, both=False)
    values = _scores(scores, positive.size)
    codes = _group_codes(sessions, positive.size)
    order = np.lexsort((-values, codes))
    session, ordered, hit = codes[order], values[order], positive[order]
    count = np.bincount(session)
    positives = np.bincount(session, weights=hit).astype(np.int64)
    some = positives > 0
    if not some.any():
        raise MetricError("no session has a positive: NDCG is not defined")
    gains = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))))
    first = np.concatenate(([0], np.cumsum(count)[:-1]))
    bounds = _runs((ordered[1:] != ordered[:-1]) | (session[1:] != session[:-1]))
    length = np.diff(bounds)
    place = bounds[:-1] - first[session[bounds[:-1]]]
    discounts = (gains[np.minimum(place + length, k)] - gains[np.minimum(place, k)]) / length
    dcg = np.bincount(session, weights=np.repeat(discounts, length) * hit)
    return dcg[some] / gains[np.minimum(positives[some], k)], order[first[some]]


def _group_codes(groups: npt.ArrayLike, rows: int) -> Integers:
    codes = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if codes.size != rows:
        raise MetricError(f"{codes.size} groups for {rows} labels")
    return codes


def _hits(ranked: npt.ArrayLike, relevant: Sequence[npt.ArrayLike]) -> tuple[Bools, Integers]:
    """Which places of `ranked` hold a relevant item for the first time [n, k], and how many are relevant [n]."""
    lists = np.asarray(ranked, dtype=np.int64)
    if lists.ndim != 2 or lists.shape[1] == 0:
        raise MetricError(f"ranked lists must be [users, k], not of shape {lists.shape}")
    if len(relevant) != lists.shape[0]:
        raise MetricError(f"{lists.shape[0]} ranked lists for {len(relevant)} sets of relevant items")
    sets = [np.asarray(items, dtype=np.int64) for items in relevant]
    told = np.array([items.size for items in sets], dtype=np.int64)
    if not told.any():
        raise MetricError("no user has a relevant item")
    flat = np.concatenate(sets)
    _, codes = np.unique(np.concatenate((flat, lists.ravel())), return_inverse=True)
    width = int(codes.max()) + 1
    rows, k = lists.shape
    wanted = np.unique(np.repeat(np.arange(rows), told) * width + codes[: flat.size])
    sizes = np.bincount(wanted // width, minlength=rows)
    found = np.repeat(np.arange(rows), k) * width + codes[flat.size :]
    first = np.zeros(found.size, dtype=bool)
    first[np.unique(found, return_index=True)[1]] = True
    return (np.isin(found, wanted) & first & (lists.ravel() >= 0)).reshape(rows, k), sizes


def recall_at_k(ranked: npt.ArrayLike, relevant: Sequence[npt.ArrayLike]) -> float:
    """Share of a user's relevant items that are in his list, averaged over users: |R_u ∩ list_u| / |R_u|.

    Args:
        ranked: [users, k] item ids out of the whole catalogue, best first; negative = empty place.
        relevant: per user the ids that he did act on; users with none are left out. Repeated ids count once.

    Raises:
        MetricError: no user has a relevant item, or the shapes do not fit.
    """
    return float(np.nanmean(recall_by_user(ranked, relevant)))


def recall_by_user(ranked: npt.ArrayLike, relevant: Sequence[npt.ArrayLike]) -> Array:
    """`recall_at_k` of each user `[users]`; NaN of one without a relevant item."""
    hits, sizes = _hits(ranked, relevant)
    return np.where(sizes > 0, hits.sum(axis=1) / np.maximum(sizes, 1), np.nan)


def ndcg_at_k(ranked: npt.ArrayLike, relevant: Sequence[npt.ArrayLike]) -> float:
    """DCG over the best possible DCG, averaged over users; relevance is 0 or 1.

    DCG_u = Σ_{j = 1..k} [item_j ∈ R_u] / log2(j + 1); the best list has min(k, |R_u|) hits at its top.
    Arguments and errors as for `recall_at_k`.
    """
    return float(np.nanmean(ndcg_by_user(ranked, relevant)))


def ndcg_by_user(ranked: npt.ArrayLike, relevant: Sequence[npt.ArrayLike]) -> Array:
    """`ndcg_at_k` of each user `[users]`; NaN of one without a relevant item."""
    hits, sizes = _hits(ranked, relevant)
    discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
    ideal = np.concatenate(([np.nan], np.cumsum(discounts)))[np.minimum(sizes, hits.shape[1])]
    return np.asarray((hits @ discounts) / ideal, dtype=np.float64)


def coverage(ranked: npt.ArrayLike, items: npt.ArrayLike) -> float:
    """Share of `items` that stand in at least one list; NaN if there are none.

    Args:
        ranked: [users, k] item ids; negative = empty place.
    """
    wanted = np.unique(np.asarray(items))
    return float(np.isin(wanted, np.asarray(ranked)).mean()) if wanted.size else float("nan")


def probabilities_of(probabilities: npt.ArrayLike, rows: int) -> Array:
    """`probabilities` in float64; a MetricError if they are none, or not `rows`."""
    values = _scores(probabilities, rows, "probabilities")
    if values.min() < 0 or values.max() > 1:
        raise MetricError(f"probabilities reach from {values.min():g} to {values.max():g}, outside 0 to 1")
    return values


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """-mean(y log p + (1 - y) log(1 - p)) in nats, p kept 2.2e-16 away from 0 and 1.

    Raises:
        MetricError: no rows, or probabilities that are not finite or outside 0 to 1.
    """
    positive = _labels(labels, both=False)
    epsilon = np.finfo(np.float64).eps
    p = np.clip(probabilities_of(probabilities, positive.size), epsilon, 1 - epsilon)
    return float(-np.where(positive, np.log(p), np.log1p(-p)).mean())


def calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 10) -> Calibration:
    """The calibration curve over at most `bins` bins of about equal count, and its expected error.

    Bins are cut at quantiles, equal probabilities staying together: rare labels crowd near 0, where bins of equal
    width would put nearly every row into one.

    Raises:
        MetricError: what `log_loss` refuses, or fewer than one bin.
    """
    positive = _labels(labels, both=False)
    values = probabilities_of(probabilities, positive.size)
    if bins < 1:
        raise MetricError(f"{bins} bins: there must be at least 1")
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
    place = np.searchsorted(edges, values, side="left")
    count = np.bincount(place)
    used = count > 0
    count = count[used]
    probability = np.bincount(place, weights=values)[used] / count
    share = np.bincount(place, weights=positive)[used] / count
    error = float((count * np.abs(share - probability)).sum() / values.size)
    return Calibration(probability, share, count, error)


def roc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Roc:
    """The points of the ROC curve; its area by the trapezoid rule is `auc`.

    Raises:
        MetricError: what `auc` refuses.
    """
    positive, values = checked(labels, scores)
    order = np.argsort(-values)
    ends = _runs(np.diff(values[order]) != 0)
    hits = np.concatenate(([0], np.cumsum(positive[order])))[ends]
    m = int(positive.sum())
    return Roc((ends - hits) / (positive.size - m), hits / m)
