"""The softmax over all items, and what stands in for it on a sample of them."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras import ops

_EXCLUDED = -1e9

CELLS = 2**23
"""So many logits are held at once, or those of `_ROWS` rows where these are more."""

_ROWS = 64


def softmax(query: ops.Tensor, items: ops.Tensor, places: ops.Tensor) -> ops.Tensor:
    """Cross-entropy of each row's positive against all items.

    `loss = −s⁺ + log Σᵢ exp sᵢ` with `sᵢ = q · vᵢ`.

    Args:
        query: `[batch, dim]`.
        items: the vectors of all items `[items, dim]`.
        places: where in `items` each row's positive stands, int `[batch]`.

    Returns:
        The loss of each row, `[batch]`.
    """
    items, places = tf.convert_to_tensor(items), tf.convert_to_tensor(places)
    count = tf.shape(items)[0]
    ids = tf.range(count, dtype=places.dtype)
    return sampled_softmax(
        query, tf.gather(items, places), items, places, ids, tf.zeros(tf.shape(places)), tf.zeros([count])
    )


def sampled_softmax(
    query: ops.Tensor,
    positives: ops.Tensor,
    negatives: ops.Tensor,
    positive_ids: ops.Tensor,
    negative_ids: ops.Tensor,
    positive_log_q: ops.Tensor,
    negative_log_q: ops.Tensor,
) -> ops.Tensor:
    """Cross-entropy of the positive against itself and shared negatives, with logQ correction.

    `loss = −s⁺ + log(exp s⁺ + Σⱼ exp sⱼ)` with `s = q · v − log(expected count in the sample)`; a negative that is
    the row's own positive (an accidental hit) is left out. Bengio & Senécal 2008; Yi et al., RecSys 2019, eq. 3.

    Written in TensorFlow: its gradient keeps one matrix of the size `[batch, sample]` instead of six.

    Args:
        query: `[batch, dim]`.
        positives: item vectors `[batch, dim]`.
        negatives: item vectors `[sample, dim]`, shared by the batch.
        positive_ids: `[batch]`.
        negative_ids: `[sample]`.
        positive_log_q: log of the positive's expected count in the sample, `[batch]`; 0 for no correction.
        negative_log_q: likewise, `[sample]`.

    Returns:
        The loss of each row, `[batch]`.
    """
    return _log_one_plus_sum_exp(
        *_against(query, positives, negatives, positive_ids, negative_ids, positive_log_q, negative_log_q)
    )


def mean_softmax(query: ops.Tensor, items: ops.Tensor, places: ops.Tensor, cells: int = CELLS) -> ops.Tensor:
    """The mean of `softmax`, `[]`, of whose logits no more than `cells` are held at once."""
    items, places = tf.convert_to_tensor(items), tf.convert_to_tensor(places)
    count = tf.shape(items)[0]
    ids = tf.range(count, dtype=places.dtype)
    return mean_sampled_softmax(
        query, tf.gather(items, places), items, places, ids, tf.zeros(tf.shape(places)), tf.zeros([count]), cells
    )


def mean_sampled_softmax(
    query: ops.Tensor,
    positives: ops.Tensor,
    negatives: ops.Tensor,
    positive_ids: ops.Tensor,
    negative_ids: ops.Tensor,
    positive_log_q: ops.Tensor,
    negative_log_q: ops.Tensor,
    cells: int = CELLS,
) -> ops.Tensor:
    """The mean of `sampled_softmax`, `[]`, of whose logits no more than `cells` are held at once.

    What comes back to a mean is one number, by which gradients are multiplied last: so each chunk of rows gives its
    part of them as soon as its logits are there, and nothing of it is kept or computed again.
    """
    rows, columns, excluded = _against(
        query, positives, negatives, positive_ids, negative_ids, positive_log_q, negative_log_q
    )
    return _mean_log_one_plus_sum_exp(rows, columns, excluded, tf.maximum(cells // tf.shape(columns)[0], _ROWS))


def _against(
    query: ops.Tensor,
    positives: ops.Tensor,
    negatives: ops.Tensor,
    positive_ids: ops.Tensor,
    negative_ids: ops.Tensor,
    positive_log_q: ops.Tensor,
    negative_log_q: ops.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Rows and columns whose products are `sⱼ − s⁺`, and the pairs of them that are accidental hits."""
    query, negatives = tf.convert_to_tensor(query), tf.convert_to_tensor(negatives)
    positive = tf.reduce_sum(query * positives, axis=-1) - positive_log_q
    # [q, 1, −s⁺] · [v, −log count, 1] = sⱼ − s⁺: the correction and the shift cost no pass over [batch, sample]
    rows = tf.concat([query, tf.ones_like(query[:, :1]), -positive[:, None]], axis=1)
    correction = -tf.convert_to_tensor(negative_log_q)[:, None]
    columns = tf.concat([negatives, correction, tf.ones_like(correction)], axis=1)
    return rows, columns, accidental_hits(positive_ids, negative_ids)


