"""Sequences of a batch read in parts of like length."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from penstock import backends
from penstock.examples import PADDING


class ByLength(keras.layers.Layer):
    """What an encoder says of sequences, with less padding: the short are read apart from the long.

    A batch is as long as its longest sequence, and most are short. So the shorter half is cut to the longest of it and
    read, then the shorter half of the rest, and so on. Items `[batch, length]`, padding behind, and more of that shape
    → states `[batch, length, dim]`, which are the encoder's where there is an item, else 0. Where shapes are fixed all
    are read as one.

    Args:
        encoder: a layer whose states of a sequence hang on no other sequence and on no padding.
        parts: so many at most.
    """

    def __init__(self, encoder: keras.layers.Layer, parts: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.encoder = encoder
        self.parts = 1 if backends.FIXED_SHAPES else parts

    def build(self, items_shape: Any, *others_shape: Any) -> None:
        if not self.encoder.built:
            self.encoder.build(items_shape, *others_shape)

    def call(self, items: Any, *others: Any, training: bool | None = None) -> Any:
        lengths = ops.sum(ops.cast(ops.not_equal(items, PADDING), "int32"), axis=1)
        order = ops.argsort(lengths)
        rows, length = ops.shape(items)[0], ops.shape(items)[1]
        states, start = [], 0
        for part in range(self.parts):
            end = rows if part == self.parts - 1 else start + (rows - start + 1) // 2
            of_part = order[start:end]
            longest = ops.max(ops.take(lengths, of_part), initial=1)
            few = [ops.take(given, of_part, axis=0)[:, backends.leading(longest)] for given in (items, *others)]
            found = self.encoder(*few, training=training)
            found = ops.where(ops.not_equal(few[0], PADDING)[..., None], found, 0.0)
            states.append(ops.pad(found, [[0, 0], [0, length - ops.shape(found)[1]], [0, 0]]))
            start = end
        return ops.take(ops.concatenate(states, axis=0), ops.argsort(order), axis=0)
