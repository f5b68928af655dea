from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import betaln
from scipy.stats import norm

from penstock.sequential import Difference, SplitTest, Sums, running_interval, running_p_value


def difference(value: float, variance: float) -> Difference:
    return Difference(np.asarray(value), np.asarray(variance))


def test_a_ratio_and_its_variance_by_hand() -> None:
    # users with 1 of 2 and 3 of 2: R = 4/4; residuals −1 and +1; V = 2/1 · 2/16
    sums = Sums.of([1, 3], [2, 2])
    assert (sums.ratio, sums.variance) == (1.0, 0.25)
    other = Sums.of([0, 1, 2], [1, 1, 1])  # R = 1, V = 3/2 · 2/9
    assert other.variance == pytest.approx(1 / 3)
    both = Difference.between(sums, other, 0.5)
    assert both.value == 0.5
    assert both.variance == pytest.approx(0.25 + 0.25 / 3)


def test_the_boundary_by_hand() -> None:
    # V = τ² = 1, α = .05: √(1 · 2 / 1 · ln(2 / .0025)) = √(2 · 6.684612) = 3.656395
    assert difference(0, 1).half_width(1, 0.05) == pytest.approx(3.656395, abs=1e-6)
    # V = 0.25, τ² = 1, α = .1: √(.25 · 1.25 · ln(1.25 / (.01 · .25))) = √(.3125 · 6.214608) = 1.393580
    assert difference(0, 0.25).half_width(1, 0.1) == pytest.approx(1.393580, abs=1e-6)
    # Λ = √(1/2) exp(4 / (2 · 1 · 2)) = e / √2
    assert difference(2, 1).log_likelihood_ratio(1) == pytest.approx(1 - math.log(2) / 2)
    assert difference(2, 1).p_value(1) == pytest.approx(math.sqrt(2) / math.e)
    assert difference(0.5, 1).p_value(1) == 1.0


@pytest.mark.parametrize("value", [0.0, 0.3, -1.1])
@pytest.mark.parametrize("variance", [0.04, 0.5])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_it_is_the_msprt_of_the_normal_case(value: float, variance: float, scale: float) -> None:
    """Λ is the likelihood of D under θ ~ N(0, τ²), integrated numerically, over that under θ = 0."""
    deviation = math.sqrt(variance)

    def under(theta: float) -> float:
        return float(norm.pdf(value, theta, deviation) * norm.pdf(theta, 0, scale))

    mixed, _ = quad(under, -12 * scale, 12 * scale, points=[value], limit=200)
    assert difference(value, variance).log_likelihood_ratio(scale) == pytest.approx(
        math.log(mixed / norm.pdf(value, 0, deviation)), abs=1e-7
    )


@pytest.mark.parametrize("value", [0.2, 0.0, -0.3, -1.1])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_one_sided_it_is_the_mixture_of_the_half_below_zero(value: float, scale: float) -> None:
    variance = 0.09

    def under(theta: float) -> float:
        return 2 * float(norm.pdf(value, theta, 0.3) * norm.pdf(theta, 0, scale))

    mixed, _ = quad(under, -12 * scale, 0, points=[value] if value < 0 else None, limit=200)
    ratio = mixed / norm.pdf(value, 0, 0.3)
    assert difference(value, variance).p_value_below(scale) == pytest.approx(min(1, 1 / ratio))


def test_one_sided_nothing_is_said_of_a_positive_difference() -> None:
    steps = 0.05 + np.random.default_rng(9).standard_normal((1000, 2000))
    count = np.arange(1, 2001)
    seen = Difference(np.cumsum(steps, axis=1) / count, np.broadcast_to(1 / count, steps.shape))
    assert (seen.p_value_below(0.1) <= 0.05).any(axis=1).mean() < 0.02
    assert (seen.p_value(0.1) <= 0.05).any(axis=1).mean() > 0.2
    steps -= 0.05  # on the boundary one walk of twenty at most is wronged
    seen = Difference(np.cumsum(steps, axis=1) / count, seen.variance)
    assert (seen.p_value_below(0.1) <= 0.05).any(axis=1).mean() < 0.05 + 2 * 0.007


@pytest.mark.parametrize("looks", [1, 10, 1000])
def test_it_is_the_asymptotic_confidence_sequence_of_waudby_smith(looks: int) -> None:
    """Their form, of t observations with deviation σ: σ √(2 (tρ² + 1) / (t²ρ²) ln(√(tρ² + 1) / α))."""
    sigma, rho, alpha = 1.7, 0.3, 0.05
    factor = looks * rho**2 + 1
    expected = sigma * math.sqrt(2 * factor / (looks * rho) ** 2 * math.log(math.sqrt(factor) / alpha))
    assert difference(0, sigma**2 / looks).half_width(rho * sigma, alpha) == pytest.approx(expected)


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(1e-4, 1)), min_size=1, max_size=20),
    st.floats(0.01, 2),
    st.floats(0.001, 0.3),
)
def test_the_p_value_is_below_alpha_just_when_zero_has_left_the_sequence(
    looks: list[tuple[float, float]], scale: float, alpha: float
) -> None:
    values, variances = (np.array(part) for part in zip(*looks, strict=True))
    seen = Difference(values, variances)
    low, high = running_interval(seen, scale, alpha)
    p = running_p_value(seen, scale)
    near = np.abs(p / alpha - 1) < 1e-9
    assert ((p <= alpha) == ((low > 0) | (high < 0)))[~near].all()
    assert (np.diff(low) >= 0).all()
    assert (np.diff(high) <= 0).all()
    assert (np.diff(p) <= 0).all()


