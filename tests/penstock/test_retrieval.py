"""Towers joined to a model that trains."""

from __future__ import annotations

import keras
import numpy as np

from penstock import objectives
from penstock.retrieval import BiasedItems, RecallConfig, Retrieval, Towers


class _Dropping(keras.layers.Layer):
    """Items of ones, of which training drops some."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = keras.layers.Dropout(0.5, seed=1)

    def call(self, indices, training=None):
        ones = keras.ops.ones((*indices.shape, 400))
        return self.drop(ones, training=training)


def test_dropout_is_on_in_training_and_off_otherwise_in_both_towers():
    inputs = {"x": keras.Input((400,), name="x")}
    seen = []

    class Objective(objectives.Objective):
        def loss(self, queries, positives, item_tower, rows=None, counts=None):
            seen.append((np.asarray(queries), np.asarray(item_tower(positives))))
            return keras.ops.mean(queries)

    tower = keras.Model(inputs, keras.layers.Dropout(0.5, seed=2)(inputs["x"]))
    model = Retrieval(Towers(tower, _Dropping()), Objective())
    batch = {"x": np.ones((2, 400), np.float32)}
    for training in (True, False):
        queries = model(batch, training=training)
        model.compute_loss(batch, np.array([2, 3]), queries, training=training)
    (dropped, items_dropped), (kept, items_kept) = seen
    assert 0.4 < (dropped == 0).mean() < 0.6
    assert 0.4 < (items_dropped == 0).mean() < 0.6
    assert (kept == 1).all()
    assert (items_kept == 1).all()


def test_dropout_trains_another_model():
    """Keras passes `training` on only to a call that takes it."""
    losses = []
    for rate in (0.0, 0.9):
        keras.utils.set_random_seed(1)
        inputs = {"x": keras.Input((8,), name="x")}
        tower = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Dropout(rate)(inputs["x"])))
        objective = objectives.build(RecallConfig(loss="softmax"), np.ones(8), 1)
        model = Retrieval(Towers(tower, BiasedItems(8, 4)), objective)
        model.compile(keras.optimizers.SGD(0.1))
        batch = {"x": np.ones((16, 8), np.float32)}
        losses.append(model.fit(batch, np.full(16, 3), epochs=2, verbose=0).history["loss"])
    assert losses[0] != losses[1]


class _Twice(keras.layers.Layer):
    """Of each row two pairs: its positive, and the item after it."""

    def call(self, inputs, positives, training=None):
        queries = keras.ops.concatenate([inputs["x"], -inputs["x"]])
        return queries, keras.ops.concatenate([positives, positives + 1]), None


def test_a_model_that_learns_pairs_is_trained_by_them_and_asked_by_its_query():
    inputs = {"x": keras.Input((3,), name="x")}
    tower = keras.Model(inputs, 2.0 * inputs["x"])
    seen = []

    class Objective(objectives.Objective):
        def loss(self, queries, positives, item_tower, rows=None, counts=None):
            seen.append((np.asarray(queries), np.asarray(positives), rows))
            return keras.ops.mean(queries)

    model = Retrieval(Towers(tower, BiasedItems(8, 2), pairs=_Twice()), Objective())
    batch = {"x": np.ones((2, 3), np.float32)}
    targets = {"item": np.array([2, 4], np.int32), "row": np.array([0, 1], np.int32)}
    model.compute_loss(batch, targets, model(batch, training=True))
    ((queries, positives, rows),) = seen
    np.testing.assert_array_equal(queries, [[1] * 3, [1] * 3, [-1] * 3, [-1] * 3])
    assert (positives.tolist(), rows) == ([2, 4, 3, 5], None)
    np.testing.assert_array_equal(model(batch), 2 * np.ones((2, 3)))


def test_a_query_that_ends_in_one_gets_the_bias():
    items = BiasedItems(6, 3)
    vectors = np.asarray(items(np.arange(6)))
    assert vectors.shape == (6, 4)
    assert (vectors[:, 3] == 0).all()
    assert np.abs(vectors[:, :3]).max() <= 2 / np.sqrt(3) + 1e-6
