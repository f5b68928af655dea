from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.recall.shan import Config, Hierarchy, build
from tests.penstock.recall.histories import CATALOGUE, ITEMS, SCHEMA, moments

DIM = 4


@pytest.fixture(scope="module")
def towers():
    keras.utils.set_random_seed(1)
    return build(Config(dim=DIM), SCHEMA, CATALOGUE)


def _attention(layer, user, vectors):
    kernel, bias = map(np.asarray, layer.hidden.weights)
    scores = [np.exp(user @ np.maximum(vector @ kernel + bias, 0)) for vector in vectors]
    return sum(score / sum(scores) * vector for score, vector in zip(scores, vectors, strict=True))


@pytest.mark.parametrize(("older", "session"), [((2, 3), (4, 5)), ((), (4,)), ((2,), (2, 2)), ((), ())])
def test_the_older_items_are_one_more_beside_those_of_the_session(towers, older, session):
    """Equations 1 to 6 by loops."""
    layer = next(layer for layer in towers.query.layers if isinstance(layer, Hierarchy))
    tables = [np.asarray(variable) for variable in towers.query.trainable_variables]
    users = next(table for table in tables if table.shape == (4, DIM))
    table = np.asarray(towers.item.table)
    inputs = moments(*((item, 5000 - place) for place, item in enumerate(older)), *((item, 2) for item in session))
    query = np.asarray(towers.query({**inputs, "user_id": np.array([3], np.int32)}))[0]
    vectors = [table[item] for item in session or (1,)]
    if older:
        vectors = [_attention(layer.of_long, users[3], [table[item] for item in older]), *vectors]
    expected = _attention(layer.of_both, users[3], vectors)
    np.testing.assert_allclose(query, expected, rtol=1e-4, atol=1e-6)
    assert towers.item(np.arange(ITEMS)).shape == (ITEMS, DIM)


def test_users_see_the_same_items_differently(towers):
    inputs = moments((2, 5000), (3, 4000), (4, 2), (5, 1))
    queries = [np.asarray(towers.query({**inputs, "user_id": np.array([user], np.int32)})) for user in (2, 3)]
    assert not np.allclose(*queries)
