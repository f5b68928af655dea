"""AttRec: self-attention over the last items, metric learning for the user (Zhang et al. 2018, arXiv 1808.06414)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from penstock.catalogue import Catalogue
from penstock.examples import FIRST, PADDING, Schema
from penstock.layers.attention import attend, dot_product
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.metric import ItemPoints, in_ball
from penstock.layers.next_item import or_unknown
from penstock.retrieval import RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit; the paper's loss is `hinge`.

    Attributes:
        short: so many items are the short term, the last.
        long_term: ω, the weight of the distance between user and item beside that of the short term.
    """

    dim: int = 64
    short: int = 5
    long_term: float = 0.3
    loss: str = "hinge"
    sampler: str = "uniform"
    sample: int = 1024
    prefixes: int = 50
    dropout: float = 0.2


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """The nearer the better: `y = ω ‖U_u − Vᵢ‖² + (1 − ω) ‖m_u − Xᵢ‖²` (eq. 10), m of `ShortTerm`.

    As an inner product, the higher the better, it is `[2 ω U; 2 (1 − ω) m; 1] · [V; X; −ω ‖V‖² − (1 − ω) ‖X‖²]`, less
    what is the same for all items. U, V and X lie in unit balls; who is not known has U = 0.

    Raises:
        ValueError: a weight that is not in [0, 1].
    """
    if not 0.0 <= config.long_term <= 1.0:
        raise ValueError(f"long_term is a weight in [0, 1], not {config.long_term}")
    features = schema.named("user_id", "history_items")
    inputs = inputs_of(features)
    size, dim = schema.size("item_id"), config.dim
    items = TwoSpaces(ItemPoints(size, dim, biased=False), ItemPoints(size, dim, biased=False), config.long_term)
    user = KnownUser(schema.size("user_id"), dim, name="long_term")(inputs["user_id"])
    short = ShortTerm(items.short, config, name="short_term")(inputs["history_items"])
    weight = config.long_term
    query = ops.concatenate([2 * weight * user, 2 * (1 - weight) * short, ops.ones_like(user[:, :1])], axis=-1)
    return Towers(keras.Model(inputs, query, name="query"), items)


class TwoSpaces(keras.layers.Layer):
    """Item indices `[…]` → `[V; X; −ω ‖V‖² − (1 − ω) ‖X‖²]` `[…, 2 dim + 1]`."""

    def __init__(self, long: ItemPoints, short: ItemPoints, weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.long, self.short, self.weight = long, short, weight

    def build(self, indices_shape: Any) -> None:
        for points in (self.long, self.short):
            if not points.built:
                points.build(indices_shape)

    def call(self, indices: Any) -> Any:
        long, short = self.long(indices), self.short(indices)
        height = self.weight * long[..., -1:] + (1.0 - self.weight) * short[..., -1:]
        return ops.concatenate([long[..., :-1], short[..., :-1], height], axis=-1)


class KnownUser(keras.layers.Layer):
    """User indices `[batch]` → points in the unit ball, 0 for who is not known, `[batch, dim]`."""

    def __init__(self, users: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = Embedding(users, dim, keras.initializers.RandomNormal(stddev=0.5 * dim**-0.5))

    def build(self, users_shape: Any) -> None:
        self.table.build(users_shape)

    def call(self, users: Any) -> Any:
        return in_ball(self.table(users)) * ops.cast(users >= FIRST, self.compute_dtype)[:, None]


class ShortTerm(keras.layers.Layer):
    """Histories `[batch, length]` → m, the mean of the last items under self-attention, `[batch, dim]` (eq. 2–5).

    `m = 1/L Σₖ (softmax(Q Kᵀ / √d) X)ₖ`, `Q = ReLU((X + T) W_q)`, `K = ReLU((X + T) W_k)`: T says by sines and cosines
    how far back an item is, the values are the items as they are, and no item looks at itself, unless it is alone.
    """

    def __init__(self, points: ItemPoints, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.points = points
        self.short = config.short
        self.of_queries, self.of_keys = (keras.layers.Dense(points.dim, "relu", use_bias=False) for _ in range(2))
        self.dropout = keras.layers.Dropout(config.dropout)

    def build(self, items_shape: Any) -> None:
        if not self.points.built:
            self.points.build(items_shape)
        self.of_queries.build((None, None, self.points.dim))
        self.of_keys.build((None, None, self.points.dim))

    def call(self, items: Any, training: bool | None = None) -> Any:
        items = or_unknown(items)
        count = ops.sum(ops.cast(ops.not_equal(items, PADDING), "int32"), axis=1, keepdims=True)
        places = count - self.short + ops.arange(self.short, dtype="int32")  # of the last items, the last one last
        present = places >= 0
        vectors = self.points.at(ops.take_along_axis(items, ops.maximum(places, 0), axis=1))
        timed = self.dropout(vectors + sinusoids(self.short, self.points.dim), training=training)
        scores = dot_product(self.of_queries(timed), self.of_keys(timed))
        alone = ops.logical_and(count == 1, present)
        other = ops.logical_or(alone[:, :, None], ops.logical_not(ops.eye(self.short, dtype="bool")))
        scores = ops.where(other, scores, -1e9)
        found = attend(scores, vectors, present, present)
        return ops.sum(found, axis=1) / ops.cast(ops.minimum(count, self.short), found.dtype)


def sinusoids(length: int, dim: int) -> np.ndarray:
    """`sin(p / 10000^(2i/dim))` in the first half and the cosines in the second, float32 `[length, dim]` (eq. 6–7)."""
    rates = 10000.0 ** (-2.0 * np.arange(-(-dim // 2)) / dim)
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :dim].astype(np.float32)
