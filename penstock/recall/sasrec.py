"""SASRec: self-attention over a history, learnt at each of its places (Kang & McAuley, ICDM 2018, arXiv 1808.09781)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock.catalogue import Catalogue
from penstock.examples import PADDING, Schema
from penstock.layers.attention import Transformer
from penstock.layers.by_length import ByLength
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.next_item import AfterAll, AfterEach, Places
from penstock.retrieval import RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit.

    Attributes:
        blocks: transformers one on the other.
        heads: of each of them.
        units: width of the network of each place; 0 for that of the vectors, as in the paper.
    """

    dim: int = 64
    blocks: int = 2
    heads: int = 1
    units: int = 0
    dropout: float = 0.3
    sample: int = 8192
    learning_rate: float = 0.001
    batch_size: int = 128


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """The state after the last item, of which each looks at those before it; an item is its vector in the history.

    `P(i | i₁ … iₙ) = softmax(eᵢ · hₙ)`, h of `CausalAttention`. The paper has one negative an item and its logistic
    loss; the softmax is what made it strong (Klenitskiy & Vasilev, RecSys 2023, arXiv 2309.07602).
    """
    (history,) = schema.named("history_items")
    inputs = inputs_of((history,))
    items = Embedding(schema.size("item_id"), config.dim, _small(), name="items")
    encoder = CausalAttention(items, history.length + 1, config, name="encoder")
    query = AfterAll(encoder, name="after_all")(inputs["history_items"])
    return Towers(keras.Model(inputs, query, name="query"), items, pairs=AfterEach(ByLength(encoder)))


class CausalAttention(keras.layers.Layer):
    """Items `[batch, length]` → states `[batch, length, dim]`: `h = norm(blocks(D(√dim eᵢ + pₖ)))` (sections 3.1–3.3).

    Args:
        length: the most items there are, the one that begins included.
    """

    def __init__(self, items: Embedding, length: int, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items = items
        self.places = Places(length, config.dim, _small())
        self.blocks = [
            Transformer(
                config.heads,
                config.dim,
                config.units or config.dim,
                "relu",
                config.dropout,
                causal=True,
                norm_first=True,
                initializer=_small(),
            )
            for _ in range(config.blocks)
        ]
        self.norm = keras.layers.LayerNormalization(epsilon=1e-6)
        self.dropout = keras.layers.Dropout(config.dropout)

    def build(self, items_shape: Any) -> None:
        for layer in (self.items, self.places):
            if not layer.built:
                layer.build(items_shape)
        shape = (*items_shape, self.items.dim)
        for layer in (*self.blocks, self.norm):
            layer.build(shape)

    def call(self, items: Any, training: bool | None = None) -> Any:
        present = ops.not_equal(items, PADDING)
        vectors = self.items.dim**0.5 * self.items(items) + self.places(items)
        vectors = self.dropout(vectors, training=training)
        for block in self.blocks:
            vectors = block(vectors, present, training=training)
        return self.norm(vectors)


def _small() -> keras.initializers.Initializer:
    """A normal distribution of deviation 0.02: at first a state is little else than its item's vector.

    What is near an item is thus likely to come next before anything is learnt of how items go on; from kernels of
    variance 1/dim a state starts as a random image of all items, and most of training goes into the way back.
    """
    return keras.initializers.RandomNormal(stddev=0.02)
