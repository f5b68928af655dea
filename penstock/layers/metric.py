"""Items as points, of which the nearer is the better: distances as inner products."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from penstock.layers.embedding import Embedding


class ItemPoints(keras.layers.Layer):
    """Item indices `[…]` → `[γᵢ; βᵢ − ‖γᵢ‖²]` `[…, dim + 1]`, of points in the unit ball and a bias that starts at 0.

    With a query `[2 x; 1]` the inner product is `βᵢ − ‖x − γᵢ‖²` less `‖x‖²`, which is the same for all items. The ball
    keeps what is rare from flying off (He et al., RecSys 2017, section 3.1; Zhang et al. 2018, section 3.3.3): `at`
    gives a point outside by its direction, where the papers move it back after each step.

    Args:
        biased: items have a bias.
    """

    def __init__(self, size: int, dim: int, biased: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.biased = biased
        normal = keras.initializers.RandomNormal(stddev=0.5 * dim**-0.5)

        def initial(shape: tuple[int, int], dtype: Any = None) -> Any:
            return ops.concatenate([normal((shape[0], dim), dtype), ops.zeros((shape[0], 1), dtype)], axis=-1)

        self.table = Embedding(size, dim + 1, initial)  # one table: its rows are gathered and updated once

    def build(self, indices_shape: Any) -> None:
        self.table.build(indices_shape)

    def at(self, indices: Any) -> Any:
        """γ, `[…, dim]`."""
        return in_ball(self.table(indices)[..., : self.dim])

    def call(self, indices: Any) -> Any:
        rows = self.table(indices)
        points = in_ball(rows[..., : self.dim])
        height = -ops.sum(ops.square(points), axis=-1, keepdims=True)
        return ops.concatenate([points, height + rows[..., self.dim :] if self.biased else height], axis=-1)


def in_ball(vectors: Any) -> Any:
    """Vectors longer than 1 cut to the length 1, `[…, dim]`."""
    squares = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(squares, 1.0))