def distinct(ids: ops.Tensor) -> tuple[ops.Tensor, ops.Tensor]:
    """A sample with repetitions as a set: the ids that are in it, and the log of how often each is.

    As `n exp s = exp(s + log n)`, a softmax over the set is that over the sample if `log n` is taken off each log of an
    expected count. `[sample]` → `[distinct]`, `[distinct]`.
    """
    found, _, counts = tf.unique_with_counts(ids)
    return found, tf.math.log(tf.cast(counts, tf.float32))


def accidental_hits(positive_ids: ops.Tensor, negative_ids: ops.Tensor) -> ops.Tensor:
    """Where a negative is the row's own positive: pairs (row, place in the sample), int32 `[hits, 2]`."""
    positive_ids = tf.convert_to_tensor(positive_ids)
    negative_ids = tf.cast(negative_ids, positive_ids.dtype)
    order = tf.argsort(negative_ids)
    ascending = tf.gather(negative_ids, order)
    first = tf.searchsorted(ascending, positive_ids, side="left")
    counts = tf.searchsorted(ascending, positive_ids, side="right") - first
    rows = tf.repeat(tf.range(tf.size(counts)), counts)
    # the n-th pair of all is the (n − pairs of earlier rows)-th of its row
    places = tf.range(tf.size(rows)) + tf.repeat(first - tf.cumsum(counts, exclusive=True), counts)
    return tf.stack([rows, tf.gather(order, places)], axis=1)


@tf.custom_gradient
def _log_one_plus_sum_exp(rows: tf.Tensor, columns: tf.Tensor, excluded: tf.Tensor) -> tf.Tensor:
    """log(1 + Σⱼ exp(rowsᵦ · columnsⱼ)) of each row, `[batch]`; the last of `columns` is all ones."""
    losses, terms, sums, total = _parts(rows, columns, excluded)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, None]:
        weight = (upstream / total)[:, None]
        return weight * sums, tf.matmul(terms, weight * rows, transpose_a=True), None

    return losses, gradient


@tf.custom_gradient
def _mean_log_one_plus_sum_exp(
    rows: tf.Tensor, columns: tf.Tensor, excluded: tf.Tensor, at_once: tf.Tensor
) -> tf.Tensor:
    """The mean of `_log_one_plus_sum_exp`, `[]`, `at_once` rows after another."""
    count = tf.shape(rows)[0]
    chunks = -(-count // at_once)

    def of_chunk(
        chunk: tf.Tensor, loss: tf.Tensor, of_rows: tf.TensorArray, of_columns: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray, tf.Tensor]:
        start = chunk * at_once
        part = rows[start : start + at_once]
        first, last = tf.unstack(tf.searchsorted(excluded[:, 0], tf.stack([start, start + at_once])))
        losses, terms, sums, total = _parts(part, columns, excluded[first:last] - tf.stack([start, 0]))
        gradient = tf.matmul(terms, part / total[:, None], transpose_a=True)
        return (
            chunk + 1,
            loss + tf.reduce_sum(losses),
            of_rows.write(chunk, sums / total[:, None]),
            of_columns + gradient,
        )

    _, loss, of_rows, of_columns = tf.while_loop(
        lambda chunk, *_: chunk < chunks,
        of_chunk,
        (
            0,
            tf.zeros([], rows.dtype),
            tf.TensorArray(rows.dtype, chunks, infer_shape=False, element_shape=[None, rows.shape[1]]),
            tf.zeros_like(columns),
        ),
        parallel_iterations=1,  # more would hold more than a chunk
    )
    mean = 1.0 / tf.cast(count, rows.dtype)
    of_rows = of_rows.concat()

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, None, None]:
        return mean * upstream * of_rows, mean * upstream * of_columns, None, None

    return mean * loss, gradient


