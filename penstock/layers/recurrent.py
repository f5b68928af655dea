"""Sequences of vectors as one vector, read step by step."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from penstock import backends
from penstock.backends import recurrence


@keras.saving.register_keras_serializable("penstock")
class PeepholeLSTMCell(keras.layers.Layer):
    """A step of an LSTM whose gates see the cell's state (Palangi et al., TASLP 2016, arXiv 1502.06922, eq. 2).

        g = tanh(W₄ x + R₄ y' + b₄)                i = σ(W₃ x + R₃ y' + P₃ c' + b₃)
        f = σ(W₂ x + R₂ y' + P₂ c' + b₂)           c = f ∘ c' + i ∘ g
        o = σ(W₁ x + R₁ y' + P₁ c + b₁)            y = o ∘ tanh(c)

    The input and forget gates see the state before the step, c', the output gate the one after it, c. The weights P
    are matrices, as the equations are written; those of Gers & Schmidhuber (2000) are diagonal. With P = 0 it is
    `keras.layers.LSTMCell`, whose order of gates (i, f, g, o) and initial weights it has.

    Call with x `[batch, width]` and [y', c'], both `[batch, units]`; gives y and [y, c].
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.state_size = [units, units]
        self.output_size = units

    def build(self, input_shape: Any) -> None:
        units = self.units
        self.kernel = self.add_weight((input_shape[-1], 4 * units), "glorot_uniform", name="kernel")
        self.recurrent_kernel = self.add_weight((units, 4 * units), "orthogonal", name="recurrent_kernel")
        self.peephole_before = self.add_weight((units, 2 * units), "glorot_uniform", name="peephole_before")
        self.peephole_after = self.add_weight((units, units), "glorot_uniform", name="peephole_after")
        self.bias = self.add_weight((4 * units,), _forget_is_one, name="bias")

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        output, state = self.step(self.project(inputs), tuple(states))
        return output, [output, state]

    def project(self, inputs: Any) -> Any:
        """`W x + b` of all gates, `[steps, width]` → `[steps, 4 units]`: what needs no state."""
        return ops.matmul(inputs, self.kernel) + self.bias

    def step(self, projected: Any, states: tuple[Any, ...]) -> tuple[Any, Any]:
        """(y, c) of `project`'s rows and (y', c')."""
        output, state = states
        total = projected + ops.matmul(output, self.recurrent_kernel)
        seen, candidate, out = ops.split(total, [2 * self.units, 3 * self.units], axis=1)
        admit, keep = ops.split(ops.sigmoid(seen + ops.matmul(state, self.peephole_before)), 2, axis=1)
        state = keep * state + admit * ops.tanh(candidate)
        return ops.sigmoid(out + ops.matmul(state, self.peephole_after)) * ops.tanh(state), state

    def begin(self, rows: Any) -> tuple[Any, Any]:
        """Both states 0, `[rows, units]`."""
        nothing = ops.zeros((rows, self.units), self.compute_dtype)
        return nothing, nothing

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


class LastState(keras.layers.Layer):
    """The output of an LSTM with peepholes at the last word that is there; of none, the zero vector.

    Vectors `[batch, length, width]` and present `[batch, length]` → `[batch, units]`. Where no word stands, the states
    stay as they are.

    Args:
        units: size of the state.
        embed: makes vectors `[steps, width]` of what there is, `[steps, …]`, if that is something else.
    """

    def __init__(self, units: int, embed: keras.layers.Layer | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.embed = embed or keras.layers.Identity()
        self.cell = PeepholeLSTMCell(units)

    def build(self, inputs_shape: Any, present_shape: Any = None) -> None:
        _build([self.cell], self.embed, inputs_shape)

    def call(self, inputs: Any, present: Any) -> Any:
        ((given, rows),) = recurrence.outputs([recurrence.Reader(self.cell)], self.embed, inputs, present)
        places = ops.arange(1, ops.shape(rows)[0] + 1)
        last = ops.maximum(ops.segment_max(places, rows, ops.shape(present)[0]), 0)
        nothing = ops.zeros((1, self.cell.units), given.dtype)
        return ops.take(ops.concatenate([nothing, given], axis=0), last, axis=0)


class MeanState(keras.layers.Layer):
    """The mean of what two LSTMs with peepholes give at each step, of which one reads from the end; of none, zero.

    Vectors `[batch, length, width]` and present `[batch, length]` → `[batch, 2 units]`; the arguments of `LastState`.
    """

    def __init__(self, units: int, embed: keras.layers.Layer | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.embed = embed or keras.layers.Identity()
        self.cells = [PeepholeLSTMCell(units), PeepholeLSTMCell(units)]

    def build(self, inputs_shape: Any, present_shape: Any = None) -> None:
        _build(self.cells, self.embed, inputs_shape)

    def call(self, inputs: Any, present: Any) -> Any:
        readers = [recurrence.Reader(self.cells[0]), recurrence.Reader(self.cells[1], backwards=True)]
        outputs = recurrence.outputs(readers, self.embed, inputs, present)
        sums = [ops.segment_sum(given, rows, ops.shape(present)[0]) for given, rows in outputs]
        steps = ops.sum(ops.cast(present, sums[0].dtype), axis=1)
        return ops.concatenate(sums, axis=-1) / ops.maximum(steps, 1.0)[:, None]


def _build(cells: list[PeepholeLSTMCell], embed: keras.layers.Layer, inputs_shape: Any) -> None:
    shape = (None, *inputs_shape[2:])
    if not embed.built:
        embed.build(shape)
    for cell in cells:
        cell.build(embed.compute_output_shape(shape))


def _forget_is_one(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """Zero, and 1 for the forget gate."""
    quarter = shape[0] // 4
    return ops.concatenate([ops.zeros(quarter, dtype), ops.ones(quarter, dtype), ops.zeros(2 * quarter, dtype)])
