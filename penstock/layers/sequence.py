"""A sequence of vectors as one vector, by what stands side by side."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class WindowPooling(keras.layers.Layer):
    """A convolution over windows of words, and of each of its features the largest (Shen et al., CIKM 2014, eq. 1–4).

    `hₜ = tanh(W_c [xₜ₋₁; xₜ; xₜ₊₁])`, `v = maxₜ hₜ`, `y = tanh(W_s v)`: vectors `[batch, length, width]` and present
    `[batch, length]` → `[batch, units]`. Beyond a text's ends stands the zero vector; padding is never the largest.

    Args:
        features: size of h.
        units: size of y.
        window: how many words a window spans, odd.
    """

    def __init__(self, features: int, units: int, window: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.convolution = keras.layers.Conv1D(features, window, padding="same", activation="tanh", use_bias=False)
        self.semantic = keras.layers.Dense(units, "tanh", use_bias=False)

    def build(self, vectors_shape: Any, present_shape: Any = None) -> None:
        self.convolution.build(vectors_shape)
        self.semantic.build((None, self.convolution.filters))

    def call(self, vectors: Any, present: Any) -> Any:
        vectors = vectors * ops.cast(present, vectors.dtype)[..., None]
        # a tanh is above −1, which therefore never is the largest
        features = ops.where(present[..., None], self.convolution(vectors), -1.0)
        return self.semantic(ops.max(features, axis=1))
