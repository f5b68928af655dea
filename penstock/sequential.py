"""Tests that may be looked at as often as one likes: confidence sequences and always-valid p-values.

A fixed-horizon test holds its error at one sample size that was chosen beforehand. Looked at after each request until
it says "significant", it says so sooner or later of two equal variants. What is here holds at all looks at once:

    P(there is a look t at which θ is outside of C_t) ≤ α,      P(there is a look at which p_t ≤ α) ≤ α if θ = 0

The unit of randomisation is the user, and a user has many requests, so variances are clustered by user. For a variant
with sums s_u (clicks, say) over n_u (impressions) of its m users, and the difference of two variants, by the delta
method:

    R = Σ s_u / Σ n_u,      V = m / (m − 1) · Σ (s_u − R n_u)² / (Σ n_u)²,      D = R₁ − f R₀,      V_D = V₁ + f² V₀

As the number of users grows, D / V_D at the information 1 / V_D is near to a Brownian motion with drift. Against no
drift a mixture of alternatives N(0, τ²) has the likelihood ratio of the mSPRT

    Λ = √(V / (V + τ²)) · exp(τ² D² / (2 V (V + τ²)))

whose inverse is the p-value, and whose boundary Λ = 1/α is the confidence sequence

    D ± √( V (V + τ²) / τ² · ln((V + τ²) / (α² V)) )

Sources: Johari, Koomen, Pekelis and Walsh, "Always valid inference", Operations Research 70(3), 2022 (mSPRT, p-value);
Howard, Ramdas, McAuliffe and Sekhon, Annals of Statistics 49(2), 2021 (the two-sided normal mixture); Waudby-Smith,
Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", Annals of
Statistics 52(6), 2024, theorem 2.2 (the same with an estimated variance: V = σ̂²/t and τ² = ρ² σ̂²); Deng, Knoblich and
Lu, "Applying the delta method in metric analytics", KDD 2018. The boundary is an asymptotic one: looks begin when
there are some users in either variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """What the users of one variant add up to, scalars or arrays `[looks]`: m, Σ s, Σ n, Σ s², Σ s n and Σ n²."""

    users: Array
    s: Array
    n: Array
    ss: Array
    sn: Array
    nn: Array

    @staticmethod
    def of(s: npt.ArrayLike, n: npt.ArrayLike) -> Sums:
        """Of each user's sums, `[users]`."""
        top, below = np.asarray(s, dtype=np.float64), np.asarray(n, dtype=np.float64)
        parts = (
            np.float64(top.size),
            top.sum(),
            below.sum(),
            *(part.sum() for part in (top**2, top * below, below**2)),
        )
        return Sums(*(np.asarray(part) for part in parts))

    @property
    def ratio(self) -> Array:
        """R; NaN where nothing is counted."""
        return np.divide(self.s, self.n, out=np.full(np.shape(self.n), np.nan), where=self.n > 0)

    @property
    def variance(self) -> Array:
        """V, the variance of R; infinite with less than two users, as nothing is known of it."""
        ratio = self.ratio
        squares = np.maximum(self.ss - 2 * ratio * self.sn + ratio**2 * self.nn, 0.0)
        enough = (self.users > 1) & (self.n > 0)
        scale = np.divide(
            self.users, (self.users - 1) * np.square(self.n), out=np.zeros(np.shape(self.n)), where=enough
        )
        return np.where(enough, squares * scale, inf)


