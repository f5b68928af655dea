from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ab_trials import SLATE, Audience, Visits, fixed_horizon, interval, running, trial, visits
from penstock.experiment import MEASURES, Config, Experiment, Minimum, Split
from penstock.feedback import FeedbackLog
from penstock.sequential import Sums

SMALL = Audience("small", users=200, requests=600, share=0.4)


def simulated(lift: float = 0.0, seed: int = 1, audience: Audience = SMALL) -> Visits:
    return visits(audience, lift, np.random.default_rng(seed))


def test_running_sums_are_those_of_all_requests_so_far() -> None:
    found = simulated()
    for measure in MEASURES:
        both = running(found, measure)
        for place in (0, 1, 77, 599):
            until = found.who[: place + 1]
            for arm, sums in enumerate(both):
                users = [user for user in np.unique(until) if found.challenger[user] == arm]
                s, n = (
                    [found.columns[name][: place + 1][until == user].sum() for user in users]
                    for name in (measure.column, measure.per)
                )
                expected = vars(Sums.of(s, n))
                for name, part in vars(sums).items():
                    assert part[place] == pytest.approx(expected[name]), (measure.name, place, arm, name)


def test_users_come_again_and_a_lift_is_one() -> None:
    large = Audience("large", users=20_000, requests=100_000, share=0.5)
    found = simulated(0.2, audience=large)
    assert np.bincount(found.who).max() > 50
    of = found.challenger[found.who]
    rates = [found.columns["click"][of == arm].mean() / SLATE for arm in (False, True)]
    assert rates[1] / rates[0] == pytest.approx(1.2, abs=0.06)


def test_a_trial_is_what_the_experiment_says_of_the_same_log(tmp_path: Path) -> None:
    """The vectorised form and the one that follows a feedback log, both looking after every request."""
    found = simulated(-0.6, audience=replace(SMALL, requests=400))
    config = replace(Config(), spacing=1.0, first_users=10)
    with FeedbackLog(tmp_path) as log:
        for request, user in enumerate(found.who.tolist()):
            variant, release = ("challenger", 2) if found.challenger[user] else ("champion", 1)
            where = {"time_ms": 0, "scenario": 0, "device": 0, "features_us": 0}
            log.impressions(request, user, range(SLATE), **where, release=release, variant=variant)
            told = {name: int(found.columns[name][request]) for name in ("click", "long_view", "watch_ms")}
            watch = np.full(SLATE, told["watch_ms"] // SLATE)
            events = [
                {
                    "item_id": item,
                    "click": int(item < told["click"]),
                    "long_view": int(item < told["long_view"]),
                    "watch_time_ms": int(watch[item]),
                }
                for item in range(SLATE)
            ]
            log.outcomes(request, events)
            found.columns["watch_ms"][request] = float(watch.sum())
    followed = Experiment(tmp_path, Split(1, 2, SMALL.share, 0), config)
    followed.read()
    assert followed.verdict(Minimum(), 0).action == "withdraw"
    level = 1 - config.confidence
    breached = next(look for look in followed.looks if min(point.guard for point in look.points.values()) <= level)
    told_apart = next(look for look in followed.looks if min(point.p_value for point in look.points.values()) <= level)

    vectorised = trial(found, config)

    # a look of the experiment is taken when a slate is shown, before what comes of it: the two are a request apart
    assert breached.requests == pytest.approx(vectorised.withdrawn, rel=0.15)
    assert told_apart.requests == pytest.approx(vectorised.sequential, rel=0.15)
    mine = found.challenger[found.who][: int(vectorised.withdrawn)].sum()
    assert vectorised.impressions == SLATE * mine


def test_equal_releases_are_hardly_ever_told_apart() -> None:
    found = [trial(simulated(seed=seed, audience=replace(SMALL, requests=2000)), Config()) for seed in range(150)]
    assert np.mean([math.isfinite(one.sequential) for one in found]) <= 0.05
    assert np.mean([math.isfinite(one.withdrawn) for one in found]) <= 0.05
    assert np.mean([math.isfinite(one.peeked) for one in found]) > 0.15


def test_a_trial_without_enough_users_says_nothing() -> None:
    one = trial(simulated(), replace(Config(), first_users=10_000))
    assert (one.sequential, one.withdrawn, one.z.size) == (math.inf, math.inf, 0)


def test_the_fixed_horizon_is_the_first_with_enough_power() -> None:
    audience = replace(SMALL, requests=6)
    # looks begin at the third and at the second request; what both have are the last four
    said = [np.array([0, 0, 1, 1]), np.array([1, 0, 0, 1, 1])]
    assert fixed_horizon(audience, [one.astype(bool) for one in said]) == 5
    assert fixed_horizon(audience, [np.zeros(4, bool)]) == math.inf


def test_the_interval_of_a_share() -> None:
    low, high = interval(0, 100)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 100)))
    assert interval(100, 100)[1] == 1.0
