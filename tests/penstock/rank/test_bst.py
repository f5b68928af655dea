from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.rank.bst import BehaviourSequence, Config


@pytest.fixture(scope="module")
def layer():
    keras.utils.set_random_seed(1)
    found = BehaviourSequence(9, Config(dim=8, heads=2, recent=3))
    found.build((None, 5), (None,))
    return found


def _read(layer, history, item):
    rows = np.array([[*history] + [0] * (5 - len(history))], np.int32)
    return np.split(np.asarray(layer(rows, np.array([item], np.int32)))[0], 2)


def test_item_and_history_look_at_each_other(layer):
    item, history = _read(layer, [2, 3, 4], 5)
    for other in (_read(layer, [2, 3, 6], 5), _read(layer, [2, 3, 4], 6)):
        assert not np.allclose(other[0], item)
        assert not np.allclose(other[1], history)


def test_the_last_items_are_read_and_their_order_counts(layer):
    np.testing.assert_array_equal(_read(layer, [7, 8, 2, 3, 4], 5), _read(layer, [2, 3, 4], 5))
    assert not np.allclose(_read(layer, [3, 2, 4], 5)[0], _read(layer, [2, 3, 4], 5)[0])


def test_without_a_history_the_item_stands_alone(layer):
    item, history = _read(layer, [], 5)
    vector = layer.items(np.array([[5]])) + layer.places(np.array([[5]]))
    np.testing.assert_allclose(item, layer.block(vector, np.array([[True]]))[0, 0], rtol=1e-5, atol=1e-6)
    assert not history.any()
    for odd in (0, 1):
        assert np.isfinite(_read(layer, [], odd)).all()


def test_who_else_is_in_the_batch_changes_nothing(layer):
    rows = np.array([[2, 3, 4, 5, 6], [7, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    together = np.asarray(layer(rows, np.array([3, 3, 3], np.int32)))
    for row, found in zip(rows, together, strict=True):
        alone = layer(row[None], np.array([3], np.int32))[0]
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-6)
