from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.recall.narm import Config, build
from tests.penstock.recall.histories import CATALOGUE, SCHEMA, history


@pytest.fixture(scope="module")
def towers():
    keras.utils.set_random_seed(1)
    return build(Config(dim=4, units=5), SCHEMA, CATALOGUE)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_local_encoder_sums_by_scores_that_are_no_shares_and_the_decoder_is_bilinear(towers):
    """Equations 6 to 9, from the states of the recurrent layer."""
    encoder = towers.pairs.encoder.encoder
    items = np.array([[1, 4, 2, 2]])
    states = np.asarray(encoder.recurrent(encoder.items(items)))[0]
    first, second, joined = (
        np.asarray(layer.kernel) for layer in (encoder.scores.of_queries, encoder.scores.of_keys, encoder.scores.joined)
    )
    bilinear = np.asarray(encoder.bilinear.kernel)
    for place, last in enumerate(states):
        local = np.zeros(5)
        for state in states[: place + 1]:
            local += (_sigmoid(last @ first + state @ second) @ joined) * state
        expected = np.concatenate([last, local]) @ bilinear
        known = [4, 2, 2][:place]
        np.testing.assert_allclose(towers.query(history(*known))[0], expected, rtol=1e-4, atol=1e-6)


def test_one_reading_gives_the_example_of_every_prefix(towers):
    queries, positives, _ = towers.pairs(history(4, 2, 3, 8), np.array([5], np.int32))
    assert np.asarray(positives).tolist() == [4, 2, 3, 8, 5]
    for known, query in enumerate(np.asarray(queries)):
        np.testing.assert_allclose(towers.query(history(*[4, 2, 3, 8][:known]))[0], query, rtol=1e-5, atol=1e-6)
