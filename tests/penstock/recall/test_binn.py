from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.recall.binn import BUCKETS, Config, Pauses, build
from tests.penstock.recall.histories import CATALOGUE, SCHEMA, moments


@pytest.fixture(scope="module")
def parts():
    keras.utils.set_random_seed(1)
    query = build(Config(dim=4, units=3, width=5, context=2, dropout=0.0), SCHEMA, CATALOGUE).query
    seen = keras.Model(query.inputs, [query.get_layer(name).output for name in ("session", "preference")])
    return lambda *actions: [np.asarray(part)[0] for part in seen(moments(*actions))]


def test_the_session_and_what_was_before_it_are_read_apart(parts):
    s, p = parts((2, 5000), (3, 4999), (4, 5), (5, 1))
    older, newer = parts((2, 5000), (8, 4999), (4, 5), (5, 1)), parts((2, 5000), (3, 4999), (8, 5), (5, 1))
    np.testing.assert_array_equal(older[0], s)
    np.testing.assert_array_equal(newer[1], p)
    assert not np.allclose(older[1], p)
    assert not np.allclose(newer[0], s)


def test_both_know_the_order_and_the_pauses(parts):
    s, p = parts((2, 5000), (3, 4999), (4, 5), (5, 1))
    turned, slower = parts((3, 5000), (2, 4999), (5, 5), (4, 1)), parts((2, 5007), (3, 4999), (4, 9), (5, 1))
    for other in (turned, slower):
        assert not np.allclose(other[0], s)
        assert not np.allclose(other[1], p)


def test_no_history_is_a_session_of_the_unknown_item(parts):
    s, p = parts()
    assert s.any()
    assert not p.any()


def test_pauses_are_told_by_powers_of_two_of_a_minute():
    minute = 60_000
    times = np.array([[0, 0, minute, 4 * minute, 10**12, 10**12 - minute, -1]])
    items = np.array([[2, 2, 2, 2, 2, 2, 0]], np.int32)
    np.testing.assert_array_equal(Pauses()(items, times), [[BUCKETS - 1, 1, 2, 3, 16, 1, 0]])
