"""Sparsely-gated mixture of experts, a gate a task (Shazeer et al., ICLR 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import keras
from keras import ops

from penstock.examples import Schema
from penstock.layers.embedding import inputs_of
from penstock.layers.sparse_experts import NoisyTopK, SparseExperts
from penstock.ranking import SIDES, RankConfig, Trunk, join, tower


@dataclass(frozen=True)
class Config(RankConfig):
    """Parameters of the model and of its fit.

    Attributes:
        asked: so many of the experts a task asks for a row, those its gate prefers.
        importance, load: weights of the losses that keep all experts in use.
    """

    experts: int = 16
    asked: int = 2
    expert_units: tuple[int, ...] = (96, 48)
    importance: float = 0.1
    load: float = 0.1


def build(config: Config, schema: Schema) -> Trunk:
    """Of many experts each task asks a few for each row: `y_t = h_t(Σₑ G_t(x)ₑ fₑ(x))`, most of the G are 0."""
    inputs = inputs_of(schema.of(*SIDES))
    vector = join(config, schema, inputs)
    gates = {
        task: NoisyTopK(config.experts, config.asked, config.importance, config.load)(vector) for task in config.tasks
    }
    experts = SparseExperts(config.experts, config.expert_units, config.activation, config.dropout_of_experts)
    mixed = experts(vector, ops.stack([*gates.values()], axis=1))
    shared = {task: mixed[:, place] for place, task in enumerate(config.tasks)}
    return Trunk(
        keras.Model(inputs, shared, name="shared"),
        {task: tower(config) for task in config.tasks},
        keras.Model(inputs, gates),
    )
