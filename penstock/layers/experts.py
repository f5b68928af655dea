"""Experts shared by tasks, and the gates that mix them."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("penstock")
class ExpertMixture(keras.layers.Layer):
    """One task's mixture of shared experts: `Σₑ gₑ(x) fₑ(x)` with `g = softmax(x W)` (Ma et al., KDD 2018, eq. 5–7).

    Call with the input `[batch, width]` and the experts' outputs `[batch, experts, dim]`; gives `[batch, dim]`.
    """

    def __init__(self, experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = experts
        self.gate = keras.layers.Dense(experts, use_bias=False)

    def call(self, inputs: Any, outputs: Any) -> Any:
        logits = self.gate(inputs)
        gates = ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))
        return ops.einsum("be,bed->bd", gates, outputs)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "experts": self.experts}
