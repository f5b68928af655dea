from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock.layers.recurrent import LastState, MeanState, PeepholeLSTMCell
from tests.penstock.layers.test_sequence import filled, texts


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _step(cell, x, y, c):
    """The equations of Palangi et al., one row."""
    W, R, before, after, b = (np.asarray(weight, np.float64) for weight in cell.get_weights())
    units = len(c)
    part = {name: slice(place * units, (place + 1) * units) for place, name in enumerate("ifgo")}
    i = _sigmoid(x @ W[:, part["i"]] + y @ R[:, part["i"]] + c @ before[:, :units] + b[part["i"]])
    f = _sigmoid(x @ W[:, part["f"]] + y @ R[:, part["f"]] + c @ before[:, units:] + b[part["f"]])
    g = np.tanh(x @ W[:, part["g"]] + y @ R[:, part["g"]] + b[part["g"]])
    new = f * c + i * g
    o = _sigmoid(x @ W[:, part["o"]] + y @ R[:, part["o"]] + new @ after + b[part["o"]])
    return o * np.tanh(new), new


def test_the_gates_see_the_state_before_the_step_and_the_output_gate_the_one_after():
    cell = PeepholeLSTMCell(1)
    cell.build((None, 1))
    state, entry = 0.8, 0.5
    # nothing but the peepholes p₃ (input), p₂ (forget), p₁ (output), and the candidate's bias
    bias = np.array([0.0, 0.0, entry, 0.0])
    cell.set_weights([np.zeros((1, 4)), np.zeros((1, 4)), np.array([[2.0, -1.0]]), np.array([[3.0]]), bias])
    y, (same, c) = cell(np.ones((1, 1), np.float32), [np.ones((1, 1), np.float32), np.full((1, 1), state, np.float32)])
    expected = _sigmoid(-1.0 * state) * state + _sigmoid(2.0 * state) * np.tanh(entry)
    assert float(c[0, 0]) == pytest.approx(expected, rel=1e-6)
    assert float(y[0, 0]) == pytest.approx(_sigmoid(3.0 * expected) * np.tanh(expected), rel=1e-6)
    assert float(same[0, 0]) == float(y[0, 0])


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5)])
def test_the_cell_takes_the_steps_of_the_equations(units, width, batch, length):
    random = np.random.default_rng(units + width)
    cell = PeepholeLSTMCell(units)
    cell.build((None, width))
    filled(cell, 2)
    inputs = random.normal(size=(batch, length, width)).astype(np.float32)
    states = [np.zeros((batch, units), np.float32)] * 2
    own = [(np.zeros(units), np.zeros(units)) for _ in range(batch)]
    for step in range(length):
        output, states = cell(inputs[:, step], states)
        own = [_step(cell, inputs[row, step], *own[row]) for row in range(batch)]
        np.testing.assert_allclose(output, [y for y, _ in own], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(states[0], output)
        np.testing.assert_allclose(states[1], [c for _, c in own], rtol=1e-4, atol=1e-6)


def test_without_peepholes_it_is_the_lstm_of_keras():
    random = np.random.default_rng(5)
    ours, plain = PeepholeLSTMCell(4), keras.layers.LSTMCell(4)
    ours.build((None, 3))
    plain.build((None, 3))
    filled(plain, 6)
    kernel, recurrent, bias = plain.get_weights()
    ours.set_weights([kernel, recurrent, np.zeros((4, 8)), np.zeros((4, 4)), bias])
    inputs = random.normal(size=(2, 7, 3)).astype(np.float32)
    expected = keras.layers.RNN(plain, return_sequences=True)(inputs)
    found = keras.layers.RNN(ours, return_sequences=True)(inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_lstm_of_keras_does():
    ours, plain = PeepholeLSTMCell(3), keras.layers.LSTMCell(3)
    ours.build((None, 2))
    plain.build((None, 2))
    np.testing.assert_array_equal(ours.bias, plain.bias)
    np.testing.assert_allclose(ours.recurrent_kernel @ tf.transpose(ours.recurrent_kernel), np.eye(3), atol=1e-5)
    assert PeepholeLSTMCell.from_config(ours.get_config()).units == 3


@pytest.mark.parametrize("weight", ["peephole_before", "peephole_after"])
def test_the_peepholes_act_and_are_learned(weight):
    inputs = np.random.default_rng(7).normal(size=(2, 4, 3)).astype(np.float32)
    layer = LastState(3)
    present = np.ones((2, 4), bool)
    cell = layer.cell
    layer(inputs, present)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(inputs, present))
    gradient = tape.gradient(total, getattr(cell, weight).value)
    assert np.abs(gradient).min() > 0.0
    variable = getattr(cell, weight)
    step = np.zeros(variable.shape, np.float32)
    step[0, 0] = 1e-2
    variable.assign(variable + step)
    changed = (float(tf.reduce_sum(layer(inputs, present))) - float(total)) / 1e-2
    assert changed == pytest.approx(float(gradient[0, 0]), rel=0.05, abs=2e-4)


def test_the_last_word_decides_when_the_text_is_over():
    vectors, present = texts(6, 5, 3)
    layer = LastState(4)
    layer(vectors, present)
    filled(layer, 1)
    found = np.asarray(layer(vectors, present))
    for row, words in enumerate(present.sum(axis=1)):
        y, c = np.zeros(4), np.zeros(4)
        for step in range(words):
            y, c = _step(layer.cell, vectors[row, step], y, c)
        np.testing.assert_allclose(found[row], y, rtol=1e-4, atol=1e-6)


def _there(kind, rows, length):
    random = np.random.default_rng(rows + length)
    begun = np.arange(length) < random.integers(0, length + 1, rows)[:, None]
    return {
        "padded behind": begun,
        "padded in front": begun[:, ::-1],
        "holes": random.random((rows, length)) < 0.5,
        "all": np.ones((rows, length), bool),
        "none": np.zeros((rows, length), bool),
    }[kind]


def _by_keras(cell, vectors, present, backwards):
    """All that Keras's own loop gives, masked: padding takes its steps, and changes nothing."""
    reader = keras.layers.RNN(cell, return_sequences=True, go_backwards=backwards)
    given = reader(vectors, mask=tf.constant(present))
    return tf.reverse(given, [1]) if backwards else given


@pytest.mark.parametrize("kind", ["padded behind", "padded in front", "holes", "all", "none"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 6), (7, 4)])
@pytest.mark.parametrize("whole", [False, True], ids=["eagerly", "as a graph"])
def test_without_padding_it_reads_and_learns_as_keras_does_with_it(kind, rows, length, whole):
    present = _there(kind, rows, length)
    vectors = tf.constant(np.random.default_rng(8).normal(size=(rows, length, 3)).astype(np.float32))
    last, mean = LastState(4), MeanState(4)
    for seed, layer in enumerate((last, mean)):
        layer(vectors, present)
        filled(layer, seed)
    cells = [last.cell, *mean.cells]
    counts = np.maximum(present.sum(axis=1), 1)[:, None]

    def ours(vectors):
        return last(vectors, present), mean(vectors, present)

    def keras_own(vectors):
        at_end, forth, back = (_by_keras(cell, vectors, present, cell is cells[2]) for cell in cells)
        there = present[..., None].astype(np.float32)
        sums = [tf.reduce_sum(given * there, axis=1) for given in (forth, back)]
        return at_end[:, -1] * present.any(axis=1)[:, None], tf.concat(sums, axis=1) / counts

    variables = [weight.value for cell in cells for weight in cell.trainable_weights]

    def learned(read):
        with tf.GradientTape() as tape:
            tape.watch(vectors)
            found = read(vectors)
            loss = tf.add_n([tf.reduce_sum(tf.sin(part)) for part in found])
        return found, tape.gradient(loss, [vectors, *variables], unconnected_gradients="zero")

    run = tf.function(lambda: learned(ours)) if whole else lambda: learned(ours)
    found, gradients = run()
    expected, as_expected = learned(keras_own)
    for part, other in zip([*found, *gradients], [*expected, *as_expected], strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(part), other, rtol=1e-4, atol=1e-5)


