from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from penstock.backends.tensorflow import accidental_hits
from penstock.losses.sampled import (
    binary,
    distinct,
    in_batch_softmax,
    mean_sampled_softmax,
    mean_softmax,
    nce,
    resample,
    sampled_softmax,
    softmax,
)


def _arguments(random, batch, sample, dim=4, items=6):
    return (
        random.normal(size=(batch, dim)).astype(np.float32),
        random.normal(size=(batch, dim)).astype(np.float32),
        random.normal(size=(sample, dim)).astype(np.float32),
        random.integers(2, items, batch),
        random.integers(2, items, sample),
        random.normal(size=batch).astype(np.float32),
        random.normal(size=sample).astype(np.float32),
    )


def _normal_of(random, *shape):
    return random.normal(size=shape).astype(np.float32)


def _oracle(query, positives, negatives, positive_ids, negative_ids, positive_log_q, negative_log_q):
    losses = []
    for row in range(len(query)):
        positive = query[row] @ positives[row] - positive_log_q[row]
        terms = [np.exp(positive)]
        others = [column for column in range(len(negatives)) if negative_ids[column] != positive_ids[row]]
        terms += [np.exp(query[row] @ negatives[column] - negative_log_q[column]) for column in others]
        losses.append(np.log(sum(terms)) - positive)
    return np.array(losses)


def _gradients(loss, *values):
    """Of the sum of `loss(*values)`, weighted by row, to each value."""
    variables = [tf.Variable(value) for value in values]
    with tf.GradientTape() as tape:
        losses = loss(*variables)
        total = tf.reduce_sum(losses * tf.range(1.0, tf.size(losses, tf.int32) + 1))
    return [np.array(tf.convert_to_tensor(gradient)) for gradient in tape.gradient(total, variables)]


