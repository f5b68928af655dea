"""A DNN for each task, which share nothing: what multi-task models are held against."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from penstock.examples import Schema
from penstock.layers.embedding import inputs_of
from penstock.ranking import SIDES, RankConfig, Trunk, dense, join, tower


@dataclass(frozen=True)
class Config(RankConfig):
    """Parameters of the model and of its fit."""

    bottom_units: tuple[int, ...] = (256, 96)


def build(config: Config, schema: Schema) -> Trunk:
    """`y_t = h_t(f_t(x))`, embeddings included: nets that are trained side by side and stopped together."""
    inputs = inputs_of(schema.of(*SIDES))
    bottoms = {task: dense(config, schema, config.bottom_units)(join(config, schema, inputs)) for task in config.tasks}
    return Trunk(keras.Model(inputs, bottoms, name="shared"), {task: tower(config) for task in config.tasks})
