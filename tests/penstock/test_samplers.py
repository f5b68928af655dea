from __future__ import annotations

import numpy as np
import pytest

from penstock.samplers import Unigram


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_draws_follow_the_stated_probabilities(power):
    counts = np.array([9, 9, 0, 1, 5, 40, 0])
    sampler = Unigram(counts, power, seed=1)
    drawn = np.asarray(sampler.draw(60_000))
    expected = (counts + 1.0) ** power
    expected[:2] = 0
    expected /= expected.sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=7) / 60_000, expected, atol=0.01)
    np.testing.assert_allclose(np.exp(np.asarray(sampler.log_probability(np.arange(2, 7)))), expected[2:], rtol=1e-5)


def test_padding_and_unknown_are_never_drawn():
    drawn = np.asarray(Unigram(np.array([100, 100, 1]), 1.0, seed=0).draw(1000))
    assert set(drawn.tolist()) == {2}


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary is empty"):
        Unigram(np.zeros(2), 0.5, seed=0)
