"""Whether the place of an item on the screen was looked at, apart from what the item is worth."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from penstock.layers.position_bias import PositionBias

LEAST_MISSED = 1e-6
"""Of a place where nothing is missed: its logarithm stays a number."""


@keras.saving.register_keras_serializable("penstock")
class Examination(PositionBias):
    """The share of the users who look at a place, a factor of what is done there, learnt in training alone.

    `P(label | x, p, d) = e(p, d) σ(r(x))`: what is not looked at is not acted on (the examination hypothesis of
    Richardson, Dominowska & Ragno, WWW 2007; learnt beside r(x) as in Guo et al., PAL, RecSys 2019, whose e has no
    device). One e is of all labels. `log e(p, d) = c(p, d) − max_q c(q, d)`, c as in `PositionBias`: of e and σ(r) the
    data tell little more than the product, so that the place that is looked at most has e = 1, and σ(r(x)) is
    P(label | looked at). Calls are those of `PositionBias` and give log e, `[batch, 1]`. A missing position has the
    logarithm of the mean of e over the positions at which the device showed its rows (`adapt`).

    Args:
        positions, devices, dropout, seed: as for `PositionBias`.

    Raises:
        ValueError: as for `PositionBias`.
    """

    def __init__(
        self, positions: int, devices: int, dropout: float = 0.1, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(positions, devices, 1, dropout, seed, **kwargs)

    def of_task(self, effect: Any, task: int) -> Any:
        """The same log e for all, `[batch]`."""
        return effect[:, 0]

    def applied(self, logits: Any, effect: Any) -> Any:
        """The logits of e σ(r), `[batch]`, of r and log e: `log e − log(1 − e + exp(−r))`."""
        missed = ops.log(ops.maximum(-ops.expm1(effect), LEAST_MISSED))
        return effect - ops.logaddexp(missed, -logits)

    def _curves(self) -> Any:
        """log e, `[devices, positions, 1]`."""
        curves = self._raw()
        return curves - ops.max(curves, axis=1, keepdims=True)

    def _missing(self, curves: Any) -> Any:
        """A row without a position says nothing of places: r(x) takes what it tells."""
        return ops.stop_gradient(ops.log(ops.sum(self.share[:, :, None] * ops.exp(curves), axis=1)))

    def curve(self, device: int) -> np.ndarray:
        """e by position on a device, `[positions]`."""
        return np.exp(super().curve(device)[:, 0])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["tasks"]
        return config
