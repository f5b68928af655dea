"""Embeddings of encoded ids, single or in lists."""

from __future__ import annotations

import keras
from keras import ops

from penstock.examples import Feature, Schema


@keras.saving.register_keras_serializable("penstock")
class MaskedMean(keras.layers.Layer):
    """Mean of the vectors of a list's ids, padding left out: `Σ eᵢ / max(n, 1)`; the empty list is the zero vector.

    Call with vectors `[batch, length, dim]` and indices `[batch, length]` (0 = padding); gives `[batch, dim]`.
    """

    def call(self, vectors: ops.Tensor, indices: ops.Tensor) -> ops.Tensor:
        present = ops.cast(ops.not_equal(indices, 0), vectors.dtype)
        total = ops.einsum("bld,bl->bd", vectors, present)
        return total / ops.maximum(ops.sum(present, axis=1, keepdims=True), 1.0)


def inputs_of(features: tuple[Feature, ...]) -> dict[str, keras.KerasTensor]:
    """A Keras input for each feature, by name: int32 `[]` or `[length]`, float32 `[]`."""
    inputs = {}
    for feature in features:
        shape = (feature.length,) if feature.kind == "ids" else ()
        dtype = "int32" if feature.kind in ("id", "ids") else "float32"
        inputs[feature.name] = keras.Input(shape, dtype=dtype, name=feature.name)
    return inputs


def embed(
    inputs: dict[str, keras.KerasTensor], features: tuple[Feature, ...], schema: Schema, dim: int, scale: float = 0.05
) -> list[keras.KerasTensor]:
    """Each feature as a vector: ids `[batch, dim]` (lists by their mean), numbers `[batch, 1]`.

    Features of one vocabulary share one table, initialised uniformly in ±`scale`.
    """
    tables: dict[str, keras.layers.Embedding] = {}
    vectors = []
    for feature in features:
        value = inputs[feature.name]
        if feature.kind in ("count", "number"):
            vectors.append(keras.layers.Reshape((1,))(value))
            continue
        if feature.vocabulary not in tables:
            initializer = keras.initializers.RandomUniform(-scale, scale)
            tables[feature.vocabulary] = keras.layers.Embedding(
                schema.size(feature.vocabulary), dim, initializer, name=f"embed_{feature.vocabulary}"
            )
        embedded = tables[feature.vocabulary](value)
        vectors.append(MaskedMean()(embedded, value) if feature.kind == "ids" else embedded)
    return vectors
