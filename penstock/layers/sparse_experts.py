"""Many experts of which each row asks few, so that what is computed grows with those asked (Shazeer et al., ICLR 2017).

Written in TensorFlow: the rows of an expert are as many as ask it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops, random

from penstock.layers.experts import per_expert

_LEAST_NOISE = 1e-6
"""Keeps a deviation of the noise that falls to 0 from dividing 0 by 0."""

_EVEN = 4
"""So many times the rows asked for may be computed, to read the experts' weights in place."""


@keras.saving.register_keras_serializable("penstock")
class NoisyTopK(keras.layers.Layer):
    """A gate that asks k of the experts: `G(x) = softmax(KeepTopK(H(x), k))` (Shazeer et al., ICLR 2017, eq. 3–5).

    `H(x)ᵢ = (x W_g)ᵢ + N(0, 1) · softplus((x W_noise)ᵢ)`, the noise in training alone. Call with `[batch, width]`;
    gives gates `[batch, experts]`, k of them above 0, which sum to 1. What is not kept gets no gradient of the gates.

    In training two losses are added that keep all experts in use, with CV the standard deviation over the mean:
    `importance · CV(Σ_x G(x))²` (eq. 6–7) and `load · CV(Σ_x P(x))²` (eq. 8–11, appendix A). `P(x)ᵢ` is the probability
    that expert i is kept if its noise alone is drawn again: a number of rows that has a gradient,
    `Φ(((x W_g)ᵢ − kth excluding i of H(x)) / softplus((x W_noise)ᵢ))`. Both matrices start at 0, so that at first each
    expert is as likely as any.

    Args:
        importance, load: weights of the losses.
        seed: of the noise.

    Raises:
        ValueError: k is not in 1 … experts.
    """

    def __init__(
        self,
        experts: int,
        k: int,
        importance: float = 0.1,
        load: float = 0.1,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 1 <= k <= experts:
            raise ValueError(f"k is how many of {experts} experts a row asks, 1 to {experts}, not {k}")
        self.experts, self.k, self.importance, self.load, self.seed = experts, k, importance, load, seed
        self._seeds = random.SeedGenerator(seed)

    def build(self, input_shape: Any) -> None:
        shape = (input_shape[-1], self.experts)
        self.gate = self.add_weight(shape, "zeros", name="gate")
        self.noise = self.add_weight(shape, "zeros", name="noise")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        clean = ops.matmul(inputs, self.gate)
        if not training:
            highest, places = tf.math.top_k(clean, self.k)
            return self._gates(highest, places)
        deviation = ops.softplus(ops.matmul(inputs, self.noise)) + _LEAST_NOISE
        noisy = clean + deviation * random.normal(ops.shape(clean), dtype=clean.dtype, seed=self._seeds)
        highest, places = tf.math.top_k(noisy, min(self.k + 1, self.experts))
        gates = self._gates(highest[:, : self.k], places[:, : self.k])
        self.add_loss(self.importance * squared_variation(tf.reduce_sum(gates, axis=0)))
        if self.k < self.experts:  # else every row asks every expert
            without = tf.where(noisy > highest[:, self.k :], highest[:, self.k :], highest[:, self.k - 1 : self.k])
            kept = 0.5 * (1.0 + tf.math.erf((clean - without) / (deviation * math.sqrt(2.0))))
            self.add_loss(self.load * squared_variation(tf.reduce_sum(kept, axis=0)))
        return gates

    def _gates(self, highest: Any, places: Any) -> Any:
        """The softmax of the kept, `[batch, k]`, at their places in `[batch, experts]`."""
        batch = tf.shape(places)[0]
        rows = tf.broadcast_to(tf.range(batch)[:, None], tf.shape(places))
        gates = tf.scatter_nd(tf.stack([rows, places], axis=-1), tf.nn.softmax(highest), [batch, self.experts])
        return tf.ensure_shape(gates, [None, self.experts])

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("experts", "k", "importance", "load", "seed")}
        return {**super().get_config(), **own}


def squared_variation(values: Any) -> Any:
    """`CV² = variance / mean²` of values that are not negative, `[n]` → `[]`; 0 if all are 0."""
    mean = tf.reduce_mean(values)
    return tf.math.divide_no_nan(tf.math.reduce_variance(values), tf.square(mean))


