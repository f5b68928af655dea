"""NARM: what a session is about, and what of it the last item points to (Li et al., CIKM 2017, arXiv 1711.04725)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock import backends
from penstock.catalogue import Catalogue
from penstock.examples import PADDING, Schema
from penstock.layers.attention import AdditiveScores
from penstock.layers.by_length import ByLength
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.next_item import AfterAll, AfterEach
from penstock.retrieval import RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit.

    Attributes:
        units: width of the recurrent state.
        input_dropout, output_dropout: of the items' vectors, and of what the decoder reads.
    """

    dim: int = 64
    units: int = 64
    input_dropout: float = 0.25
    output_dropout: float = 0.5
    sample: int = 8192
    batch_size: int = 128
    learning_rate: float = 0.001


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """Both encoders' states against an item's vector, by a bilinear form.

    `P(i | i₁ … iₜ) = softmax(eᵢᵀ B cₜ)`, c of `GlobalAndLocal` (section 3.5); the query is `B cₜ` `[batch, dim]`, and
    an item the vector that it has in the history. The paper makes an example of every prefix of a session; here one
    reading of the whole gives them all.
    """
    (history,) = schema.named("history_items")
    inputs = inputs_of((history,))
    items = Embedding(schema.size("item_id"), config.dim, keras.initializers.RandomNormal(stddev=0.05), name="items")
    encoder = GlobalAndLocal(items, config, name="encoder")
    query = AfterAll(encoder, name="after_all")(inputs["history_items"])
    return Towers(keras.Model(inputs, query, name="query"), items, pairs=AfterEach(ByLength(encoder)))


class GlobalAndLocal(keras.layers.Layer):
    """Items `[batch, length]` → `B [hₜ; Σⱼ αₜⱼ hⱼ]` at each place t, `[batch, length, dim]` (eq. 4–9).

    h is a GRU's state, and `αₜⱼ = vᵀ σ(A₁ hₜ + A₂ hⱼ)` for j ≤ t, which is no softmax: how much of a session is about
    its purpose is not the same for all.
    """

    def __init__(self, items: Embedding, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.items = items
        self.recurrent = keras.layers.GRU(config.units, return_sequences=True)
        self.scores = AdditiveScores(config.units, "sigmoid")
        self.bilinear = keras.layers.Dense(config.dim, use_bias=False)
        self.input_dropout = keras.layers.Dropout(config.input_dropout)
        self.output_dropout = keras.layers.Dropout(config.output_dropout)

    def build(self, items_shape: Any) -> None:
        if not self.items.built:
            self.items.build(items_shape)
        units = self.recurrent.units
        self.recurrent.build((None, None, self.items.dim))
        self.scores.build((None, None, units), (None, None, units))
        self.bilinear.build((None, None, 2 * units))

    def call(self, items: Any, training: bool | None = None) -> Any:
        states = self.recurrent(self.input_dropout(self.items(items), training=training))
        places = ops.arange(ops.shape(items)[1])
        seen = ops.logical_and(places[:, None] >= places, ops.not_equal(items, PADDING)[:, None])
        weights = self.scores(states, states) * ops.cast(seen, states.dtype)
        both = ops.concatenate([states, ops.matmul(weights, states)], axis=-1)
        return self.bilinear(self.output_dropout(both, training=training))
