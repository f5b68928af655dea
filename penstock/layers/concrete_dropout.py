"""Dropout whose rate is learned."""

from __future__ import annotations

from math import log
from typing import Any

import keras
from keras import ops

_TEMPERATURE = 0.1


@keras.saving.register_keras_serializable("penstock")
class ConcreteDropout(keras.layers.Layer):
    """Dropout at a rate p that is learned, so that passes agree more the more there was to learn from.

    `x (1 − z) / (1 − p)` with `z = σ((logit p + logit u) / t)`, u uniform in (0, 1) for each number and t = 0.1: z is
    near 0 or 1, above ½ with probability p, and has a slope in p. Adds `−K/N H(p)` to the losses of the layer, in nats,
    with K the width of the input: the entropy draws p to ½, the data draw it to 0, and N rows of data weigh N times as
    much. Gal, Hron & Kendall, NeurIPS 2017, section 3; the prior over weights is flat, which takes out their l² term.

    At a fixed rate the variance of the passes hardly falls as data grow: the noise is put in, not learned.

    Call with `[…, K]` and `training`; gives the same shape, and the input itself if not training.

    Args:
        rows: N, how many rows the model is trained on; the losses are means over rows.
        rate: p at the start.

    Raises:
        ValueError: no rows, or a rate that is not inside (0, 1).
    """

    def __init__(self, rows: int, rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rows < 1:
            raise ValueError(f"rows is how many the model is trained on, at least 1, not {rows}")
        if not 0.0 < rate < 1.0:
            raise ValueError(f"a dropout rate that is learned starts inside (0, 1), not at {rate}")
        self.rows, self.rate = rows, rate
        self._seeds = keras.random.SeedGenerator()

    def build(self, input_shape: Any) -> None:
        start = keras.initializers.Constant(log(self.rate) - log(1.0 - self.rate))
        self.logit = self.add_weight((), start, dtype="float32", autocast=False, name="logit")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not training:
            return inputs
        logit = ops.convert_to_tensor(self.logit)
        rate = ops.sigmoid(logit)
        # H(p) = p softplus(−logit p) + (1 − p) softplus(logit p)
        entropy = rate * ops.softplus(-logit) + (1.0 - rate) * ops.softplus(logit)
        self.add_loss(-inputs.shape[-1] / self.rows * entropy)
        # in half precision 1 − 1e-6 is 1, and its logit infinite
        uniform = keras.random.uniform(ops.shape(inputs), 1e-6, 1.0 - 1e-6, "float32", self._seeds)
        dropped = ops.sigmoid((logit + ops.log(uniform) - ops.log1p(-uniform)) / _TEMPERATURE)
        return inputs * ops.cast((1.0 - dropped) / (1.0 - rate), inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rows": self.rows, "rate": self.rate}
