"""Attention: scores of queries and keys, the softmax that leaves padding out, and several heads of it.

Throughout, queries are `[…, queries, dim]`, keys and values `[…, keys, dim]`, scores and weights `[…, queries, keys]`.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

_NEVER = -1e9
"""The score of a key that may not be looked at: its exponential is 0 beside any other's."""


def dot_product(queries: Any, keys: Any, scale: float | None = None) -> Any:
    """Scores `q · k / √dim` (Vaswani et al., NIPS 2017, eq. 1); `scale` takes the place of `1 / √dim`."""
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return ops.einsum("...qd,...kd->...qk", queries, keys) * scale


def weights_of(scores: Any, key_mask: Any = None, query_mask: Any = None, causal: bool = False) -> Any:
    """The softmax over the keys that a query may look at: weights that sum to 1, or to 0 where there is no such key.

    Args:
        key_mask: bool, true for keys that are there; broadcasts against `[…, keys]`.
        query_mask: bool, true for queries that are there; broadcasts against `[…, queries]`. The others look at none.
        causal: queries and keys stand in one order, and a query looks at no key behind its own place.
    """
    seen = []
    if key_mask is not None:
        seen.append(ops.expand_dims(key_mask, -2))
    if query_mask is not None:
        seen.append(ops.expand_dims(query_mask, -1))
    if causal:
        places = ops.arange(ops.shape(scores)[-2])[:, None], ops.arange(ops.shape(scores)[-1])
        seen.append(ops.greater_equal(*places))
    exact = ops.cast(scores, "float32")  # half floats do not reach as far down as _NEVER
    if not seen:
        return ops.cast(_softmax(exact), scores.dtype)
    mask = seen[0]
    for other in seen[1:]:
        mask = ops.logical_and(mask, other)
    return ops.cast(_softmax(ops.where(mask, exact, _NEVER)) * ops.cast(mask, "float32"), scores.dtype)


def _softmax(scores: Any) -> Any:
    """As that of Keras, which warns where there is one key."""
    return ops.exp(scores - ops.logsumexp(scores, axis=-1, keepdims=True))


def attend(scores: Any, values: Any, key_mask: Any = None, query_mask: Any = None, causal: bool = False) -> Any:
    """The values under the weights of `weights_of`, `[…, queries, dim]`; zero where a query may look at no key."""
    return ops.matmul(weights_of(scores, key_mask, query_mask, causal), values)


