from __future__ import annotations

import numpy as np
import pytest

from penstock.layers.metric import ItemPoints, in_ball


def test_what_is_too_long_keeps_its_direction_and_what_is_not_stays():
    vectors = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(in_ball(vectors), [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_the_inner_product_ranks_as_the_distance(biased):
    random = np.random.default_rng(0)
    layer = ItemPoints(7, 3, biased)
    layer.build(None)
    layer.table.table.assign(random.normal(size=(7, 4)))
    asked = random.normal(size=3).astype(np.float32)
    scores = np.asarray(layer(np.arange(7))) @ np.append(2 * asked, 1.0)
    biases = np.asarray(layer.table.table)[:, 3] if biased else 0.0
    expected = biases - ((asked - np.asarray(layer.at(np.arange(7)))) ** 2).sum(axis=1) + asked @ asked
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
