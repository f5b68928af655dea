from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from penstock.layers.experts import ExpertMixture, Experts
from penstock.layers.sparse_experts import NoisyTopK, SparseExperts, squared_variation


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _softmax(logits):
    terms = np.exp(logits - np.max(logits))
    return terms / terms.sum()


def _gate(experts, k, width=4, noise=0.0, **arguments):
    """A gate with random weights, those of the noise scaled."""
    layer = NoisyTopK(experts, k, **arguments)
    layer.build((None, width))
    layer.set_weights([_normal(1, width, experts), noise * _normal(2, width, experts)])
    return layer


def _experts(experts, units, width=3, **arguments):
    layer = SparseExperts(experts, units, **arguments)
    layer.build((None, width))
    layer.set_weights([0.7 * _normal(place, *w.shape) for place, w in enumerate(layer.get_weights())])
    return layer


def _gates(seed, batch, experts, k, favoured=0.0):
    """Gates with k above 0; some favour the first expert."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(batch, experts)) + favoured * (np.arange(experts) == 0)
    gates = np.zeros((batch, experts), np.float32)
    for row in range(batch):
        kept = np.argsort(-logits[row])[:k]
        gates[row, kept] = _softmax(random.normal(size=k))
    return gates


def _dense(layer, inputs, gates):
    """Every expert on every row, in loops, weighted by the gates."""
    kernels, biases = ([np.asarray(weight) for weight in weights] for weights in (layer.kernels, layer.biases))
    mixed = np.zeros((*gates.shape[:-1], layer.units[-1]))
    for row in range(len(inputs)):
        for expert in range(layer.experts):
            hidden = inputs[row]
            for kernel, bias in zip(kernels, biases, strict=True):
                hidden = np.maximum(hidden @ kernel[expert] + bias[expert, 0], 0.0)
            mixed[row] += np.multiply.outer(gates[row, ..., expert], hidden)
    return mixed


def _plain(layer, inputs, gates):
    """The same by TensorFlow's own operations and gradients."""
    hidden = tf.tile(tf.convert_to_tensor(inputs)[None], [layer.experts, 1, 1])
    for kernel, bias in zip(layer.kernels, layer.biases, strict=True):
        hidden = tf.nn.relu(tf.matmul(hidden, kernel.value) + bias.value)
    return tf.einsum("b...e,ebd->b...d", gates, hidden)


# the gate


def test_without_noise_the_gate_is_the_softmax_of_the_k_highest():
    layer = NoisyTopK(4, 2)
    layer.build((None, 4))
    layer.set_weights([np.eye(4), np.zeros((4, 4))])
    gates = np.asarray(layer(np.array([[0.0, 3.0, 1.0, 2.0]], np.float32)))
    high = 1.0 / (1.0 + math.exp(-1.0))
    np.testing.assert_allclose(gates, [[0.0, high, 0.0, 1.0 - high]], rtol=1e-6)


@pytest.mark.parametrize("experts", [1, 3, 6])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_gates_equal_the_loops(experts, k, batch):
    k = min(k, experts)
    layer, inputs = _gate(experts, k), _normal(0, batch, 4)
    found = np.asarray(layer(inputs))
    for row, logits in enumerate(inputs @ np.asarray(layer.gate)):
        kept = np.argsort(-logits)[:k]
        expected = np.zeros(experts)
        expected[kept] = _softmax(logits[kept])
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)


def test_all_experts_without_noise_are_the_dense_mixture():
    sparse, dense, inputs = _gate(5, 5), ExpertMixture(5), _normal(0, 7, 4)
    dense.build((None, 4))
    dense.gate.kernel.assign(sparse.gate)
    np.testing.assert_allclose(sparse(inputs), dense.gates(inputs), rtol=1e-5)


def test_one_expert_a_row_has_all_of_it():
    gates = np.asarray(_gate(5, 1, noise=1.0)(_normal(0, 40, 4), training=True))
    assert sorted(np.unique(gates)) == [0.0, 1.0]
    np.testing.assert_array_equal(gates.sum(axis=1), 1.0)


def test_the_noise_is_normal_with_a_softplus_for_its_deviation():
    # of two experts with logits 0 and a the first is kept with the probability Φ(−a / √(σ₁² + σ₂²))
    a, scales = 0.8, np.array([1.5, -0.5])
    layer = NoisyTopK(2, 1, seed=3)
    layer.build((None, 1))
    layer.set_weights([np.array([[0.0, a]]), scales[None]])
    gates = np.asarray(layer(np.ones((40_000, 1), np.float32), training=True))
    deviations = np.log1p(np.exp(scales))
    expected = norm.cdf(-a / np.sqrt((deviations**2).sum()))
    assert gates[:, 0].mean() == pytest.approx(expected, abs=0.008)
    assert np.asarray(layer(np.ones((5, 1), np.float32)))[:, 0].max() == 0.0  # no noise but in training


