"""A recurrent cell over sequences of unlike length: where shapes may follow from values, no step is taken for padding.

In an order of the rows by their length, those that have a step are the first of those that had the one before. So a
step is of ever fewer rows, and all that is there lies packed, without the gaps that padding leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from keras import ops

from penstock import backends


class Cell(Protocol):
    """What is taken one step after another; what needs no state is done for all steps at once."""

    units: int

    def project(self, inputs: Any) -> Any:
        """`[steps, width]` → what `step` reads of them, `[steps, …]`."""

    def step(self, projected: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """The states `[rows, units]` after a step, of which the first is what the cell gives."""

    def begin(self, rows: Any) -> tuple[Any, ...]:
        """The states before the first step."""


@dataclass(frozen=True)
class Reader:
    """A cell, and whether it reads each row from its end."""

    cell: Cell
    backwards: bool = False


def outputs(readers: Sequence[Reader], embed: Callable[[Any], Any], inputs: Any, present: Any) -> list[tuple[Any, Any]]:
    """What each cell gives after each step, `[steps, units]`, and the row of each step, `[steps]`, in a row's order.

    The vectors are made once, and are the same to all that read them. Where shapes are fixed there are steps for
    padding too, of a row past the last, which a segment's sum leaves out.

    Args:
        readers: what reads.
        embed: makes vectors `[steps, width]` of inputs `[steps, …]`.
        inputs: `[batch, length, …]`.
        present: `[batch, length]`; what is not, is passed over, wherever it stands.
    """
    return (_of_all if backends.FIXED_SHAPES else _packed)(readers, embed, inputs, present)


def _packed(readers: Sequence[Reader], embed: Callable[[Any], Any], inputs: Any, present: Any) -> list[tuple[Any, Any]]:
    import tensorflow as tf

    lists, lengths = tf.where(present), tf.reduce_sum(tf.cast(present, tf.int32), axis=1)
    vectors = embed(tf.gather_nd(inputs, lists))
    row = tf.cast(lists[:, 0], tf.int32)
    forwards = tf.gather_nd(tf.cumsum(tf.cast(present, tf.int32), axis=1), lists) - 1
    backwards = tf.gather(lengths, row) - 1 - forwards
    rank = tf.gather(tf.math.invert_permutation(tf.argsort(lengths, direction="DESCENDING", stable=True)), row)
    longest = tf.maximum(tf.reduce_max(lengths), 1)  # one step of no rows, where there is none
    counts = tf.reduce_sum(tf.cast(lengths[:, None] > tf.range(longest), tf.int32), axis=0)
    before = tf.cumsum(counts, exclusive=True)

    def read(reader: Reader) -> tuple[Any, Any]:
        order = tf.math.invert_permutation(tf.gather(before, backwards if reader.backwards else forwards) + rank)
        return _steps(reader.cell, tf.gather(vectors, order), counts, tf.shape(present)[0]), tf.gather(row, order)

    return [read(reader) for reader in readers]


def _steps(cell: Cell, vectors: Any, counts: Any, rows: Any) -> Any:
    """What a cell gives, `[steps, units]`, for vectors `[steps, width]` that lie by step, `[longest]` so many each."""
    import tensorflow as tf

    projected = cell.project(vectors)
    longest = tf.shape(counts)[0]
    # slices of one tensor would each have a gradient of its whole size
    parts = tf.TensorArray(projected.dtype, longest, infer_shape=False, element_shape=[None, *projected.shape[1:]])
    parts = parts.split(projected, counts)
    given = tf.TensorArray(projected.dtype, longest, infer_shape=False, element_shape=[None, cell.units])

    def step(place: Any, given: Any, *states: Any) -> tuple[Any, ...]:
        part = parts.read(place)
        count = tf.shape(part)[0]
        states = cell.step(part, tuple(state[:count] for state in states))
        return place + 1, given.write(place, states[0]), *states

    start = cell.begin(rows)
    of_any_count = [tf.TensorShape([None, *state.shape[1:]]) for state in start]
    _, given, *_ = tf.while_loop(
        lambda place, *_: place < longest,
        step,
        (0, given, *start),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape(None), *of_any_count),
    )
    return tf.ensure_shape(given.concat(), [None, cell.units])


def _of_all(readers: Sequence[Reader], embed: Callable[[Any], Any], inputs: Any, present: Any) -> list[tuple[Any, Any]]:
    batch, length = present.shape
    vectors = embed(ops.reshape(inputs, (batch * length, *inputs.shape[2:])))
    there = ops.transpose(present)
    rows = ops.where(there, ops.arange(batch)[None], batch)

    def read(reader: Reader) -> tuple[Any, Any]:
        cell = reader.cell
        by_step = ops.moveaxis(ops.reshape(cell.project(vectors), (batch, length, -1)), 1, 0)

        def step(states: Any, part: Any) -> Any:
            projected, there = part
            after = cell.step(projected, states)
            states = tuple(ops.where(there[:, None], new, old) for new, old in zip(after, states, strict=True))
            return states, states[0]

        _, given = ops.scan(step, cell.begin(batch), (by_step, there), reverse=reader.backwards)
        in_order = (ops.flip(given, axis=0), ops.flip(rows, axis=0)) if reader.backwards else (given, rows)
        return ops.reshape(in_order[0], (length * batch, cell.units)), ops.reshape(in_order[1], (-1,))

    return [read(reader) for reader in readers]
