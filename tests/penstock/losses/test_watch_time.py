from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.losses.watch_time import (
    DAY_SECONDS,
    expected_watch_time,
    log_normal_expectation,
    log_normal_nll,
    weighted_logistic,
)


def _log(rows, rate, seed, seconds=30.0):
    """Impressions of which a share is clicked and watched for exponential times."""
    random = np.random.default_rng(seed)
    positives = (random.random(rows) < rate).astype(np.float32)
    return (random.exponential(seconds, rows).astype(np.float32)), positives


def _slope(seconds, positives, logit, exact):
    variable = tf.Variable(np.float32(logit))
    with tf.GradientTape() as tape:
        losses = weighted_logistic(seconds, positives, tf.fill(positives.shape, variable), exact)
        loss = tf.reduce_mean(losses)
    return float(tape.gradient(loss, variable))


def test_a_click_weighs_its_seconds_and_no_click_one():
    seconds, positives, logits = np.array([5.0, 7.0]), np.array([1.0, 0.0]), np.array([0.0, 0.0])
    np.testing.assert_allclose(weighted_logistic(seconds, positives, logits), np.log(2) * np.array([5, 1]), rtol=1e-6)
    exact = weighted_logistic(seconds, positives, logits, exact=True)
    np.testing.assert_allclose(exact, np.log(2) * np.array([6, 1]), rtol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_and_its_gradient_equal_the_loops(exact, seed):
    random = np.random.default_rng(seed)
    seconds, positives = _log(7, 0.5, seed)
    logits = random.normal(size=7).astype(np.float32) * 2
    expected, slopes = [], []
    for second, positive, logit in zip(seconds, positives, logits, strict=True):
        odds = np.exp(logit)
        taken, left = second * positive, 1.0 if exact else 1 - positive
        expected.append(taken * np.log(1 + 1 / odds) + left * np.log(1 + odds))
        slopes.append(-taken / (1 + odds) + left * odds / (1 + odds))
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        losses = weighted_logistic(seconds, positives, variable, exact)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tape.gradient(losses, variable), slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.8])
def test_the_odds_of_a_constant_are_all_seconds_by_the_impressions_without_a_click(rate):
    seconds, positives = _log(4000, rate, 1)
    watched, clicks = float((seconds * positives).sum()), positives.sum()
    assert _slope(seconds, positives, np.log(watched / (4000 - clicks)), False) == pytest.approx(0.0, abs=1e-5)
    # which is E[T] / (1 − P), and about E[T] (1 + P)
    mean, share = watched / 4000, float(clicks / 4000)
    odds = float(expected_watch_time(np.float32(np.log(watched / (4000 - clicks)))))
    assert odds == pytest.approx(mean / (1 - share), rel=1e-4)
    assert 0.0 <= odds / mean - (1 + share) + 1e-5 <= 1.01 * share**2 / (1 - share) + 1e-4
    assert (odds == pytest.approx(mean, rel=0.02)) is (rate == 0.01)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.8, 1.0])
def test_with_every_impression_a_negative_the_odds_are_the_expected_watch_time(rate):
    seconds, positives = _log(4000, rate, 2)
    mean = float((seconds * positives).mean())
    assert _slope(seconds, positives, np.log(mean), True) == pytest.approx(0.0, abs=1e-5)
    assert float(expected_watch_time(np.float32(np.log(mean)))) == pytest.approx(mean, rel=1e-4)


def test_items_that_are_always_clicked_stand_before_those_watched_longer_by_the_papers_odds():
    # half of the impressions watched 40 s against nine in ten for 10 s: E[T] 20 and 9, odds 40 and 90
    found = {}
    for exact in (False, True):
        for item, (rate, watched) in enumerate([(0.5, 40.0), (0.9, 10.0)]):
            seconds, positives = np.full(10, watched, np.float32), (np.arange(10) < 10 * rate).astype(np.float32)
            logit = tf.Variable(0.0)
            for _ in range(60):  # Newton, of a convex loss in one number
                with tf.GradientTape() as outer, tf.GradientTape() as inner:
                    outer.watch(logit)
                    loss = tf.reduce_sum(weighted_logistic(seconds, positives, tf.fill([10], logit), exact))
                    slope = inner.gradient(loss, logit)
                logit.assign_sub(tf.clip_by_value(slope / outer.gradient(slope, logit), -1.0, 1.0))
            found[exact, item] = float(expected_watch_time(logit))
    assert found == pytest.approx({(False, 0): 40.0, (False, 1): 90.0, (True, 0): 20.0, (True, 1): 9.0}, rel=1e-3)


def test_no_seconds_and_no_clicks_is_the_logistic_loss_of_negatives():
    logits = np.array([-3.0, 0.0, 3.0], np.float32)
    none = np.zeros(3, np.float32)
    np.testing.assert_allclose(weighted_logistic(none, none, logits), np.log1p(np.exp(logits)), rtol=1e-5)


def test_losses_and_expectations_of_extreme_logits_are_numbers():
    logits = np.array([-300.0, 300.0], np.float32)
    losses = weighted_logistic(np.full(2, 1e4, np.float32), np.ones(2, np.float32), logits)
    np.testing.assert_allclose(losses, [3e6, 0.0])
    np.testing.assert_allclose(expected_watch_time(logits), [0.0, DAY_SECONDS], rtol=1e-5)
    np.testing.assert_allclose(expected_watch_time(logits, most=60.0), [0.0, 60.0], rtol=1e-5)


def test_the_log_normal_is_the_normal_of_the_log():
    nll = log_normal_nll(np.array([np.e**2 - 1]), np.array([1.0]), np.array([np.log(4.0)]))
    np.testing.assert_allclose(nll, [0.5 * 1 / 4 + 0.5 * np.log(4)], rtol=1e-5)


def test_its_expectation_is_the_mean_of_draws():
    random = np.random.default_rng(3)
    for mean, log_variance in ((1.0, -1.0), (3.0, 0.0), (2.0, 0.5)):
        drawn = np.expm1(mean + np.exp(log_variance / 2) * random.normal(size=400_000))
        ours = float(log_normal_expectation(np.float32(mean), np.float32(log_variance)))
        assert ours == pytest.approx(drawn.mean(), rel=0.02)


def test_fitted_to_a_constant_it_gives_back_the_mean_and_the_noise_of_the_log():
    seconds = np.expm1(2.0 + 0.5 * np.random.default_rng(4).normal(size=5000)).astype(np.float32)
    logs = np.log1p(seconds)
    values = [tf.Variable(np.float32(logs.mean())), tf.Variable(np.float32(np.log(logs.var())))]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(log_normal_nll(seconds, *values))
    np.testing.assert_allclose(tape.gradient(loss, values), [0.0, 0.0], atol=1e-4)
    assert float(log_normal_expectation(*values)) == pytest.approx(seconds.mean(), rel=0.02)


@given(mean=st.floats(-50, 50), log_variance=st.floats(-20, 20))
@settings(max_examples=30, deadline=None)
def test_an_expectation_is_a_time_that_a_log_may_hold(mean, log_variance):
    expected = float(log_normal_expectation(np.float32(mean), np.float32(log_variance)))
    assert 0.0 <= expected <= DAY_SECONDS * (1 + 1e-5)


def test_without_noise_the_expectation_is_the_time_itself():
    assert float(log_normal_expectation(np.float32(np.log(31.0)), np.float32(-30.0))) == pytest.approx(30.0, rel=1e-5)
