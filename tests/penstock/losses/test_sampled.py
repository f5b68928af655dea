from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from penstock.losses.sampled import sampled_softmax


def _oracle(query, positives, negatives, positive_ids, negative_ids, positive_log_q, negative_log_q):
    losses = []
    for row in range(len(query)):
        positive = query[row] @ positives[row] - positive_log_q[row]
        terms = [np.exp(positive)]
        others = [column for column in range(len(negatives)) if negative_ids[column] != positive_ids[row]]
        terms += [np.exp(query[row] @ negatives[column] - negative_log_q[column]) for column in others]
        losses.append(np.log(sum(terms)) - positive)
    return np.array(losses)


def test_one_negative_is_the_logistic_loss():
    query = np.array([[2.0, 0.0]], np.float32)
    loss = sampled_softmax(
        query,
        np.array([[1.0, 0.0]], np.float32),
        np.array([[0.25, 5.0]], np.float32),
        np.array([2]),
        np.array([3]),
        np.zeros(1, np.float32),
        np.zeros(1, np.float32),
    )
    assert np.asarray(loss) == pytest.approx(np.log1p(np.exp(0.5 - 2.0)), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sample", [1, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_loops(batch, sample, seed):
    random = np.random.default_rng(seed)
    arguments = (
        random.normal(size=(batch, 4)).astype(np.float32),
        random.normal(size=(batch, 4)).astype(np.float32),
        random.normal(size=(sample, 4)).astype(np.float32),
        random.integers(2, 6, batch),
        random.integers(2, 6, sample),
        random.normal(size=batch).astype(np.float32),
        random.normal(size=sample).astype(np.float32),
    )
    np.testing.assert_allclose(np.asarray(sampled_softmax(*arguments)), _oracle(*arguments), rtol=1e-5)


def test_sampling_every_item_once_is_the_exact_softmax_and_its_gradient():
    random = np.random.default_rng(3)
    items = tf.Variable(random.normal(size=(6, 4)).astype(np.float32))
    query = tf.Variable(random.normal(size=(5, 4)).astype(np.float32))
    ids = np.array([0, 1, 2, 3, 3])
    with tf.GradientTape(persistent=True) as tape:
        sampled = sampled_softmax(
            query, tf.gather(items, ids), items, ids, np.arange(6), np.zeros(5, np.float32), np.zeros(6, np.float32)
        )
        exact = tf.nn.sparse_softmax_cross_entropy_with_logits(ids, query @ tf.transpose(items))
    np.testing.assert_allclose(sampled, exact, rtol=1e-5)
    for variable in (items, query):
        ours = tf.convert_to_tensor(tape.gradient(sampled, variable))
        np.testing.assert_allclose(ours, tape.gradient(exact, variable), rtol=1e-4, atol=1e-6)


def test_logq_makes_the_sampled_gradient_unbiased_in_expectation():
    # with negatives drawn from q and corrected, Σ over the sample estimates the partition function
    random = np.random.default_rng(4)
    logits = random.normal(size=50)
    q = random.dirichlet(np.ones(50))
    drawn = random.choice(50, size=(4000, 20), p=q)
    estimate = np.exp(logits[drawn] - np.log(20 * q[drawn])).sum(axis=1).mean()
    assert estimate == pytest.approx(np.exp(logits).sum(), rel=0.05)
