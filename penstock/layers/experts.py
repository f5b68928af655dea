"""Experts shared by tasks, and the gates that mix them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, random

_NEVER = -1e9
"""The logit of an expert that is dropped: its exponential is 0 beside any other's."""


def per_expert(shape: tuple[int, int], experts: int, dtype: Any = None) -> Any:
    """Glorot's uniform start of each expert's matrix by itself, `[experts, inputs, units]`."""
    glorot = keras.initializers.GlorotUniform()
    return ops.stack([glorot.clone()(shape, dtype) for _ in range(experts)])


@keras.saving.register_keras_serializable("penstock")
class Experts(keras.layers.Layer):
    """MLPs of one shape on one input, computed side by side: `f_e(x)` of each expert e (Ma et al., KDD 2018, eq. 6).

    Call with `[batch, width]`; gives `[batch, experts, units[-1]]`. The first layer of all experts is one matrix, as
    they read the same input, and a later layer one batched product: as many operations, and variables for the
    optimizer, as of a single MLP.

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

    def build(self, input_shape: Any) -> None:
        experts, first = self.experts, self.units[0]

        def side_by_side(shape: tuple[int, int], dtype: Any = None) -> Any:
            return ops.reshape(ops.transpose(per_expert((shape[0], first), experts, dtype), (1, 0, 2)), shape)

        def stacked(shape: tuple[int, int, int], dtype: Any = None) -> Any:
            return per_expert(shape[1:], experts, dtype)

        self.kernels = [self.add_weight((input_shape[-1], experts * first), side_by_side, name="kernel_0")]
        self.biases = [self.add_weight((experts * first,), "zeros", name="bias_0")]
        for place, (width, units) in enumerate(zip(self.units, self.units[1:], strict=False), start=1):
            self.kernels.append(self.add_weight((experts, width, units), stacked, name=f"kernel_{place}"))
            self.biases.append(self.add_weight((experts, 1, units), "zeros", name=f"bias_{place}"))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        hidden = ops.matmul(inputs, self.kernels[0]) + self.biases[0]
        hidden = self._dropouts[0](self.activation(hidden), training=training)
        hidden = ops.reshape(hidden, (-1, self.experts, self.units[0]))
        if len(self.units) == 1:
            return hidden
        hidden = ops.transpose(hidden, (1, 0, 2))
        for kernel, bias, dropout in zip(self.kernels[1:], self.biases[1:], self._dropouts[1:], strict=True):
            hidden = dropout(self.activation(ops.matmul(hidden, kernel) + bias), training=training)
        return ops.transpose(hidden, (1, 0, 2))

    def get_config(self) -> dict[str, Any]:
        own = {"experts": self.experts, "units": list(self.units), "dropout": self.dropout}
        return {**super().get_config(), **own, "activation": keras.activations.serialize(self.activation)}


@keras.saving.register_keras_serializable("penstock")
class ExpertMixture(keras.layers.Layer):
    """One task's mixture of shared experts: `Σₑ gₑ(x) fₑ(x)` with `g = softmax(x W)` (Ma et al., KDD 2018, eq. 5–7).

    Call with the input `[batch, width]` and the experts' outputs `[batch, experts, dim]`; gives `[batch, dim]`.

    In training a gate that has settled on few experts gives the others nothing to learn from, and so settles for good.
    Against it each expert's share is set to 0 with the probability `gate_dropout`, and the rest is divided by its sum
    (Zhao et al., RecSys 2019, section 5.2, "Gating Network Stability"). Each row draws for itself, so that every expert
    is in every batch; a row that lost all its experts keeps them all.

    Args:
        gate_dropout: in [0, 1).
        seed: of what is dropped.
        start: the shares that the gate departs from, `[experts]`, as the logits of `x = 0`: equal ones if None.

    Raises:
        ValueError: a gate_dropout outside [0, 1), or shares that are none of so many experts.
    """

    def __init__(
        self,
        experts: int,
        gate_dropout: float = 0.1,
        seed: int | None = None,
        start: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= gate_dropout < 1.0:
            raise ValueError(f"gate_dropout is a probability below 1, not {gate_dropout}")
        if start is not None and (len(start) != experts or min(start) <= 0 or not np.isclose(sum(start), 1.0)):
            raise ValueError(f"shares of {experts} experts are so many positive numbers of sum 1, not {list(start)}")
        self.experts, self.gate_dropout, self.seed = experts, gate_dropout, seed
        self.start = None if start is None else tuple(start)
        self.gate = keras.layers.Dense(experts, use_bias=False)
        self._seeds = random.SeedGenerator(seed)

    def build(self, inputs_shape: Any, outputs_shape: Any = None) -> None:
        if not self.gate.built:  # `gates` may have been asked first
            self.gate.build(inputs_shape)

    def call(self, inputs: Any, outputs: Any, training: bool | None = None) -> Any:
        # a product of small matrices for each row takes longer than one pass over all of them
        return ops.sum(ops.expand_dims(self.gates(inputs, training), -1) * outputs, axis=1)

    def gates(self, inputs: Any, training: bool | None = None) -> Any:
        """The share of each expert, `[batch, experts]`; shares sum to 1."""
        logits = self.gate(inputs)
        if self.start is not None:
            logits = logits + ops.cast(np.log(self.start), logits.dtype)
        if training and self.gate_dropout:
            drawn = random.uniform(ops.shape(logits), seed=self._seeds)
            kept = ops.greater_equal(drawn, self.gate_dropout)
            kept = ops.logical_or(kept, ops.logical_not(ops.any(kept, axis=-1, keepdims=True)))
            logits = ops.where(kept, logits, _NEVER)
        return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))

    def get_config(self) -> dict[str, Any]:
        own = {"experts": self.experts, "gate_dropout": self.gate_dropout, "seed": self.seed, "start": self.start}
        return {**super().get_config(), **own}


def utilisation(gates: np.ndarray) -> np.ndarray:
    """The mean share of each expert over rows: `[rows, experts]` → `[experts]`.

    Raises:
        ValueError: there is no row.
    """
    if not len(gates):
        raise ValueError("of no rows there is no utilisation")
    return np.mean(np.asarray(gates, np.float64), axis=0)


def spread(gates: np.ndarray) -> dict[str, list[float]]:
    """The `utilisation` of experts as `mean`, and the share below which one row in ten is, and nine: `low`, `high`."""
    low, high = np.quantile(gates, [0.1, 0.9], axis=0)
    return {"mean": utilisation(gates).tolist(), "low": low.tolist(), "high": high.tolist()}


def polarised(shares: np.ndarray, unused: float = 0.01, alone: float = 0.95) -> bool:
    """Whether a gate has collapsed: most of its experts have "zero utilisation", or one has next to all of it.

    What Zhao et al. (RecSys 2019, section 5.2) saw in one of five of their fits is a gate with zero utilisation on
    most experts; what a gate is by its mean counts, as one that picks an expert for each row is as it should be.

    Args:
        shares: the gate's `utilisation`, `[experts]`.
        unused: an expert is, if its share is below this part of an equal one, `unused / experts`.
        alone: so large a share leaves nothing to the others.
    """
    experts = len(shares)
    if experts == 1:
        return False
    return bool(2 * np.sum(shares < unused / experts) > experts or np.max(shares) > alone)