@keras.saving.register_keras_serializable("penstock")
class AdditiveScores(keras.layers.Layer):
    """Scores `vᵀ tanh(W q + U k)` (Bahdanau et al., ICLR 2015, section A.1.2).

    Args:
        units: length of v.
        activation: what stands in the place of tanh, by its name.
    """

    def __init__(self, units: int, activation: str = "tanh", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.of_queries = keras.layers.Dense(units, use_bias=False)
        self.of_keys = keras.layers.Dense(units, use_bias=False)
        self.joined = keras.layers.Dense(1, use_bias=False)

    def build(self, queries_shape: Any, keys_shape: Any) -> None:
        self.of_queries.build((None, queries_shape[-1]))
        self.of_keys.build((None, keys_shape[-1]))
        self.joined.build((None, self.units))

    def call(self, queries: Any, keys: Any) -> Any:
        hidden = self.activation(self.of_queries(queries)[..., :, None, :] + self.of_keys(keys)[..., None, :, :])
        return self.joined(hidden)[..., 0]

    def get_config(self) -> dict[str, Any]:
        own = {"units": self.units, "activation": keras.activations.serialize(self.activation)}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("penstock")
class MultiplicativeScores(keras.layers.Layer):
    """Scores `qᵀ W k` (Luong et al., EMNLP 2015, eq. 8, "general")."""

    def build(self, queries_shape: Any, keys_shape: Any) -> None:
        self.kernel = self.add_weight((queries_shape[-1], keys_shape[-1]), "glorot_uniform", name="kernel")

    def call(self, queries: Any, keys: Any) -> Any:
        return dot_product(ops.matmul(queries, self.kernel), keys, scale=1.0)


@keras.saving.register_keras_serializable("penstock")
class MultiHeadAttention(keras.layers.Layer):
    """`[head₁; …; headₕ] Wᴼ` with `headᵢ = Attention(Q Wᵢᵠ, K Wᵢᴷ, K Wᵢⱽ)` (Vaswani et al., NIPS 2017, section 3.2.2).

    Call with queries `[batch, queries, width]` and keys `[batch, keys, width]`, which are the values too, and with
    masks `[batch, keys]` and `[batch, queries]`; gives `[batch, queries, dim]`. Without biases, so that a query that
    looks at nothing is zero.

    Args:
        heads: h.
        dim: of the result; a head has dim / heads.
        scaled: divides scores by the root of a head's dim.
        initializer: of the kernels, as Keras knows it.

    Raises:
        ValueError: dim is no multiple of heads.
    """

    def __init__(
        self, heads: int, dim: int, scaled: bool = True, initializer: Any = "glorot_uniform", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} dimensions cannot be shared by {heads} heads")
        self.heads = heads
        self.dim = dim
        self.scaled = scaled
        self.initializer = keras.initializers.get(initializer)
        self.of_queries, self.of_keys, self.of_values, self.joined = (
            keras.layers.Dense(dim, use_bias=False, kernel_initializer=self.initializer.clone()) for _ in range(4)
        )

    def build(self, queries_shape: Any, keys_shape: Any, *masks_shape: Any, **_: Any) -> None:
        self.of_queries.build((None, queries_shape[-1]))
        self.of_keys.build((None, keys_shape[-1]))
        self.of_values.build((None, keys_shape[-1]))
        self.joined.build((None, self.dim))

    def call(self, queries: Any, keys: Any, key_mask: Any = None, query_mask: Any = None, causal: bool = False) -> Any:
        queries, values, keys = (
            self._split(projection(inputs))
            for projection, inputs in ((self.of_queries, queries), (self.of_values, keys), (self.of_keys, keys))
        )
        key_mask, query_mask = (None if mask is None else mask[:, None] for mask in (key_mask, query_mask))
        found = attend(dot_product(queries, keys, None if self.scaled else 1.0), values, key_mask, query_mask, causal)
        found = ops.transpose(found, (0, 2, 1, 3))
        return self.joined(ops.reshape(found, (-1, ops.shape(found)[1], self.dim)))

    def _split(self, vectors: Any) -> Any:
        """`[batch, places, dim]` → `[batch, heads, places, dim / heads]`."""
        parts = ops.reshape(vectors, (-1, ops.shape(vectors)[1], self.heads, self.dim // self.heads))
        return ops.transpose(parts, (0, 2, 1, 3))

    def get_config(self) -> dict[str, Any]:
        own = {"heads": self.heads, "dim": self.dim, "scaled": self.scaled}
        return {**super().get_config(), **own, "initializer": keras.initializers.serialize(self.initializer)}


@keras.saving.register_keras_serializable("penstock")
class Transformer(keras.layers.Layer):
    """A block of self-attention and a network of each place (Vaswani et al., NIPS 2017, sections 3.1 and 3.3).

    `y = x + D(MultiHead(x))`, `z = y + D(W₂ f(W₁ y + b₁) + b₂)`, D dropout, each with a layer norm: of what is read, as
    `g(norm(x))`, where the norm stands first, else of the sum. Vectors `[batch, length, dim]` and present
    `[batch, length]` → `[batch, length, dim]`.

    Args:
        heads, dim: of `MultiHeadAttention`.
        units: rows of W₁.
        activation: f.
        causal: a place looks at none behind it.
        norm_first: the norm stands first.
        initializer: of the kernels, as Keras knows it.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        units: int,
        activation: str,
        dropout: float,
        causal: bool = False,
        norm_first: bool = False,
        initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads = MultiHeadAttention(heads, dim, initializer=initializer)
        self.wide = keras.layers.Dense(units, activation, kernel_initializer=self.heads.initializer.clone())
        self.narrow = keras.layers.Dense(dim, kernel_initializer=self.heads.initializer.clone())
        self.norms = [keras.layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropout = keras.layers.Dropout(dropout)
        self.causal = causal
        self.norm_first = norm_first

    def build(self, vectors_shape: Any, present_shape: Any = None) -> None:
        self.heads.build(vectors_shape, vectors_shape)
        self.wide.build(vectors_shape)
        self.narrow.build((None, None, self.wide.units))
        for norm in self.norms:
            norm.build(vectors_shape)

    def call(self, vectors: Any, present: Any, training: bool | None = None) -> Any:
        def attention(of: Any) -> Any:
            return self.heads(of, of, present, present, causal=self.causal)

        def network(of: Any) -> Any:
            return self.narrow(self.dropout(self.wide(of), training=training))

        for part, norm in zip((attention, network), self.norms, strict=True):
            read = norm(vectors) if self.norm_first else vectors
            vectors = vectors + self.dropout(part(read), training=training)
            vectors = vectors if self.norm_first else norm(vectors)
        return vectors

    def get_config(self) -> dict[str, Any]:
        own = {"heads": self.heads.heads, "dim": self.heads.dim, "units": self.wide.units}
        own |= {"activation": keras.activations.serialize(self.wide.activation), "dropout": self.dropout.rate}
        own |= {"causal": self.causal, "norm_first": self.norm_first}
        return {**super().get_config(), **own, "initializer": keras.initializers.serialize(self.heads.initializer)}
