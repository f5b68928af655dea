from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.optimizers import Adagrad, Adam, build

ROWS, DIM = 5, 3
START = np.linspace(-1, 1, ROWS * DIM).reshape(ROWS, DIM).astype(np.float32)
BATCHES = ([0, 1], [1, 1, 2], [3, 3, 3], [4, 0, 4, 1, 0])
ADAGRAD = {"initial_accumulator_value": 1e-3, "epsilon": 0.0}


def _steps(optimizer, batches, dense: bool = False) -> tuple[np.ndarray, list[np.ndarray]]:
    """The table after a step with each batch of ids, and the optimizer's state."""
    table = keras.Variable(START)
    for ids in batches:
        target = tf.reshape(tf.range(len(ids) * DIM, dtype=tf.float32), [len(ids), DIM]) / 4.0
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((tf.gather(table.value, ids) - target) ** 2)
        gradient = tape.gradient(loss, table.value)
        assert isinstance(gradient, tf.IndexedSlices)
        optimizer.apply([tf.convert_to_tensor(gradient) if dense else gradient], [table])
    return np.asarray(table), [np.asarray(variable) for variable in optimizer.variables]


def test_adagrad_of_one_row():
    # g = 2 (w − t) at each of two occurrences; from 0 the first step is η sign(g), whatever the size of g
    after, _ = _steps(Adagrad(0.1), [[2, 2]])
    gradient = 2 * (2 * START[2] - np.array([0, 0.25, 0.5]) - np.array([0.75, 1.0, 1.25]))
    np.testing.assert_allclose(after[2], START[2] - 0.1 * np.sign(gradient), rtol=1e-5)
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(START, 2, 0))


def _lazy_adam(batches, rate=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-7) -> np.ndarray:
    table = START.astype(np.float64)
    first, second = np.zeros_like(table), np.zeros_like(table)
    for step, ids in enumerate(batches, 1):
        gradients: dict[int, np.ndarray] = {}
        for place, row in enumerate(ids):
            target = np.arange(place * DIM, (place + 1) * DIM) / 4
            gradients[row] = gradients.get(row, 0.0) + 2 * (table[row] - target)
        for row, gradient in gradients.items():
            first[row] = beta_1 * first[row] + (1 - beta_1) * gradient
            second[row] = beta_2 * second[row] + (1 - beta_2) * gradient**2
            mean, square = first[row] / (1 - beta_1**step), second[row] / (1 - beta_2**step)
            table[row] -= rate * mean / (np.sqrt(square) + epsilon)
    return table


