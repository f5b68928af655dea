from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from penstock.layers.recurrent import LastState
from penstock.layers.sequence import WindowPooling


def texts(rows, length, width, seed=0):
    """Random vectors and which of them are words: every number of words, and none."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(rows, length, width)).astype(np.float32)
    return vectors, np.arange(length)[None, :] < np.arange(rows)[:, None] % (length + 1)


def filled(layer, seed):
    """Gives every weight of a layer random values, biases included."""
    random = np.random.default_rng(seed)
    layer.set_weights([random.normal(0.0, 0.7, weight.shape) for weight in layer.get_weights()])


@pytest.mark.parametrize("layer", [LastState(4), WindowPooling(6, 4)], ids=["lstm", "cnn"])
def test_padding_in_front_or_behind_changes_nothing_and_order_does(layer):
    random = np.random.default_rng(3)
    text = random.normal(size=(1, 4, 3)).astype(np.float32)
    junk = random.normal(size=(1, 2, 3)).astype(np.float32) * 50.0
    layer(text, np.ones((1, 4), bool))
    expected = layer(text, np.ones((1, 4), bool))
    behind = layer(np.concatenate([text, junk], axis=1), np.array([[True] * 4 + [False] * 2]))
    front = layer(np.concatenate([junk, text], axis=1), np.array([[False] * 2 + [True] * 4]))
    np.testing.assert_allclose(behind, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(front, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(np.asarray(layer(text[:, ::-1], np.ones((1, 4), bool))) - expected).max() > 0.01
    nothing = np.asarray(layer(text, np.zeros((1, 4), bool)))
    assert np.isfinite(nothing).all()


def _window_oracle(layer, vectors, present):
    W, S = (np.asarray(weight, np.float64) for weight in layer.get_weights())
    window, width, features = W.shape
    rows = []
    for vector, there in zip(vectors, present, strict=True):
        best = np.full(features, -1.0)
        for place in range(len(vector)):
            if not there[place]:
                continue
            total = np.zeros(features)
            for offset in range(window):
                other = place + offset - window // 2
                if 0 <= other < len(vector) and there[other]:
                    for column in range(width):
                        total += vector[other, column] * W[offset, column]
            best = np.maximum(best, np.tanh(total))
        rows.append(np.tanh(best @ S))
    return np.array(rows)


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("width", [1, 4])
def test_windows_and_their_largest_are_those_of_the_loops(window, length, width):
    layer = WindowPooling(5, 3, window)
    vectors, present = texts(length + 1, length, width, seed=window)
    layer(vectors, present)
    filled(layer, 4)
    np.testing.assert_allclose(layer(vectors, present), _window_oracle(layer, vectors, present), rtol=1e-4, atol=1e-6)


def test_of_a_feature_only_the_largest_window_learns():
    layer = WindowPooling(1, 1, 1)
    vectors = tf.constant([[[0.2], [0.7], [-0.4], [9.0]]])
    present = np.array([[True, True, True, False]])
    layer(vectors, present)
    layer.set_weights([np.ones((1, 1, 1)), np.ones((1, 1))])
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        y = layer(vectors, present)
    assert float(y[0, 0]) == pytest.approx(np.tanh(np.tanh(0.7)), rel=1e-6)
    slope = (1 - np.tanh(np.tanh(0.7)) ** 2) * (1 - np.tanh(0.7) ** 2)
    np.testing.assert_allclose(tape.gradient(y, vectors)[0, :, 0], [0.0, slope, 0.0, 0.0], rtol=1e-5)
