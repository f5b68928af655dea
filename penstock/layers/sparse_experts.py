"""Many experts of which each row asks few: what is computed grows with those asked (Shazeer et al., ICLR 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, random

from penstock import backends
from penstock.layers.experts import per_expert

_LEAST_NOISE = 1e-6
"""Keeps a deviation of the noise that falls to 0 from dividing 0 by 0."""


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
            highest, places = ops.top_k(clean, self.k)
            return self._gates(highest, places)
        deviation = ops.softplus(ops.matmul(inputs, self.noise)) + _LEAST_NOISE
        noisy = clean + deviation * random.normal(ops.shape(clean), dtype=clean.dtype, seed=self._seeds)
        highest, places = ops.top_k(noisy, min(self.k + 1, self.experts))
        gates = self._gates(highest[:, : self.k], places[:, : self.k])
        self.add_loss(self.importance * squared_variation(ops.sum(gates, axis=0)))
        if self.k < self.experts:  # else every row asks every expert
            without = ops.where(noisy > highest[:, self.k :], highest[:, self.k :], highest[:, self.k - 1 : self.k])
            kept = 0.5 * (1.0 + ops.erf((clean - without) / (deviation * math.sqrt(2.0))))
            self.add_loss(self.load * squared_variation(ops.sum(kept, axis=0)))
        return gates

    def _gates(self, highest: Any, places: Any) -> Any:
        """The softmax of the kept, `[batch, k]`, at their places in `[batch, experts]`."""
        batch = ops.shape(places)[0]
        rows = ops.broadcast_to(ops.arange(batch, dtype="int32")[:, None], ops.shape(places))
        shares = ops.softmax(highest) if self.k > 1 else ops.ones_like(highest)  # of one Keras warns
        gates = ops.scatter(ops.stack([rows, places], axis=-1), shares, (batch, self.experts))
        return ops.reshape(gates, (-1, self.experts))

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("experts", "k", "importance", "load", "seed")}
        return {**super().get_config(), **own}


def squared_variation(values: Any) -> Any:
    """`CV² = variance / mean²` of values that are not negative, `[n]` → `[]`; 0 if all are 0."""
    return ops.divide_no_nan(ops.var(values), ops.square(ops.mean(values)))


@keras.saving.register_keras_serializable("penstock")
class SparseExperts(keras.layers.Layer):
    """MLPs of one shape of which a row asks those that its gates are not 0 for: `Σₑ gₑ fₑ(x)` (Shazeer 2017, eq. 1).

    Call with `[batch, width]` and gates `[batch, experts]`; gives `[batch, units[-1]]`. Several tasks may share the
    experts: gates `[batch, tasks, experts]` give `[batch, tasks, units[-1]]`, and an expert that two of a row's tasks
    ask is computed once.

    What is computed is what is asked for (`penstock.backends.tensorflow.mixed`), unless shapes are fixed.

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
        self.supports_jit = backends.FIXED_SHAPES  # XLA compiles no shapes that follow from values

    def build(self, inputs_shape: Any, gates_shape: Any = None) -> None:
        def stacked(shape: tuple[int, int, int], dtype: Any = None) -> Any:
            return per_expert(shape[1:], shape[0], dtype)

        widths = (inputs_shape[-1], *self.units)
        self.kernels, self.biases = [], []
        for place, (width, units) in enumerate(zip(widths, self.units, strict=False)):
            self.kernels.append(self.add_weight((self.experts, width, units), stacked, name=f"kernel_{place}"))
            self.biases.append(self.add_weight((self.experts, 1, units), "zeros", name=f"bias_{place}"))

    def call(self, inputs: Any, gates: Any, training: bool | None = None) -> Any:
        def after(dropout: keras.layers.Layer) -> Callable[[Any], Any]:
            return lambda hidden: dropout(self.activation(hidden), training=training)

        layers = [*zip(self.kernels, self.biases, map(after, self._dropouts), strict=True)]
        if len(gates.shape) == 3:
            return backends.mixed(inputs, gates, layers)
        return backends.mixed(inputs, gates[:, None, :], layers)[:, 0]

    def get_config(self) -> dict[str, Any]:
        own = {"experts": self.experts, "units": list(self.units), "dropout": self.dropout}
        return {**super().get_config(), **own, "activation": keras.activations.serialize(self.activation)}
