"""Shared-Bottom: one MLP for all tasks, and a tower each (Caruana, Machine Learning 28, 1997)."""

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
    """`y_t = h_t(f(x))`: what all tasks share is as good for one as for the other, or worse for both."""
    inputs = inputs_of(schema.of(*SIDES))
    shared = dense(config, schema, config.bottom_units)(join(config, schema, inputs))
    return Trunk(keras.Model(inputs, shared, name="shared"), {task: tower(config) for task in config.tasks})