@keras.saving.register_keras_serializable("penstock")
class SparseExperts(keras.layers.Layer):
    """MLPs of one shape of which a row asks those that its gates are not 0 for: `Σₑ gₑ fₑ(x)` (Shazeer 2017, eq. 1).

    Call with `[batch, width]` and gates `[batch, experts]`; gives `[batch, units[-1]]`. Several tasks may share the
    experts: gates `[batch, tasks, experts]` give `[batch, tasks, units[-1]]`, and an expert that two of a row's tasks
    ask is computed once.

    The pairs of a row and an expert it asks are put in order of the expert, each expert's pairs are cut into blocks of
    one size, and a layer is one product of blocks and their experts' matrices. If the experts are asked evenly a block
    is as long as the longest queue, and the matrices are read where they stand. If not, blocks are as long as the mean
    queue and matrices are copied for each: so at most twice the pairs are computed however uneven the queues are, none
    is left out, and experts that nobody asks cost nothing.

    Args:
        units: of each layer of an expert.
        activation: after each layer.
        dropout: after each activation, the share of units that a step leaves out.

    Raises:
        ValueError: no expert or no layer.
    """

    def __init__(
        self, experts: int, units: Sequence[int], activation: Any = "relu", dropout: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if experts < 1 or not units:
            raise ValueError(f"experts need at least one expert and one layer, not {experts} and {list(units)}")
        self.experts, self.units, self.dropout = experts, tuple(units), dropout
        self.activation = keras.activations.get(activation)
        self._dropouts = [keras.layers.Dropout(dropout) for _ in units]
        self.supports_jit = False  # XLA compiles no shapes that follow from values

    def build(self, inputs_shape: Any, gates_shape: Any = None) -> None:
        def stacked(shape: tuple[int, int, int], dtype: Any = None) -> Any:
            return per_expert(shape[1:], shape[0], dtype)

        widths = (inputs_shape[-1], *self.units)
        self.kernels, self.biases = [], []
        for place, (width, units) in enumerate(zip(widths, self.units, strict=False)):
            self.kernels.append(self.add_weight((self.experts, width, units), stacked, name=f"kernel_{place}"))
            self.biases.append(self.add_weight((self.experts, 1, units), "zeros", name=f"bias_{place}"))

    def call(self, inputs: Any, gates: Any, training: bool | None = None) -> Any:
        inputs, gates = tf.convert_to_tensor(inputs), tf.convert_to_tensor(gates)
        by_task = gates if len(gates.shape) == 3 else gates[:, None, :]
        by_expert = tf.transpose(by_task, (2, 0, 1))
        pairs = tf.cast(tf.where(tf.reduce_any(tf.not_equal(by_expert, 0.0), axis=-1)), tf.int32)
        expert, row = pairs[:, 0], pairs[:, 1]
        outputs = self._outputs(inputs, expert, row, training)
        weighted = tf.gather_nd(by_expert, pairs)[:, :, None] * outputs[:, None, :]
        mixed = tf.math.unsorted_segment_sum(weighted, row, tf.shape(inputs)[0])
        return tf.ensure_shape(mixed, by_task.shape[:2] + self.units[-1:]) if len(gates.shape) == 3 else mixed[:, 0]

    def _outputs(self, inputs: Any, expert: Any, row: Any, training: bool | None) -> Any:
        """`f_e(x)` of pairs in order of the expert, `[pairs]` each → `[pairs, units[-1]]`."""
        count = tf.size(expert)
        queues = tf.math.bincount(expert, minlength=self.experts, maxlength=self.experts)
        longest = tf.reduce_max(queues)
        even = self.experts * longest <= _EVEN * count
        size = tf.where(even, longest, -(-count // self.experts))
        blocks = tf.where(even, 1, -(-queues // tf.maximum(size, 1)))
        owner = tf.repeat(tf.range(self.experts), blocks)
        before = tf.cumsum(blocks, exclusive=True) * size - tf.cumsum(queues, exclusive=True)
        slots = tf.range(count) + tf.gather(before, expert)
        # slots that no pair has are of row 0, and nobody reads what comes of them
        rows = tf.scatter_nd(slots[:, None], row, [tf.size(owner) * size])
        hidden = tf.reshape(_taken(inputs, rows), [tf.size(owner), size, inputs.shape[-1]])

        def of_blocks(weights: Any) -> Any:
            weights = tf.convert_to_tensor(weights)
            return tf.cond(even, lambda: weights, lambda: _taken(weights, owner))

        for kernel, bias, dropout in zip(self.kernels, self.biases, self._dropouts, strict=True):
            hidden = self.activation(tf.matmul(hidden, of_blocks(kernel)) + of_blocks(bias))
            hidden = dropout(hidden, training=training)
        return tf.gather(tf.reshape(hidden, [-1, self.units[-1]]), slots)

    def get_config(self) -> dict[str, Any]:
        own = {"experts": self.experts, "units": list(self.units), "dropout": self.dropout}
        return {**super().get_config(), **own, "activation": keras.activations.serialize(self.activation)}


def _taken(values: Any, rows: Any) -> Any:
    """Rows of `[n, …]`, with a dense gradient: what reads a sparse one takes its rows to be distinct."""
    flat = tf.gather(tf.reshape(values, [-1, math.prod(values.shape[1:])]), rows)  # a reshape's gradient is dense
    return tf.reshape(flat, [-1, *values.shape[1:]])
