"""Multi-gate mixture of experts over click, long view and like (Ma et al., KDD 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import keras
from keras import ops

from penstock.events import LABELS
from penstock.examples import Schema
from penstock.layers.embedding import embed, inputs_of
from penstock.layers.experts import ExpertMixture
from penstock.training import Settings


@dataclass(frozen=True)
class Config:
    """Parameters of the model and of its fit."""

    dim: int = 16
    experts: int = 4
    expert_units: tuple[int, ...] = (96, 48)
    tower_units: tuple[int, ...] = (24,)
    activation: str = "relu"
    dropout: float = 0.1
    epochs: int = 3
    batch_size: int = 512
    learning_rate: float = 0.002
    patience: int = 1

    @property
    def settings(self) -> Settings:
        return Settings(self.epochs, self.batch_size, self.learning_rate, self.patience)


def build(config: Config, schema: Schema) -> keras.Model:
    """Encoded features by name → the probability of each label by name, `[batch]`.

    `p_t = σ(h_t(Σₑ g_{t,e}(x) fₑ(x)))` with `x` the concatenated embeddings and numbers.
    """
    inputs = inputs_of(schema.features)
    joined = ops.concatenate(embed(inputs, schema.features, schema, config.dim), axis=-1)
    experts = []
    for _ in range(config.experts):
        hidden = joined
        for units in config.expert_units:
            hidden = keras.layers.Dense(units, config.activation)(hidden)
            hidden = keras.layers.Dropout(config.dropout)(hidden)
        experts.append(hidden)
    outputs = ops.stack(experts, axis=1)
    heads = {}
    for label in LABELS:
        hidden = ExpertMixture(config.experts, name=f"mixture_{label}")(joined, outputs)
        for units in config.tower_units:
            hidden = keras.layers.Dense(units, config.activation)(hidden)
        heads[label] = keras.layers.Reshape((), name=label)(keras.layers.Dense(1, "sigmoid")(hidden))
    return keras.Model(inputs, heads)
