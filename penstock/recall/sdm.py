"""SDM: the session that runs and older interests, joined by a gate (Lv et al., CIKM 2019, arXiv 1909.00385)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from penstock import backends, sessions
from penstock.catalogue import Catalogue
from penstock.examples import CONTEXT, PADDING, Schema
from penstock.layers.attention import MultiHeadAttention, attend, dot_product
from penstock.layers.embedding import Embedding, Given, embed, inputs_of, sizes_of
from penstock.layers.latent_cross import LatentCross
from penstock.retrieval import BiasedItems, RecallConfig, Towers

LONGEST = 0.25
"""In training this share of a batch's sessions, the longest, are read apart from the others."""

ATTRIBUTES = ("author_id", "tags", "category", "music_id")
"""What is read of an item beside its id."""


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit.

    Attributes:
        short: so many actions of the session are read, the last.
        long: so many of the actions before it are read, the last.
        long_days: and those alone that are no older than this.
        width: size of the vector of each attribute of an item.
        layers: LSTMs one on the other; the input of each but the first is added to its output.
        heads: kinds of interest that the self-attention tells apart.
        gate: mixes short and long term by a gate; without it they are added.
        latent_cross: scenario, device, hour and the time since the last action multiply what the LSTM says of the
            session (Beutel et al., WSDM 2018, section 5.2).
    """

    short: int = 50
    long: int = 20
    long_days: float = 7.0
    width: int = 32
    layers: int = 1
    heads: int = 4
    gate: bool = True
    latent_cross: bool = False
    dropout: float = 0.1
    sample: int = 8192


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """Session and older actions, each attended by the user's profile, and a gate for each dimension between them.

    `o = (1 − G) ∘ p + G ∘ s`, `P(i | user) = softmax(wᵢ · o + bᵢ)`: s of `ShortTerm`, p of `LongTerm`, G of `Gate`; the
    query is `[o; 1]` `[batch, dim + 1]` and the item vectors are `[wᵢ; bᵢ]`, which are not those of the histories. The
    profile `e_u` is the embedded features of the user, brought to `dim`.
    """
    (history,) = schema.named("history_items")
    profile = tuple(feature for feature in schema.of("user") if feature.name not in ("user_id", "history_items"))
    contexts = schema.named(*CONTEXT) if config.latent_cross else ()
    others = tuple(feature for feature in contexts if feature not in profile)
    inputs = inputs_of((history, *schema.of("sequence"), *profile, *others))
    short, long = sessions.split(
        inputs["history_items"],
        inputs["history_times"],
        inputs["history_sessions"],
        inputs["time_ms"],
        config.short,
        config.long,
        config.long_days,
    )
    user = keras.layers.Dense(config.dim)(ops.concatenate(embed(inputs, profile, schema, config.dim), axis=-1))
    attributes = ItemAttributes(
        {name: catalogue.attributes[name] for name in ATTRIBUTES},
        {name: schema.size(name) for name in ATTRIBUTES},
        schema.size("item_id"),
        config.width,
    )
    factor = ops.ones_like(user)
    if contexts:
        factor = LatentCross(sizes_of(contexts, schema))(factor, [inputs[feature.name] for feature in contexts])
    short_term = ShortTerm(attributes, config.dim, config.heads, config.layers, config.dropout, name="short_term")
    s = short_term(short, user, factor)
    p = LongTerm(attributes, config.dim, config.dropout, name="long_term")(long, user)
    joined = Gate(config.dim, name="gate")(user, s, p) if config.gate else s + p
    query = ops.concatenate([joined, ops.ones_like(joined[:, :1])], axis=-1)
    return Towers(
        keras.Model(inputs, query, name="query"), BiasedItems(schema.size("item_id"), config.dim, name="items")
    )


class ItemAttributes(keras.layers.Layer):
    """The vectors of items: one of the id and one of each attribute, `[…]` → `[…, width]` by name (section 3.3).

    An attribute that is a list is the mean of its vectors, zero if it is empty; of another, having none is a value.

    Args:
        tables: the encoded attributes of each item index, `[indices]` or `[indices, length]`.
        sizes: how many values each of them has, padding and unknown included.
        items: number of item indices; the tables may have more, of items that no history has.
    """

    def __init__(
        self, tables: Mapping[str, np.ndarray], sizes: Mapping[str, int], items: int, width: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.names = ("item_id", *tables)
        self._known = {name: np.asarray(table[:items], np.int32) for name, table in tables.items()}
        self._embeddings = {
            name: Embedding(size, width, keras.initializers.RandomUniform(-0.2, 0.2), name=f"embed_{name}")
            for name, size in {"item_id": items, **sizes}.items()
        }

    def build(self, items_shape: Any) -> None:
        self._tables = {
            name: self.add_weight(
                table.shape, Given(table), dtype="int32", trainable=False, autocast=False, name=f"table_{name}"
            )
            for name, table in self._known.items()
        }
        for embedding in self._embeddings.values():
            embedding.build(items_shape)

    def call(self, items: Any) -> dict[str, Any]:
        found = {"item_id": self._embeddings["item_id"](items)}
        for name, table in self._tables.items():
            indices = ops.take(table, items, axis=0)
            if len(table.shape) == 1:
                found[name] = self._embeddings[name](indices)
                continue
            means = self._embeddings[name](ops.reshape(indices, (-1, table.shape[1])), mean=True)
            found[name] = ops.reshape(means, (*ops.shape(items), self.width))
        return found


class ShortTerm(keras.layers.Layer):
    """The session's interest: items `[batch, length]` and e_u `[batch, dim]` → s `[batch, dim]` (sections 3.4 and 3.5).

    `h = c ∘ LSTM(e)`, c a factor by the context `[batch, dim]`, over the items' vectors, all attributes of each
    concatenated; `ĥ = norm(h + MultiHead(h))` with scores that are not scaled; `s = Σₖ αₖ ĥₖ`, `α = softmax(ĥ · e_u)`
    (`attend_as`). Without any item s is zero.
    """

    def __init__(
        self, attributes: ItemAttributes, dim: int, heads: int, layers: int, dropout: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES  # how long a batch is, is known only when it runs
        self.dim = dim
        self.attributes = attributes
        self.recurrent = [keras.layers.LSTM(dim, return_sequences=True) for _ in range(layers)]
        self.heads = MultiHeadAttention(heads, dim, scaled=False)
        self.norm = keras.layers.LayerNormalization()
        self.dropout = keras.layers.Dropout(dropout)

    def build(self, items_shape: Any, user_shape: Any, factor_shape: Any) -> None:
        if not self.attributes.built:
            self.attributes.build(items_shape)
        width = self.attributes.width * len(self.attributes.names)
        for lstm in self.recurrent:
            lstm.build((None, None, width))
            width = self.dim
        self.heads.build((None, None, self.dim), (None, None, self.dim))
        self.norm.build((None, None, self.dim))

    def call(self, items: Any, user: Any, factor: Any, training: bool = False) -> Any:
        lengths = ops.sum(ops.cast(ops.not_equal(items, PADDING), "int32"), axis=1)
        if not training or backends.FIXED_SHAPES:
            return self._interest(items, user, factor, lengths, training)
        # most sessions are short: the few long ones alone take as many steps as they have
        order = ops.argsort(lengths)
        items, user, factor, lengths = (ops.take(of, order, axis=0) for of in (items, user, factor, lengths))
        cut = ops.cast((1.0 - LONGEST) * ops.cast(ops.shape(order)[0], "float32"), "int32")
        parts = slice(cut), slice(cut, None)
        found = [self._interest(items[part], user[part], factor[part], lengths[part], training) for part in parts]
        return ops.take(ops.concatenate(found), ops.argsort(order), axis=0)

    def _interest(self, items: Any, user: Any, factor: Any, lengths: Any, training: bool) -> Any:
        # padding stands behind: steps that no session has are left out
        items = items[:, backends.leading(ops.max(lengths, initial=1))]
        present = ops.not_equal(items, PADDING)
        vectors = ops.concatenate(list(self.attributes(items).values()), axis=-1)
        vectors = self.dropout(vectors, training=training)
        for place, lstm in enumerate(self.recurrent):
            vectors = lstm(vectors) + (vectors if place else 0.0)
        vectors = vectors * factor[:, None]
        vectors = self.norm(vectors + self.heads(vectors, vectors, present, present))
        return attend_as(user, vectors, present)


class LongTerm(keras.layers.Layer):
    """Older interests: items `[batch, length]` and e_u `[batch, dim]` → p `[batch, dim]` (section 3.6).

    Each attribute f is a set of its own: `gₖ = W_f eₖ + b_f`, `z_f = Σₖ αₖ gₖ`, `α = softmax(g · e_u)` (`attend_as`),
    and `p = tanh(W [z_f …] + b)`. Without any item all z are zero.
    """

    def __init__(self, attributes: ItemAttributes, dim: int, dropout: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.attributes = attributes
        self.dense = {name: keras.layers.Dense(dim, name=f"dense_{name}") for name in attributes.names}
        self.joined = keras.layers.Dense(dim, "tanh")
        self.dropout = keras.layers.Dropout(dropout)

    def build(self, items_shape: Any, user_shape: Any) -> None:
        if not self.attributes.built:
            self.attributes.build(items_shape)
        for dense in self.dense.values():
            dense.build((None, self.attributes.width))
        self.joined.build((None, self.dim * len(self.dense)))

    def call(self, items: Any, user: Any, training: bool = False) -> Any:
        present = ops.not_equal(items, PADDING)
        vectors = self.attributes(items)
        sets = [attend_as(user, dense(vectors[name]), present) for name, dense in self.dense.items()]
        return self.joined(self.dropout(ops.concatenate(sets, axis=-1), training=training))


class Gate(keras.layers.Layer):
    """`(1 − G) ∘ p + G ∘ s` with `G = σ(W₁ e_u + W₂ s + W₃ p + b)` (section 3.6); all `[batch, dim]`."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(dim, "sigmoid")

    def build(self, user_shape: Any, short_shape: Any, long_shape: Any) -> None:
        self.dense.build((None, user_shape[-1] + short_shape[-1] + long_shape[-1]))

    def call(self, user: Any, short: Any, long: Any) -> Any:
        gate = self.dense(ops.concatenate([user, short, long], axis=-1))
        return (1.0 - gate) * long + gate * short


def attend_as(user: Any, vectors: Any, present: Any) -> Any:
    """User attention, `Σₖ αₖ vₖ` with `α = softmax(v · e_u)` over what is present (section 3.5.2).

    Args:
        user: e_u, `[batch, dim]`.
        vectors: `[batch, length, dim]`.
        present: bool `[batch, length]`.
    """
    return attend(dot_product(user[:, None], vectors, scale=1.0), vectors, present)[:, 0]
