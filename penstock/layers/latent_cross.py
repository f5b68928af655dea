"""Context that changes what a hidden vector means, by multiplying it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from penstock.layers.embedding import Embedding


def latent_cross(hidden: Any, contexts: Sequence[Any]) -> Any:
    """`h ∘ (1 + Σ_c w_c)` (Beutel et al., WSDM 2018, eq. 5–6).

    Args:
        hidden: h, `[batch, dim]` or `[batch, length, dim]`.
        contexts: w of each context: `[batch, dim]`, or with a length also `[batch, length, dim]`.
    """
    total = 1.0
    for context in contexts:
        whole_row = len(context.shape) < len(hidden.shape)
        total = total + (ops.expand_dims(context, 1) if whole_row else context)
    return hidden * total


@keras.saving.register_keras_serializable("penstock")
class LatentCross(keras.layers.Layer):
    """`h ∘ (1 + Σ_c w_c)` with w learned by context: an embedding of an id, a multiple of a vector for a number.

    A network that gets context beside its input has to build products of the two out of sums, which takes many units
    (Beutel et al., WSDM 2018, section 3); here they are given. w starts from a normal distribution about 0, so that at
    first the layer changes next to nothing (section 5.3). A number of 0 has w = 0: give standardised ones, or such as
    0 is neutral in.

    Call with hidden `[batch, dim]` or `[batch, length, dim]` and a list of contexts: int indices or float numbers,
    `[batch]` or, with a length, `[batch, length]`.

    Args:
        sizes: of each context, the number of its indices; 0 if it is a number.
        deviation: of the normal distribution.
    """

    def __init__(self, sizes: Sequence[int], deviation: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sizes, self.deviation = tuple(sizes), deviation

    def build(self, hidden_shape: Any, contexts_shape: Any = None) -> None:
        dim = hidden_shape[-1]
        self.parts = [self._part(size, dim) for size in self.sizes]
        for part in self.parts:
            part.build((None, 1))

    def _part(self, size: int, dim: int) -> keras.layers.Layer:
        normal = keras.initializers.RandomNormal(stddev=self.deviation)
        if size:
            return Embedding(size, dim, normal, dtype=self.dtype_policy)
        return keras.layers.Dense(dim, use_bias=False, kernel_initializer=normal, dtype=self.dtype_policy)

    def call(self, hidden: Any, contexts: Sequence[Any]) -> Any:
        vectors = [
            part(context if size else ops.expand_dims(context, -1))
            for size, part, context in zip(self.sizes, self.parts, contexts, strict=True)
        ]
        return latent_cross(hidden, vectors)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "sizes": list(self.sizes), "deviation": self.deviation}
