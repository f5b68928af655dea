"""The backend TensorFlow: rows of variables in place, and shapes that follow from values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

FIXED_SHAPES = False
"""Whether all shapes are, so that XLA compiles what is here."""

STEPS_AT_ONCE = 10
"""So many steps are one call of a graph: what Keras does between two takes an eighth of a rank model's step."""

_ROWS = 64
"""So many rows of logits are held at once at least."""

_EVEN = 4
"""So many times the rows asked for may be computed, to read the experts' weights in place."""


# shapes


def leading(count: Any) -> slice:
    """The first `count` places, of which no more are needed by a batch."""
    return slice(None, count)


def once(values: Any) -> tuple[Any, Any]:
    """The values that there are, and where in them each stands: any shape → `[distinct]`, `[values]`."""
    return tf.unique(tf.reshape(values, [-1]))


def first_places(ids: Any) -> Any:
    """Where in a batch the id of each row stands first, `[rows]` → int32 `[rows]`."""
    unique, place = tf.unique(ids)
    first = tf.math.unsorted_segment_min(tf.range(tf.size(ids)), place, tf.size(unique))
    return tf.gather(first, place)


def parted(vectors: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """The rows of two lists that were looked up as one."""
    # the gradient of slices would be two whole matrices and their sum
    return tuple(tf.split(vectors, [tf.size(first), tf.size(second)]))


def at(states: Any, places: Any) -> Any:
    """The state at one place of each sequence, `[batch, length, dim]` and `[batch]` → `[batch, dim]`."""
    return tf.gather(states, places, batch_dims=1)


def those(where: Any, states: Any, items: Any) -> tuple[Any, Any, Any]:
    """States and items of the places that are wanted, and which of them count: None for all.

    `[batch, length]`, `[batch, length, dim]`, `[batch, length]` → `[wanted, dim]`, `[wanted]`.
    """
    places = tf.where(where)
    return tf.gather_nd(states, places), tf.gather_nd(items, places), None


# rows of tables


def rows(table: Any, indices: Any) -> Any:
    """Rows of a variable, which itself is not read, with a sparse gradient: `[…]` → `[…, dim]`."""
    return tf.gather(table.value, indices)


def mean_of_rows(table: Any, indices: Any) -> Any:
    """The mean of each list's rows, padding left out, `[batch, length]` → `[batch, dim]`.

    Each row is gathered once, and summed by list without a tensor `[batch, length, dim]`, forwards as backwards.
    """
    lists = tf.where(tf.not_equal(indices, 0))
    # of tf.unique, a gather and a segment mean TensorFlow's optimiser makes one that reads the whole table
    found, place, _ = tf.unique_with_counts(tf.gather_nd(indices, lists))
    return tf.sparse.segment_mean(tf.gather(table.value, found), place, lists[:, 0], num_segments=tf.shape(indices)[0])


def write_rows(table: Any, indices: Any, values: Any) -> None:
    """Writes rows of a variable in place; those of an index that is there twice are equal."""
    table.value.scatter_update(tf.IndexedSlices(values, indices))


# the softmax over a sample


def distinct(ids: Any) -> tuple[Any, Any]:
    """A sample with repetitions as a set, and the log of how often each is in it: `[sample]` → `[distinct]` twice."""
    found, _, counts = tf.unique_with_counts(ids)
    return found, tf.math.log(tf.cast(counts, tf.float32))


def log_frequency(ids: Any, counts: Any) -> Any:
    """The log of how often a batch has the id of each row, `[batch]`; counts as `those` says."""
    _, place, times = tf.unique_with_counts(ids)
    return tf.math.log(tf.cast(tf.gather(times, place), tf.float32))


def log_one_plus_sum_exp(rows: Any, columns: Any, positive_ids: Any, negative_ids: Any) -> Any:
    """`log(1 + Σⱼ exp(rowsᵦ · columnsⱼ))` of each row over the negatives that are not its positive, `[batch]`.

    Its gradient keeps one matrix of the size `[batch, sample]` instead of six.

    Args:
        rows: `[batch, dim]`.
        columns: `[sample, dim]`, of which the last number is 1.
        positive_ids, negative_ids: `[batch]`, `[sample]`.
    """
    return _log_one_plus_sum_exp(rows, columns, accidental_hits(positive_ids, negative_ids))


def mean_log_one_plus_sum_exp(
    rows: Any, columns: Any, positive_ids: Any, negative_ids: Any, cells: int, counts: Any
) -> Any:
    """The mean of `log_one_plus_sum_exp`, `[]`, of whose logits no more than `cells` are held at once.

    What comes back to a mean is one number, by which gradients are multiplied last: so each chunk of rows gives its
    part of them as soon as its logits are there, and nothing of it is kept or computed again.

    Args:
        counts: which rows count, as `those` says.
    """
    at_once = tf.maximum(cells // tf.shape(columns)[0], _ROWS)
    return _mean_log_one_plus_sum_exp(rows, columns, accidental_hits(positive_ids, negative_ids), at_once)


def accidental_hits(positive_ids: Any, negative_ids: Any) -> Any:
    """Where a negative is the row's own positive: pairs (row, place in the sample), int32 `[hits, 2]`."""
    positive_ids = tf.convert_to_tensor(positive_ids)
    negative_ids = tf.cast(negative_ids, positive_ids.dtype)
    order = tf.argsort(negative_ids)
    ascending = tf.gather(negative_ids, order)
    first = tf.searchsorted(ascending, positive_ids, side="left")
    counts = tf.searchsorted(ascending, positive_ids, side="right") - first
    rows = tf.repeat(tf.range(tf.size(counts)), counts)
    # the n-th pair of all is the (n − pairs of earlier rows)-th of its row
    places = tf.range(tf.size(rows)) + tf.repeat(first - tf.cumsum(counts, exclusive=True), counts)
    return tf.stack([rows, tf.gather(order, places)], axis=1)


@tf.custom_gradient
def _log_one_plus_sum_exp(rows: tf.Tensor, columns: tf.Tensor, excluded: tf.Tensor) -> tf.Tensor:
    """log(1 + Σⱼ exp(rowsᵦ · columnsⱼ)) of each row, `[batch]`; the last of `columns` is all ones."""
    losses, terms, sums, total = _parts(rows, columns, excluded)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, None]:
        weight = (upstream / total)[:, None]
        return weight * sums, tf.transpose(_turned(weight * rows, terms)), None

    return losses, gradient


@tf.custom_gradient
def _mean_log_one_plus_sum_exp(
    rows: tf.Tensor, columns: tf.Tensor, excluded: tf.Tensor, at_once: tf.Tensor
) -> tf.Tensor:
    """The mean of `_log_one_plus_sum_exp`, `[]`, `at_once` rows after another."""
    count = tf.shape(rows)[0]
    chunks = -(-count // at_once)

    def of_chunk(
        chunk: tf.Tensor, loss: tf.Tensor, of_rows: tf.TensorArray, of_columns: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray, tf.Tensor]:
        start = chunk * at_once
        part = rows[start : start + at_once]
        first, last = tf.unstack(tf.searchsorted(excluded[:, 0], tf.stack([start, start + at_once])))
        losses, terms, sums, total = _parts(part, columns, excluded[first:last] - tf.stack([start, 0]))
        return (
            chunk + 1,
            loss + tf.reduce_sum(losses),
            of_rows.write(chunk, sums / total[:, None]),
            of_columns + _turned(part / total[:, None], terms),
        )

    _, loss, of_rows, of_columns = tf.while_loop(
        lambda chunk, *_: chunk < chunks,
        of_chunk,
        (
            0,
            tf.zeros([], rows.dtype),
            tf.TensorArray(rows.dtype, chunks, infer_shape=False, element_shape=[None, rows.shape[1]]),
            tf.transpose(tf.zeros_like(columns)),
        ),
        parallel_iterations=1,  # more would hold more than a chunk
    )
    mean = 1.0 / tf.cast(count, rows.dtype)
    of_rows, of_columns = of_rows.concat(), tf.transpose(of_columns)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, None, None]:
        return mean * upstream * of_rows, mean * upstream * of_columns, None, None

    return mean * loss, gradient


def _turned(rows: tf.Tensor, terms: tf.Tensor) -> tf.Tensor:
    """The gradient of columns, `[dim, sample]`: the product with the wide matrix turned takes half as long again."""
    return tf.matmul(rows, terms, transpose_a=True)


def _parts(
    rows: tf.Tensor, columns: tf.Tensor, excluded: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """The losses of rows, and what their gradients are made of: each term of the sums, `Σⱼ term columnsⱼ`, the sums."""

    def exponentials(shift: tf.Tensor | None) -> tf.Tensor:
        exponents = tf.matmul(rows, columns, transpose_b=True)
        if shift is not None:
            exponents = exponents - shift[:, None]
        return tf.tensor_scatter_nd_update(tf.exp(exponents), excluded, tf.zeros(tf.shape(excluded)[:1], rows.dtype))

    def shifted() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        exponents = tf.matmul(rows, columns, transpose_b=True)
        lowest = tf.fill(tf.shape(excluded)[:1], exponents.dtype.min)
        exponents = tf.tensor_scatter_nd_update(exponents, excluded, lowest)
        shift = tf.maximum(tf.reduce_max(exponents, axis=1), 0.0)
        terms = exponentials(shift)
        return terms, tf.matmul(terms, columns), shift

    terms = exponentials(None)
    sums = tf.matmul(terms, columns)  # Σⱼ exp(…) columnsⱼ: the gradient of the rows, and last the sum itself
    # a negative above its positive by more than a float holds is rare: only then is the largest looked for
    terms, sums, shift = tf.cond(
        tf.reduce_all(tf.math.is_finite(sums[:, -1])), lambda: (terms, sums, tf.zeros_like(sums[:, -1])), shifted
    )
    total = tf.exp(-shift) + sums[:, -1]
    # log1p keeps the digits of a loss near 0
    losses = tf.where(shift > 0.0, shift + tf.math.log(total), tf.math.log1p(sums[:, -1]))
    return losses, terms, sums, total


# experts


def mixed(inputs: Any, gates: Any, layers: Sequence[tuple[Any, Any, Callable[[Any], Any]]]) -> Any:
    """`Σₑ gₑ fₑ(x)` of the experts whose gates are not 0, `[batch, width]`, `[batch, tasks, experts]` → `[…, units]`.

    The pairs of a row and an expert it asks are put in order of the expert, each expert's pairs are cut into blocks of
    one size, and a layer is one product of blocks and their experts' matrices. If the experts are asked evenly a block
    is as long as the longest queue, and the matrices are read where they stand. If not, blocks are as long as the mean
    queue and matrices are copied for each: so at most twice the pairs are computed however uneven the queues are, none
    is left out, and experts that nobody asks cost nothing.

    Args:
        layers: matrices `[experts, width, units]`, biases `[experts, 1, units]`, and what comes after.
    """
    inputs, gates = tf.convert_to_tensor(inputs), tf.convert_to_tensor(gates)
    by_expert = tf.transpose(gates, (2, 0, 1))
    pairs = tf.cast(tf.where(tf.reduce_any(tf.not_equal(by_expert, 0.0), axis=-1)), tf.int32)
    expert, row = pairs[:, 0], pairs[:, 1]
    outputs = _outputs(inputs, expert, row, layers)
    weighted = tf.gather_nd(by_expert, pairs)[:, :, None] * outputs[:, None, :]
    found = tf.math.unsorted_segment_sum(weighted, row, tf.shape(inputs)[0])
    return tf.ensure_shape(found, [*gates.shape[:2], outputs.shape[-1]])


def _outputs(inputs: Any, expert: Any, row: Any, layers: Sequence[tuple[Any, Any, Callable[[Any], Any]]]) -> Any:
    """`f_e(x)` of pairs in order of the expert, `[pairs]` each → `[pairs, units]`."""
    experts, _, units = layers[-1][0].shape
    count = tf.size(expert)
    queues = tf.math.bincount(expert, minlength=experts, maxlength=experts)
    longest = tf.reduce_max(queues)
    even = experts * longest <= _EVEN * count
    size = tf.where(even, longest, -(-count // experts))
    blocks = tf.where(even, 1, -(-queues // tf.maximum(size, 1)))
    owner = tf.repeat(tf.range(experts), blocks)
    before = tf.cumsum(blocks, exclusive=True) * size - tf.cumsum(queues, exclusive=True)
    slots = tf.range(count) + tf.gather(before, expert)
    # slots that no pair has are of row 0, and nobody reads what comes of them
    rows = tf.scatter_nd(slots[:, None], row, [tf.size(owner) * size])
    hidden = tf.reshape(_taken(inputs, rows), [tf.size(owner), size, inputs.shape[-1]])

    def of_blocks(weights: Any) -> Any:
        weights = tf.convert_to_tensor(weights)
        return tf.cond(even, lambda: weights, lambda: _taken(weights, owner))

    for kernel, bias, after in layers:
        hidden = after(tf.matmul(hidden, of_blocks(kernel)) + of_blocks(bias))
    return tf.gather(tf.reshape(hidden, [-1, units]), slots)


def _taken(values: Any, rows: Any) -> Any:
    """Rows of `[n, …]`, with a dense gradient: what reads a sparse one takes its rows to be distinct."""
    flat = tf.gather(tf.reshape(values, [-1, math.prod(values.shape[1:])]), rows)  # a reshape's gradient is dense
    return tf.reshape(flat, [-1, *values.shape[1:]])


# gradients within a step


def each_gradient(losses: Callable[[Any], Mapping[str, Any]], shared: Any) -> tuple[dict[str, Any], Any]:
    """Losses by name, and the gradient of each to what they share, float64 `[losses, numbers]`.

    Raises:
        ValueError: a loss that does not depend on what is shared.
    """
    parts = tf.nest.flatten(shared)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(parts)
        by_name = dict(losses(shared))
    gradients = []
    for name, loss in by_name.items():
        found = tape.gradient(loss, parts)
        if all(gradient is None for gradient in found):
            raise ValueError(f"the loss of {name} does not depend on what the tasks share")
        whole = [tf.zeros_like(part) if one is None else one for part, one in zip(parts, found, strict=True)]
        gradients.append(tf.concat([tf.reshape(tf.cast(one, tf.float64), [-1]) for one in whole], axis=0))
    del tape
    return by_name, tf.stack(gradients)


# what a fit runs


def hold(arrays: Any) -> Any:
    """Keeps rows in memory to be cut into batches: arrays in any structure, `[rows, …]` each."""
    with tf.device("CPU:0"):  # batches are made there: a GPU would hold all rows and give them back for each
        return tf.nest.map_structure(tf.constant, arrays)


def cut(held: Any, order: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Any:
    """One batch after another, each of the rows from a start to an end of the order."""
    rows = tf.constant(order)

    def take(start: tf.Tensor, end: tf.Tensor) -> Any:
        taken = rows[start:end]
        return tf.nest.map_structure(lambda array: tf.gather(array, taken), held)

    edges = tf.data.Dataset.from_tensor_slices((starts, ends))
    return edges.map(take, num_parallel_calls=2).prefetch(2)


def compiled(
    predict: Callable[[Any], Mapping[str, Any]], variables: Sequence[Any], batches: Any
) -> Callable[[Any], Mapping[str, Any]]:
    """A prediction as a graph for batches of any size, which takes seconds to make: worth it for what is asked often.

    Args:
        variables: all that it reads.
        batches: of the inputs that it will get.
    """
    given, _ = batches.element_spec
    specs = {name: tf.TensorSpec([None, *spec.shape[1:]], spec.dtype) for name, spec in given.items()}
    graph: Callable[[Any], Mapping[str, Any]] = tf.function(
        predict, input_signature=[specs], autograph=False, jit_compile=False
    )
    return graph
