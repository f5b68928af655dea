"""Losses that stand in for the softmax over all items, on a sample of them."""

from __future__ import annotations

from keras import ops

_EXCLUDED = -1e9


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
    positive = ops.sum(query * positives, axis=-1) - positive_log_q
    negative = ops.matmul(query, ops.transpose(negatives)) - negative_log_q[None, :]
    hit = ops.equal(negative_ids[None, :], positive_ids[:, None])
    negative = ops.where(hit, _EXCLUDED, negative)
    logits = ops.concatenate([positive[:, None], negative], axis=1)
    return ops.logsumexp(logits, axis=1) - positive
