"""Vectors of one kind merged into one, by an attention that asks nobody."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from penstock.layers.attention import attend


@keras.saving.register_keras_serializable("penstock")
class AttentionMerge(keras.layers.Layer):
    """`M = a H` with `a = softmax(W₂ uᵀ)` and `u = tanh(H W₁)` (Liu et al., KDD 2019; shapes of the erratum).

    Call with H `[…, n, m]` and, where some of the n may be missing or stand for several, how many each is,
    `[…, n]`; gives `[…, m]`, zero where all are missing. W₁ is `[m, k]`, W₂ `[1, k]`.

    Args:
        units: k.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, "tanh", use_bias=False)
        self.scores = keras.layers.Dense(1, use_bias=False)

    def build(self, vectors_shape: Any, counts_shape: Any = None) -> None:
        self.hidden.build((None, vectors_shape[-1]))
        self.scores.build((None, self.units))

    def call(self, vectors: Any, counts: Any = None) -> Any:
        scores = self.scores(self.hidden(vectors))[..., None, :, 0]
        if counts is None:
            return attend(scores, vectors)[..., 0, :]
        return attend_counted(scores, vectors, counts)[..., 0, :]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


def attend_counted(scores: Any, values: Any, counts: Any) -> Any:
    """`attend` to keys that stand for several equal ones each: `n exp s = exp(s + log n)`, so that all of them weigh.

    Args:
        counts: n, `[…, keys]`, whole or not; keys of 0 are not looked at.
    """
    counts = ops.cast(counts, scores.dtype)
    return attend(scores + ops.log(ops.maximum(counts, 1e-12))[..., None, :], values, ops.greater(counts, 0))
