"""What comes next after each item of a history: one reading of it, and a prediction at each place.

An encoder is a layer: item indices `[batch, length]`, padding behind → states `[batch, length, dim]`, of which each
says what is known after the item of its place and hangs on no later one. A history is begun by the unknown item, so
that what comes first is predicted too, and a user without any history is one who begins.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from penstock import backends
from penstock.examples import FIRST, PADDING, UNKNOWN


class AfterAll(keras.layers.Layer):
    """The state after the last item: histories `[batch, length]` → `[batch, dim]`."""

    def __init__(self, encoder: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES  # how long a batch is, is known only when it runs
        self.encoder = encoder

    def build(self, items_shape: Any) -> None:
        if not self.encoder.built:
            self.encoder.build(items_shape)

    def call(self, items: Any, training: bool | None = None) -> Any:
        items, lengths = begun(items)
        return backends.at(self.encoder(items, training=training), lengths - 1)


class AfterEach(keras.layers.Layer):
    """The states after each item of a history, and the items that came next, the positive last.

    Call with inputs that have `history_items` `[batch, length]`, and positives `[batch]`; gives queries `[pairs, dim]`,
    positives `[pairs]`, and which of them count (`penstock.backends.those`). Unknown items are nobody's next.

    Args:
        encoder: that of `AfterAll`.
    """

    def __init__(self, encoder: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.encoder = encoder

    def build(self, inputs_shape: Any, positives_shape: Any) -> None:
        if not self.encoder.built:
            self.encoder.build(inputs_shape["history_items"])

    def call(self, inputs: Any, positives: Any, training: bool | None = None) -> tuple[Any, Any, Any]:
        items, lengths = begun(inputs["history_items"])
        states = self.encoder(items, training=training)
        following = appended(items, lengths, positives)[:, 1:]
        return backends.those(following >= FIRST, states, following)


def begun(items: Any) -> tuple[Any, Any]:
    """Histories with the unknown item before them, and how long they are: `[batch]`, 1 or more.

    Where shapes may follow from values they are cut to the longest.
    """
    items = ops.convert_to_tensor(items)
    lengths = 1 + ops.sum(ops.cast(items != PADDING, "int32"), axis=1)
    first = ops.full((ops.shape(items)[0], 1), UNKNOWN, dtype=items.dtype)
    return ops.concatenate([first, items[:, backends.leading(ops.max(lengths) - 1)]], axis=1), lengths


def or_unknown(items: Any) -> Any:
    """Histories, those without any item with the unknown one: `[batch, length]`."""
    first = ops.where(ops.equal(items[:, :1], PADDING), UNKNOWN, items[:, :1])
    return ops.concatenate([first, items[:, 1:]], axis=1)


def appended(items: Any, lengths: Any, last: Any) -> Any:
    """Sequences with one item more: `[batch, length]` and `[batch]` → `[batch, length + 1]`."""
    longer = ops.pad(items, [[0, 0], [0, 1]])
    here = ops.equal(ops.arange(ops.shape(longer)[1], dtype="int32"), lengths[:, None])
    return ops.where(here, ops.cast(last, items.dtype)[:, None], longer)


class Places(keras.layers.Layer):
    """A vector for each place of a sequence, counted from its end: `[batch, length]` → `[batch, length, dim]`.

    The last item of a sequence has the last of `size` places, as where sequences are padded in front.
    """

    def __init__(self, size: int, dim: int, initializer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size
        self.dim = dim
        self.initializer = keras.initializers.get(initializer)

    def build(self, items_shape: Any) -> None:
        self.table = self.add_weight((self.size, self.dim), self.initializer, name="places")

    def call(self, items: Any) -> Any:
        lengths = ops.sum(ops.cast(ops.not_equal(items, PADDING), "int32"), axis=1, keepdims=True)
        places = self.size - lengths + ops.arange(ops.shape(items)[1], dtype="int32")
        return ops.take(self.table, ops.minimum(places, self.size - 1), axis=0)
