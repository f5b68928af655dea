from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from penstock.layers.experts import ExpertMixture, Experts, polarised, spread, utilisation


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _filled(layer, seed, *inputs):
    """Builds a layer on inputs, and gives every weight random values."""
    layer(*inputs)
    random = np.random.default_rng(seed)
    layer.set_weights([random.normal(0.0, 0.7, weight.shape) for weight in layer.get_weights()])
    return layer


def _mixture(experts, width=4, **arguments):
    layer = ExpertMixture(experts, **arguments)
    layer.build((None, width))
    layer.gate.kernel.assign(_normal(7, width, experts))
    return layer


def _softmax(logits):
    terms = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return terms / terms.sum(axis=-1, keepdims=True)


def _perceptron(x, matrices, biases):
    for matrix, bias in zip(matrices, biases, strict=True):
        x = np.maximum(x @ matrix + bias, 0.0)
    return x


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("units", [(4,), (4, 2), (3, 5, 2)])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_experts_are_perceptrons_of_their_own(experts, units, batch):
    inputs = _normal(0, batch, 6)
    layer = _filled(Experts(experts, units), 1, inputs)
    kernels, biases = ([np.asarray(weight) for weight in weights] for weights in (layer.kernels, layer.biases))
    found = np.asarray(layer(inputs))
    for expert in range(experts):
        own = slice(expert * units[0], (expert + 1) * units[0])
        matrices = [kernels[0][:, own], *(kernel[expert] for kernel in kernels[1:])]
        shifts = [biases[0][own], *(bias[expert, 0] for bias in biases[1:])]
        for row in range(batch):
            expected = _perceptron(inputs[row], matrices, shifts)
            np.testing.assert_allclose(found[row, expert], expected, rtol=1e-4, atol=1e-5)


def test_each_expert_starts_as_a_dense_layer_of_its_own_would():
    keras.utils.set_random_seed(3)
    layer = Experts(5, (8, 6))
    layer.build((None, 10))
    for kernel, width, units in ((layer.kernels[0], 10, 8), (layer.kernels[1], 8, 6)):
        values = np.asarray(kernel)
        assert np.abs(values).max() == pytest.approx(np.sqrt(6 / (width + units)), rel=0.02)
    first = np.asarray(layer.kernels[0]).reshape(10, 5, 8)
    assert not np.array_equal(first[:, 0], first[:, 1])


def test_the_gradient_of_an_expert_is_of_its_own_output():
    inputs = tf.constant(_normal(0, 4, 3))
    layer = _filled(Experts(3, (4, 2)), 1, inputs)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(inputs)[:, 1])
    first, second = tape.gradient(loss, [kernel.value for kernel in layer.kernels])
    assert np.flatnonzero(np.abs(second).sum(axis=(1, 2))).tolist() == [1]
    assert np.flatnonzero(np.abs(first).sum(axis=0).reshape(3, 4).sum(axis=1)).tolist() == [1]


def test_experts_drop_units_in_training_alone():
    inputs = _normal(0, 200, 3)
    layer = _filled(Experts(2, (8,), "linear", dropout=0.25), 1, inputs)
    plain, dropped = np.asarray(layer(inputs)), np.asarray(layer(inputs, training=True))
    np.testing.assert_array_equal(plain, np.asarray(layer(inputs, training=False)))
    assert np.mean(dropped == 0.0) == pytest.approx(0.25, abs=0.03)
    kept = dropped != 0.0
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75, rtol=1e-5)


@pytest.mark.parametrize(("experts", "units"), [(0, (4,)), (3, ())])
def test_experts_without_an_expert_or_a_layer_are_refused(experts, units):
    with pytest.raises(ValueError, match="at least one expert and one layer"):
        Experts(experts, units)