def test_one_request_a_user_is_the_variance_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=50)
    sums = Sums.of(values, np.ones(50))
    assert sums.ratio == pytest.approx(values.mean())
    assert sums.variance == pytest.approx(values.var(ddof=1) / 50)


def test_a_user_is_one_observation_however_often_it_comes() -> None:
    """Requests that say the same again add nothing; taken for independent they would halve the variance."""
    generator = np.random.default_rng(2)
    clicks, shown = generator.integers(0, 5, 40), np.full(40, 5)
    assert Sums.of(4 * clicks, 4 * shown).variance == pytest.approx(Sums.of(clicks, shown).variance)


def test_sums_equal_a_loop_over_users() -> None:
    generator = np.random.default_rng(3)
    for users in (2, 3, 17, 200):
        s, n = generator.exponential(size=users), generator.integers(1, 9, users)
        ratio = sum(s) / sum(n)
        spread = sum((one - ratio * many) ** 2 for one, many in zip(s, n, strict=True))
        assert Sums.of(s, n).variance == pytest.approx(users / (users - 1) * spread / sum(n) ** 2)


def test_the_variance_is_that_of_repeated_experiments() -> None:
    """Users with rates of their own, who come a random number of times."""
    generator = np.random.default_rng(4)
    n = 10 * generator.geometric(0.3, (4000, 100))
    s = generator.binomial(n, generator.beta(2, 2, n.shape))
    ratios = s.sum(1) / n.sum(1)
    claimed = np.mean([Sums.of(*one).variance for one in zip(s, n, strict=True)])
    assert claimed == pytest.approx(ratios.var(), rel=0.08)
    alone = np.mean(ratios * (1 - ratios) / n.sum(1))
    assert alone < claimed / 5  # what taking impressions for independent would claim


def test_what_is_not_known_is_no_evidence() -> None:
    nothing, one, same = Sums.of([], []), Sums.of([3], [4]), Sums.of([0, 0], [5, 5])
    for sums in (nothing, one):
        assert sums.variance == math.inf
        unknown = Difference.between(sums, Sums.of([1, 3], [2, 2]))
        assert (unknown.half_width(0.1, 0.05), unknown.p_value(0.1)) == (math.inf, 1.0)
        assert unknown.p_value_below(0.1) == 1.0
    zero = Difference.between(same, same)
    assert (zero.half_width(0.1, 0.05), zero.p_value(0.1)) == (math.inf, 1.0)
    low, high = running_interval(Difference(np.array([np.nan, 0.2]), np.array([np.inf, 0.01])), 0.1, 0.05)
    assert (low[0], high[0]) == (-math.inf, math.inf)
    assert low[1] < 0.2 < high[1]


def test_a_normal_walk_leaves_the_sequence_in_one_of_twenty_at_most() -> None:
    """2,000 walks of 3,000 steps, looked at after each; a z-test that is looked at as often errs most of the time."""
    steps = np.random.default_rng(5).standard_normal((2000, 3000))
    count = np.arange(1, 3001)
    seen = Difference(np.cumsum(steps, axis=1) / count, np.broadcast_to(1 / count, steps.shape))
    wrong = (seen.p_value(0.1) <= 0.05).any(axis=1).mean()
    assert wrong < 0.05 + 2 * 0.005
    assert (np.abs(seen.value) / np.sqrt(seen.variance) > 1.96).any(axis=1).mean() > 0.5


def test_a_true_difference_is_covered_at_all_looks() -> None:
    steps = 0.2 + np.random.default_rng(6).standard_normal((1000, 2000))
    count = np.arange(1, 2001)
    seen = Difference(np.cumsum(steps, axis=1) / count, np.broadcast_to(1 / count, steps.shape))
    half = seen.half_width(0.2, 0.05)
    assert (np.abs(seen.value - 0.2) > half).any(axis=1).mean() < 0.05 + 2 * 0.007
    assert (seen.p_value(0.2)[:, -1] < 0.05).mean() > 0.99


# The split


def test_the_split_test_is_the_beta_mixture() -> None:
    share, weight = 0.2, 50.0
    test = SplitTest(share, weight)
    challenger = champion = 0
    largest = 0.0
    for of in np.random.default_rng(7).random(300) < 0.35:
        test.add(bool(of))
        challenger, champion = challenger + of, champion + (not of)
        top = betaln(weight * share + challenger, weight * (1 - share) + champion)
        log_e = top - betaln(weight * share, weight * (1 - share))
        log_e -= challenger * math.log(share) + champion * math.log(1 - share)
        largest = max(largest, log_e)
    assert (test.challenger, test.champion) == (challenger, champion)
    assert test.p_value == pytest.approx(math.exp(-largest))


def test_the_first_user_says_nothing() -> None:
    test = SplitTest(0.3)
    test.add(True)
    assert test.p_value == pytest.approx(1.0)


def test_a_right_split_is_hardly_ever_doubted_and_a_wrong_one_is() -> None:
    generator = np.random.default_rng(8)

    def doubted(share: float) -> float:
        found = 0
        for _ in range(200):
            test = SplitTest(0.2)
            for of in generator.random(1500) < share:
                test.add(bool(of))
            found += test.p_value <= 0.05
        return found / 200

    assert doubted(0.2) <= 0.05
    assert doubted(0.3) == 1.0


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_a_split_of_everybody_is_none(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        SplitTest(share)
