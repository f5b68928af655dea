from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from penstock.layers.next_item import AfterAll, AfterEach, Places, appended, begun

HISTORIES = np.array([[4, 3, 4, 1, 0, 0], [0, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0]], np.int32)
POSITIVES = np.array([6, 7, 5], np.int32)


class Sums(keras.layers.Layer):
    """State k: the sum of the items up to there, which no later one changes."""

    def call(self, items, training=None):
        return tf.cumsum(tf.cast(items, tf.float32), axis=1)[..., None]


def test_a_history_is_begun_by_the_unknown_and_cut_to_the_longest():
    items, lengths = begun(HISTORIES)
    np.testing.assert_array_equal(items, [[1, 4, 3, 4, 1], [1, 0, 0, 0, 0], [1, 5, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [5, 1, 2])
    np.testing.assert_array_equal(
        appended(items, lengths, POSITIVES), [[1, 4, 3, 4, 1, 6], [1, 7, 0, 0, 0, 0], [1, 5, 5, 0, 0, 0]]
    )


def test_after_all_is_the_state_of_the_last_item_that_is_there():
    np.testing.assert_array_equal(AfterAll(Sums())(HISTORIES), [[13], [1], [6]])


def test_after_each_asks_for_the_next_item_at_every_place_and_never_for_the_unknown():
    queries, positives, _ = AfterEach(Sums())({"history_items": HISTORIES}, POSITIVES)
    expected = [(1, 4), (5, 3), (8, 4), (13, 6), (1, 7), (1, 5), (6, 5)]  # not (12, unknown)
    assert list(zip(np.asarray(queries)[:, 0], np.asarray(positives), strict=True)) == expected


def test_the_last_pair_of_a_row_is_what_serving_asks_by():
    """A history that grows by its positive asks as the row after it."""
    queries, *_ = AfterEach(Sums())({"history_items": HISTORIES[2:]}, POSITIVES[2:])
    np.testing.assert_array_equal(queries[-1:], AfterAll(Sums())(HISTORIES[2:]))


def test_places_are_counted_from_the_end():
    layer = Places(6, 1, "zeros")
    layer.build(None)
    layer.table.assign(np.arange(6.0)[:, None])
    found = np.asarray(layer(begun(HISTORIES)[0]))[..., 0]
    np.testing.assert_array_equal(found[0], [1, 2, 3, 4, 5])
    assert found[1, 0] == 5
    np.testing.assert_array_equal(found[2, :2], [4, 5])
