"""GRU4Rec: a recurrent network over the history (Hidasi et al., ICLR 2016, arXiv 1511.06939; CIKM 2018, 1706.03847)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock import backends
from penstock.catalogue import Catalogue
from penstock.examples import Schema
from penstock.layers.by_length import ByLength
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.next_item import AfterAll, AfterEach
from penstock.retrieval import BiasedItems, RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit.

    Attributes:
        layers: recurrent layers one on the other.
        units: width of each; the last one's state is brought to `dim`.
        tied: an item of the history has the vector by which it is scored (the paper's constrained embedding), of `dim`.
    """

    dim: int = 64
    layers: int = 1
    units: int = 64
    tied: bool = True
    dropout: float = 0.2
    sample: int = 8192
    batch_size: int = 128
    learning_rate: float = 0.001


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """The state after the last item; the query is `[hₙ; 1]` `[batch, dim + 1]`, an item `[wᵢ; bᵢ]`.

    `P(i | i₁ … iₙ) = softmax(wᵢ · hₙ + bᵢ)`, h of `Recurrent`; or, by `loss`, what ranks the next item above samples:
    `top1_max` or `bpr_max`. The paper trains sessions in parallel, of each the next step, because sessions are of any
    length; here a batch is whole histories cut to the longest, of which all steps learn, with their whole past.
    """
    (history,) = schema.named("history_items")
    inputs = inputs_of((history,))
    items = BiasedItems(schema.size("item_id"), config.dim, name="items")
    own = Embedding(schema.size("item_id"), config.dim, keras.initializers.RandomUniform(-0.05, 0.05))
    encoder = Recurrent(items if config.tied else own, config, name="encoder")
    query = AfterAll(encoder, name="after_all")(inputs["history_items"])
    return Towers(keras.Model(inputs, query, name="query"), items, pairs=AfterEach(ByLength(encoder)))


class Recurrent(keras.layers.Layer):
    """Items `[batch, length]` → states `[batch, length, dim + 1]`: `[W GRU(D(x)) + b; 1]` of the items' vectors x.

    The GRU is that of Cho et al. (EMNLP 2014) as Keras has it, its reset gate behind the product.
    """

    def __init__(self, items: keras.layers.Layer, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.items = items
        self.dim = config.dim
        self.recurrent = [keras.layers.GRU(config.units, return_sequences=True) for _ in range(config.layers)]
        self.projection = keras.layers.Dense(config.dim)
        self.dropout = keras.layers.Dropout(config.dropout)

    def build(self, items_shape: Any) -> None:
        if not self.items.built:
            self.items(ops.zeros((1,), "int32"))
        width = self.dim
        for gru in self.recurrent:
            gru.build((None, None, width))
            width = gru.units
        self.projection.build((None, None, width))

    def call(self, items: Any, training: bool | None = None) -> Any:
        vectors = self.dropout(self.items(items)[..., : self.dim], training=training)
        for gru in self.recurrent:
            vectors = gru(vectors)
        states = self.projection(self.dropout(vectors, training=training))
        return ops.concatenate([states, ops.ones_like(states[..., :1])], axis=-1)