def test_a_mean_is_of_both_directions():
    layer = MeanState(3)
    vectors = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    present = np.arange(5) < np.array([[3], [0]])
    found = np.asarray(layer(vectors, present))
    states = []
    for cell, inputs in zip(layer.cells, (vectors[0, :3], vectors[0, 2::-1]), strict=True):
        y, c, steps = np.zeros(3), np.zeros(3), []
        for x in inputs:
            y, c = _step(cell, x, y, c)
            steps.append(y)
        states.append(np.mean(steps, axis=0))
    np.testing.assert_allclose(found[0], np.concatenate(states), rtol=1e-4, atol=1e-6)
    assert not found[1].any()


@pytest.mark.parametrize("kind", [LastState, MeanState])
def test_what_is_not_there_is_not_even_embedded_and_what_is_is_once(kind):
    seen = []

    class Seen(keras.layers.Layer):
        def call(self, ids):
            seen.append(len(ids))
            return keras.ops.one_hot(ids[..., 0], 4)

        def compute_output_shape(self, shape):
            return *shape[:-1], 4

    ids = np.array([[[1], [2], [0]], [[0], [0], [0]], [[3], [0], [2]]])
    present = ids[..., 0] != 0
    plain, embedded = kind(2), kind(2, embed=Seen())
    vectors = keras.ops.one_hot(ids[..., 0], 4)
    plain(vectors, present)
    embedded(ids, present)
    embedded.set_weights(plain.get_weights())
    seen.clear()
    np.testing.assert_allclose(embedded(ids, present), plain(vectors, present), rtol=1e-6)
    assert seen == [4]