def _parts(
    rows: tf.Tensor, columns: tf.Tensor, excluded: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """The losses of rows, and what their gradients are made of: each term of the sums, `Σⱼ term columnsⱼ`, the sums."""

    def exponentials(shift: tf.Tensor | None) -> tf.Tensor:
        exponents = tf.matmul(rows, columns, transpose_b=True)
        if shift is not None:
            exponents = exponents - shift[:, None]
        return tf.tensor_scatter_nd_update(tf.exp(exponents), excluded, tf.zeros(tf.shape(excluded)[:1], rows.dtype))

    def shifted() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        exponents = tf.matmul(rows, columns, transpose_b=True)
        lowest = tf.fill(tf.shape(excluded)[:1], exponents.dtype.min)
        exponents = tf.tensor_scatter_nd_update(exponents, excluded, lowest)
        shift = tf.maximum(tf.reduce_max(exponents, axis=1), 0.0)
        terms = exponentials(shift)
        return terms, tf.matmul(terms, columns), shift

    terms = exponentials(None)
    sums = tf.matmul(terms, columns)  # Σⱼ exp(…) columnsⱼ: the gradient of the rows, and last the sum itself
    # a negative above its positive by more than a float holds is rare: only then is the largest looked for
    terms, sums, shift = tf.cond(
        tf.reduce_all(tf.math.is_finite(sums[:, -1])), lambda: (terms, sums, tf.zeros_like(sums[:, -1])), shifted
    )
    total = tf.exp(-shift) + sums[:, -1]
    # log1p keeps the digits of a loss near 0
    losses = tf.where(shift > 0.0, shift + tf.math.log(total), tf.math.log1p(sums[:, -1]))
    return losses, terms, sums, total


def in_batch_softmax(
    query: ops.Tensor, items: ops.Tensor, ids: ops.Tensor, log_q: ops.Tensor | None = None, first: Any = None
) -> ops.Tensor:
    """Cross-entropy of each row's positive against the other positives of the batch.

    The sampled softmax whose sample is the set of the batch's items: with the correction an item that the batch has
    n times counts once, as the probability is that of its being there at all. Yi et al., RecSys 2019, eq. 4–5.

    Args:
        query: `[rows, dim]`: the whole batch, or a part of it.
        items: the positives' vectors `[batch, dim]`.
        ids: those of the positives, `[batch]`.
        log_q: log of the probability that a batch has the item, `[batch]`; None for no correction, in which an item
            counts as often as it is there.
        first: where in the batch a part begins; None for the whole.

    Returns:
        The loss of each row, `[rows]`.
    """
    ids = tf.convert_to_tensor(ids)
    if log_q is None:
        own = of_sample = tf.zeros(tf.shape(ids))
    else:
        _, place, counts = tf.unique_with_counts(ids)
        own, of_sample = log_q, log_q + tf.math.log(tf.cast(tf.gather(counts, place), tf.float32))
    positives, positive_ids = items, ids
    if first is not None:
        part = slice(first, first + tf.shape(query)[0])
        positives, positive_ids, own = items[part], ids[part], own[part]
    return sampled_softmax(query, positives, items, positive_ids, ids, own, of_sample)


def nce(
    query: ops.Tensor,
    positives: ops.Tensor,
    negatives: ops.Tensor,
    positive_log_q: ops.Tensor,
    negative_log_q: ops.Tensor,
) -> ops.Tensor:
    """Noise-contrastive estimation: the logistic loss of telling the positive from shared noise.

    `loss = −log σ(s⁺) − Σⱼ log σ(−sⱼ)` with `s = q · v − log(k q(item))`, k draws of the noise: at its minimum
    `exp(q · v)` is the probability of the item, normalised. Noise that is the row's own positive stays in: it is noise
    by its origin. Gutmann & Hyvärinen, AISTATS 2010, eq. 3–5; Mnih & Teh, ICML 2012. Without the correction it is the
    negative sampling of word2vec.

    Args:
        query: `[batch, dim]`.
        positives: item vectors `[batch, dim]`.
        negatives: item vectors `[sample, dim]`, shared by the batch.
        positive_log_q: log of the positive's expected count in the noise less the log of what `exp(q · v)` is a
            multiple of the probability by, `[batch]`; 0 for no correction.
        negative_log_q: likewise, `[sample]`.

    Returns:
        The loss of each row, `[batch]`.
    """
    positive = ops.sum(query * positives, axis=-1) - positive_log_q
    negative = ops.matmul(query, ops.transpose(negatives)) - negative_log_q[None, :]
    return ops.softplus(-positive) + ops.sum(ops.softplus(negative), axis=1)


def resample(
    query: ops.Tensor,
    negatives: ops.Tensor,
    positive_ids: ops.Tensor,
    negative_ids: ops.Tensor,
    negative_log_q: ops.Tensor,
    noise: ops.Tensor,
    count: int,
    temperature: float,
) -> tuple[ops.Tensor, ops.Tensor]:
    """The second pass of TAPAS: keeps those of a sample that the batch, as the model is now, ranks high.

    `rⱼ = 1/batch Σᵦ softmaxⱼ(sᵦⱼ / T)`, over the corrected logits of the sample without the rows' accidental hits. The
    `count` largest of `φⱼ = log rⱼ + noiseⱼ` are kept: draws without replacement (Gumbel-top-k). With κ the largest
    `φ` that is not kept, j is among the kept with probability `πⱼ = 1 − exp(−exp(log rⱼ − κ))`, and the sum of
    `xⱼ / πⱼ` over the kept is an unbiased estimate of that of x over the sample (Kool, van Hoof & Welling, ICML 2019,
    section 4): adding `log πⱼ` to the log of the expected count makes the second pass as fair as the first.
    All kept: π = 1. Bai, Goldman & Zhang 2017, arXiv 1707.03073, who keep the largest and do not correct for it.

    Args:
        query: `[batch, dim]`.
        negatives: item vectors `[sample, dim]`.
        positive_ids: `[batch]`.
        negative_ids: `[sample]`.
        negative_log_q: log of the expected count in the sample, `[sample]`; 0 for no correction.
        noise: standard Gumbel, `[sample]`.
        count: how many are kept, at most the size of the sample.
        temperature: T; the lower, the more are those kept that the batch ranks highest.

    Returns:
        The places in the sample of those kept, int32 `[count]`, and their `log π`, `[count]`. No gradient flows.
    """
    logits = ops.matmul(query, ops.transpose(negatives)) - negative_log_q[None, :]
    hit = ops.equal(negative_ids[None, :], positive_ids[:, None])
    shares = ops.log_softmax(ops.where(hit, _EXCLUDED, logits) / temperature, axis=1)
    log_share = ops.stop_gradient(ops.logsumexp(shares, axis=0)) - ops.log(ops.cast(ops.shape(query)[0], "float32"))
    perturbed = log_share + noise
    size = noise.shape[0]
    if count == size:
        return ops.arange(size, dtype="int32"), ops.zeros((size,))
    highest, places = ops.top_k(perturbed, count + 1)
    odds = ops.take(log_share, places[:-1]) - highest[-1]
    # 1 − exp(−x) is x for small x, whose exponential may be 0
    log_kept = ops.where(odds < -15.0, odds, ops.log(-ops.expm1(-ops.exp(ops.maximum(odds, -15.0)))))
    return ops.cast(places[:-1], "int32"), log_kept