@pytest.mark.parametrize("training", [False, True])
def test_one_expert_is_a_shared_bottom(training):
    outputs = _normal(0, 50, 1, 3)
    mixed = ExpertMixture(1, gate_dropout=0.5)(np.ones((50, 4), np.float32), outputs, training=training)
    np.testing.assert_allclose(np.asarray(mixed), outputs[:, 0], rtol=1e-6)


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_mixture_is_the_softmax_of_the_gate(experts, batch, seed):
    inputs, outputs = _normal(seed, batch, 4), _normal(seed + 9, batch, experts, 2)
    layer = _mixture(experts)
    gates = _softmax(inputs @ np.asarray(layer.gate.kernel))
    np.testing.assert_allclose(np.asarray(layer.gates(inputs)), gates, rtol=1e-5)
    for row in range(batch):
        expected = sum(gates[row, expert] * outputs[row, expert] for expert in range(experts))
        np.testing.assert_allclose(np.asarray(layer(inputs, outputs))[row], expected, rtol=1e-4, atol=1e-6)


def test_a_gate_departs_from_the_shares_that_it_is_given():
    start, inputs = [0.5, 0.3, 0.2], _normal(0, 5, 4)
    layer = ExpertMixture(3, start=start)
    layer.build((None, 4))
    expected = np.array(start) * np.exp(inputs @ np.asarray(layer.gate.kernel))
    np.testing.assert_allclose(layer.gates(inputs), expected / expected.sum(axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(layer.gates(np.zeros((2, 4), np.float32)), [start] * 2, rtol=1e-5)
    even, plain = ExpertMixture(3, start=[1 / 3] * 3), ExpertMixture(3)
    for each in (even, plain):
        each.build((None, 4))
        each.gate.kernel.assign(layer.gate.kernel)
    np.testing.assert_allclose(even.gates(inputs), plain.gates(inputs), rtol=1e-5)


@pytest.mark.parametrize("start", [[0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.5, 0.5]])
def test_shares_to_depart_from_are_those_of_all_experts(start):
    with pytest.raises(ValueError, match="3 experts are so many positive numbers of sum 1"):
        ExpertMixture(3, start=start)


def test_the_gradient_of_the_gate():
    # d/dlogitₑ Σ_j g_j f_j = gₑ (fₑ − Σ_j g_j f_j)
    layer = _mixture(3, width=3)
    layer.gate.kernel.assign(np.eye(3, dtype=np.float32))
    logits, outputs = tf.constant(_normal(0, 4, 3)), _normal(1, 4, 3, 1)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        total = tf.reduce_sum(layer(logits, outputs))
    gates, values = _softmax(logits.numpy()), outputs[:, :, 0]
    expected = gates * (values - (gates * values).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(tape.gradient(total, logits), expected, rtol=1e-4, atol=1e-6)


def test_what_is_left_after_gate_dropout_is_renormalised():
    inputs = _normal(0, 2000, 4)
    layer = _mixture(3, gate_dropout=0.3, seed=5)
    plain, dropped = np.asarray(layer.gates(inputs)), np.asarray(layer.gates(inputs, training=True))
    kept = dropped > 0.0
    expected = np.where(kept, plain, 0.0)
    np.testing.assert_allclose(dropped, expected / expected.sum(axis=1, keepdims=True), rtol=1e-4)
    # rows of which all fall (0.3³) keep all
    assert np.mean(~kept) == pytest.approx(0.3 - 0.3**3, abs=0.02)
    assert np.mean(kept.all(axis=1)) == pytest.approx(0.7**3 + 0.3**3, abs=0.03)
    assert len(np.unique(kept, axis=0)) == 7  # every row for itself, and none that is empty


def test_the_mean_under_gate_dropout_is_that_of_all_the_ways_to_drop():
    layer = _mixture(2, width=2, gate_dropout=0.2, seed=1)
    layer.gate.kernel.assign(np.eye(2, dtype=np.float32))
    share = 0.9
    inputs = np.tile(np.log([[share, 1.0 - share]]).astype(np.float32), (40_000, 1))
    both, one = 0.8**2 + 0.2**2, 0.8 * 0.2
    assert float(np.mean(layer.gates(inputs, training=True)[:, 0])) == pytest.approx(both * share + one, abs=0.005)


def test_an_expert_that_a_row_dropped_learns_nothing_from_it():
    layer = _mixture(3, gate_dropout=0.4, seed=2)
    inputs, outputs = tf.constant(_normal(0, 30, 4)), tf.constant(_normal(1, 30, 3, 2))
    twin = _mixture(3, gate_dropout=0.4, seed=2)
    dropped = np.asarray(twin.gates(inputs, training=True)) == 0.0
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        loss = tf.reduce_sum(tf.square(layer(inputs, outputs, training=True)))
    learns = np.abs(tape.gradient(loss, outputs)).sum(axis=2) > 0.0
    assert dropped.any()
    np.testing.assert_array_equal(learns, ~dropped)


def test_the_same_seed_drops_the_same():
    inputs, outputs = _normal(0, 20, 4), _normal(1, 20, 3, 2)
    first, same, other = (_mixture(3, gate_dropout=0.5, seed=seed) for seed in (4, 4, 5))
    one, two = ([np.asarray(layer(inputs, outputs, training=True)) for _ in range(2)] for layer in (first, same))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(*one)
    assert not np.array_equal(one[0], np.asarray(other(inputs, outputs, training=True)))
    np.testing.assert_array_equal(first(inputs, outputs), other(inputs, outputs))


def test_gates_of_any_size_stay_finite():
    layer = _mixture(3, width=3, gate_dropout=0.5, seed=0)
    layer.gate.kernel.assign(1e4 * np.eye(3, dtype=np.float32))
    gates = np.asarray(layer.gates(_normal(0, 500, 3), training=True))
    np.testing.assert_allclose(gates.sum(axis=1), 1.0, rtol=1e-5)


@given(arrays(np.float32, (6, 3), elements=st.floats(-30, 30, width=32)), st.booleans())
@settings(max_examples=30, deadline=None)
def test_gates_are_shares(inputs, training):
    gates = np.asarray(_mixture(4, width=3, gate_dropout=0.5).gates(inputs, training=training))
    assert (gates >= 0.0).all()
    np.testing.assert_allclose(gates.sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("gate_dropout", [-0.1, 1.0])
def test_a_gate_dropout_is_a_probability_below_one(gate_dropout):
    with pytest.raises(ValueError, match="probability below 1"):
        ExpertMixture(3, gate_dropout)


def test_the_gates_of_a_functional_model_can_be_read():
    inputs = keras.Input((4,))
    layer = ExpertMixture(3, name="mixture")
    model = keras.Model(inputs, layer(inputs, Experts(3, (5, 2))(inputs)))
    reader = keras.Model(inputs, model.get_layer("mixture").gates(inputs))
    values = _normal(0, 6, 4)
    np.testing.assert_allclose(reader(values), _softmax(values @ np.asarray(layer.gate.kernel)), rtol=1e-5)
    assert model.output_shape == (None, 2)


def test_copies_from_their_configs_are_the_same_layers():
    for layer in (Experts(3, (4, 2), "tanh", 0.2), ExpertMixture(3, 0.3, seed=1, start=[0.5, 0.3, 0.2])):
        copy = keras.layers.deserialize(keras.layers.serialize(layer))
        assert copy.get_config() == layer.get_config()


def test_utilisation_is_the_mean_share():
    gates = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(utilisation(gates), [0.75, 0.25, 0.0])
    with pytest.raises(ValueError, match="no rows"):
        utilisation(np.zeros((0, 3)))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0], False),  # one expert is all there is
        ([0.5, 0.5], False),
        ([0.94, 0.06], False),
        ([0.96, 0.04], True),
        ([0.6, 0.398, 0.001, 0.001], False),  # two of four
        ([0.6, 0.398, 0.002, 0.0], False),
        ([0.94, 0.056, 0.002, 0.002], False),
        ([0.6, 0.39, 0.003, 0.003, 0.004], False),
        ([0.6, 0.396, 0.0015, 0.0015, 0.001], True),  # three of five below 1 % of a fifth
    ],
)
def test_a_gate_is_polarised_if_most_experts_are_unused_or_one_is_alone(shares, expected):
    assert polarised(np.array(shares)) is expected


def test_a_gate_that_picks_one_expert_a_row_is_not_polarised():
    assert not polarised(utilisation(np.eye(4)[np.arange(100) % 4]))


def test_the_spread_of_shares_is_their_mean_and_the_span_of_most_rows():
    gates = np.stack([np.linspace(0.0, 1.0, 101), np.linspace(1.0, 0.0, 101)], axis=1)
    found = spread(gates)
    assert found["mean"] == pytest.approx([0.5, 0.5])
    assert found["low"] == pytest.approx([0.1, 0.1])
    assert found["high"] == pytest.approx([0.9, 0.9])
