"""What a recall model is trained for: a loss with its sampler, chosen by name, for any pair of towers.

| loss | is | reads of a config |
|---|---|---|
| `softmax` | the softmax over all known items | |
| `sampled_softmax` | that over the positive and negatives the batch shares | sampler, `sample`, `log_q` |
| `in_batch` | that over the positives of the batch, by estimated frequencies | `log_q`, `decay` |
| `nce` | noise-contrastive estimation | sampler, `sample`, `log_q` |
| `binary` | binary cross-entropy, each row with negatives of its own | sampler, `negatives` |
| `tapas` | sampled softmax, of negatives the batch ranks high | sampler, `sample`, `log_q`, `resample`, `temperature` |
| `sagram` | all pairs, items as the sampler draws them, by the last vectors | sampler, `sample`, `gravity` |
| `sogram` | the same by moving averages | sampler, `sample`, `gravity`, `decay` |
| `bpr` | the positive above each negative | sampler, `sample` |
| `top1_max` | the positive above the highest negatives, and these near 0 | sampler, `sample` |
| `bpr_max` | likewise | sampler, `sample`, `regularization` |
| `hinge` | the positive above each negative by a margin | sampler, `sample`, `margin` |

`sampled_softmax` is `softmax` if `sample` is all items or more. Samplers are `uniform`, `unigram` (which reads `power`)
and `log_uniform`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops, random

from penstock import backends, distribution
from penstock.examples import FIRST, PADDING
from penstock.losses import ranking, sampled
from penstock.losses.gramian import AverageGramian, OnlineGramian, gravity, quadratic
from penstock.retrieval import RecallConfig
from penstock.samplers import LogUniform, Sampler, StreamingFrequency, Uniform, Unigram, checked_decay

ItemTower = Callable[[Any], Any]


class Objective(keras.layers.Layer):
    """A loss of queries and their positives, with what it needs to remember from batch to batch."""

    def build(self, input_shape: Any) -> None:
        """Makes what is remembered that is as wide as a query; `input_shape` is that of the queries, `[batch, dim]`."""
        self.built = True

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        """The mean over the batch, `[]`.

        Args:
            queries: `[batch, dim]`.
            positives: item indices `[batch]`.
            item_tower: item indices `[…]` → vectors `[…, dim]`.
            rows: which of the training examples these are, int32 `[batch]`, each once an epoch.
            counts: which rows count, as `penstock.losses.sampled.mean` takes them.
        """
        raise NotImplementedError


class Softmax(Objective):
    """The softmax over all known items."""

    def __init__(self, known: int) -> None:
        super().__init__()
        self._known = known

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        items = item_tower(ops.arange(FIRST, FIRST + self._known, dtype="int32"))
        return sampled.mean_softmax(queries, items, positives - FIRST, counts=counts)


def _vectors(item_tower: ItemTower, positives: Any, others: Any) -> tuple[Any, Any]:
    """The vectors of two lists of indices, from one call of the tower."""
    return backends.parted(item_tower(ops.concatenate([positives, others])), positives, others)


class _Drawn(Objective):
    """What losses with shared negatives have in common.

    Raises:
        ValueError: a sample of less than 1.
    """

    def __init__(self, sampler: Sampler, sample: int, log_q: bool = True) -> None:
        super().__init__()
        if sample < 1:
            raise ValueError(f"sample is how many negatives are drawn, at least 1, not {sample}")
        self.sampler = sampler
        self._sample = sample
        self._log_q = log_q

    def _log_count(self, indices: Any) -> Any:
        """log of the expected count of each index in the sample; 0 without correction."""
        if not self._log_q:
            return ops.zeros(ops.shape(indices))
        return self.sampler.log_probability(indices) + float(np.log(self._sample))


class SampledSoftmax(_Drawn):
    """Softmax over the positive and negatives that the batch shares, corrected for how likely each was drawn."""

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        negatives, log_times = sampled.distinct(self.sampler.draw(self._sample))
        of_positives, of_negatives = _vectors(item_tower, positives, negatives)
        return sampled.mean_sampled_softmax(
            queries,
            of_positives,
            of_negatives,
            positives,
            negatives,
            self._log_count(positives),
            self._log_count(negatives) - log_times,
            counts=counts,
        )


class InBatch(Objective):
    """Softmax over the positives of the batch, corrected by how often batches have each."""

    def __init__(self, frequency: StreamingFrequency, log_q: bool = True) -> None:
        super().__init__()
        self.frequency = frequency
        self._log_q = log_q

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        batch, log_q = distribution.gathered(positives), None
        if self._log_q:
            # what does not count is noted as padding, which nobody asks for
            self.frequency.update(batch if counts is None else ops.where(counts > 0, batch, PADDING))
            log_q = self.frequency.log_probability(batch)
        first = distribution.place() * ops.shape(positives)[0] if distribution.replicas() > 1 else None
        losses = sampled.in_batch_softmax(queries, item_tower(batch), batch, log_q, first, counts)
        return sampled.mean(losses, counts)


class NCE(_Drawn):
    """Noise-contrastive estimation of `P(item | query) = exp(q · v + c)`.

    c is learned with the rest (Gutmann & Hyvärinen 2010, eq. 1). It starts at −log n, where vectors near 0 are
    normalised; from 0 the first steps would go into pushing n items down. Without correction there is no c.
    """

    def __init__(self, sampler: Sampler, sample: int, log_q: bool, known: int) -> None:
        super().__init__(sampler, sample, log_q)
        if log_q:
            start = keras.initializers.Constant(-float(np.log(known)))
            self.log_normaliser = self.add_weight(shape=(), initializer=start, name="log_normaliser")

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        negatives = self.sampler.draw(self._sample)
        of_positives, of_negatives = _vectors(item_tower, positives, negatives)
        normaliser = ops.convert_to_tensor(self.log_normaliser) if self._log_q else 0.0
        losses = sampled.nce(
            queries,
            of_positives,
            of_negatives,
            self._log_count(positives) - normaliser,
            self._log_count(negatives) - normaliser,
        )
        return sampled.mean(losses, counts)


class Binary(Objective):
    """Binary cross-entropy of the positive and of negatives that each row draws for itself.

    Raises:
        ValueError: no negative.
    """

    def __init__(self, sampler: Sampler, negatives: int) -> None:
        super().__init__()
        if negatives < 1:
            raise ValueError(f"negatives is how many a row draws, at least 1, not {negatives}")
        self.sampler = sampler
        self._negatives = negatives

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        shape = (-1, self._negatives)
        drawn = ops.reshape(self.sampler.draw(ops.shape(positives)[0] * self._negatives), shape)
        of_positives, of_drawn = _vectors(item_tower, positives, ops.reshape(drawn, (-1,)))
        others = ops.cast(ops.not_equal(drawn, positives[:, None]), queries.dtype)
        of_drawn = ops.reshape(of_drawn, (*shape, of_drawn.shape[-1]))
        return sampled.mean(sampled.binary(queries, of_positives, of_drawn, others), counts)


class Tapas(_Drawn):
    """Two-pass sampled softmax: of the sample those are kept that the batch, as the model is now, ranks high.

    Raises:
        ValueError: fewer than 1 or more than the sample are kept, or a temperature that is not above 0.
    """

    def __init__(
        self, sampler: Sampler, sample: int, log_q: bool, resample: int, temperature: float, seed: int
    ) -> None:
        super().__init__(sampler, sample, log_q)
        if not 1 <= resample <= sample:
            raise ValueError(f"resample is how many of sample = {sample} are kept, 1 to {sample}, not {resample}")
        if not temperature > 0.0:
            raise ValueError(f"temperature divides logits: it is above 0, not {temperature}")
        self._resample = resample
        self._temperature = temperature
        self._seeds = random.SeedGenerator(seed)

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        negatives = self.sampler.draw(self._sample)
        of_positives, of_negatives = _vectors(item_tower, positives, negatives)
        log_count = self._log_count(negatives)
        places, log_kept = sampled.resample(
            queries,
            of_negatives,
            positives,
            negatives,
            log_count,
            self._gumbel(),
            self._resample,
            self._temperature,
            counts,
        )
        losses = sampled.sampled_softmax(
            queries,
            of_positives,
            ops.take(of_negatives, places, axis=0),
            positives,
            ops.take(negatives, places),
            self._log_count(positives),
            ops.take(log_count, places) + (log_kept if self._log_q else 0.0),
        )
        return sampled.mean(losses, counts)

    def _gumbel(self) -> Any:
        uniform = random.uniform((self._sample,), minval=1e-20, seed=self._seeds)
        return -ops.log(-ops.log(uniform))


class _AllPairs(_Drawn):
    """The quadratic loss of the positives, and the gravity of all pairs of query and item by estimated Gramians.

    An item weighs in all pairs as the sampler draws it: alike, or more the more frequent it is.

    Args:
        strength: λ, the weight of the gravity.

    Raises:
        ValueError: a strength below 0.
    """

    def __init__(self, sampler: Sampler, sample: int, strength: float) -> None:
        super().__init__(sampler, sample)
        if not strength >= 0.0:
            raise ValueError(f"gravity is a weight, at least 0, not {strength}")
        self._strength = strength

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        drawn = self.sampler.draw(self._sample)
        of_positives, of_drawn = _vectors(item_tower, positives, drawn)
        of_queries, of_items = self.gramians(queries, rows, drawn, of_drawn, counts)
        pull = gravity(queries, of_drawn, of_queries, of_items, counts)
        return sampled.mean(quadratic(queries, of_positives), counts) + self._strength * pull

    def gramians(self, queries: Any, rows: Any, drawn: Any, of_drawn: Any, counts: Any) -> tuple[Any, Any]:
        """The estimates of queries and items with a batch taken in, `[dim, dim]` each."""
        raise NotImplementedError


class SOGram(_AllPairs):
    """All pairs by moving averages of the Gramians.

    Raises:
        ValueError: a decay outside (0, 1].
    """

    def __init__(self, sampler: Sampler, sample: int, strength: float, decay: float) -> None:
        super().__init__(sampler, sample, strength)
        self._decay = checked_decay(decay)

    def build(self, input_shape: Any) -> None:
        self.of_queries = OnlineGramian(input_shape[-1], self._decay)
        self.of_items = OnlineGramian(input_shape[-1], self._decay)

    def gramians(self, queries: Any, rows: Any, drawn: Any, of_drawn: Any, counts: Any) -> tuple[Any, Any]:
        return self.of_queries.update(queries, counts), self.of_items.update(of_drawn)


class SAGram(_AllPairs):
    """All pairs by Gramians of the last vector of each training example and of each item.

    Args:
        counts: how often each index occurs as a positive, `[size]`: their sum is the number of training examples.
    """

    def __init__(self, sampler: Sampler, sample: int, strength: float, counts: np.ndarray) -> None:
        super().__init__(sampler, sample, strength)
        self._examples = int(np.sum(counts))
        self._items = np.exp(np.asarray(sampler.log_probability(np.arange(len(counts)))))

    def build(self, input_shape: Any) -> None:
        self.of_queries = AverageGramian(np.full(self._examples, 1.0 / max(self._examples, 1)), input_shape[-1])
        self.of_items = AverageGramian(self._items, input_shape[-1])

    def gramians(self, queries: Any, rows: Any, drawn: Any, of_drawn: Any, counts: Any) -> tuple[Any, Any]:
        if rows is None:
            raise ValueError("sagram remembers each example: it has to be told which of them the rows are")
        return self.of_queries.update(rows, queries), self.of_items.update(drawn, of_drawn)


class Ranking(_Drawn):
    """The positive above negatives that the batch shares.

    Args:
        of: a loss of `penstock.losses.ranking`, of positives, negatives and which of them count.
    """

    def __init__(self, sampler: Sampler, sample: int, of: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__(sampler, sample)
        self._of = of

    def loss(self, queries: Any, positives: Any, item_tower: ItemTower, rows: Any = None, counts: Any = None) -> Any:
        drawn = self.sampler.draw(self._sample)
        of_positives, of_drawn = _vectors(item_tower, positives, drawn)
        others = ops.cast(ops.not_equal(drawn[None, :], positives[:, None]), queries.dtype)
        scores = ops.sum(queries * of_positives, axis=-1), ops.matmul(queries, ops.transpose(of_drawn))
        return sampled.mean(self._of(*scores, others), counts)


SAMPLERS: dict[str, Callable[[RecallConfig, np.ndarray, int], Sampler]] = {
    "uniform": lambda config, counts, seed: Uniform(counts, seed),
    "unigram": lambda config, counts, seed: Unigram(counts, config.power, seed),
    "log_uniform": lambda config, counts, seed: LogUniform(counts, seed),
}


def _sampled_softmax(config: RecallConfig, sampler: Sampler, counts: np.ndarray, seed: int) -> Objective:
    """Its limiting case where there is nothing to sample: as many draws as items cost no less than the items."""
    known = len(counts) - FIRST
    if config.log_q and config.sample >= known:
        return Softmax(known)
    return SampledSoftmax(sampler, config.sample, config.log_q)


LOSSES: dict[str, Callable[[RecallConfig, Sampler, np.ndarray, int], Objective]] = {
    "softmax": lambda config, sampler, counts, seed: Softmax(len(counts) - FIRST),
    "sampled_softmax": _sampled_softmax,
    "in_batch": lambda config, sampler, counts, seed: InBatch(
        StreamingFrequency(counts, config.batch_size, config.decay), config.log_q
    ),
    "nce": lambda config, sampler, counts, seed: NCE(sampler, config.sample, config.log_q, len(counts) - FIRST),
    "binary": lambda config, sampler, counts, seed: Binary(sampler, config.negatives),
    "tapas": lambda config, sampler, counts, seed: Tapas(
        sampler, config.sample, config.log_q, config.resample, config.temperature, seed + 1
    ),
    "sagram": lambda config, sampler, counts, seed: SAGram(sampler, config.sample, config.gravity, counts),
    "sogram": lambda config, sampler, counts, seed: SOGram(sampler, config.sample, config.gravity, config.decay),
    "bpr": lambda config, sampler, counts, seed: Ranking(sampler, config.sample, ranking.bpr),
    "top1_max": lambda config, sampler, counts, seed: Ranking(sampler, config.sample, ranking.top1_max),
    "bpr_max": lambda config, sampler, counts, seed: Ranking(
        sampler, config.sample, partial(ranking.bpr_max, regularization=config.regularization)
    ),
    "hinge": lambda config, sampler, counts, seed: Ranking(
        sampler, config.sample, partial(ranking.hinge, margin=config.margin)
    ),
}


def build(config: RecallConfig, counts: np.ndarray, seed: int) -> Objective:
    """The objective that a config names.

    Args:
        counts: how often each item index is a positive in training, `[known items + 2]`.

    Raises:
        ValueError: an unknown loss or sampler, a parameter out of range, or no known item.
    """
    for kind, name, known in (("loss", config.loss, LOSSES), ("sampler", config.sampler, SAMPLERS)):
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: there are {', '.join(sorted(known))}")
    sampler = SAMPLERS[config.sampler](config, counts, seed)
    return LOSSES[config.loss](config, sampler, counts, seed)
