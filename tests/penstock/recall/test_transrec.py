from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.recall.transrec import Config, build
from tests.penstock.recall.histories import CATALOGUE, ITEMS, SCHEMA, history


@pytest.fixture(scope="module")
def towers():
    keras.utils.set_random_seed(1)
    found = build(Config(dim=4), SCHEMA, CATALOGUE)
    random = np.random.default_rng(0)
    for variable in found.query.trainable_variables:  # some points lie outside the ball now, and biases are not 0
        variable.assign(random.normal(size=variable.shape, scale=0.7))
    return found


def _scores(towers, user, *items):
    query = towers.query({**history(*items), "user_id": np.array([user], np.int32)})
    return np.asarray(towers.item(np.arange(2, ITEMS))) @ np.asarray(query)[0]


def _differences(towers, move, last):
    """How much higher than the first item each is, by equation 4."""
    table = np.asarray(towers.item.table.table)
    points, biases = table[:, :4], table[:, 4]
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1.0)
    scores = biases - ((points[last] + move - points) ** 2).sum(axis=1)
    return scores[2:] - scores[2]


@pytest.mark.parametrize("user", [0, 1, 2, 3])
def test_the_next_item_lies_where_the_user_moves_the_last_one(towers, user):
    moved = next(layer for layer in towers.query.layers if layer.name == "moved")
    own = np.asarray(moved.of_users.table)[user] if user > 1 else 0.0  # nobody known is moved as all are
    move = np.asarray(moved.of_all) + own
    for items, last in (((2, 3), 3), ((3,), 3), ((), 1), ((2, 3, 4, 5, 6, 7), 7)):
        scores = _scores(towers, user, *items)
        np.testing.assert_allclose(scores - scores[0], _differences(towers, move, last), rtol=1e-4, atol=1e-5)


def test_the_last_item_alone_counts(towers):
    np.testing.assert_array_equal(_scores(towers, 2, 2, 3, 4), _scores(towers, 2, 7, 8, 4))


def test_users_start_as_all_others():
    towers = build(Config(dim=4), SCHEMA, CATALOGUE)
    np.testing.assert_array_equal(_scores(towers, 2, 4), _scores(towers, 3, 4))
