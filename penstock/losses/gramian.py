"""The quadratic loss over all pairs of query and item, by Gramians that are estimated from batches.

`L = mean over positives of (1 − q · v)² + λ mean over all pairs of (q · v)²`. The second mean, the gravity, is the
inner product of two `[dim, dim]` matrices, `⟨G_q, G_v⟩` with `G_q = mean q qᵀ` and `G_v = Σᵢ pᵢ vᵢ vᵢᵀ`, so that no
pair is ever looked at. Krichene et al., ICLR 2019, arXiv 1807.07187.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from penstock import backends, distribution
from penstock.losses.sampled import mean
from penstock.samplers import checked_decay


def quadratic(query: ops.Tensor, positives: ops.Tensor) -> ops.Tensor:
    """`(1 − q · v)²` of each row, `[batch, dim]` twice → `[batch]`."""
    return ops.square(1.0 - ops.sum(query * positives, axis=-1))


def gramian(vectors: ops.Tensor, counts: Any = None) -> ops.Tensor:
    """`1/n Σ v vᵀ`, `[n, dim]` → `[dim, dim]`; of the rows that count, as `penstock.losses.sampled.mean` takes them."""
    if counts is None:
        return ops.matmul(ops.transpose(vectors), vectors) / ops.cast(ops.shape(vectors)[0], vectors.dtype)
    return ops.matmul(ops.transpose(vectors), counts[:, None] * vectors) / ops.maximum(ops.sum(counts), 1.0)


def gravity(
    query: ops.Tensor, items: ops.Tensor, query_gramian: ops.Tensor, item_gramian: ops.Tensor, counts: Any = None
) -> ops.Tensor:
    """An estimate of `⟨G_q, G_v⟩` and of its gradient, `[]`.

    Its gradient is that of `mean q · Ĝ_v q + mean v · Ĝ_q v`, the Gramians taken as constants, which is the gradient of
    `⟨G_q, G_v⟩` where the Gramians are exact (section 2.2); its value is half of that sum, as both means are the same
    quantity.

    Args:
        query: those of the batch, `[batch, dim]`.
        items: the vectors of items drawn as all pairs weigh them, `[sample, dim]`.
        query_gramian, item_gramian: the estimates, `[dim, dim]`.
        counts: which queries count, as `penstock.losses.sampled.mean` takes them.
    """
    of_queries = mean(ops.sum(ops.matmul(query, ops.stop_gradient(item_gramian)) * query, axis=-1), counts)
    of_items = ops.mean(ops.sum(ops.matmul(items, ops.stop_gradient(query_gramian)) * items, axis=-1))
    both = of_queries + of_items
    return both - ops.stop_gradient(both) / 2.0


class OnlineGramian(keras.layers.Layer):
    """SOGram's estimate: a moving average over batches, `Ĝ ← (1 − α) Ĝ + α/|B| Σ v vᵀ` (Algorithm 2).

    It starts at 0 and is divided by the weight that batches have in it so far, so that it is a mean from the first.
    Of frozen vectors its mean is the Gramian and its variance α / (2 − α) times that of one batch's; of moving ones it
    lags by about 1/α batches. α = 1 is the estimate of the batch alone.

    Args:
        dim: width of the vectors.
        decay: α, in (0, 1].

    Raises:
        ValueError: a decay outside (0, 1].
    """

    def __init__(self, dim: int, decay: float) -> None:
        super().__init__()
        self._decay = checked_decay(decay)
        self.total = self.add_weight(shape=(dim, dim), initializer="zeros", trainable=False, name="total")
        self.weight = self.add_weight(shape=(), initializer="zeros", trainable=False, name="weight")

    def update(self, vectors: ops.Tensor, counts: Any = None) -> ops.Tensor:
        """The estimate with the vectors of one batch `[batch, dim]` taken in, `[dim, dim]`; counts as for `gramian`."""
        vectors = distribution.gathered(ops.stop_gradient(vectors))
        self.total.assign((1.0 - self._decay) * self.total + self._decay * gramian(vectors, counts))
        self.weight.assign((1.0 - self._decay) * self.weight + self._decay)
        return self.total / self.weight


class AverageGramian(keras.layers.Layer):
    """SAGram's estimate: the Gramian of each vector as it was last seen, corrected by the batch (Algorithm 1).

    With `v̂ᵢ` the last vector of i and `S = Σᵢ pᵢ v̂ᵢ v̂ᵢᵀ`, the estimate is `S + 1/|B| Σ_B (v vᵀ − v̂ v̂ᵀ)`: unbiased
    whatever is remembered if i is in B by `pᵢ`, and the better the less the vectors have moved. Then `v̂ ← v` for the
    batch. Vectors that were never seen are 0.

    Args:
        weights: `pᵢ`, `[size]`; they sum to 1.
        dim: width of the vectors.
    """

    def __init__(self, weights: np.ndarray, dim: int) -> None:
        super().__init__()
        self._weights = ops.convert_to_tensor(np.asarray(weights, np.float32))
        size = len(weights)
        self.table = self.add_weight(shape=(size, dim), initializer="zeros", trainable=False, name="table")
        self.total = self.add_weight(shape=(dim, dim), initializer="zeros", trainable=False, name="total")

    def update(self, ids: ops.Tensor, vectors: ops.Tensor) -> ops.Tensor:
        """The estimate with a batch taken in: int `[batch]` in 0 … size − 1, `[batch, dim]` → `[dim, dim]`."""
        ids, vectors = distribution.gathered(ids), distribution.gathered(ops.stop_gradient(vectors))
        former = backends.rows(self.table, ids)
        estimate = ops.convert_to_tensor(self.total) + gramian(vectors) - gramian(former)
        first = backends.first_places(ids)  # what a batch has twice counts once
        alone = ops.equal(first, ops.arange(ops.shape(first)[0], dtype="int32"))
        weights = (ops.take(self._weights, ids) * ops.cast(alone, "float32"))[:, None]
        change = ops.matmul(ops.transpose(vectors), weights * vectors)
        change -= ops.matmul(ops.transpose(former), weights * former)
        self.total.assign(self.total + change)
        backends.write_rows(self.table, ids, ops.take(vectors, first, axis=0))
        return estimate

    def save_own_variables(self, store: Any) -> None:
        """Nothing: the table is as long as the training data, and a trained model has no use for it."""

    def load_own_variables(self, store: Any) -> None:
        """Nothing."""
