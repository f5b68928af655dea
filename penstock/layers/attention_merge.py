"""Vectors of one kind merged into one, by an attention that asks nobody."""

from __future__ import annotations

from typing import Any

import keras

from penstock.layers.attention import attend


@keras.saving.register_keras_serializable("penstock")
class AttentionMerge(keras.layers.Layer):
    """`M = a H` with `a = softmax(W₂ uᵀ)` and `u = tanh(H W₁)` (Liu et al., KDD 2019; shapes of the erratum).

    Call with H `[…, n, m]` and, where some of the n may be missing, a bool mask `[…, n]`; gives `[…, m]`, zero where
    all are missing. W₁ is `[m, k]`, W₂ `[1, k]`.

    Args:
        units: k.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, "tanh", use_bias=False)
        self.scores = keras.layers.Dense(1, use_bias=False)

    def build(self, vectors_shape: Any, present_shape: Any = None) -> None:
        self.hidden.build((None, vectors_shape[-1]))
        self.scores.build((None, self.units))

    def call(self, vectors: Any, present: Any = None) -> Any:
        scores = self.scores(self.hidden(vectors))[..., None, :, 0]
        return attend(scores, vectors, present)[..., 0, :]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}
