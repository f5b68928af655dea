"""Multi-gate mixture of experts (Ma et al., KDD 2018; Zhao et al., RecSys 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from penstock.examples import Schema
from penstock.layers.embedding import inputs_of
from penstock.layers.experts import ExpertMixture, Experts
from penstock.ranking import SIDES, RankConfig, Trunk, join, tower


@dataclass(frozen=True)
class Config(RankConfig):
    """Parameters of the model and of its fit.

    Attributes:
        gate_dropout: in training a gate leaves out each expert with this probability, so that none relies on one.
    """

    experts: int = 4
    expert_units: tuple[int, ...] = (96, 48)
    gate_dropout: float = 0.1


class Mixture(keras.layers.Layer):
    """A task's mixture of the experts, through its tower: `h_t(Σₑ g_{t,e}(x) fₑ(x))`, of `[x, f(x)]`."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mixture = ExpertMixture(config.experts, config.gate_dropout)
        self.tower = tower(config)

    def call(self, shared: Any, training: bool = False) -> Any:
        return self.tower(self.mixture(*shared, training=training), training=training)


def build(config: Config, schema: Schema) -> Trunk:
    """Experts read all there is; each task has a gate that mixes them and a tower.

    `y_t = h_t(Σₑ g_{t,e}(x) fₑ(x))` with `g_t = softmax(x W_t)` (Ma et al. 2018, eq. 5–7).
    """
    inputs = inputs_of(schema.of(*SIDES))
    vector = join(config, schema, inputs)
    outputs = Experts(config.experts, config.expert_units, config.activation, config.dropout_of_experts)(vector)
    mixtures = {task: Mixture(config, name=f"tower_{task}") for task in config.tasks}
    gates = {task: mixture.mixture.gates(vector) for task, mixture in mixtures.items()}
    return Trunk(keras.Model(inputs, [vector, outputs], name="shared"), mixtures, keras.Model(inputs, gates))
