"""A recall model: a query tower and item vectors in one space, scored by the inner product."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from penstock.losses.sampled import sampled_softmax
from penstock.samplers import Unigram


class Retrieval(keras.Model):
    """Trains `score(user, item) = query(user) · vector(item)` on positives against sampled negatives.

    Args:
        query_tower: encoded user features by name → `[batch, dim]`.
        item_tower: encoded item ids of any shape `[…]` → `[…, dim]`.
        sampler: where shared negatives come from.
        sample: how many negatives a batch shares.

    Targets are the encoded ids of the positives, int32 `[batch]`.
    """

    def __init__(self, query_tower: keras.Model, item_tower: keras.layers.Layer, sampler: Unigram, sample: int) -> None:
        super().__init__()
        self.query_tower = query_tower
        self.item_tower = item_tower
        self._sampler = sampler
        self._sample = sample

    def build(self, input_shape: Any = None) -> None:
        """Makes the item tower's weights; the query tower has its own already."""
        self.item_tower(ops.zeros((1,), "int32"))
        self.built = True

    def call(self, inputs: dict[str, Any]) -> Any:
        return self.query_tower(inputs)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        positives = ops.cast(y, "int32")
        negatives = self._sampler.draw(self._sample)
        log_sample = ops.log(float(self._sample))
        losses = sampled_softmax(
            y_pred,
            self.item_tower(positives),
            self.item_tower(negatives),
            positives,
            negatives,
            self._sampler.log_probability(positives) + log_sample,
            self._sampler.log_probability(negatives) + log_sample,
        )
        return ops.mean(losses)


@keras.saving.register_keras_serializable("penstock")
class BiasedItems(keras.layers.Layer):
    """The output layer of a softmax over items as vectors: `[wᵢ, bᵢ]`, `[…]` → `[…, dim + 1]`.

    With a query that ends in 1 the inner product is `w · u + b`.
    """

    def __init__(self, size: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights_of = keras.layers.Embedding(size, dim, keras.initializers.RandomNormal(stddev=dim**-0.5))
        self.bias_of = keras.layers.Embedding(size, 1, "zeros")

    def call(self, indices: Any) -> Any:
        return ops.concatenate([self.weights_of(indices), self.bias_of(indices)], axis=-1)
