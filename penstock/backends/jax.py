"""The backend JAX: whole tables, and shapes that are fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax import numpy as jnp

from penstock.examples import FIRST

jax.config.update("jax_enable_x64", True)  # times are int64, in milliseconds; floats stay what they are

FIXED_SHAPES = True

STEPS_AT_ONCE = 1

_EXCLUDED = -1e9

_ROWS = 64


def leading(count: Any) -> slice:
    """All: how many are needed is a value."""
    return slice(None)


def once(values: Any) -> tuple[Any, Any]:
    """The values as they are."""
    flat = jnp.reshape(values, -1)
    return flat, jnp.arange(flat.shape[0], dtype="int32")


def first_places(ids: Any) -> Any:
    """As on TensorFlow, `[rows]` → int32 `[rows]`."""
    _, first, place = jnp.unique(ids, return_index=True, return_inverse=True, size=ids.shape[0])
    return first[place].astype("int32")


def parted(vectors: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """The rows of two lists that were looked up as one."""
    return vectors[: first.shape[0]], vectors[first.shape[0] :]


def at(states: Any, places: Any) -> Any:
    """The state at one place of each sequence, `[batch, length, dim]` and `[batch]` → `[batch, dim]`."""
    return jnp.take_along_axis(states, places[:, None, None], axis=1)[:, 0]


def those(where: Any, states: Any, items: Any) -> tuple[Any, Any, Any]:
    """The states of all places, items, and which of them count, 1 or 0; what does not is of an item that there is."""
    counts = jnp.reshape(where, -1).astype("float32")
    return jnp.reshape(states, (-1, states.shape[-1])), jnp.where(where, items, FIRST).reshape(-1), counts


def rows(table: Any, indices: Any) -> Any:
    """Rows of a variable, with a gradient as large as it: `[…]` → `[…, dim]`."""
    return jnp.take(table.value, indices, axis=0)


def mean_of_rows(table: Any, indices: Any) -> Any:
    """The mean of each list's rows, padding left out, `[batch, length]` → `[batch, dim]`."""
    present = jnp.not_equal(indices, 0).astype(table.dtype)
    total = jnp.einsum("bld,bl->bd", rows(table, indices), present)
    return total / jnp.maximum(jnp.sum(present, axis=1, keepdims=True), 1.0)


def write_rows(table: Any, indices: Any, values: Any) -> None:
    """Writes rows of a variable; those of an index that is there twice are equal."""
    table.assign(table.value.at[indices].set(values))


def distinct(ids: Any) -> tuple[Any, Any]:
    """The sample as it is: each id is in it once more."""
    return ids, jnp.zeros(ids.shape, "float32")


def log_frequency(ids: Any, counts: Any) -> Any:
    """The log of how often a batch has the id of each row among those that count, `[batch]`."""
    weights = jnp.ones(ids.shape[0], "float32") if counts is None else counts
    _, place = jnp.unique(ids, return_inverse=True, size=ids.shape[0])
    times = jnp.zeros(ids.shape[0], "float32").at[place].add(weights)[place]
    return jnp.log(jnp.maximum(times, 1.0))


def log_one_plus_sum_exp(rows: Any, columns: Any, positive_ids: Any, negative_ids: Any) -> Any:
    """As on TensorFlow, `[batch]`."""
    hits = jnp.equal(positive_ids[:, None], negative_ids[None, :])
    exponents = jnp.where(hits, _EXCLUDED, rows @ columns.T)
    return jnp.logaddexp(0.0, jax.nn.logsumexp(exponents, axis=1))


def mean_log_one_plus_sum_exp(
    rows: Any, columns: Any, positive_ids: Any, negative_ids: Any, cells: int, counts: Any
) -> Any:
    """As on TensorFlow, `[]`, over the rows that count. Of several chunks logits are computed again for gradients."""
    weights = jnp.ones(rows.shape[0], rows.dtype) if counts is None else counts
    at_once = max(cells // columns.shape[0], _ROWS)
    chunks = -(-rows.shape[0] // at_once)

    def of_chunk(chunk: tuple[Any, Any, Any]) -> Any:
        part, ids, weight = chunk
        return jnp.sum(weight * log_one_plus_sum_exp(part, columns, ids, negative_ids))

    if chunks == 1:
        total = of_chunk((rows, positive_ids, weights))
    else:
        filled = [
            jnp.pad(each, [(0, chunks * at_once - each.shape[0])] + [(0, 0)] * (each.ndim - 1))
            for each in (rows, positive_ids, weights)
        ]
        parts = tuple(jnp.reshape(each, (chunks, at_once, *each.shape[1:])) for each in filled)
        total = jnp.sum(jax.lax.map(jax.checkpoint(of_chunk), parts))
    return total / jnp.maximum(jnp.sum(weights), 1.0)


def mixed(inputs: Any, gates: Any, layers: Sequence[tuple[Any, Any, Callable[[Any], Any]]]) -> Any:
    """As on TensorFlow, of all experts, those that nobody asks included."""
    hidden = inputs[None]
    for kernel, bias, after in layers:
        hidden = after(keras.ops.matmul(hidden, kernel) + bias)
    return jnp.einsum("bte,ebu->btu", gates, hidden)


def each_gradient(losses: Callable[[Any], Mapping[str, Any]], shared: Any) -> tuple[dict[str, Any], Any]:
    """As on TensorFlow; a loss that does not depend on what is shared has a gradient of 0, and is not told."""
    names: list[str] = []

    def stacked(shared: Any) -> Any:
        by_name = losses(shared)
        names[:] = by_name
        return jnp.stack([*by_name.values()])

    found, back = jax.vjp(stacked, shared)
    gradients = [
        jnp.concatenate([jnp.reshape(part, -1).astype("float64") for part in jax.tree.leaves(back(one))])
        for one in jnp.eye(len(names), dtype=found.dtype)
    ]
    return dict(zip(names, found, strict=True)), jnp.stack(gradients)


def hold(arrays: Any) -> Any:
    """Keeps rows in memory to be cut into batches: arrays in any structure, `[rows, …]` each."""
    return arrays


def cut(held: Any, order: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Any:
    """One batch after another, each of the rows from a start to an end of the order."""
    return _Cut(held, order, starts, ends)


class _Cut(keras.utils.PyDataset):
    """The batches of one order, by their number."""

    def __init__(self, held: Any, order: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        super().__init__()
        self._held, self._order, self._edges = held, order, list(zip(starts, ends, strict=True))

    def __len__(self) -> int:
        return len(self._edges)

    def __getitem__(self, place: int) -> Any:
        rows = self._order[slice(*self._edges[place])]
        return keras.tree.map_structure(lambda array: array[rows], self._held)

    def __iter__(self) -> Iterator[Any]:
        return (self[place] for place in range(len(self)))


def compiled(
    predict: Callable[[Any], Mapping[str, Any]], variables: Sequence[Any], batches: Any
) -> Callable[[Any], Mapping[str, Any]]:
    """A prediction compiled for each size of batch that it gets; what it draws at random is the same in each call.

    Args:
        variables: all that it reads.
    """

    @jax.jit
    def of_values(values: list[Any], inputs: Any) -> Mapping[str, Any]:
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return predict(inputs)

    return lambda inputs: of_values([variable.value for variable in variables], inputs)
