"""What the place of an item on the screen does to a click, apart from what the item is worth."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops, random

PACE = 3.0
"""So many times do weights of curves count: Adam moves each weight by its rate, and steep curves have far to go."""


@keras.saving.register_keras_serializable("penstock")
class PositionBias(keras.layers.Layer):
    """A logit for each task by position and device, added in training alone (Zhao et al., RecSys 2019, section 4.4).

    `P(label | x, p, d) = σ(r(x) + b(p, d))` with `b(p, d) = c(p, d) − Σ_q share(q | d) c(q, d)`; c is a curve that
    devices share, so that a rare one has its shape, and what each has of its own; both are `PACE` times their weights.
    Call with positions and device indices, int `[batch]`; gives `[batch, tasks]`. A position below 0 is missing, one
    beyond the last is the last.

    Of r(x) and b the data tell only the sum, so that a constant may stand in either. Here the mean of b over the
    positions at which a device showed its rows is 0 (`adapt`; until then all count alike), and a missing position has
    the logit 0. So it is neutral: r(x) alone, which is what serving computes, is the prediction for a row at an
    average place of the device, and as a whole about as high as the labels it was trained on; a ranking is the same
    under any constant. How one device's labels differ from another's as a whole is r's to say: x has the device.

    In training a share of the rows has its position withheld, so that r(x) explains what it can without it.

    Args:
        positions: how many have a logit of their own.
        devices: number of device indices.
        dropout: share of the rows whose position is withheld, in [0, 1).
        seed: of which rows they are.

    Raises:
        ValueError: no position, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        positions: int,
        devices: int,
        tasks: int = 1,
        dropout: float = 0.1,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if positions < 1:
            raise ValueError(f"positions is how many positions have a logit, at least 1, not {positions}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is a share of the rows below 1, not {dropout}")
        self.positions, self.devices, self.tasks, self.dropout, self.seed = positions, devices, tasks, dropout, seed
        self._seeds = random.SeedGenerator(seed)

    def build(self, position_shape: Any = None, device_shape: Any = None) -> None:
        of_device = (self.devices, self.positions)
        uniform = keras.initializers.Constant(1.0 / self.positions)
        self.shared = self.add_weight((self.positions, self.tasks), "zeros", name="shared")
        self.own = self.add_weight((*of_device, self.tasks), "zeros", name="own")
        self.share = self.add_weight(of_device, uniform, trainable=False, name="share")
        self.built = True

    def adapt(self, position: np.ndarray, device: np.ndarray) -> None:
        """Takes the positions at which each device shows its rows from those of training, `[rows]` each.

        A device without a row has the positions of all, and if no row has a position all positions count alike.
        """
        if not self.built:
            self.build()
        known = np.asarray(position) >= 0
        place = np.minimum(np.asarray(position)[known], self.positions - 1)
        counts = np.zeros((self.devices, self.positions))
        np.add.at(counts, (np.asarray(device)[known], place), 1.0)
        everywhere = counts.sum(axis=0) if counts.any() else np.ones(self.positions)
        counts[counts.sum(axis=1) == 0.0] = everywhere
        self.share.assign((counts / counts.sum(axis=1, keepdims=True)).astype(np.float32))

    def call(self, position: Any, device: Any, training: bool | None = None) -> Any:
        position, device = ops.cast(position, "int32"), ops.cast(device, "int32")
        known = ops.greater_equal(position, 0)
        if training and self.dropout:
            drawn = random.uniform(ops.shape(position), seed=self._seeds)
            known = ops.logical_and(known, ops.greater_equal(drawn, self.dropout))
        curves = self._curves()
        place = device * self.positions + ops.clip(position, 0, self.positions - 1)
        at_place = ops.take(ops.reshape(curves, (-1, self.tasks)), place, axis=0)
        return ops.where(known[:, None], at_place, ops.take(self._missing(curves), device, axis=0))

    def of_task(self, effect: Any, task: int) -> Any:
        """What a call gave for one of the tasks, by its place among them: `[batch]`."""
        return effect[:, task]

    def applied(self, logits: Any, effect: Any) -> Any:
        """The logits of a task at the places of an effect, `[batch]` both: their sum."""
        return logits + effect

    def curve(self, device: int) -> np.ndarray:
        """What is learned by position on a device, `[positions, tasks]`."""
        return np.array(ops.convert_to_numpy(self._curves()[device]))

    def _raw(self) -> Any:
        """c, `[devices, positions, tasks]`."""
        return PACE * (self.shared[None] + self.own)

    def _curves(self) -> Any:
        """b, `[devices, positions, tasks]`."""
        curves = self._raw()
        return curves - ops.einsum("dp,dpt->dt", self.share, curves)[:, None]

    def _missing(self, curves: Any) -> Any:
        """What a row without a position has, `[devices, tasks]`."""
        return ops.zeros_like(curves[:, 0])

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("positions", "devices", "tasks", "dropout", "seed")}
        return {**super().get_config(), **own}