def test_at_first_every_expert_is_as_likely_as_any():
    gates = np.asarray(NoisyTopK(8, 2, seed=0)(_normal(0, 20_000, 4), training=True))
    np.testing.assert_allclose((gates > 0.0).mean(axis=0), 2 / 8, atol=0.01)


def test_the_gradient_reaches_the_logits_of_the_kept_alone():
    layer = NoisyTopK(5, 2)
    layer.build((None, 5))
    layer.set_weights([np.eye(5), np.zeros((5, 5))])
    logits, weights = _normal(0, 3, 5), _normal(1, 3, 5)

    def total(values):
        return float(np.sum(np.asarray(layer(values.astype(np.float32)), np.float64) * weights))

    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(variable) * weights)
    gradient = np.asarray(tape.gradient(loss, variable))
    kept = np.asarray(layer(logits)) > 0.0
    np.testing.assert_array_equal(gradient != 0.0, kept)
    for row, expert in np.argwhere(kept):
        step = np.zeros_like(logits)
        step[row, expert] = 1e-2
        difference = (total(logits + step) - total(logits - step)) / 2e-2
        assert gradient[row, expert] == pytest.approx(difference, rel=0.02, abs=1e-4)


def test_cv_squared():
    assert float(squared_variation(tf.constant([1.0, 3.0]))) == pytest.approx(0.25)
    assert float(squared_variation(tf.constant([5.0, 5.0, 5.0]))) == 0.0
    assert float(squared_variation(tf.zeros(3))) == 0.0


def _losses(layer, inputs):
    """Those of one step, and the noisy logits it drew."""
    copy = NoisyTopK.from_config(layer.get_config())
    copy.build((None, inputs.shape[1]))
    copy.set_weights(layer.get_weights())
    clean = inputs @ np.asarray(layer.gate)
    deviation = np.log1p(np.exp(inputs @ np.asarray(layer.noise)))
    drawn = np.asarray(keras.random.normal(clean.shape, seed=copy._seeds))
    gates = np.asarray(layer(inputs, training=True))
    return [float(loss) for loss in layer.losses], gates, clean, deviation, clean + deviation * drawn


def _cv_squared(values):
    return np.var(values) / np.mean(values) ** 2


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (5, 1), (5, 3), (6, 5)])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_losses_equal_the_loops(experts, k, batch):
    layer = _gate(experts, k, noise=0.5, importance=0.3, load=0.2, seed=4)
    inputs = _normal(3, batch, 4)
    (importance, load), gates, clean, deviation, noisy = _losses(layer, inputs)
    asked = np.zeros(experts)
    for row in range(batch):
        assert set(np.flatnonzero(gates[row])) == set(np.argsort(-noisy[row])[:k])
        for expert in range(experts):
            threshold = np.sort(np.delete(noisy[row], expert))[::-1][k - 1]
            asked[expert] += norm.cdf((clean[row, expert] - threshold) / deviation[row, expert])
    assert importance == pytest.approx(0.3 * _cv_squared(gates.sum(axis=0)), rel=1e-4)
    assert load == pytest.approx(0.2 * _cv_squared(asked), rel=1e-3)


def test_the_smooth_load_is_the_probability_of_being_kept_under_new_noise():
    layer = _gate(4, 2, noise=0.5, importance=0.0, load=1.0, seed=1)
    inputs = _normal(3, 1, 4)
    (_, load), _, clean, deviation, noisy = _losses(layer, inputs)
    random = np.random.default_rng(0)
    kept = np.zeros(4)
    for expert in range(4):
        again = np.tile(noisy, (100_000, 1))
        again[:, expert] = clean[0, expert] + deviation[0, expert] * random.normal(size=len(again))
        kept[expert] = np.mean((again > again[:, [expert]]).sum(axis=1) < 2)
    assert load == pytest.approx(_cv_squared(kept), rel=0.03)


