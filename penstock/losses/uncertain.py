"""Losses that learn how uncertain a prediction is, and what of that more data would take away.

A head that gives a mean and a log-variance learns the noise of what it predicts: the aleatoric uncertainty. Several
passes with dropout left on (Gal & Ghahramani, ICML 2016) disagree where there was little to learn from: the epistemic
one, if the rate of the dropout falls as data grow (`penstock.layers.concrete_dropout`). Equations are numbered as in
Kendall & Gal, NeurIPS 2017; `s` is log σ² throughout.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from keras import ops


class Uncertainty(NamedTuple):
    """A prediction with its variance in two parts, `[batch]` each; their sum is the variance of what is predicted.

    Attributes:
        mean: the mean over the passes.
        epistemic: variance of the passes' means: for want of data.
        aleatoric: mean of the passes' variances: the noise of the data.
    """

    mean: Any
    epistemic: Any
    aleatoric: Any


def gaussian_nll(target: Any, mean: Any, log_variance: Any) -> Any:
    """`½ exp(−s) (y − μ)² + ½ s` of each row, three times `[batch]` → `[batch]` (eq. 8).

    The negative log-likelihood of N(μ, exp s) less the constant ½ log 2π; it may be negative. At its minimum s is the
    log of the squared error. A target that is constant in part of the data drives s to −∞: `bounded` keeps it.
    """
    return 0.5 * ops.exp(-log_variance) * ops.square(target - mean) + 0.5 * log_variance


def bounded(log_variance: Any, lowest: float = -6.0, highest: float = 6.0) -> Any:
    """A head's output within bounds, with a slope everywhere, so that none is stuck at one: `[batch]` → `[batch]`.

    `s′ = highest − softplus(highest − s)`, then `lowest + softplus(s′ − lowest)`: Chua et al., NeurIPS 2018, appendix
    A.1. Between the bounds, a few units from either, it changes nothing.
    """
    below = highest - ops.softplus(highest - log_variance)
    return lowest + ops.softplus(below - lowest)


def normal_quantiles(count: int) -> np.ndarray:
    """The quantiles of N(0, 1) at (i + ½) / count, float32 `[count, 1]`: noise without chance, for serving."""
    normal = NormalDist()
    return np.array([[normal.inv_cdf((place + 0.5) / count)] for place in range(count)], np.float32)


def logit_normal_nll(labels: Any, mean: Any, log_variance: Any, noise: Any) -> Any:
    """Cross-entropy of a probability whose logit is N(μ, exp s), integrated by Monte Carlo (eq. 10 and 12).

    `−log (1/T Σ_t σ(±x_t))` with `x_t = μ + exp(s/2) ε_t`, + for a positive and − for a negative: the softmax of their
    equation for two classes. Computed from log σ by log-sum-exp, so that no probability is 0. s → −∞: the logistic
    loss of μ.

    Args:
        labels: 0 or 1, `[batch]`.
        mean, log_variance: of the logit, `[batch]`.
        noise: ε, standard normal, `[draws, batch]`; `[draws, 1]` is shared by the rows.

    Returns:
        The loss of each row, `[batch]`.
    """
    sign = 2.0 * labels - 1.0
    logits = mean + ops.exp(0.5 * log_variance) * noise
    log_likelihood = -ops.softplus(-sign * logits)
    draws = ops.cast(ops.shape(log_likelihood)[0], log_likelihood.dtype)
    return ops.log(draws) - ops.logsumexp(log_likelihood, axis=0)


def logit_normal_probability(mean: Any, log_variance: Any, noise: Any) -> Any:
    """`1/T Σ_t σ(μ + exp(s/2) ε_t)`: the probability that `logit_normal_nll` learns, `[batch]`; arguments as there."""
    return ops.mean(ops.sigmoid(mean + ops.exp(0.5 * log_variance) * noise), axis=0)


def regression_uncertainty(means: Any, variances: Any) -> Uncertainty:
    """Of T passes of a Gaussian head, `[draws, batch]` twice.

    `Var y = (1/T Σ μ_t² − (1/T Σ μ_t)²) + 1/T Σ σ_t²` (eq. 9). The first part is computed as the mean square distance
    from the mean, which loses no digits; of one pass it is 0.
    """
    return Uncertainty(ops.mean(means, axis=0), ops.var(means, axis=0), ops.mean(variances, axis=0))


def binary_uncertainty(probabilities: Any) -> Uncertainty:
    """Of T passes of a binary head, probabilities `[draws, batch]`: `p̄ (1 − p̄) = Var_t p_t + 1/T Σ p_t (1 − p_t)`.

    The law of total variance for a label that is 1 with probability p_t: eq. 9 with σ_t² = p_t (1 − p_t).
    """
    return regression_uncertainty(probabilities, probabilities * (1.0 - probabilities))
