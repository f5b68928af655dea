"""Distributions over item indices: negatives drawn inside the training graph, and how often batches have an item.

Padding and unknown (indices 0 and 1) are never drawn.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops, random

from penstock import backends
from penstock.examples import FIRST

_NEVER = -690.0
"""log q of an index that is never drawn: finite, so that a loss that looks at one stays a number."""


class Sampler(keras.layers.Layer):
    """Draws item indices with replacement.

    Args:
        log_probabilities: of the items from index 2, `[known items]`; they sum to 1.

    Raises:
        ValueError: there is no item.
    """

    def __init__(self, log_probabilities: np.ndarray, seed: int) -> None:
        super().__init__()
        if not len(log_probabilities):
            raise ValueError("the vocabulary is empty: there is nothing to sample")
        self._known = len(log_probabilities)
        # made once, outside the graphs that read it: none of them holds a copy
        self._log_probabilities = _tensor(np.concatenate([np.full(FIRST, _NEVER), log_probabilities]))
        self._seeds = random.SeedGenerator(seed)

    def draw(self, count: Any) -> ops.Tensor:
        """`count` indices, int32 `[count]`; in a graph it may be a number that is known when it runs."""
        raise NotImplementedError

    def log_probability(self, indices: ops.Tensor) -> ops.Tensor:
        """log q of each index, float32 of the same shape."""
        return ops.take(self._log_probabilities, indices, axis=0)


class Uniform(Sampler):
    """Draws every known item alike: `q = 1/n`.

    Args:
        counts: how often each index occurs as a positive, `[size]`; only its length matters.
    """

    def __init__(self, counts: np.ndarray, seed: int) -> None:
        known = max(len(counts) - FIRST, 0)
        super().__init__(np.full(known, -np.log(max(known, 1))), seed)

    def draw(self, count: Any) -> ops.Tensor:
        return random.randint((count,), FIRST, FIRST + self._known, seed=self._seeds)


class Unigram(Sampler):
    """Draws item i with probability ∝ (count_i + 1)^power, one look-up a draw (the alias method).

    Power 0 is uniform, 0.75 the choice of word2vec (Mikolov et al. 2013, arXiv 1310.4546, section 2.2).

    Args:
        counts: how often each index occurs as a positive, `[size]`.
    """

    def __init__(self, counts: np.ndarray, power: float, seed: int) -> None:
        weights = (np.asarray(counts, np.float64)[FIRST:] + 1.0) ** power
        probabilities = weights / np.maximum(weights.sum(), 1e-300)
        super().__init__(np.log(probabilities), seed)
        keep, alias = alias_table(probabilities)
        self._keep, self._alias = _tensor(keep), ops.convert_to_tensor(alias)

    def draw(self, count: Any) -> ops.Tensor:
        column = random.randint((count,), 0, self._known, seed=self._seeds)
        stays = random.uniform((count,), seed=self._seeds) < ops.take(self._keep, column)
        return FIRST + ops.where(stays, column, ops.take(self._alias, column))


class LogUniform(Sampler):
    """Draws the item of rank r by count, 0 the most frequent, with `P(r) = log((r + 2) / (r + 1)) / log(n + 1)`.

    Zipf's law about, by inversion: `r = ⌊(n + 1)^u⌋ − 1` for u uniform in [0, 1).

    Args:
        counts: how often each index occurs as a positive, `[size]`; of equals the lower index ranks first.
    """

    def __init__(self, counts: np.ndarray, seed: int) -> None:
        by_rank = np.argsort(-np.asarray(counts, np.float64)[FIRST:], kind="stable")
        known = len(by_rank)
        log_probabilities = np.empty(known)
        log_probabilities[by_rank] = np.log(np.log1p(1.0 / np.arange(1, known + 1)) / np.log(known + 1.0))
        super().__init__(log_probabilities, seed)
        self._by_rank = ops.convert_to_tensor(by_rank.astype(np.int32))

    def draw(self, count: Any) -> ops.Tensor:
        uniform = random.uniform((count,), seed=self._seeds)
        rank = ops.cast(ops.exp(uniform * float(np.log(self._known + 1.0))), "int32") - 1
        return FIRST + ops.take(self._by_rank, ops.clip(rank, 0, self._known - 1))


def alias_table(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The table of the alias method: `keep` in [0, 1] and `alias`, float64 and int32 `[n]`.

    A column c uniform in 0 … n − 1 stands for itself with probability `keep[c]`, else for `alias[c]`. Walker 1977; the
    sweep is Vose's (1991): the columns below 1/n are filled up one after another by those above, each of which goes on
    until it is itself below and is filled by the next. By the running sums of what is lacking and what is over all
    columns are done at once.
    """
    scaled = np.asarray(probabilities, np.float64) * len(probabilities)
    keep, alias = np.ones(len(scaled)), np.arange(len(scaled), dtype=np.int32)
    below, above = np.flatnonzero(scaled < 1.0), np.flatnonzero(scaled >= 1.0)
    if not len(below) or not len(above):
        return keep, alias
    lacking, over = np.cumsum(1.0 - scaled[below]), np.cumsum(scaled[above] - 1.0)
    before = np.concatenate([[0.0], lacking[:-1]])
    keep[below] = scaled[below]
    alias[below] = above[np.minimum(np.searchsorted(over, before, side="left"), len(above) - 1)]
    # the column that a large one could not fill whole: the large one then lacks what it gave too much
    last = np.searchsorted(lacking, over, side="right")
    passes_on = (last < len(below)) & (np.arange(len(above)) < len(above) - 1)  # the rest is rounding
    keep[above[passes_on]] = 1.0 - (lacking[last[passes_on]] - over[passes_on])
    alias[above[passes_on]] = above[np.flatnonzero(passes_on) + 1]
    return keep, alias


