from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.layers.by_length import ByLength
from penstock.layers.embedding import Embedding
from penstock.recall import bert4rec, gru4rec, narm, sasrec
from penstock.retrieval import BiasedItems


def _encoder(name):
    keras.utils.set_random_seed(3)
    if name == "sasrec":
        config = sasrec.Config(dim=4, heads=2, dropout=0.0)
        return sasrec.CausalAttention(Embedding(9, 4), 8, config)
    if name == "gru4rec":
        return gru4rec.Recurrent(BiasedItems(9, 4), gru4rec.Config(dim=4, units=5, layers=2, dropout=0.0))
    if name == "narm":
        config = narm.Config(dim=4, units=5, input_dropout=0.0, output_dropout=0.0)
        return narm.GlobalAndLocal(Embedding(9, 4), config)
    config = bert4rec.Config(dim=4, dropout=0.0)
    return bert4rec.Bidirectional(Embedding(9, 5), 8, config)


def _sequences(lengths, longest):
    random = np.random.default_rng(len(lengths))
    items = random.integers(1, 9, (len(lengths), longest)).astype(np.int32)
    return np.where(np.arange(longest) < np.array(lengths)[:, None], items, 0)


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "narm", "bert4rec"])
@pytest.mark.parametrize("lengths", [[7, 1, 2, 5, 3, 3, 1, 6, 2, 1], [4, 1], [3], [5, 5, 5, 5], [1, 1, 1, 0]], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_apart_it_says_and_learns_what_it_does_at_once(name, lengths, parts):
    items = tf.constant(_sequences(lengths, max(lengths)))
    given = [items] if name != "bert4rec" else [items, tf.equal(items % 3, 1)]
    encoder = _encoder(name)
    encoder(*given)
    layer = ByLength(encoder, parts)
    weights = [weight.value for weight in encoder.trainable_weights]
    there = tf.not_equal(items, 0)

    def learned(read):
        with tf.GradientTape() as tape:
            states = tf.where(there[..., None], read(*given), 0.0)
            loss = tf.reduce_sum(tf.sin(3.0 * states))
        return states, tape.gradient(loss, weights, unconnected_gradients="zero")

    expected, gradients = learned(encoder)
    for run in (layer, tf.function(layer)):
        found, own = learned(run)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        for ours, other in zip(own, gradients, strict=True):
            np.testing.assert_allclose(tf.convert_to_tensor(ours), tf.convert_to_tensor(other), rtol=1e-3, atol=1e-4)


def test_a_part_is_as_long_as_its_longest():
    seen = []

    class Seen(keras.layers.Layer):
        def call(self, items):
            seen.append(tuple(items.shape))
            return keras.ops.one_hot(items, 9)

    items = _sequences([7, 1, 2, 5, 3, 3, 1, 6, 2, 1], 9)
    encoder = Seen()
    layer = ByLength(encoder)
    layer(items)
    seen.clear()
    states = np.asarray(layer(items))
    assert seen == [(5, 2), (3, 5), (1, 6), (1, 7)]
    np.testing.assert_array_equal(states, np.eye(9)[items] * (items != 0)[..., None])
