from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.recall.attrec import Config, build, sinusoids
from tests.penstock.recall.histories import CATALOGUE, ITEMS, SCHEMA, history

DIM, SHORT, WEIGHT = 4, 3, 0.3


@pytest.fixture(scope="module")
def towers():
    keras.utils.set_random_seed(1)
    found = build(Config(dim=DIM, short=SHORT, long_term=WEIGHT), SCHEMA, CATALOGUE)
    random = np.random.default_rng(0)
    for variable in [*found.query.trainable_variables, *found.item.trainable_variables]:
        variable.assign(random.normal(size=variable.shape, scale=0.7))
    return found


def _layer(towers, name):
    return next(layer for layer in towers.query.layers if layer.name == name)


def _short_term(layer, items):
    """Equations 2 to 5 by loops."""
    vectors = np.asarray(layer.points.at(np.array(items[-SHORT:])))
    timed = vectors + sinusoids(SHORT, DIM)[-len(vectors) :]
    queries = np.maximum(timed @ np.asarray(layer.of_queries.kernel), 0)
    keys = np.maximum(timed @ np.asarray(layer.of_keys.kernel), 0)
    found = []
    for place in range(len(vectors)):
        others = [other for other in range(len(vectors)) if other != place or len(vectors) == 1]
        scores = [np.exp(queries[place] @ keys[other] / np.sqrt(DIM)) for other in others]
        found.append(sum(s / sum(scores) * vectors[other] for s, other in zip(scores, others, strict=True)))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("items", [(2, 3, 4, 5), (2, 3), (6,), (4, 4, 4, 4, 4, 4)])
def test_the_score_is_the_two_distances_weighted(towers, items):
    short = _layer(towers, "short_term")
    for user in (1, 2):
        query = towers.query({**history(*items), "user_id": np.array([user], np.int32)})
        scores = np.asarray(towers.item(np.arange(2, ITEMS))) @ np.asarray(query)[0]
        own = np.asarray(_layer(towers, "long_term")(np.array([user])))[0]
        assert own.any() == (user > 1)
        far = ((own - np.asarray(towers.item.long.at(np.arange(2, ITEMS)))) ** 2).sum(axis=1)
        away = ((_short_term(short, items) - np.asarray(towers.item.short.at(np.arange(2, ITEMS)))) ** 2).sum(axis=1)
        expected = -(WEIGHT * far + (1 - WEIGHT) * away)
        np.testing.assert_allclose(scores - scores[0], expected - expected[0], rtol=1e-3, atol=1e-5)


def test_what_is_further_back_than_the_short_term_is_forgotten_and_order_counts(towers):
    short = _layer(towers, "short_term")

    def found(*items):
        return np.asarray(short(history(*items)["history_items"]))

    np.testing.assert_array_equal(found(2, 3, 4, 5), found(7, 3, 4, 5))
    assert not np.allclose(found(3, 4, 5), found(5, 4, 3))


def test_no_history_is_one_of_the_unknown_item(towers):
    short = _layer(towers, "short_term")
    np.testing.assert_array_equal(short(history()["history_items"]), short(history(1)["history_items"]))


def test_sinusoids_of_equation_6():
    found = sinusoids(3, 4)
    np.testing.assert_allclose(found[2], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-5)


def test_a_weight_is_a_share():
    with pytest.raises(ValueError, match=r"a weight in \[0, 1\], not 1.5"):
        build(Config(long_term=1.5), SCHEMA, CATALOGUE)
