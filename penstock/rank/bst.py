"""BST: a transformer over the history and the item that is asked for (Chen et al., DLP-KDD 2019, arXiv 1905.06874)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock.examples import PADDING, Schema
from penstock.layers.attention import Transformer
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.next_item import Places, appended
from penstock.ranking import SIDES, RankConfig, Trunk, dense, join, tower


@dataclass(frozen=True)
class Config(RankConfig):
    """Parameters of the model and of its fit.

    Attributes:
        recent: so many items of the history are read, the last.
        heads: of the transformer.
        hidden: layers over the sequence and the other features.
    """

    recent: int = 20
    heads: int = 4
    hidden: tuple[int, ...] = (256, 128)


def build(config: Config, schema: Schema) -> Trunk:
    """`y_t = h_t(MLP([x; Transformer(history, item)]))`, x all other features (section 2).

    The item stands behind the history, so that both look at each other; what the item's place has become, and the mean
    of the places of the history, are read. The paper tells places by how long ago each was; here they are counted from
    the end, as a request for ranking has no times of the history.
    """
    inputs = inputs_of(schema.of(*SIDES))
    sequence = BehaviourSequence(schema.size("item_id"), config, name="sequence")
    read = sequence(inputs["history_items"], inputs["item_id"])
    vector = ops.concatenate([join(config, schema, inputs), read], axis=-1)
    shared = dense(config, schema, config.hidden)(vector)
    return Trunk(keras.Model(inputs, shared, name="shared"), {task: tower(config) for task in config.tasks})


class BehaviourSequence(keras.layers.Layer):
    """Histories `[batch, length]` and items `[batch]` → `[z of the item; mean z of the history]`, `[batch, 2 dim]`.

    z are the places of one transformer over both, of the items' vectors and those of the places.
    """

    def __init__(self, size: int, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recent = config.recent
        scale = config.embedding_scale
        self.items = Embedding(size, config.dim, keras.initializers.RandomUniform(-scale, scale))
        self.places = Places(config.recent + 1, config.dim, keras.initializers.RandomUniform(-scale, scale))
        self.block = Transformer(config.heads, config.dim, 4 * config.dim, "leaky_relu", config.dropout_of_experts)

    def build(self, history_shape: Any, items_shape: Any) -> None:
        self.items.build(history_shape)
        self.places.build(history_shape)
        self.block.build((None, None, self.items.dim))

    def call(self, history: Any, items: Any, training: bool | None = None) -> Any:
        count = ops.sum(ops.cast(ops.not_equal(history, PADDING), "int32"), axis=1, keepdims=True)
        places = ops.maximum(count - self.recent, 0) + ops.arange(self.recent, dtype="int32")
        inside = places < count
        recent = ops.where(inside, ops.take_along_axis(history, ops.where(inside, places, 0), axis=1), PADDING)
        lengths = ops.minimum(count[:, 0], self.recent)
        # an item that is not known, or not told, still has a place to look from
        sequence = appended(recent, lengths, ops.maximum(items, 1))
        present = ops.not_equal(sequence, PADDING)
        found = self.block(self.items(sequence) + self.places(sequence), present, training=training)
        own = ops.take_along_axis(found, ops.cast(lengths, "int32")[:, None, None], axis=1)[:, 0]
        weights = ops.cast(inside, found.dtype)
        mean = ops.einsum("bld,bl->bd", found[:, :-1], weights) / ops.maximum(ops.sum(weights, axis=1), 1.0)[:, None]
        return ops.concatenate([own, mean], axis=-1)
