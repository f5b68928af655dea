"""YouTube's ranking network (Covington, Adams & Sargin, RecSys 2016, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import keras
from keras import ops

from penstock.examples import Schema
from penstock.layers.embedding import embed, inputs_of
from penstock.layers.quantile import Cumulative
from penstock.ranking import SIDES, RankConfig, Trunk, dense, tower, withheld


@dataclass(frozen=True)
class Config(RankConfig):
    """Parameters of the model and of its fit."""

    hidden: tuple[int, ...] = (256, 128)


def build(config: Config, schema: Schema) -> Trunk:
    """`y_t = h_t(MLP([embeddings; x̃; x̃²; √x̃]))`: ids of one space share a table, numbers are their quantiles.

    The paper learns one task, expected watch time by weighted logistic regression: here `watch_time` is that head, and
    the others stand beside it. User and item meet in the MLP alone.
    """
    features = schema.of(*SIDES)
    inputs = inputs_of(features)
    numbers = [feature for feature in features if feature.kind in ("count", "number")]
    ids = tuple(feature for feature in features if feature not in numbers)
    parts = embed(withheld(config, schema, inputs), ids, schema, config.dim, config.embedding_scale)
    parts += [Cumulative(schema.quantiles[feature.name].tolist())(inputs[feature.name]) for feature in numbers]
    shared = dense(config, schema, config.hidden)(ops.concatenate(parts, axis=-1))
    return Trunk(keras.Model(inputs, shared, name="shared"), {task: tower(config) for task in config.tasks})