@dataclass(frozen=True)
class Difference:
    """D with its variance, scalars or arrays `[looks]`."""

    value: Array
    variance: Array

    @staticmethod
    def between(challenger: Sums, champion: Sums, factor: float = 1.0) -> Difference:
        """R₁ − factor · R₀: with a factor below 1, whether the challenger is worse by more than that."""
        return Difference(
            challenger.ratio - factor * champion.ratio, challenger.variance + factor**2 * champion.variance
        )

    def log_likelihood_ratio(self, scale: npt.ArrayLike) -> Array:
        """ln Λ of the mixture N(0, scale²) against no difference.

        0, which says nothing, where the variance is not known, or is 0: nothing was ever counted but the same.
        """
        known = np.isfinite(self.variance) & (self.variance > 0) & np.isfinite(self.value)
        variance = np.where(known, self.variance, 1.0)
        mixture = np.square(np.asarray(scale, dtype=np.float64))
        exponent = mixture * np.square(np.where(known, self.value, 0.0)) / (2 * variance * (variance + mixture))
        return np.where(known, exponent - 0.5 * np.log1p(mixture / variance), 0.0)

    def p_value(self, scale: npt.ArrayLike) -> Array:
        """min(1, 1/Λ) at this look; the always-valid p-value is the least of all looks so far (`running_p_value`)."""
        return np.exp(-np.maximum(self.log_likelihood_ratio(scale), 0.0))

    def p_value_below(self, scale: npt.ArrayLike) -> Array:
        """The same against no difference or a positive one, one-sided: small when D is below 0.

        The mixture is the half of N(0, scale²) below 0. Its likelihood ratio against 0 is a supermartingale under any
        θ ≥ 0 too:

            Λ₋ = 2 √(V / (V + τ²)) exp(τ² D² / (2 V (V + τ²))) Φ(−τ D / √(V (V + τ²)))
        """
        known = np.isfinite(self.variance) & (self.variance > 0) & np.isfinite(self.value)
        variance = np.where(known, self.variance, 1.0)
        tau = np.asarray(scale, dtype=np.float64)
        reach = np.where(known, self.value, 0.0) * tau / np.sqrt(variance * (variance + np.square(tau)))
        log_ratio = log(2) + self.log_likelihood_ratio(scale) + log_ndtr(-reach)
        return np.where(known, np.exp(-np.maximum(log_ratio, 0.0)), 1.0)

    def half_width(self, scale: npt.ArrayLike, alpha: float) -> Array:
        """Of the interval at this look: the |D| at which Λ = 1/alpha; infinite where the variance is not known."""
        known = np.isfinite(self.variance) & (self.variance > 0) & np.isfinite(self.value)
        variance = np.where(known, self.variance, 1.0)
        mixture = np.square(np.asarray(scale, dtype=np.float64))
        tail = np.log1p(mixture / variance) - 2 * log(alpha)
        with np.errstate(divide="ignore"):  # a mixture of nothing but 0 never tells
            wide = np.sqrt(variance * (variance / mixture + 1) * tail)
        return np.where(known, wide, inf)


def running_interval(difference: Difference, scale: npt.ArrayLike, alpha: float) -> tuple[Array, Array]:
    """The confidence sequence at looks `[looks]`: what all intervals up to each have in common.

    Where the low end is above the high end the intervals contradict each other: the difference has changed.
    """
    half = difference.half_width(scale, alpha)
    value = np.where(np.isfinite(half), difference.value, 0.0)
    return np.maximum.accumulate(value - half), np.minimum.accumulate(value + half)


def running_p_value(difference: Difference, scale: npt.ArrayLike) -> Array:
    """The always-valid p-value at looks `[looks]`: the least so far; ≤ α when 0 has left the confidence sequence."""
    return np.minimum.accumulate(difference.p_value(scale))


class SplitTest:
    """Whether users fall into the challenger with the probability `share`: a test at every new user.

    The e-process of Lindon and Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022, for two
    variants: against a mixture of shares that is Beta(k share, k (1 − share)), for k the concentration,

        E = B(k share + n₁, k (1 − share) + n₀) / B(k share, k (1 − share)) / (share^n₁ (1 − share)^n₀)

    which is a martingale if the share is right, so P(E ever reaches 1/α) ≤ α, at any sample size (Ville 1939).

    Attributes:
        challenger, champion: users so far.
        p_value: 1 / the largest E so far.
    """

    def __init__(self, share: float, concentration: float = 200.0) -> None:
        if not 0 < share < 1:
            raise ValueError(f"the share of a split is between 0 and 1, not {share}")
        self._share, self._weight = share, concentration
        self._log_e = self._largest = 0.0
        self.challenger = self.champion = 0

    def add(self, challenger: bool) -> None:
        """A user who was not there before."""
        of_share = self._share if challenger else 1 - self._share
        before = self.challenger if challenger else self.champion
        expected = (self._weight * of_share + before) / (self._weight + self.challenger + self.champion)
        self._log_e += log(expected / of_share)
        self._largest = max(self._largest, self._log_e)
        if challenger:
            self.challenger += 1
        else:
            self.champion += 1

    @property
    def p_value(self) -> float:
        return exp(-self._largest)