def _plain(query, positives, negatives, positive_ids, negative_ids, positive_log_q, negative_log_q):
    """The same loss by TensorFlow's own operations and gradients."""
    positive = tf.reduce_sum(query * positives, axis=1) - positive_log_q
    negative = tf.matmul(query, negatives, transpose_b=True) - negative_log_q
    negative = tf.where(negative_ids[None, :] == positive_ids[:, None], -np.inf, negative)
    return tf.reduce_logsumexp(tf.concat([positive[:, None], negative], axis=1), axis=1) - positive


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
    arguments = _arguments(np.random.default_rng(seed), batch, sample)
    np.testing.assert_allclose(np.asarray(sampled_softmax(*arguments)), _oracle(*arguments), rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_gradient_is_that_of_the_plain_operations_also_beyond_what_an_exponential_holds(scale):
    query, positives, negatives, positive_ids, negative_ids, *log_q = _arguments(np.random.default_rng(5), 8, 12)
    query = query * scale
    arguments = (query, positives, negatives, positive_ids, negative_ids, *log_q)
    losses = np.asarray(sampled_softmax(*arguments))
    assert bool(losses.max() > 90.0) is (scale > 1.0)  # exp(89) is infinite
    np.testing.assert_allclose(losses, _plain(*arguments), rtol=1e-5, atol=1e-6)

    def of(function):
        return lambda q, p, n, a, b: function(q, p, n, positive_ids, negative_ids, a, b)

    values = (query, positives, negatives, *log_q)
    for ours, plain in zip(_gradients(of(sampled_softmax), *values), _gradients(of(_plain), *values), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * scale)


def test_one_row_beyond_an_exponential_leaves_the_others_as_they_are():
    query = np.array([[1.0], [300.0]], np.float32)
    positives = np.array([[2.0], [1.0]], np.float32)
    negatives = np.array([[2.0], [-1.0]], np.float32)
    none = np.zeros(2, np.float32)
    losses = sampled_softmax(query, positives, negatives, np.array([2, 3]), np.array([4, 5]), none, none)
    np.testing.assert_allclose(losses, [np.log(2 + np.exp(-3)), 300.0], rtol=1e-6)


def test_negatives_that_are_all_the_positive_leave_no_loss_and_no_gradient():
    vectors = np.ones((3, 2), np.float32)
    ids, none = np.full(3, 2), np.zeros(3, np.float32)
    gradients = _gradients(lambda q, p, n: sampled_softmax(q, p, n, ids, ids, none, none), vectors, vectors, vectors)
    assert not np.any(np.asarray(sampled_softmax(vectors, vectors, vectors, ids, ids, none, none)))
    assert not any(np.any(gradient) for gradient in gradients)


def test_a_graph_takes_batches_of_any_size():
    compiled = tf.function(
        sampled_softmax,
        input_signature=[tf.TensorSpec(shape, dtype) for shape, dtype in (
            ([None, 4], tf.float32), ([None, 4], tf.float32), ([None, 4], tf.float32),
            ([None], tf.int64), ([None], tf.int64), ([None], tf.float32), ([None], tf.float32),
        )],
    )  # fmt: skip
    for batch, sample in ((1, 5), (6, 2)):
        arguments = _arguments(np.random.default_rng(batch), batch, sample)
        np.testing.assert_allclose(compiled(*map(tf.constant, arguments)), _oracle(*arguments), rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("batch", [1, 64, 150])
def test_the_mean_chunk_by_chunk_is_that_of_all_rows_and_so_is_its_gradient(batch, scale):
    """Chunks are of 64 rows here: one, one that is full, and three of which the last is not."""
    query, positives, negatives, ids, others, log_p, log_n = _arguments(np.random.default_rng(5), batch, 9)
    values = tuple(scale * value for value in (query, positives, negatives))

    def loss(mean):
        def of(query, positives, negatives):
            found = mean(query, positives, negatives, ids, others, log_p, log_n)
            return tf.reshape(3.0 * found, [1])

        return of

    in_chunks = loss(lambda *arguments: mean_sampled_softmax(*arguments, cells=1))
    at_once = loss(lambda *arguments: tf.reduce_mean(_plain(*arguments)))
    np.testing.assert_allclose(in_chunks(*values), at_once(*values), rtol=1e-5)
    for ours, plain in zip(_gradients(in_chunks, *values), _gradients(at_once, *values), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * scale)


def test_the_mean_over_all_items_is_that_of_the_exact_softmax():
    query, _, items, *_ = _arguments(np.random.default_rng(6), 70, 9)
    places = np.arange(70) % 9
    np.testing.assert_allclose(
        mean_softmax(query, items, places, cells=1), tf.reduce_mean(softmax(query, items, places)), rtol=1e-5
    )


@pytest.mark.parametrize(("cells", "whole"), [(1_000_000, False), (100_000_000, True)])
def test_no_more_logits_are_held_than_those_of_a_chunk(cells, whole):
    """All of 50,000 rows with 2,000 items are 400 MB."""

    @tf.function(jit_compile=False)
    def step(query, items):
        with tf.GradientTape() as tape:
            tape.watch([query, items])
            loss = mean_softmax(query, items, tf.range(50_000) % 2_000, cells)
        return tape.gradient(loss, [query, items])

    def megabytes(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    arguments = tf.zeros([50_000, 8]), tf.zeros([2_000, 8])
    traced = step.get_concrete_function(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = megabytes("VmRSS")
    traced(*arguments)
    assert (megabytes("VmHWM") - before > 300) == whole


@pytest.mark.parametrize("seed", range(4))
def test_accidental_hits_are_those_of_the_loops(seed):
    random = np.random.default_rng(seed)
    positives, negatives = random.integers(0, 5, 6), random.integers(0, 9, 20)
    expected = {(row, place) for row in range(6) for place in range(20) if positives[row] == negatives[place]}
    found = [tuple(pair) for pair in accidental_hits(positives, negatives.astype(np.int32)).numpy().tolist()]
    assert len(found) == len(expected)
    assert set(found) == expected


def test_a_sample_as_a_set_is_the_same_sample():
    random = np.random.default_rng(6)
    query, positives, _, positive_ids, negative_ids, log_q, _ = _arguments(random, 4, 30)
    vectors, of_items = _normal_of(random, 6, 4), _normal_of(random, 6)
    found, log_times = distinct(negative_ids)
    assert sorted(found.numpy().tolist()) == sorted(set(negative_ids.tolist()))

    def loss(ids, correction):
        return sampled_softmax(query, positives, vectors[ids], positive_ids, ids, log_q, correction)

    whole = loss(negative_ids, of_items[negative_ids])
    np.testing.assert_allclose(loss(found.numpy(), of_items[found.numpy()] - log_times), whole, rtol=1e-5)


def test_sampling_every_item_once_is_the_exact_softmax_and_its_gradient():
    random = np.random.default_rng(3)
    items = random.normal(size=(6, 4)).astype(np.float32)
    query = random.normal(size=(5, 4)).astype(np.float32)
    places = np.array([0, 1, 2, 3, 3])

    def exact(query, items):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(places, tf.matmul(query, items, transpose_b=True))

    def ours(query, items):
        return softmax(query, items, places)

    np.testing.assert_allclose(ours(query, items), exact(query, items), rtol=1e-5)
    for one, other in zip(_gradients(ours, query, items), _gradients(exact, query, items), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_softmax_over_one_item_is_certain():
    vectors = np.array([[3.0, -1.0]], np.float32)
    assert np.asarray(softmax(vectors, vectors, np.array([0]))).tolist() == [0.0]


def test_logq_makes_the_sampled_sum_unbiased():
    # with negatives drawn from q and corrected, Σ over the sample estimates the partition function
    random = np.random.default_rng(4)
    logits = random.normal(size=50).astype(np.float32)
    q = random.dirichlet(np.ones(50))
    drawn = random.choice(50, size=(1, 40_000), p=q)[0]
    loss = sampled_softmax(
        np.ones((1, 1), np.float32),
        np.zeros((1, 1), np.float32),
        logits[drawn][:, None],
        np.array([99]),
        drawn,
        np.zeros(1, np.float32),
        np.log(40_000 * q[drawn]).astype(np.float32),
    )
    assert np.expm1(np.asarray(loss)[0]) == pytest.approx(np.exp(logits).sum(), rel=0.03)


def _in_batch_oracle(query, items, ids, log_q):
    losses = []
    for row in range(len(ids)):
        positive = query[row] @ items[row] - (0.0 if log_q is None else log_q[row])
        total, seen = np.exp(positive), set()
        for other in range(len(ids)):
            if ids[other] == ids[row] or (log_q is not None and ids[other] in seen):
                continue
            seen.add(ids[other])
            total += np.exp(query[row] @ items[other] - (0.0 if log_q is None else log_q[other]))
        losses.append(np.log(total) - positive)
    return losses


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_in_batch_equals_the_loops(corrected, seed):
    random = np.random.default_rng(seed)
    ids = random.integers(2, 6, 7)
    vectors = random.normal(size=(6, 3)).astype(np.float32)
    query = random.normal(size=(7, 3)).astype(np.float32)
    log_q = random.normal(size=6).astype(np.float32)[ids] if corrected else None
    ours = in_batch_softmax(query, vectors[ids], ids, log_q)
    np.testing.assert_allclose(ours, _in_batch_oracle(query, vectors[ids], ids, log_q), rtol=1e-5)


def test_in_batch_of_one_item_has_no_loss_and_of_two_is_logistic():
    query, items = np.eye(2, dtype=np.float32), 2.0 * np.eye(2, dtype=np.float32)
    assert not np.any(np.asarray(in_batch_softmax(query, items, np.array([5, 5]))))
    log_q = np.log([0.5, 0.25]).astype(np.float32)
    expected = [np.log1p(np.exp(-2.0) / 0.25 * 0.5), np.log1p(np.exp(-2.0) / 0.5 * 0.25)]
    np.testing.assert_allclose(in_batch_softmax(query, items, np.array([5, 6]), log_q), expected, rtol=1e-5)


def test_nce_of_one_row_and_one_noise_item():
    query, positive, noise = ([[1.0, 2.0]], [[0.5, 0.25]], [[1.0, -1.0]])
    loss = nce(*(np.array(value, np.float32) for value in (query, positive, noise)), np.array([0.4]), np.array([-0.3]))
    expected = np.log1p(np.exp(-(1.0 - 0.4))) + np.log1p(np.exp(-1.0 + 0.3))
    assert np.asarray(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batch", "sample"), [(1, 1), (3, 5)])
def test_nce_equals_the_loops_and_its_gradient_the_closed_form(batch, sample):
    query, positives, noise, _, _, log_q, noise_log_q = _arguments(np.random.default_rng(1), batch, sample)
    expected, gradient = np.zeros(batch), np.zeros_like(query)
    for row in range(batch):
        own = 1 / (1 + np.exp(-(query[row] @ positives[row] - log_q[row])))
        expected[row] -= np.log(own)
        gradient[row] -= (1 - own) * positives[row]
        for column in range(sample):
            taken = 1 / (1 + np.exp(-(query[row] @ noise[column] - noise_log_q[column])))
            expected[row] -= np.log(1 - taken)
            gradient[row] += taken * noise[column]
    arguments = (positives, noise, log_q, noise_log_q)
    np.testing.assert_allclose(nce(query, *arguments), expected, rtol=1e-5)
    (ours,) = _gradients(lambda value: nce(value, *arguments), query)
    np.testing.assert_allclose(ours, gradient * np.arange(1, batch + 1)[:, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (3, 1), (4, 2)])
def test_binary_is_the_cross_entropy_of_a_classifier_and_its_gradient(batch, count):
    random = np.random.default_rng(7)
    query, positives = (random.normal(size=(batch, 3)).astype(np.float32) for _ in range(2))
    negatives = random.normal(size=(batch, count, 3)).astype(np.float32)
    others = (np.arange(batch * count).reshape(batch, count) % 3 != 1).astype(np.float32)
    scores = np.concatenate([positives[:, None], negatives], axis=1) @ query[:, :, None]
    labels = np.concatenate([np.ones((batch, 1)), np.zeros((batch, count))], axis=1).astype(np.float32)
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels, scores[:, :, 0]).numpy()
    expected = entropy[:, 0] + (entropy[:, 1:] * others).sum(axis=1)
    np.testing.assert_allclose(binary(query, positives, negatives, others), expected, rtol=1e-5)
    # d/ds⁺ = σ(s⁺) − 1, d/ds⁻ = σ(s⁻)
    slopes = (1 / (1 + np.exp(-scores[:, :, 0])) - labels) * np.concatenate([np.ones((batch, 1)), others], axis=1)
    gradient = np.einsum("bn,bnd->bd", slopes, np.concatenate([positives[:, None], negatives], axis=1))
    (ours,) = _gradients(lambda value: binary(value, positives, negatives, others), query)
    np.testing.assert_allclose(ours, gradient * np.arange(1, batch + 1)[:, None], rtol=1e-4, atol=1e-6)


def test_nce_is_smallest_where_the_scores_are_the_normalised_log_probabilities():
    probabilities, q, draws = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.2, 0.3, 0.4]), 3
    log_q = np.log(draws * q).astype(np.float32)
    pairs = [(item, noise) for item in range(4) for noise in range(4)]
    weights = np.array([probabilities[item] * q[noise] for item, noise in pairs], np.float32)

    def expected_loss(scores):
        losses = []
        for item, noise in pairs:
            drawn = [noise] * draws
            one = tf.ones((1, 1))
            losses.append(
                nce(one, scores[item][None, None], tf.gather(scores, drawn)[:, None], log_q[[item]], log_q[drawn])[0]
            )
        return tf.reduce_sum(tf.stack(losses) * weights)

    for shift, zero in ((0.0, True), (0.3, False)):
        scores = tf.Variable(np.log(probabilities).astype(np.float32) + shift)
        with tf.GradientTape() as tape:
            loss = expected_loss(scores)
        slope = np.array(tf.convert_to_tensor(tape.gradient(loss, scores)))
        assert np.allclose(slope, 0.0, atol=1e-6) is zero


def _resample_oracle(query, negatives, positive_ids, negative_ids, log_q, noise, count, temperature):
    share = np.zeros(len(negatives))
    for row in range(len(query)):
        terms = np.zeros(len(negatives))
        for column in range(len(negatives)):
            if negative_ids[column] != positive_ids[row]:
                terms[column] = np.exp((query[row] @ negatives[column] - log_q[column]) / temperature)
        share += terms / terms.sum() / len(query)
    perturbed = np.log(share) + noise
    order = np.argsort(-perturbed)
    threshold = perturbed[order[count]] if count < len(negatives) else -np.inf
    return order[:count], np.log(1 - np.exp(-np.exp(np.log(share[order[:count]]) - threshold)))


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_resampling_equals_the_loops(count, temperature):
    random = np.random.default_rng(count)
    query, _, negatives, positive_ids, negative_ids, _, log_q = _arguments(random, 5, 8, items=20)
    arguments = (query, negatives, positive_ids, negative_ids, log_q, random.gumbel(size=8).astype(np.float32))
    places, log_kept = resample(*arguments, count, temperature)
    expected_places, expected_log_kept = _resample_oracle(*arguments, count, temperature)
    kept = dict(zip(np.asarray(places).tolist(), np.asarray(log_kept), strict=True))
    expected = dict(zip(expected_places.tolist(), expected_log_kept, strict=True))
    assert kept == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_second_pass_is_an_unbiased_estimate_of_the_first():
    random = np.random.default_rng(8)
    query, _, negatives, positive_ids, negative_ids, _, log_q = _arguments(random, 3, 10)
    terms = np.exp(query[0] @ negatives.T - log_q)

    def estimate(noise):
        places, log_kept = resample(query, negatives, positive_ids, negative_ids, log_q, noise, 3, 2.0)
        return tf.reduce_sum(tf.gather(tf.constant(terms), places) * tf.exp(-log_kept))

    estimates = tf.vectorized_map(estimate, tf.constant(random.gumbel(size=(6000, 10)), tf.float32)).numpy()
    error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - terms.sum()) < 4 * error
    assert error < 0.02 * terms.sum()


def test_keeping_all_is_the_plain_sampled_softmax_and_sampling_all_the_exact_one():
    random = np.random.default_rng(9)
    query, items = (random.normal(size=(size, 4)).astype(np.float32) for size in (5, 8))
    places, none = np.array([0, 3, 3, 7, 1]), np.zeros(8, np.float32)
    kept, log_kept = resample(query, items, places, np.arange(8), none, none, 8, 0.7)
    two_pass = sampled_softmax(
        query, items[places], tf.gather(items, kept), places, kept, none[:5], tf.gather(none, kept) + log_kept
    )
    exact = tf.nn.sparse_softmax_cross_entropy_with_logits(places, query @ items.T)
    np.testing.assert_allclose(two_pass, exact, rtol=1e-5)


def test_the_lower_the_temperature_the_more_the_highest_are_kept():
    random = np.random.default_rng(10)
    query = np.ones((1, 1), np.float32)
    negatives = np.linspace(-2, 2, 20, dtype=np.float32)[:, None]
    mean = {}
    for temperature in (0.05, 1.0, 100.0):
        means = []
        for _ in range(40):
            noise = random.gumbel(size=20).astype(np.float32)
            places, log_kept = resample(
                query, negatives, np.array([99]), np.arange(20), np.zeros(20, np.float32), noise, 5, temperature
            )
            assert np.all(np.isfinite(log_kept))
            means.append(negatives[np.asarray(places), 0].mean())
        mean[temperature] = np.mean(means)
    assert mean[0.05] == pytest.approx(negatives[-5:, 0].mean(), abs=0.05)
    assert mean[0.05] > mean[1.0] + 0.3 > mean[100.0] + 0.6
    assert mean[100.0] == pytest.approx(0.0, abs=0.25)


def test_a_sample_of_nothing_but_the_positive_resamples_to_numbers():
    vectors = np.ones((4, 2), np.float32)
    ids, none = np.full(4, 2), np.zeros(4, np.float32)
    _, log_kept = resample(vectors, vectors, ids, ids, none, none, 2, 0.01)
    assert np.all(np.isfinite(log_kept))