def test_the_load_loss_has_the_gradient_of_its_finite_differences():
    inputs = tf.constant(_normal(3, 6, 4))
    gate, noise = _normal(1, 4, 5), 0.5 * _normal(2, 4, 5)

    def loss(gate, noise):
        layer = NoisyTopK(5, 2, importance=0.0, load=1.0, seed=4)  # the same noise each time
        layer.build((None, 4))
        layer.set_weights([gate, noise])
        with tf.GradientTape() as tape:
            layer(inputs, training=True)
            total = tf.add_n(layer.losses)
        return float(total), tape.gradient(total, [layer.gate.value, layer.noise.value])

    _, gradients = loss(gate, noise)
    random = np.random.default_rng(0)
    for gradient, place in zip(gradients, (0, 1), strict=True):
        direction = random.normal(size=(4, 5)).astype(np.float32)
        steps = [[gate, noise], [gate, noise]]
        for sign, values in zip((1.0, -1.0), steps, strict=True):
            values[place] = values[place] + sign * 2e-3 * direction
        difference = (loss(*steps[0])[0] - loss(*steps[1])[0]) / 4e-3
        assert float(tf.reduce_sum(gradient * direction)) == pytest.approx(difference, rel=0.03)


def test_only_training_adds_losses_and_no_load_where_all_are_asked():
    layer, inputs = _gate(3, 2), _normal(0, 5, 4)
    layer(inputs)
    assert layer.losses == []
    whole = _gate(3, 3)
    whole(inputs, training=True)
    assert len(whole.losses) == 1


def test_the_losses_bring_experts_back_that_nobody_asks():
    layer = NoisyTopK(8, 1, importance=1.0, load=1.0, seed=0)
    layer.build((None, 1))
    one = np.where(np.arange(8) == 0, 3.0, 0.0)
    layer.set_weights([one[None], np.zeros((1, 8))])
    inputs = tf.ones((256, 1))
    optimizer = keras.optimizers.Adam(0.05)
    optimizer.build([layer.gate, layer.noise])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            gates = layer(inputs, training=True)
            loss = tf.add_n(layer.losses)
        optimizer.apply(tape.gradient(loss, [layer.gate.value, layer.noise.value]))
        return gates

    before = np.asarray(step()).mean(axis=0).max()
    for _ in range(80):
        after = np.asarray(step()).mean(axis=0).max()
    assert before > 0.9
    assert after < 0.25


def test_a_noise_that_has_died_out_leaves_finite_gradients():
    layer = NoisyTopK(4, 2, seed=0)
    layer.build((None, 1))
    layer.set_weights([np.zeros((1, 4)), np.full((1, 4), -200.0)])
    with tf.GradientTape() as tape:
        layer(np.ones((8, 1), np.float32), training=True)
        loss = tf.add_n(layer.losses)
    for gradient in tape.gradient(loss, [layer.gate.value, layer.noise.value]):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_one_to_all(k):
    with pytest.raises(ValueError, match=f"1 to 3, not {k}"):
        NoisyTopK(3, k)


# the experts


def test_a_row_is_the_weighted_sum_of_its_experts():
    layer = SparseExperts(3, (1,), "linear")
    layer.build((None, 1))
    layer.set_weights([np.array([2.0, 3.0, 5.0]).reshape(3, 1, 1), np.array([0.0, 1.0, 0.0]).reshape(3, 1, 1)])
    mixed = layer(np.array([[1.0], [10.0]], np.float32), np.array([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]], np.float32))
    np.testing.assert_allclose(mixed, [[0.25 * 2 + 0.75 * 4], [50.0]], rtol=1e-6)


EVEN = [(1, 1, 1, 0.0), (7, 3, 1, 0.0), (9, 4, 4, 0.0), (40, 5, 2, 0.0)]
UNEVEN = [(1, 5, 1, 0.0), (40, 16, 1, 9.0), (64, 30, 2, 9.0)]
QUEUES = EVEN + UNEVEN


@pytest.mark.parametrize(("batch", "experts", "k", "favoured"), QUEUES)
@pytest.mark.parametrize("units", [(2,), (4, 2)])
def test_equals_the_dense_computation(batch, experts, k, favoured, units):
    layer, inputs = _experts(experts, units), _normal(0, batch, 3)
    gates = _gates(1, batch, experts, k, favoured)
    np.testing.assert_allclose(layer(inputs, gates), _dense(layer, inputs, gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "experts", "k", "favoured"), QUEUES)
