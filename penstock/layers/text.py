"""Texts of items, of what a user has read, and of queries as vectors."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from penstock import backends
from penstock.examples import PADDING, UNKNOWN
from penstock.layers.embedding import Embedding
from penstock.tokens import Texts


class ItemWords(keras.layers.Layer):
    """The words of items by their indices, `[…]` → int32 `[…, length]`; one that has none is the word unknown.

    Args:
        items: the words of each index, int32 `[items + 2, length]`.
    """

    def __init__(self, items: np.ndarray, **kwargs: Any) -> None:
        super().__init__(dtype="int32", **kwargs)
        nothing = (items == PADDING).all(axis=1)
        self._items = items.copy()
        self._items[nothing, 0] = UNKNOWN

    def call(self, indices: Any) -> Any:
        return ops.take(ops.convert_to_tensor(self._items), indices, axis=0)


class HistoryWords(keras.layers.Layer):
    """The texts of the items of a history one after the other, `[batch, items]` → the last words `[batch, length]`.

    Padding stands in front. A history without words is the word unknown.

    Args:
        items: the words of each index, int32 `[items + 2, length]`.
        limit: so many words at most.
    """

    def __init__(self, items: np.ndarray, limit: int, **kwargs: Any) -> None:
        super().__init__(dtype="int32", **kwargs)
        self._items = items
        self._limit = limit

    def call(self, history: Any) -> Any:
        words = ops.take(ops.convert_to_tensor(self._items), history, axis=0)
        wide = words.shape[1] * words.shape[2]
        words = ops.reshape(words, (-1, wide))
        present = ops.not_equal(words, PADDING)
        # in float32, which sorts fast: places up to 2²⁴ are exact
        place = ops.where(present, ops.arange(1, wide + 1, dtype="float32"), 0.0)
        last, found = ops.top_k(place, min(self._limit, wide))
        taken = ops.where(ops.equal(last, 0.0), PADDING, ops.take_along_axis(words, found, axis=1))
        taken = ops.flip(taken, axis=1)
        nothing = ops.logical_not(ops.any(present, axis=1, keepdims=True))
        return ops.concatenate([taken[:, :-1], ops.where(nothing, UNKNOWN, taken[:, -1:])], axis=1)


class WordHashing(keras.layers.Layer):
    """Words as the sum of what their symbols stand for, `Σₛ E[s]`: symbols `[…, width]` → `[…, dim]`.

    The count vector of a word's letter trigrams times a learned matrix E (Huang et al., CIKM 2013, section 3.2).

    Args:
        symbols: how many there are, padding and unknown included.
    """

    def __init__(self, symbols: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding = Embedding(symbols, dim)

    def call(self, parts: Any) -> Any:
        vectors = self.embedding(parts)
        return ops.sum(vectors * _mask(parts, vectors.dtype), axis=-2)


class TextTower(keras.layers.Layer):
    """A text as a unit vector: words of the catalogue `[…, length]` → `[…, dim]`.

    Args:
        texts: what the words are made of.
        hashing: words → vectors; towers may share it.
        encoder: vectors `[batch, length, width]`, zero where there is no word, and whether there is one
            `[batch, length]` → `[batch, dim]`.
    """

    def __init__(self, texts: Texts, hashing: WordHashing, encoder: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES  # how many words a batch has is known only when it runs
        self.hashing = hashing
        self.encoder = encoder
        self._parts = texts.parts

    def call(self, words: Any) -> Any:
        shape = ops.shape(words)
        flat = ops.reshape(words, (-1, shape[-1]))
        # a batch says few words many times: each is put together once
        own, place = backends.once(flat)
        vectors = self.hashing(ops.take(ops.convert_to_tensor(self._parts), own, axis=0))
        vectors = ops.take(vectors, ops.reshape(place, ops.shape(flat)), axis=0)
        encoded = unit(self.encoder(vectors, ops.not_equal(flat, PADDING)))
        return ops.reshape(encoded, (*shape[:-1], encoded.shape[-1]))

    def read(self, parts: Any) -> Any:
        """Texts of any words, as `Texts.encode` gives them `[batch, length, width]` → `[batch, dim]`."""
        return unit(self.encoder(self.hashing(parts), ops.not_equal(parts[..., 0], PADDING)))


class Bag(keras.layers.Layer):
    """Tanh layers over the sum of a text's words, whatever their order (Huang et al., CIKM 2013, eq. 3).

    `l₁ = tanh(Σₜ xₜ + b₁)`, `lᵢ = tanh(Wᵢ lᵢ₋₁ + bᵢ)`: vectors `[batch, length, width]`, present `[batch, length]` →
    `[batch, units[-1]]`. The first layer's matrix is that of the words' vectors.
    """

    def __init__(self, units: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = [keras.layers.Dense(count, "tanh") for count in units]

    def build(self, vectors_shape: Any, present_shape: Any = None) -> None:
        self.bias = self.add_weight((vectors_shape[-1],), "zeros", name="bias")
        width = vectors_shape[-1]
        for dense in self.dense:
            dense.build((None, width))
            width = dense.units

    def call(self, vectors: Any, present: Any) -> Any:
        hidden = ops.tanh(ops.einsum("bld,bl->bd", vectors, ops.cast(present, vectors.dtype)) + self.bias)
        for dense in self.dense:
            hidden = dense(hidden)
        return hidden


def unit(vectors: Any) -> Any:
    """Vectors `[…, dim]` at length 1; the zero vector stays what it is."""
    return vectors * ops.rsqrt(ops.maximum(ops.sum(ops.square(vectors), axis=-1, keepdims=True), 1e-12))


def _mask(indices: Any, dtype: str) -> Any:
    return ops.cast(ops.not_equal(indices, PADDING), dtype)[..., None]
