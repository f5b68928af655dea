"""Losses for seconds of watching: weighted logistic regression, and a log-normal with a variance of its own."""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from penstock.losses.uncertain import gaussian_nll

DAY_SECONDS = 86_400.0
"""The longest watch time that a log may hold."""


def weighted_logistic(seconds: Any, positives: Any, logits: Any, exact: bool = False) -> Any:
    """Logistic loss in which positives weigh as many seconds as they were watched and negatives 1.

    `T y softplus(−s) + (1 − y) softplus(s)`: of N impressions with k positives the odds are `e^s = Σ Tᵢ / (N − k)`,
    which is `E[T] / (1 − P)` with P = k / N and E[T] the expected watch time of an impression, 0 where it was not
    clicked. For small P that is about `E[T] (1 + P)`, and E[T]: Covington, Adams & Sargin, RecSys 2016, section 4.2.
    Where P is large, as in a feed, it is not; and as it differs by item, the order by odds is not that by E[T].

    With `exact` every impression counts once as a negative, `T y softplus(−s) + softplus(s)`: the odds are
    `Σ Tᵢ / N = E[T]`, whatever P.

    Args:
        seconds: watched, at least 0, `[batch]`; those of negatives are not read.
        positives: which impressions were clicked, 0 or 1, `[batch]`.
        logits: `[batch]`.
        exact: odds of E[T] instead of E[T] / (1 − P).

    Returns:
        The loss of each row, `[batch]`.
    """
    negatives = ops.ones_like(positives) if exact else 1.0 - positives
    return seconds * positives * ops.softplus(-logits) + negatives * ops.softplus(logits)


def expected_watch_time(logits: Any, most: float = DAY_SECONDS) -> Any:
    """`min(e^s, most)` seconds, of the logits `[batch]` that `weighted_logistic` learns."""
    return ops.exp(ops.minimum(logits, math.log(most)))


def log_normal_nll(seconds: Any, mean: Any, log_variance: Any) -> Any:
    """`gaussian_nll` of `log(1 + seconds)`, three times `[batch]` → `[batch]`."""
    return gaussian_nll(ops.log1p(seconds), mean, log_variance)


def log_normal_expectation(mean: Any, log_variance: Any, most: float = DAY_SECONDS) -> Any:
    """`E[T] = exp(μ + σ²/2) − 1` seconds if log(1 + T) is N(μ, σ²), within 0 … most; `[batch]` twice → `[batch]`."""
    exponent = mean + 0.5 * ops.exp(log_variance)
    return ops.expm1(ops.clip(exponent, 0.0, math.log1p(most)))
