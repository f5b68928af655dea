"""SHAN: attention of the user over older items, and over these and the session's (Ying et al., IJCAI 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock import sessions
from penstock.catalogue import Catalogue
from penstock.examples import PADDING, Schema
from penstock.layers.attention import attend, dot_product
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.next_item import or_unknown
from penstock.retrieval import RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit; the paper's loss is `bpr`.

    Attributes:
        short: so many actions of the session are read, the last.
        long: so many of the actions before it are read, the last.
        long_days: and those alone that are no older than this.
    """

    dim: int = 64
    short: int = 10
    long: int = 40
    long_days: float = 60.0
    loss: str = "bpr"
    sampler: str = "uniform"
    sample: int = 1024
    prefixes: int = 50


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """`s(u, i) = u_hybrid · vᵢ`: the session's items and, as one item more, what the older ones come to (section 4).

    `u_long = Σⱼ αⱼ vⱼ` over the older items, `u_hybrid = β₀ u_long + Σⱼ βⱼ vⱼ` over the session's, α and β of
    `UserAttention`. The two sets are those of `penstock.sessions`; a user without any item has the unknown one.
    """
    names = ("user_id", "history_items", "history_times", "history_sessions", "time_ms")
    inputs = inputs_of(schema.named(*names))
    scale = config.dim**-0.5
    items = Embedding(schema.size("item_id"), config.dim, keras.initializers.RandomNormal(stddev=scale), name="items")
    user = Embedding(schema.size("user_id"), config.dim, keras.initializers.RandomNormal(stddev=scale))
    short, long = sessions.split(
        inputs["history_items"],
        inputs["history_times"],
        inputs["history_sessions"],
        inputs["time_ms"],
        config.short,
        config.long,
        config.long_days,
    )
    query = Hierarchy(items, name="hierarchy")(user(inputs["user_id"]), short, long)
    return Towers(keras.Model(inputs, query, name="query"), items)


class UserAttention(keras.layers.Layer):
    """`Σⱼ αⱼ xⱼ` with `α = softmax(uᵀ ReLU(W xⱼ + b))` over what is present (eq. 1–3).

    Call with u `[batch, dim]`, x `[batch, length, dim]` and present `[batch, length]`; gives `[batch, dim]`.
    """

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(dim, "relu")

    def build(self, user_shape: Any, vectors_shape: Any, present_shape: Any = None) -> None:
        self.hidden.build(vectors_shape)

    def call(self, user: Any, vectors: Any, present: Any) -> Any:
        return attend(dot_product(user[:, None], self.hidden(vectors), scale=1.0), vectors, present)[:, 0]


class Hierarchy(keras.layers.Layer):
    """u `[batch, dim]`, the session's and the older items, `[batch, …]` both → u_hybrid `[batch, dim]`."""

    def __init__(self, items: Embedding, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items = items
        self.of_long, self.of_both = UserAttention(items.dim), UserAttention(items.dim)

    def build(self, user_shape: Any, short_shape: Any, long_shape: Any) -> None:
        if not self.items.built:
            self.items.build(short_shape)
        for attention in (self.of_long, self.of_both):
            attention.build(user_shape, (None, None, self.items.dim))

    def call(self, user: Any, short: Any, long: Any) -> Any:
        short = or_unknown(short)  # a session has no item if the user has none
        older = ops.not_equal(long, PADDING)
        summed = self.of_long(user, self.items(long), older)
        vectors = ops.concatenate([summed[:, None], self.items(short)], axis=1)
        present = ops.concatenate([ops.any(older, axis=1, keepdims=True), ops.not_equal(short, PADDING)], axis=1)
        return self.of_both(user, vectors, present)