class StreamingFrequency(keras.layers.Layer):
    """Estimates the probability that a batch has an item, from the steps between the batches that had it.

    At step t, for each item of the batch: `B ← (1 − α) B + α (t − A)`, `A ← t`, and `p = 1 / B`. Yi et al., RecSys
    2019, Algorithm 2; an array of each index instead of hash tables, so that no two items collide. B starts at the
    gap that the counts let expect, `1 / (1 − (1 − count / Σ counts)^batch)`, of which the estimate of a stationary
    stream stays the mean (their equation 9).

    Args:
        counts: how often each index occurs as a positive, `[size]`.
        batch_size: rows of a batch.
        decay: α, the weight of the newest gap, in (0, 1].

    Raises:
        ValueError: a decay outside (0, 1].
    """

    def __init__(self, counts: np.ndarray, batch_size: int, decay: float) -> None:
        super().__init__()
        self._decay = checked_decay(decay)
        shares = np.maximum(counts, 1.0) / max(np.sum(counts), 1.0)
        gaps = -1.0 / np.expm1(batch_size * np.log1p(-np.minimum(shares, 1.0 - 1e-9)))
        self.step = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="step")
        self.last = self.add_weight(
            shape=(len(counts),), dtype="int32", initializer="zeros", trainable=False, name="last"
        )
        self.gap = self.add_weight(shape=(len(counts),), initializer="zeros", trainable=False, name="gap")
        self.gap.assign(gaps.astype(np.float32))

    def update(self, indices: ops.Tensor) -> None:
        """Takes in the items of one batch, int `[batch]`; how often each is in it makes no difference."""
        self.step.assign(self.step + 1)
        step = ops.convert_to_tensor(self.step)
        since = ops.cast(step - backends.rows(self.last, indices), "float32")
        gap = (1.0 - self._decay) * backends.rows(self.gap, indices) + self._decay * since
        backends.write_rows(self.gap, indices, gap)
        backends.write_rows(self.last, indices, ops.broadcast_to(step, ops.shape(indices)))

    def log_probability(self, indices: ops.Tensor) -> ops.Tensor:
        """log p of each index, float32 of the same shape."""
        return -ops.log(backends.rows(self.gap, indices))


def checked_decay(decay: float) -> float:
    """The weight of the newest value in a running estimate.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay is the weight of the newest value, above 0 and at most 1, not {decay}")
    return decay


def _tensor(values: np.ndarray) -> ops.Tensor:
    return ops.convert_to_tensor(values.astype(np.float32))
