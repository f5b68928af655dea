from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.examples import Schema, read_slice
from penstock.layers.embedding import Embedding
from penstock.rank.mmoe import Config, build
from penstock.ranking import SIDES, join

SMALL = {"dim": 4, "match": 3, "expert_units": (6, 5), "tasks": ("click", "long_view", "like")}


@pytest.fixture(scope="module")
def schema(examples) -> Schema:
    return Schema.load(examples / "schema")


@pytest.fixture(scope="module")
def encoded(examples, schema) -> dict[str, np.ndarray]:
    return schema.encode_rows(read_slice(examples, "test").head(8), *SIDES)


def _shared(config: Config, schema: Schema, encoded: dict[str, np.ndarray]) -> tuple[keras.Model, dict]:
    keras.utils.set_random_seed(1)
    model = build(config, schema).shared
    return model, {tensor.name: encoded[tensor.name] for tensor in model.inputs}


def test_an_expert_learns_of_its_own_set_of_embeddings_alone(schema, encoded):
    model, inputs = _shared(Config(experts=4, embeddings=2, **SMALL), schema, encoded)
    tables = [layer.table.value for layer in model.layers if isinstance(layer, Embedding)]
    for expert, others in enumerate([slice(4, 8), slice(4, 8), slice(0, 4), slice(0, 4)]):
        with tf.GradientTape() as tape:
            of_expert = tf.reduce_sum(tf.square(model(inputs)[1][:, expert]))
        gradients = [tf.convert_to_tensor(found).numpy() for found in tape.gradient(of_expert, tables)]
        assert all(not found[:, others].any() for found in gradients)
        assert sum(np.abs(found).sum() for found in gradients) > 0


def test_gates_read_every_set(schema, encoded):
    model, inputs = _shared(Config(experts=3, embeddings=3, **SMALL), schema, encoded)
    everything, outputs = model(inputs)
    one = keras.Model(model.inputs, join(Config(**SMALL), schema, {tensor.name: tensor for tensor in model.inputs}))
    assert everything.shape == (8, 3 * one.output.shape[1])
    assert outputs.shape == (8, 3, 5)


def test_experts_are_shared_evenly_by_sets_or_refused(schema):
    with pytest.raises(ValueError, match="7 experts cannot be shared evenly by 2 sets"):
        build(Config(experts=7, embeddings=2, **SMALL), schema)
    with pytest.raises(ValueError, match="0 sets"):
        build(Config(experts=7, embeddings=0, **SMALL), schema)
