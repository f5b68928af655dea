from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.examples import UNKNOWN
from penstock.layers.embedding import Embedding, IdDropout
from penstock.optimizers import Adagrad, Adam

TABLE = np.arange(18, dtype=np.float32).reshape(6, 3) ** 2
LISTS = np.array([[4, 2, 0, 0], [0, 0, 0, 0], [5, 5, 0, 2], [1, 2, 3, 4]], np.int32)


def _layer(**arguments) -> Embedding:
    layer = Embedding(6, 3, **arguments)
    layer.build(())
    layer.set_weights([TABLE])
    return layer


@pytest.mark.parametrize("indices", [2, [0, 5, 5], [[1, 2], [3, 0]], np.zeros((0, 2), np.int32)])
def test_gives_the_row_of_each_index(indices):
    np.testing.assert_array_equal(np.asarray(_layer()(tf.constant(indices))), TABLE[np.asarray(indices)])


def test_the_gradient_is_of_the_rows_alone():
    layer = _layer()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.constant([[1, 4], [4, 4]])))
    gradient = tape.gradient(loss, layer.table.value)
    assert isinstance(gradient, tf.IndexedSlices)
    np.testing.assert_array_equal(gradient.indices, [1, 4, 4, 4])
    np.testing.assert_array_equal(gradient.values, np.ones((4, 3)))


def test_the_mean_of_a_list_leaves_padding_out():
    expected = [(TABLE[4] + TABLE[2]) / 2, TABLE[0] * 0, (2 * TABLE[5] + TABLE[2]) / 3, TABLE[1:5].mean(axis=0)]
    np.testing.assert_allclose(np.asarray(_layer()(LISTS, mean=True)), expected, rtol=1e-6)


@pytest.mark.parametrize("lists", [LISTS, LISTS[1:2], np.zeros((0, 4), np.int32)])
def test_the_gradient_of_the_mean_equals_the_loops(lists):
    layer = _layer()
    weights = np.random.default_rng(0).normal(size=(len(lists), 3)).astype(np.float32)
    expected = np.zeros((6, 3))
    for row, indices in enumerate(lists):
        present = [index for index in indices if index]
        for index in present:
            expected[index] += weights[row] / len(present)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.constant(lists), mean=True) * weights)
    gradient = tape.gradient(loss, layer.table.value)
    assert isinstance(gradient, tf.IndexedSlices)
    assert len(np.unique(gradient.indices)) == len(gradient.indices)
    assert 0 not in gradient.indices
    np.testing.assert_allclose(tf.convert_to_tensor(gradient), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [-1, 6])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU gives the zero vector")
def test_an_index_out_of_range_is_refused(index, mean):
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{index} is not in \[0, 6\)"):
        _layer()(tf.constant([[1, index]]), mean=mean)


def test_training_in_keras_changes_the_rows_of_the_batch_alone():
    index, items = keras.Input((), dtype="int32"), keras.Input((None,), dtype="int32")
    layer = Embedding(6, 3)
    output = keras.ops.sum(layer(index) * layer(items, mean=True), axis=-1)
    model = keras.Model([index, items], output)
    model.compile(Adagrad(0.1), "mse")
    layer.set_weights([TABLE])
    batch = [np.array([1, 1]), np.array([[4, 4, 0], [1, 0, 0]])]
    model.fit(batch, np.array([1.0, 2.0]), verbose=0)
    changed = (np.asarray(layer.table) != TABLE).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [1, 4])


def test_no_step_reads_the_whole_table():
    # "Unique", a gather and a segment mean are what TensorFlow's optimiser turns into a read of the whole variable
    layer = _layer()
    graph = tf.function(lambda: layer(tf.constant(LISTS), mean=True)).get_concrete_function().graph
    assert not {operation.type for operation in graph.get_operations()} & {"Unique", "UniqueV2", "ReadVariableOp"}


def test_a_batch_of_empty_lists_is_a_step_that_changes_nothing():
    items = keras.Input((None,), dtype="int32")
    layer = Embedding(6, 3)
    model = keras.Model(items, layer(items, mean=True))
    model.compile(Adam(0.1), "mse")
    layer.set_weights([TABLE])
    model.fit(np.zeros((2, 4), np.int32), np.ones((2, 3)), verbose=0)
    np.testing.assert_array_equal(np.asarray(layer.table), TABLE)


def test_another_precision_is_that_of_the_vectors_and_not_of_the_table():
    layer = _layer(dtype="mixed_bfloat16")
    assert layer(tf.constant([1])).dtype == tf.bfloat16
    assert layer.table.dtype == "float32"


def test_a_copy_from_its_config_is_the_same_layer():
    layer = Embedding(6, 3, keras.initializers.RandomUniform(-0.5, 0.5, seed=1), name="items")
    copy = keras.layers.deserialize(keras.layers.serialize(layer))
    np.testing.assert_array_equal(np.asarray(layer(tf.range(6))), np.asarray(copy(tf.range(6))))
    assert copy.name == "items"


def test_withheld_ids_are_unknown_in_training_alone():
    keras.utils.set_random_seed(0)
    layer = IdDropout(0.3)
    indices = np.arange(2, 20_002, dtype=np.int32)
    np.testing.assert_array_equal(layer(indices), indices)
    found = np.asarray(layer(indices, training=True))
    assert set(found[found != indices]) == {UNKNOWN}
    assert np.mean(found != indices) == pytest.approx(0.3, abs=0.015)
    assert np.asarray(layer(indices, training=True) != found).any()
    np.testing.assert_array_equal(IdDropout(0.0)(indices, training=True), indices)
    with pytest.raises(ValueError, match="not 1"):
        IdDropout(1.0)