@pytest.mark.parametrize("batches", [BATCHES[:1], BATCHES[1:2], BATCHES, BATCHES * 3])
def test_adam_equals_the_loops(batches):
    np.testing.assert_allclose(_steps(Adam(0.1), batches)[0], _lazy_adam(batches), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batches", [BATCHES[:1], BATCHES[1:2], BATCHES, BATCHES * 3])
def test_adagrad_equals_the_dense_update_of_keras_in_every_row(batches):
    ours, state = _steps(Adagrad(0.1, **ADAGRAD), batches)
    keras_alone, dense_state = _steps(keras.optimizers.Adagrad(0.1, **ADAGRAD), batches, dense=True)
    np.testing.assert_allclose(ours, keras_alone, rtol=1e-5)
    for mine, theirs in zip(state, dense_state, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_adam_that_touches_every_row_at_each_step_is_adam():
    batches = ([0, 1, 2, 3, 4, 4], [4, 3, 3, 3, 2, 1, 0], [0, 1, 2, 3, 4]) * 4
    ours, state = _steps(Adam(0.1), batches)
    keras_alone, dense_state = _steps(keras.optimizers.Adam(0.1), batches, dense=True)
    np.testing.assert_allclose(ours, keras_alone, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(state, dense_state, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@pytest.mark.parametrize(("ours", "stock"), [(Adagrad, keras.optimizers.Adagrad), (Adam, keras.optimizers.Adam)])
def test_dense_gradients_are_applied_as_keras_applies_them(ours, stock):
    arguments = ADAGRAD if ours is Adagrad else {}
    after, state = _steps(ours(0.1, **arguments), BATCHES * 3, dense=True)
    keras_alone, dense_state = _steps(stock(0.1, **arguments), BATCHES * 3, dense=True)
    np.testing.assert_allclose(after, keras_alone, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(state, dense_state, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)  # 1 − β₂ is that of float32


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6), min_size=1, max_size=3))
def test_rows_that_were_never_touched_stay_and_so_do_their_moments(batches):
    untouched = sorted(set(range(ROWS)) - {row for ids in batches for row in ids})
    for optimizer, initial in ((Adagrad(0.1, 0.5), 0.5), (Adam(0.1), 0.0)):
        after, (_, _, *moments) = _steps(optimizer, batches)
        np.testing.assert_array_equal(after[untouched], START[untouched])
        for moment in moments:
            np.testing.assert_array_equal(moment[untouched], np.full((len(untouched), DIM), initial, np.float32))


@pytest.mark.parametrize("stock", [keras.optimizers.Adam, keras.optimizers.Adagrad])
def test_keras_alone_gets_repeated_ids_wrong(stock):
    # Why ours exists: it scatters each entry of a sparse gradient on its own. The day this fails, Keras sums them.
    right = _steps(stock(0.1), [[1, 1, 2]] * 3, dense=True)[0]
    wrong = _steps(stock(0.1), [[1, 1, 2]] * 3)[0]
    assert np.abs(wrong[1] - right[1]).max() > 0.05
    once = _steps(stock(0.1), [[1, 2]] * 3, dense=True)[0]
    np.testing.assert_allclose(_steps(stock(0.1), [[1, 2]] * 3)[0], once, rtol=1e-5)


@pytest.mark.parametrize("clip", [{"clipvalue": 0.5}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}])
def test_clipping_is_that_of_the_dense_gradient(clip):
    ours = _steps(Adagrad(0.1, **ADAGRAD, **clip), BATCHES)[0]
    dense = _steps(keras.optimizers.Adagrad(0.1, **ADAGRAD, **clip), BATCHES, dense=True)[0]
    np.testing.assert_allclose(ours, dense, rtol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [{"weight_decay": 0.01}, {"use_ema": True}, {"gradient_accumulation_steps": 2}, {"loss_scale_factor": 8.0}],
)
@pytest.mark.parametrize("optimizer", [Adagrad, Adam])
def test_settings_that_go_over_all_rows_are_refused(optimizer, setting):
    with pytest.raises(ValueError, match=f"{optimizer.__name__} changes the rows .* it has no {next(iter(setting))}"):
        optimizer(0.1, **setting)


def test_a_second_constant_of_adagrad_is_refused():
    with pytest.raises(ValueError, match="give a positive initial_accumulator_value"):
        Adagrad(0.1, epsilon=1e-7)
    with pytest.raises(ValueError, match="give a positive initial_accumulator_value"):
        Adagrad(0.1, initial_accumulator_value=0.0)


@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_going_on_with_a_saved_state_is_going_on(name):
    whole, _ = _steps(build(name, 0.1), BATCHES)
    first = build(name, 0.1)
    table, state = _steps(first, BATCHES[:2])
    second = keras.optimizers.deserialize(keras.optimizers.serialize(first))
    assert type(second) is type(first)
    held = keras.Variable(table)
    second.build([held])
    for variable, value in zip(second.variables, state, strict=True):
        variable.assign(value)
    for ids in BATCHES[2:]:
        target = tf.reshape(tf.range(len(ids) * DIM, dtype=tf.float32), [len(ids), DIM]) / 4.0
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((tf.gather(held.value, ids) - target) ** 2)
        second.apply([tape.gradient(loss, held.value)], [held])
    np.testing.assert_array_equal(np.asarray(held), whole)


def test_an_unknown_optimizer_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd': there are adagrad, adam"):
        build("sgd", 0.1)
