from __future__ import annotations

import numpy as np

from penstock.layers.embedding import MaskedMean
from penstock.layers.experts import ExpertMixture


def test_the_mean_leaves_padding_out_and_the_empty_list_is_zero():
    vectors = np.array([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[5.0, 5.0]] * 3], np.float32)
    mean = MaskedMean()(vectors, np.array([[4, 7, 0], [0, 0, 0]]))
    np.testing.assert_allclose(np.asarray(mean), [[2.0, 4.0], [0.0, 0.0]])


def test_one_expert_is_a_shared_bottom():
    outputs = np.random.default_rng(0).normal(size=(5, 1, 3)).astype(np.float32)
    mixed = ExpertMixture(1)(np.ones((5, 4), np.float32), outputs)
    np.testing.assert_allclose(np.asarray(mixed), outputs[:, 0], rtol=1e-6)


def test_the_mixture_is_the_softmax_of_the_gate():
    random = np.random.default_rng(1)
    inputs, outputs = random.normal(size=(5, 4)).astype(np.float32), random.normal(size=(5, 3, 2)).astype(np.float32)
    layer = ExpertMixture(3)
    mixed = np.asarray(layer(inputs, outputs))
    logits = inputs @ np.asarray(layer.gate.kernel)
    gates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mixed, (gates[:, :, None] * outputs).sum(axis=1), rtol=1e-5)
