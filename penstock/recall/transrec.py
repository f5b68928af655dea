"""TransRec: a user as a translation from one item to the next (He, Kang & McAuley, RecSys 2017, arXiv 1707.02410)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock.catalogue import Catalogue
from penstock.examples import FIRST, PADDING, Schema
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.metric import ItemPoints
from penstock.layers.next_item import or_unknown
from penstock.retrieval import RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit; the paper's loss is `bpr`."""

    dim: int = 64
    loss: str = "bpr"
    sampler: str = "uniform"
    sample: int = 1024
    prefixes: int = 50


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """The last item, moved by the user, beside the next: `s(u, i, j) = βⱼ − ‖γᵢ + t + t_u − γⱼ‖²` (eq. 4).

    As an inner product it is `[2 x; 1] · [γⱼ; βⱼ − ‖γⱼ‖²]` with `x = γᵢ + t + t_u`, less `‖x‖²`, which is the same for
    all items j. t is of all users, and `t_u`, which starts at 0, one's own: who is not known is moved as all are.
    γ lies in the unit ball. Without any item a user has the unknown one.
    """
    features = schema.named("user_id", "history_items")
    inputs = inputs_of(features)
    points = ItemPoints(schema.size("item_id"), config.dim, name="items")
    moved = Moved(points, schema.size("user_id"), name="moved")(inputs["user_id"], inputs["history_items"])
    query = ops.concatenate([2.0 * moved, ops.ones_like(moved[:, :1])], axis=-1)
    return Towers(keras.Model(inputs, query, name="query"), points)


class Moved(keras.layers.Layer):
    """Users `[batch]` and histories `[batch, length]` → `γᵢ + t + t_u` of the last item i, `[batch, dim]`."""

    def __init__(self, points: ItemPoints, users: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.points = points
        self.of_users = Embedding(users, points.dim, "zeros")

    def build(self, users_shape: Any, items_shape: Any) -> None:
        if not self.points.built:
            self.points.build(items_shape)
        self.of_users.build(users_shape)
        self.of_all = self.add_weight((self.points.dim,), keras.initializers.RandomNormal(stddev=0.01), name="of_all")

    def call(self, users: Any, items: Any) -> Any:
        items = or_unknown(items)
        count = ops.sum(ops.cast(ops.not_equal(items, PADDING), "int32"), axis=1, keepdims=True)
        last = ops.take_along_axis(items, count - 1, axis=1)[:, 0]
        known = ops.cast(users >= FIRST, self.compute_dtype)[:, None]
        return self.points.at(last) + self.of_all + known * self.of_users(users)
