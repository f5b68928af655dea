"""Embeddings of encoded ids, single or in lists."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from penstock import backends
from penstock.examples import UNKNOWN, Feature, Schema

_DTYPES = {"id": "int32", "ids": "int32", "integer": "int64", "integers": "int64"}


@keras.saving.register_keras_serializable("penstock")
class Embedding(keras.layers.Layer):
    """A table of vectors of which a step reads and changes only the rows that are asked for.

    Call with indices `[…]`; gives `[…, dim]`. With `mean`, indices are lists `[batch, length]`, 0 is padding; gives
    their means `[batch, dim]`, `Σ eᵢ / max(n, 1)`: an empty list is the zero vector, and padding gets no gradient.

    `keras.layers.Embedding` reads the whole table at each step, a copy once rows of it have been changed in place.
    TensorFlow gathers from the variable itself, and its gradient is sparse, which XLA does not compile: `supports_jit`
    is False there.

    Args:
        size: number of rows; indices are 0 … size − 1.
        initializer: of the table, as Keras knows it.
        vocabulary: what the indices are of.

    Raises:
        tensorflow.errors.InvalidArgumentError: an index out of range, negative ones included, on the CPU. A GPU gives
            the zero vector, JAX what it likes: `penstock.examples.encode_ids` gives none.
    """

    def __init__(self, size: int, dim: int, initializer: Any = "uniform", vocabulary: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.dim, self.vocabulary = size, dim, vocabulary
        self.initializer = keras.initializers.get(initializer)
        self.autocast = False  # a cast would read the whole table
        self.supports_jit = backends.FIXED_SHAPES

    def build(self, input_shape: Any) -> None:
        self.table = self.add_weight((self.size, self.dim), self.initializer, name="embeddings")

    def call(self, indices: Any, mean: bool = False) -> Any:
        rows = backends.mean_of_rows if mean else backends.rows
        return ops.cast(rows(self.table, indices), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        initializer = keras.initializers.serialize(self.initializer)
        own = {"size": self.size, "dim": self.dim, "vocabulary": self.vocabulary}
        return {**super().get_config(), **own, "initializer": initializer}


class Given(keras.initializers.Initializer):
    """The values of a table, which as a weight of a layer is a variable and not a part of its graph."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return ops.convert_to_tensor(self._values, dtype)


@keras.saving.register_keras_serializable("penstock")
class MaskedMean(keras.layers.Layer):
    """Mean of the vectors of a list's ids, padding left out: `Σ eᵢ / max(n, 1)`; the empty list is the zero vector.

    Call with vectors `[batch, length, dim]` and indices `[batch, length]` (0 = padding); gives `[batch, dim]`.
    """

    def call(self, vectors: ops.Tensor, indices: ops.Tensor) -> ops.Tensor:
        present = ops.cast(ops.not_equal(indices, 0), vectors.dtype)
        total = ops.einsum("bld,bl->bd", vectors, present)
        return total / ops.maximum(ops.sum(present, axis=1, keepdims=True), 1.0)


@keras.saving.register_keras_serializable("penstock")
class IdDropout(keras.layers.Layer):
    """In training a share of the ids becomes the unknown id, so that a model learns to do without them.

    An id that few rows have lets a network learn those rows by heart, and one that training has not seen is unknown
    when serving: this way the vector of the unknown is learnt too. Call with indices of any shape; gives the same.

    Args:
        rate: the share, in [0, 1).

    Raises:
        ValueError: a rate outside [0, 1).
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"a share of the ids is at least 0 and below 1, not {rate}")
        self.rate = rate
        self._seeds = keras.random.SeedGenerator()

    def call(self, indices: Any, training: bool | None = None) -> Any:
        if not training or not self.rate:
            return indices
        drawn = keras.random.uniform(ops.shape(indices), seed=self._seeds)
        return ops.where(drawn < self.rate, ops.full_like(indices, UNKNOWN), indices)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


def inputs_of(features: tuple[Feature, ...]) -> dict[str, keras.KerasTensor]:
    """A Keras input for each feature, by name: ids int32 and integers int64 `[]` or `[length]`, float32 `[]`."""
    inputs = {}
    for feature in features:
        shape = (feature.length,) if feature.length else ()
        dtype = _DTYPES.get(feature.kind, "float32")
        inputs[feature.name] = keras.Input(shape, dtype=dtype, name=feature.name)
    return inputs


def embed(
    inputs: dict[str, keras.KerasTensor], features: tuple[Feature, ...], schema: Schema, dim: int, scale: float = 0.05
) -> list[keras.KerasTensor]:
    """Each feature as a vector: ids `[batch, dim]` (lists by their mean), numbers `[batch, 1]`.

    Features of one vocabulary share one table, initialised uniformly in ±`scale`.
    """
    tables: dict[str, Embedding] = {}
    vectors = []
    for feature in features:
        value = inputs[feature.name]
        if feature.kind in ("count", "number"):
            vectors.append(keras.layers.Reshape((1,))(value))
            continue
        if feature.vocabulary not in tables:
            initializer = keras.initializers.RandomUniform(-scale, scale)
            size = schema.size(feature.vocabulary)
            tables[feature.vocabulary] = Embedding(size, dim, initializer, feature.vocabulary)
        vectors.append(tables[feature.vocabulary](value, mean=feature.kind == "ids"))
    return vectors


def sizes_of(features: tuple[Feature, ...], schema: Schema) -> list[int]:
    """How many indices each feature has; 0 if it is a number."""
    return [schema.size(feature.vocabulary) if feature.vocabulary else 0 for feature in features]
