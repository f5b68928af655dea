from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.examples import Schema, read_slice
from penstock.layers.embedding import Embedding
from penstock.layers.experts import Experts
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


def test_a_task_teaches_its_own_experts_and_embeddings_alone(schema, encoded):
    config = Config(experts=2, **SMALL)
    keras.utils.set_random_seed(1)
    trunk = build(config, schema)
    inputs = {tensor.name: encoded[tensor.name] for tensor in trunk.shared.inputs}
    tables = [layer.table.value for layer in trunk.shared.layers if isinstance(layer, Embedding)]
    kernels = [layer.kernels[0].value for layer in trunk.shared.layers if isinstance(layer, Experts)]
    assert len(kernels) == 3
    for place, task in enumerate(config.tasks):
        with tf.GradientTape() as tape:
            of_task = tf.reduce_sum(tf.square(trunk.towers[task](trunk.shared(inputs)[task])))
        of_tables, of_kernels = tape.gradient(of_task, (tables, kernels))
        own = slice(4 * place, 4 * (place + 1))
        for found in (tf.convert_to_tensor(one).numpy() for one in of_tables):
            assert not np.delete(found, own, axis=1).any()
        assert sum(np.abs(tf.convert_to_tensor(one).numpy()[:, own]).sum() for one in of_tables) > 0
        assert [found is not None and bool(np.any(found)) for found in of_kernels] == [
            other == task for other in config.tasks
        ]


def test_a_task_reads_the_experts_of_all(schema, encoded):
    config = Config(experts=2, **SMALL)
    trunk = build(config, schema)
    inputs = {tensor.name: encoded[tensor.name] for tensor in trunk.shared.inputs}
    shared = trunk.shared(inputs)
    outputs = np.asarray(shared["click"][1])
    assert outputs.shape == (8, 6, 5)
    assert all(np.array_equal(outputs, shared[task][1]) for task in config.tasks)
    gates = {task: np.asarray(found) for task, found in trunk.gates(inputs).items()}
    assert {task: found.shape for task, found in gates.items()} == dict.fromkeys(config.tasks, (8, 6))
    mixed = np.sum(gates["like"][:, :, None] * outputs, axis=1)
    tower = trunk.towers["like"]
    np.testing.assert_allclose(tower(shared["like"]), tower.tower(mixed), rtol=1e-5)


def test_a_gate_departs_from_a_share_of_the_task_s_own_experts(schema, encoded):
    config = Config(experts=2, own_share=0.6, **SMALL)
    trunk = build(config, schema)
    for tower in trunk.towers.values():
        tower.mixture.gate.kernel.assign(tf.zeros_like(tower.mixture.gate.kernel))
    gates = trunk.gates({tensor.name: encoded[tensor.name] for tensor in trunk.gates.inputs})
    for place, task in enumerate(config.tasks):
        expected = np.insert(np.full(4, 0.1), 2 * place, [0.3, 0.3])
        np.testing.assert_allclose(gates[task], np.tile(expected, (8, 1)), rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_task_begins_with_some_of_its_own_and_some_of_the_others(schema, share):
    with pytest.raises(ValueError, match=f"own_share is a part of 1, not {share}"):
        build(Config(own_share=share, **SMALL), schema)


def test_shared_experts_learn_from_every_task_and_read_one_set(schema, encoded):
    config = Config(own=False, experts=4, **SMALL)
    trunk = build(config, schema)
    inputs = {tensor.name: encoded[tensor.name] for tensor in trunk.shared.inputs}
    vector, outputs = trunk.shared(inputs)
    one = keras.Model(trunk.shared.inputs, join(config, schema, {of.name: of for of in trunk.shared.inputs}))
    assert vector.shape == (8, one.output.shape[1])
    assert outputs.shape == (8, 4, 5)
    (kernel,) = [layer.kernels[0].value for layer in trunk.shared.layers if isinstance(layer, Experts)]
    for task in config.tasks:
        with tf.GradientTape() as tape:
            of_task = tf.reduce_sum(tf.square(trunk.towers[task](trunk.shared(inputs))))
        by_expert = np.asarray(tape.gradient(of_task, kernel)).reshape(-1, 4, 6)
        assert np.abs(by_expert).sum(axis=(0, 2)).all()
