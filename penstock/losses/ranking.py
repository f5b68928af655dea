"""Losses that want the positive above shared negatives, whatever the scores are.

Throughout, positives are scores `[batch]`, negatives scores `[batch, sample]`, and `counts` says of each negative
whether it is one of the row: 1, or 0 where it is the row's own positive (an accidental hit). A row without any has no
loss.
"""

from __future__ import annotations

from typing import Any

from keras import ops


def bpr(positives: Any, negatives: Any, counts: Any) -> Any:
    """`−1/N Σⱼ log σ(s⁺ − sⱼ)`, `[batch]` (Rendle et al., UAI 2009; as in Hidasi et al., ICLR 2016, section 3.1.3)."""
    return _mean(ops.softplus(negatives - positives[:, None]), counts)


def bpr_max(positives: Any, negatives: Any, counts: Any, regularization: float) -> Any:
    """`−log Σⱼ aⱼ σ(s⁺ − sⱼ) + λ Σⱼ aⱼ sⱼ²`, a the softmax of the negatives, `[batch]`.

    A negative far below the positive has no gradient and, by its weight, no say either: more negatives do not make the
    gradient vanish, as they do that of `bpr`. Hidasi & Karatzoglou, CIKM 2018, eq. 11.
    """
    log_weights = _log_weights(negatives, counts)
    ranked = ops.logsumexp(log_weights - ops.softplus(negatives - positives[:, None]), axis=1)
    held = ops.sum(ops.exp(log_weights) * ops.square(negatives), axis=1)
    return ops.where(ops.any(counts > 0, axis=1), regularization * held - ranked, 0.0)


def top1_max(positives: Any, negatives: Any, counts: Any) -> Any:
    """`Σⱼ aⱼ (σ(sⱼ − s⁺) + σ(sⱼ²))`, a the softmax of the negatives, `[batch]` (Hidasi & Karatzoglou 2018, eq. 7).

    The second term holds the scores of negatives near 0.
    """
    terms = ops.sigmoid(negatives - positives[:, None]) + ops.sigmoid(ops.square(negatives))
    return ops.sum(ops.exp(_log_weights(negatives, counts)) * terms * counts, axis=1)


def hinge(positives: Any, negatives: Any, counts: Any, margin: float) -> Any:
    """`1/N Σⱼ max(0, γ + sⱼ − s⁺)`, `[batch]` (Zhang et al. 2018, arXiv 1808.06414, eq. 11, of distances −s)."""
    return _mean(ops.relu(margin + negatives - positives[:, None]), counts)


def _mean(losses: Any, counts: Any) -> Any:
    return ops.sum(losses * counts, axis=1) / ops.maximum(ops.sum(counts, axis=1), 1.0)


def _log_weights(negatives: Any, counts: Any) -> Any:
    """The logs of the softmax over what counts; of the rest −1e9."""
    return ops.log_softmax(ops.where(counts > 0, negatives, -1e9), axis=1)
