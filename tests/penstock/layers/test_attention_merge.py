from __future__ import annotations

import numpy as np
import tensorflow as tf

from penstock.layers.attention_merge import AttentionMerge


def _layer(units=3, width=4):
    layer = AttentionMerge(units)
    layer.build((None, None, width))
    return layer


def _merged(layer, vectors, present):
    """In the symbols of the paper."""
    first, second = np.asarray(layer.hidden.kernel), np.asarray(layer.scores.kernel).T
    found = []
    for field, there in zip(vectors, present, strict=True):
        held = field[there]
        u = np.tanh(held @ first)
        a = np.exp(second @ u.T)
        found.append((a / a.sum() @ held)[0] if len(held) else np.zeros(vectors.shape[-1]))
    return np.array(found)


def test_it_is_the_sum_under_the_softmax_of_what_is_there():
    layer, random = _layer(), np.random.default_rng(1)
    vectors = random.normal(size=(5, 6, 4)).astype(np.float32)
    present = random.random((5, 6)) < 0.6
    present[0], present[1] = True, False
    np.testing.assert_allclose(layer(vectors, present), _merged(layer, vectors, present), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(vectors[:1]), _merged(layer, vectors[:1], present[:1]), rtol=1e-5, atol=1e-6)


def test_one_vector_is_its_own_merge_and_equal_ones_are_theirs():
    layer = _layer()
    one = np.random.default_rng(2).normal(size=(2, 1, 4)).astype(np.float32)
    np.testing.assert_allclose(layer(one), one[:, 0], rtol=1e-6)
    np.testing.assert_allclose(layer(np.repeat(one, 7, axis=1)), one[:, 0], rtol=1e-5)


def test_without_a_say_of_the_scores_it_is_the_mean_and_so_is_its_gradient():
    layer = _layer()
    layer.scores.kernel.assign(np.zeros((3, 1)))
    vectors = tf.constant(np.random.default_rng(3).normal(size=(2, 5, 4)).astype(np.float32))
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        merged = layer(vectors)
    np.testing.assert_allclose(merged, np.mean(vectors, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tape.gradient(merged, vectors), np.full((2, 5, 4), 0.2), rtol=1e-5)


def test_one_that_is_there_several_times_weighs_as_if_it_stood_there_so_often():
    layer, random = _layer(), np.random.default_rng(4)
    vectors, counts = random.normal(size=(1, 4, 4)).astype(np.float32), np.array([[3, 1, 0, 2]], np.float32)
    repeated = np.repeat(vectors, counts[0].astype(int), axis=1)
    np.testing.assert_allclose(layer(vectors, counts), layer(repeated), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(vectors, 0.25 * counts), layer(vectors, counts), rtol=1e-5, atol=1e-6)
