"""YouTubeDNN candidate generation (Covington, Adams & Sargin, RecSys 2016, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from penstock.examples import Schema
from penstock.layers.embedding import embed, inputs_of
from penstock.retrieval import BiasedItems, Retrieval
from penstock.samplers import Unigram
from penstock.training import Settings


@dataclass(frozen=True)
class Config:
    """Parameters of the model and of its fit."""

    dim: int = 32
    hidden: tuple[int, ...] = (128, 64)
    activation: str = "relu"
    dropout: float = 0.1
    sample: int = 1024
    power: float = 0.5
    epochs: int = 12
    batch_size: int = 512
    learning_rate: float = 0.003
    patience: int = 2

    @property
    def settings(self) -> Settings:
        return Settings(self.epochs, self.batch_size, self.learning_rate, self.patience)


def build(config: Config, schema: Schema, counts: np.ndarray, seed: int) -> Retrieval:
    """The towers: averaged histories and profile, concatenated, through an MLP; the last layer is the user's vector.

    `u = MLP([mean(history); profile])`, `P(i | user) = softmax(wᵢ · u + bᵢ)`; the query is `[u; 1]` `[batch, dim + 1]`
    and the item vectors are `[wᵢ; bᵢ]`.

    Args:
        counts: how often each item index is a positive in training, `[items]`.
    """
    features = tuple(feature for feature in schema.of("user") if feature.name != "user_id")
    inputs = inputs_of(features)
    hidden = ops.concatenate(embed(inputs, features, schema, config.dim), axis=-1)
    for units in config.hidden:
        hidden = keras.layers.Dense(units, config.activation)(hidden)
        hidden = keras.layers.Dropout(config.dropout)(hidden)
    user = keras.layers.Dense(config.dim)(hidden)
    query = ops.concatenate([user, ops.ones_like(user[:, :1])], axis=-1)
    return Retrieval(
        keras.Model(inputs, query, name="query"),
        BiasedItems(schema.size("item_id"), config.dim, name="items"),
        Unigram(counts, config.power, seed),
        config.sample,
    )
