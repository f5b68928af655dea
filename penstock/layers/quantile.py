"""Numbers by their place among those of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("penstock")
class Cumulative(keras.layers.Layer):
    """`x̃ = ∫ df` up to x, in [0, 1]: the cumulative distribution, by lines through quantiles of the training rows.

    Call with `[batch]`; gives `[batch, 3]`: `x̃`, `x̃²` and `√x̃` (Covington, Adams & Sargin, RecSys 2016, section 4.1).
    A number that many rows have is in the middle of theirs, and so is one beyond it if it is the least or the largest:
    the line has no step, so that the last digit of a number decides nothing.

    Args:
        quantiles: rising, evenly spaced in probability from the least to the largest; at least two.
    """

    def __init__(self, quantiles: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantiles = [float(value) for value in quantiles]
        # in the precision they are compared in: two that differ by less would be a piece of no length
        edges, first, counts = np.unique(np.array(self.quantiles, np.float32), return_index=True, return_counts=True)
        # a number that spans several quantiles stands in the middle of them
        places = (first + (counts - 1) / 2.0) / (len(self.quantiles) - 1)
        self._edges, self._places = edges, places.astype(np.float32)

    def call(self, numbers: Any) -> Any:
        edges, places, numbers = self._edges, self._places, ops.cast(numbers, "float32")
        if len(edges) == 1:
            place = ops.full_like(numbers, places[0])
        else:
            piece = ops.clip(ops.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
            low, high = ops.take(edges, piece), ops.take(edges, piece + 1)
            share = ops.clip((numbers - low) / (high - low), 0.0, 1.0)
            place = ops.take(places, piece) + share * (ops.take(places, piece + 1) - ops.take(places, piece))
        return ops.cast(ops.stack([place, ops.square(place), ops.sqrt(place)], axis=-1), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "quantiles": self.quantiles}
