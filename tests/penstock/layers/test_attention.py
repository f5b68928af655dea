from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.layers.attention import (
    AdditiveScores,
    MultiHeadAttention,
    MultiplicativeScores,
    Transformer,
    attend,
    dot_product,
    weights_of,
)

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (3, 4, 4, 2)]
"""Batch, queries, keys, dim."""


def _random(shape, seed=0):
    batch, queries, keys, dim = shape
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(batch, queries, dim)).astype(np.float32),
        random.normal(size=(batch, keys, dim)).astype(np.float32),
        random.random((batch, keys)) < 0.6,
        random.random((batch, queries)) < 0.6,
    )


def _loops(scores, values, key_mask, query_mask, causal):
    """Attention one query at a time, over the list of keys it may look at."""
    batch, queries, keys = scores.shape
    found = np.zeros((batch, queries, values.shape[-1]))
    for row, query in itertools.product(range(batch), range(queries)):
        if query_mask is not None and not query_mask[row, query]:
            continue
        seen = [key for key in range(keys) if key_mask is None or key_mask[row, key]]
        seen = [key for key in seen if not causal or key <= query]
        parts = [np.exp(np.float64(scores[row, query, key])) for key in seen]
        for key, part in zip(seen, parts, strict=True):
            found[row, query] += part / sum(parts) * values[row, key]
    return found