def test_the_gradients_are_those_of_the_dense_computation(batch, experts, k, favoured):
    layer, weights = _experts(experts, (4, 2)), _normal(8, batch, 2)
    inputs, gates = tf.Variable(_normal(0, batch, 3)), tf.Variable(_gates(1, batch, experts, k, favoured))
    variables = [inputs, gates, *(variable.value for variable in layer.trainable_variables)]
    found = []
    for function in (layer, lambda x, g: _plain(layer, x, g)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(function(inputs, gates) * weights)
        gradients = tape.gradient(loss, variables)
        assert not any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients[2:])
        found.append([np.array(tf.convert_to_tensor(gradient)) for gradient in gradients])
    asked = gates.numpy() != 0.0
    np.testing.assert_allclose(found[0][1][asked], found[1][1][asked], rtol=1e-4, atol=1e-5)
    assert not found[0][1][~asked].any()
    for ours, plain in zip(found[0][:1] + found[0][2:], found[1][:1] + found[1][2:], strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("favoured", [0.0, 9.0])
def test_tasks_share_the_experts(favoured):
    layer, inputs = _experts(20, (4, 2)), _normal(0, 30, 3)
    by_task = [_gates(seed, 30, 20, 2, favoured) for seed in range(3)]
    mixed = np.asarray(layer(inputs, np.stack(by_task, axis=1)))
    assert mixed.shape == (30, 3, 2)
    for task, gates in enumerate(by_task):
        np.testing.assert_allclose(mixed[:, task], layer(inputs, gates), rtol=1e-4, atol=1e-5)


def test_all_experts_asked_are_the_dense_mixture():
    inputs, dense, mixture, gate = _normal(0, 6, 3), Experts(4, (5, 2)), ExpertMixture(4), _gate(4, 4, width=3)
    layer = _experts(4, (5, 2))
    dense.build((None, 3))
    mixture.build((None, 3))
    mixture.gate.kernel.assign(gate.gate)
    first, second = (np.asarray(kernel) for kernel in layer.kernels)
    shifts = [np.asarray(bias) for bias in layer.biases]
    dense.set_weights([first.transpose(1, 0, 2).reshape(3, 20), shifts[0].reshape(20), second, shifts[1]])
    expected = mixture(inputs, dense(inputs))
    np.testing.assert_allclose(layer(inputs, gate(inputs)), expected, rtol=1e-4, atol=1e-5)


def _computed(batch, experts, k, favoured, seed):
    """How many rows the experts compute."""
    rows = []

    def counting(hidden):
        rows.append(int(tf.reduce_prod(tf.shape(hidden)[:-1])))
        return hidden

    layer = _experts(experts, (2,), activation=counting)
    layer(_normal(0, batch, 3), _gates(seed, batch, experts, k, favoured))
    return rows[-1]


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 9.0), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_is_computed_does_not_grow_with_the_experts(batch, experts, k, favoured, seed):
    k = min(k, experts)
    assert batch * k <= _computed(batch, experts, k, favoured, seed) <= 4 * batch * k


@pytest.mark.parametrize(("batch", "experts", "k", "favoured"), UNEVEN)
def test_uneven_queues_are_computed_at_most_twice(batch, experts, k, favoured):
    assert _computed(batch, experts, k, favoured, seed=1) <= 2 * batch * k


def test_units_are_dropped_in_training_alone():
    layer, inputs, gates = _experts(4, (16,), dropout=0.25), _normal(0, 200, 3), _gates(0, 200, 4, 1)
    plain, dropped = np.asarray(layer(inputs, gates)), np.asarray(layer(inputs, gates, training=True))
    assert np.mean(dropped[plain > 0.0] == 0.0) == pytest.approx(0.25, abs=0.03)
    kept = dropped != 0.0
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75, rtol=1e-5)


@pytest.mark.parametrize(("experts", "units"), [(0, (4,)), (3, ())])
def test_experts_without_an_expert_or_a_layer_are_refused(experts, units):
    with pytest.raises(ValueError, match="at least one expert and one layer"):
        SparseExperts(experts, units)


def test_a_model_trains_and_its_saved_form_takes_any_number_of_rows(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    gates = keras.ops.stack([NoisyTopK(30, 2)(inputs) for _ in range(2)], axis=1)
    shared = SparseExperts(30, (4, 2), dropout=0.1)(inputs, gates)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(shared)))
    assert shared.shape == (None, 2, 2)
    model.compile("adam", "mse")
    values = _normal(0, 64, 3)
    fitted = model.fit(values, values[:, :1] * values[:, 1:2], batch_size=30, verbose=0)
    assert np.isfinite(fitted.history["loss"]).all()
    module = tf.Module()
    module.model = model
    module.serve = tf.function(lambda rows: model(rows, training=False), input_signature=[tf.TensorSpec([None, 3])])
    tf.saved_model.save(module, str(tmp_path / "model"))
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    for rows in (0, 1, 50):
        found = loaded.serve(tf.constant(values[:rows]))
        assert found.shape == (rows, 1)
        np.testing.assert_allclose(found, model(values[:rows], training=False), rtol=1e-5, atol=1e-6)


def test_copies_from_their_configs_are_the_same_layers():
    for layer in (NoisyTopK(5, 2, 0.3, 0.2, seed=1), SparseExperts(3, (4, 2), "tanh", 0.2)):
        copy = keras.layers.deserialize(keras.layers.serialize(layer))
        assert copy.get_config() == layer.get_config()
