"""The softmax over all items, and what stands in for it on a sample of them."""

from __future__ import annotations

from typing import Any

from keras import ops

from penstock import backends

_EXCLUDED = -1e9

CELLS = 2**23
"""So many logits are held at once, or those of 64 rows where these are more."""


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
    return sampled_softmax(query, *_all_items(items, places))


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
    rows, columns = _against(query, positives, negatives, positive_log_q, negative_log_q)
    return backends.log_one_plus_sum_exp(rows, columns, positive_ids, negative_ids)


def mean_softmax(
    query: ops.Tensor, items: ops.Tensor, places: ops.Tensor, cells: int = CELLS, counts: Any = None
) -> ops.Tensor:
    """The mean of `softmax`, `[]`; cells and counts as for `mean_sampled_softmax`."""
    return mean_sampled_softmax(query, *_all_items(items, places), cells, counts)


def _all_items(items: ops.Tensor, places: ops.Tensor) -> tuple[Any, Any, Any, Any, Any, Any]:
    """What `sampled_softmax` takes of positives that stand among all items, each drawn once."""
    items, places = ops.convert_to_tensor(items), ops.convert_to_tensor(places)
    count = ops.shape(items)[0]
    ids = ops.arange(count, dtype=places.dtype)
    return ops.take(items, places, axis=0), items, places, ids, ops.zeros(ops.shape(places)), ops.zeros((count,))


def mean_sampled_softmax(
    query: ops.Tensor,
    positives: ops.Tensor,
    negatives: ops.Tensor,
    positive_ids: ops.Tensor,
    negative_ids: ops.Tensor,
    positive_log_q: ops.Tensor,
    negative_log_q: ops.Tensor,
    cells: int = CELLS,
    counts: Any = None,
) -> ops.Tensor:
    """The mean of `sampled_softmax`, `[]`, of whose logits no more than `cells` are held at once.

    Args:
        counts: which rows count, as `mean` takes them.
    """
    rows, columns = _against(query, positives, negatives, positive_log_q, negative_log_q)
    return backends.mean_log_one_plus_sum_exp(rows, columns, positive_ids, negative_ids, cells, counts)


def mean(losses: ops.Tensor, counts: Any = None) -> ops.Tensor:
    """The mean of rows, `[batch]` → `[]`.

    Args:
        counts: of each row 1 or 0, `[batch]`: 0 for one that stands there because shapes are fixed. None: all count.
    """
    return ops.mean(losses) if counts is None else ops.sum(losses * counts) / ops.maximum(ops.sum(counts), 1.0)


def _against(
    query: ops.Tensor,
    positives: ops.Tensor,
    negatives: ops.Tensor,
    positive_log_q: ops.Tensor,
    negative_log_q: ops.Tensor,
) -> tuple[ops.Tensor, ops.Tensor]:
    """Rows and columns whose products are `sⱼ − s⁺`."""
    query, negatives = ops.convert_to_tensor(query), ops.convert_to_tensor(negatives)
    positive = ops.sum(query * positives, axis=-1) - positive_log_q
    # [q, 1, −s⁺] · [v, −log count, 1] = sⱼ − s⁺: the correction and the shift cost no pass over [batch, sample]
    rows = ops.concatenate([query, ops.ones_like(query[:, :1]), -positive[:, None]], axis=1)
    correction = -ops.convert_to_tensor(negative_log_q)[:, None]
    return rows, ops.concatenate([negatives, correction, ops.ones_like(correction)], axis=1)


def distinct(ids: ops.Tensor) -> tuple[ops.Tensor, ops.Tensor]:
    """A sample with repetitions as a set: the ids that are in it, and the log of how often each is.

    As `n exp s = exp(s + log n)`, a softmax over the set is that over the sample if `log n` is taken off each log of an
    expected count. `[sample]` → `[distinct]`, `[distinct]`. Where shapes are fixed it is the sample.
    """
    return backends.distinct(ids)


def in_batch_softmax(
    query: ops.Tensor,
    items: ops.Tensor,
    ids: ops.Tensor,
    log_q: ops.Tensor | None = None,
    first: Any = None,
    counts: Any = None,
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
        counts: which rows of the batch count, as `mean` takes them; the others are nobody's negatives.

    Returns:
        The loss of each row, `[rows]`.
    """
    ids = ops.convert_to_tensor(ids)
    if log_q is None:
        own = of_sample = ops.zeros(ops.shape(ids))
    else:
        own, of_sample = log_q, log_q + backends.log_frequency(ids, counts)
    if counts is not None:
        of_sample = ops.where(counts > 0, of_sample, -_EXCLUDED)
    positives, positive_ids = items, ids
    if first is not None:
        part = slice(first, first + ops.shape(query)[0])
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


def binary(query: ops.Tensor, positives: ops.Tensor, negatives: ops.Tensor, others: ops.Tensor) -> ops.Tensor:
    """Binary cross-entropy of each row's positive and of negatives that are its own.

    `loss = −log σ(s⁺) − Σⱼ log(1 − σ(sⱼ))` with `s = q · v` (Kang & McAuley, ICDM 2018, eq. 6, with one negative).

    Args:
        query: `[batch, dim]`.
        positives: item vectors `[batch, dim]`.
        negatives: item vectors `[batch, negatives, dim]`.
        others: 1 for a negative that is another item than the positive, else 0, `[batch, negatives]`.

    Returns:
        The loss of each row, `[batch]`.
    """
    positive = ops.sum(query * positives, axis=-1)
    negative = ops.sum(query[:, None] * negatives, axis=-1)
    return ops.softplus(-positive) + ops.sum(others * ops.softplus(negative), axis=1)


def resample(
    query: ops.Tensor,
    negatives: ops.Tensor,
    positive_ids: ops.Tensor,
    negative_ids: ops.Tensor,
    negative_log_q: ops.Tensor,
    noise: ops.Tensor,
    count: int,
    temperature: float,
    counts: Any = None,
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
        counts: which rows count, as `mean` takes them.

    Returns:
        The places in the sample of those kept, int32 `[count]`, and their `log π`, `[count]`. No gradient flows.
    """
    logits = ops.matmul(query, ops.transpose(negatives)) - negative_log_q[None, :]
    hit = ops.equal(negative_ids[None, :], positive_ids[:, None])
    shares = ops.log_softmax(ops.where(hit, _EXCLUDED, logits) / temperature, axis=1)
    batch = ops.cast(ops.shape(query)[0], "float32")
    if counts is not None:
        shares, batch = ops.where(counts[:, None] > 0, shares, _EXCLUDED), ops.maximum(ops.sum(counts), 1.0)
    log_share = ops.stop_gradient(ops.logsumexp(shares, axis=0)) - ops.log(batch)
    perturbed = log_share + noise
    size = noise.shape[0]
    if count == size:
        return ops.arange(size, dtype="int32"), ops.zeros((size,))
    highest, places = ops.top_k(perturbed, count + 1)
    odds = ops.take(log_share, places[:-1]) - highest[-1]
    # 1 − exp(−x) is x for small x, whose exponential may be 0
    log_kept = ops.where(odds < -15.0, odds, ops.log(-ops.expm1(-ops.exp(ops.maximum(odds, -15.0)))))
    return ops.cast(places[:-1], "int32"), log_kept