def _dot_product(queries, keys):
    return [[[np.dot(q, k) / np.sqrt(len(q)) for k in row] for q in of] for of, row in zip(queries, keys, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_loops(shape, masked, causal):
    for seed in range(3):
        queries, keys, key_mask, query_mask = _random(shape, seed)
        masks = [mask if used else None for mask, used in zip((key_mask, query_mask), masked, strict=True)]
        found = attend(dot_product(queries, keys), keys, *masks, causal=causal)
        np.testing.assert_allclose(
            found, _loops(np.array(_dot_product(queries, keys)), keys, *masks, causal), rtol=1e-5, atol=1e-6
        )


def test_equals_the_one_of_keras_where_both_are_defined():
    queries, keys, key_mask, _ = _random((4, 3, 5, 6), 7)
    key_mask[:, 0] = True
    expected = keras.ops.dot_product_attention(
        queries[:, :, None], keys[:, :, None], keys[:, :, None], mask=key_mask[:, None, None]
    )
    np.testing.assert_allclose(attend(dot_product(queries, keys), keys, key_mask), expected[:, :, 0], rtol=1e-5)


def test_the_gradient_is_that_of_small_differences():
    queries, keys, key_mask, query_mask = _random((2, 3, 4, 2), 1)
    key_mask[0] = False  # a row that sees nothing
    toward = np.random.default_rng(2).normal(size=(2, 3, 2))

    def value(q, k):
        return np.sum(toward * _loops(np.array(_dot_product(q, k)), k, key_mask, query_mask, True))

    variables = tf.Variable(queries), tf.Variable(keys)
    with tf.GradientTape() as tape:
        found = attend(dot_product(*variables), variables[1], key_mask, query_mask, causal=True)
        total = tf.reduce_sum(toward.astype(np.float32) * found)
    for place, gradient in enumerate(map(np.asarray, tape.gradient(total, variables))):
        assert np.isfinite(gradient).all()
        for index in np.ndindex(gradient.shape):
            moved = [[queries.astype(np.float64), keys.astype(np.float64)] for _ in range(2)]
            for side, step in zip(moved, (1e-4, -1e-4), strict=True):
                side[place] = side[place].copy()
                side[place][index] += step
            slope = (value(*moved[0]) - value(*moved[1])) / 2e-4
            assert gradient[index] == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_one_key_is_its_value():
    queries, keys, _, _ = _random((3, 4, 1, 5))
    np.testing.assert_array_equal(attend(dot_product(queries, keys), keys), np.repeat(keys, 4, axis=1))


def test_equal_scores_are_the_mean_of_the_keys_that_are_there():
    _, keys, key_mask, _ = _random((3, 1, 6, 4))
    key_mask[:, 0] = True
    means = [row[mask].mean(axis=0) for row, mask in zip(keys, key_mask, strict=True)]
    found = attend(np.zeros((3, 1, 6), np.float32), keys, key_mask)
    np.testing.assert_allclose(found[:, 0], means, rtol=1e-5)


def test_who_sees_nothing_and_who_is_not_there_is_zero():
    queries, keys, key_mask, query_mask = _random((2, 3, 4, 2))
    key_mask[0], query_mask[1] = False, False
    scores = dot_product(queries, keys)
    weights = np.asarray(weights_of(scores, key_mask, query_mask))
    assert not weights.any()
    assert np.asarray(weights_of(scores, key_mask)[1]).sum(axis=-1) == pytest.approx(1)


def test_a_later_key_changes_nothing_before_it():
    inputs, _, _, _ = _random((2, 6, 6, 4))
    changed = inputs.copy()
    changed[:, 4] = 99.0
    layer = MultiHeadAttention(2, 4)
    before, after = np.asarray(layer(inputs, inputs, causal=True)), np.asarray(layer(changed, changed, causal=True))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_what_padding_holds_changes_nothing():
    queries, keys, key_mask, query_mask = _random((4, 3, 5, 4))
    layer = MultiHeadAttention(2, 4)
    found = layer(queries, keys, key_mask, query_mask)
    other = np.where(key_mask[..., None], keys, 1e3)
    np.testing.assert_array_equal(found, layer(queries, other, key_mask, query_mask))
    assert not np.asarray(found)[~query_mask].any()


def test_half_floats_hide_what_is_masked_too():
    queries, keys, key_mask, _ = (array.astype(np.float16) for array in _random((3, 4, 5, 4)))
    weights = np.asarray(weights_of(dot_product(queries, keys), key_mask > 0))
    assert weights.dtype == np.float16
    assert not weights[np.repeat(key_mask[:, None] == 0, 4, axis=1)].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_additive_and_multiplicative_scores_equal_the_loops(shape):
    queries, keys, _, _ = _random(shape)
    additive, multiplicative = AdditiveScores(3), MultiplicativeScores()
    scores = np.asarray(additive(queries, keys)), np.asarray(multiplicative(queries, keys))
    w, u, v = (np.asarray(dense.kernel) for dense in (additive.of_queries, additive.of_keys, additive.joined))
    for row, query, key in itertools.product(*map(range, shape[:3])):
        q, k = queries[row, query], keys[row, key]
        assert scores[0][row, query, key] == pytest.approx((np.tanh(q @ w + k @ u) @ v).item(), rel=1e-4, abs=1e-5)
        assert scores[1][row, query, key] == pytest.approx(
            q @ np.asarray(multiplicative.kernel) @ k, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize(("heads", "causal"), [(1, False), (2, True), (4, False)])
def test_heads_equal_those_of_keras(heads, causal):
    queries, keys, _, _ = _random((3, 5, 5, 8))
    keys = queries if causal else keys
    key_mask = np.arange(5) < np.array([[5], [3], [1]])
    ours = MultiHeadAttention(heads, 8)
    theirs = keras.layers.MultiHeadAttention(heads, 8 // heads, use_bias=False)
    found = ours(queries, keys, key_mask, causal=causal)
    theirs(queries, keys)
    parts = [np.asarray(dense.kernel) for dense in (ours.of_queries, ours.of_keys, ours.of_values)]
    theirs.set_weights(
        [*(part.reshape(8, heads, -1) for part in parts), np.asarray(ours.joined.kernel).reshape(heads, -1, 8)]
    )
    expected = theirs(queries, keys, attention_mask=key_mask[:, None], use_causal_mask=causal)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_heads_take_the_root_of_their_own_dim_or_none():
    queries, keys, _, _ = _random((2, 3, 4, 8))
    scaled, plain = MultiHeadAttention(2, 8), MultiHeadAttention(2, 8, scaled=False)
    expected = scaled(queries, keys)
    plain(queries, keys)
    plain.set_weights(scaled.get_weights())
    plain.of_queries.kernel.assign(plain.of_queries.kernel / 2.0)
    np.testing.assert_allclose(plain(queries, keys), expected, rtol=1e-5)


def test_heads_must_divide_the_dim():
    with pytest.raises(ValueError, match="6 dimensions cannot be shared by 4 heads"):
        MultiHeadAttention(4, 6)


def test_the_layers_come_back_from_their_config():
    normal = keras.initializers.RandomNormal(stddev=0.02)
    layers = (
        AdditiveScores(3),
        MultiplicativeScores(),
        MultiHeadAttention(2, 8, scaled=False, initializer=normal),
        Transformer(2, 8, 16, "relu", 0.1, causal=True, initializer=normal),
    )
    for layer in layers:
        config = layer.get_config()
        assert type(layer).from_config(config).get_config() == config


def test_every_kernel_of_a_block_starts_from_the_initializer_and_on_its_own():
    block = Transformer(2, 32, 32, "relu", 0.0, initializer=keras.initializers.RandomNormal(mean=3.0, stddev=0.02))
    block.build((None, None, 32))
    kernels = [np.asarray(weight) for weight in block.trainable_weights if weight.name == "kernel"]
    assert len(kernels) == 6
    for place, kernel in enumerate(kernels):
        assert kernel.mean() == pytest.approx(3.0, abs=0.01)
        assert kernel.std() == pytest.approx(0.02, rel=0.1)
        assert all((kernel != other).any() for other in kernels[:place])
