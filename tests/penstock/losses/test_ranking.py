from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.losses.ranking import bpr, bpr_max, hinge, top1_max


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softmax(scores):
    return np.exp(scores) / np.exp(scores).sum()


ORACLES = {
    bpr: lambda p, n: -np.mean([np.log(_sigmoid(p - s)) for s in n]),
    top1_max: lambda p, n: sum(a * (_sigmoid(s - p) + _sigmoid(s**2)) for a, s in zip(_softmax(n), n, strict=True)),
    bpr_max: lambda p, n: (
        -np.log(sum(a * _sigmoid(p - s) for a, s in zip(_softmax(n), n, strict=True)))
        + 0.7 * sum(a * s**2 for a, s in zip(_softmax(n), n, strict=True))
    ),
    hinge: lambda p, n: np.mean([max(0.0, 0.3 + s - p) for s in n]),
}
SETTINGS = {bpr_max: {"regularization": 0.7}, hinge: {"margin": 0.3}}


def _scores(batch=4, sample=6, seed=0):
    random = np.random.default_rng(seed)
    counts = (random.random((batch, sample)) < 0.7).astype(np.float32)
    counts[:, 0] = 1.0
    return *(random.normal(size=size).astype(np.float32) for size in (batch, (batch, sample))), counts


@pytest.mark.parametrize("loss", ORACLES)
def test_equals_the_loops_over_what_counts(loss):
    positives, negatives, counts = _scores()
    found = np.asarray(loss(positives, negatives, counts, **SETTINGS.get(loss, {})))
    for row in range(len(positives)):
        expected = ORACLES[loss](positives[row], negatives[row][counts[row] > 0])
        assert found[row] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ORACLES)
def test_a_row_whose_negatives_are_all_its_positive_has_no_loss_and_no_gradient(loss):
    positives, negatives, counts = _scores()
    counts[1] = 0.0
    variable = tf.Variable(negatives)
    with tf.GradientTape() as tape:
        found = loss(positives, variable, counts, **SETTINGS.get(loss, {}))
    gradient = np.asarray(tape.gradient(found, variable))
    assert found[1] == 0.0
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()
    assert gradient.any()


def test_of_one_negative_bpr_max_is_bpr():
    positives, negatives, _ = _scores(sample=1)
    ones = np.ones_like(negatives)
    np.testing.assert_allclose(
        bpr_max(positives, negatives, ones, regularization=0.0), bpr(positives, negatives, ones), rtol=1e-5
    )


def test_more_negatives_that_are_far_below_leave_the_gradient_of_bpr_max_as_it_is_and_not_that_of_bpr():
    """Why it was made: Hidasi & Karatzoglou 2018, section 3.2."""
    gradients = {}
    for loss, settings in ((bpr, {}), (bpr_max, {"regularization": 0.0})):
        for easy in (0, 99):
            positive = tf.Variable([1.0])
            negatives = keras.ops.convert_to_tensor([[1.0] + [-20.0] * easy], "float32")
            with tf.GradientTape() as tape:
                found = loss(positive, negatives, keras.ops.ones_like(negatives), **settings)
            gradients[loss, easy] = float(tape.gradient(found, positive)[0])
    assert gradients[bpr_max, 99] == pytest.approx(gradients[bpr_max, 0], rel=1e-4)
    assert gradients[bpr, 99] == pytest.approx(gradients[bpr, 0] / 100, rel=1e-3)
