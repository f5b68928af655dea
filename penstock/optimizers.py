"""Optimisers that change only the rows of a table that a batch touched, and sum what a batch asks of each row first.

A gather's gradient is sparse: row indices, as often as they were gathered, and a gradient for each. Keras applies it
entry by entry, so that a row that occurs twice gets a wrong update, and computes with the whole table, so that a step
costs as much as the vocabulary is large. Here the entries of a row are summed, then the rows that there are get their
update. Clipping sees the summed rows, and so does as with dense gradients. A dense gradient is applied by TensorFlow's
one operation for it, where Keras takes a dozen for each variable.

On another backend gradients of tables are dense, and updates are Keras's: of all rows, with Adagrad to the same result.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from penstock import distribution

_ALL_ROWS = ("weight_decay", "use_ema", "gradient_accumulation_steps", "loss_scale_factor", "amsgrad")


class _ByRow:
    """What the optimisers below share; stands before the Keras optimizer whose settings and state they have.

    Raises:
        ValueError: a setting of Keras's that goes over all rows at each step.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for name in _ALL_ROWS:
            if getattr(self, name, None):
                raise ValueError(f"{type(self).__name__} changes the rows of a batch alone: it has no {name}")

    def apply(self, grads: list[Any], trainable_variables: list[Any] | None = None) -> None:
        super().apply([_summed(gradient) for gradient in grads], trainable_variables)  # type: ignore[misc]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        rate = ops.cast(learning_rate, variable.dtype)
        if _is_sparse(gradient):
            if distribution.replicas() > 1:
                gradient = _summed(gradient)  # each replica's rows occur once, and stand one behind the other
            self._update_rows(gradient.indices, ops.cast(gradient.values, variable.dtype), variable, rate)
        elif keras.config.backend() == "tensorflow":
            self._update_all(ops.cast(gradient, variable.dtype), variable, rate)
        else:
            super().update_step(gradient, variable, learning_rate)  # type: ignore[misc]

    def _update_rows(self, rows: Any, gradients: Any, variable: Any, learning_rate: Any) -> None:
        """Updates `rows`, each of which occurs once: `[rows]`, `[rows, …]`."""
        raise NotImplementedError

    def _update_all(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates a whole variable."""
        raise NotImplementedError


@keras.saving.register_keras_serializable("penstock")
class Adagrad(_ByRow, keras.optimizers.Adagrad):
    """`a ← a + g²`, `w ← w − η g / √a` (Duchi, Hazan & Singer, JMLR 2011, section 1.2, the diagonal form).

    Equal to the dense update in every row: a gradient of 0 changes nothing. `a` starts at a number that only keeps 0/0
    away: Keras's 0.1 is far above the squares of an embedding's gradients and stands for a lower rate at first.
    """

    def __init__(
        self, learning_rate: Any = 0.05, initial_accumulator_value: float = 1e-20, epsilon: float = 0.0, **settings: Any
    ) -> None:
        super().__init__(
            learning_rate, initial_accumulator_value=initial_accumulator_value, epsilon=epsilon, **settings
        )
        if epsilon or initial_accumulator_value <= 0.0:
            raise ValueError("Adagrad has no epsilon: give a positive initial_accumulator_value instead")

    def _update_rows(self, rows: Any, gradients: Any, variable: Any, learning_rate: Any) -> None:
        accumulator = self._accumulators[self._get_variable_index(variable)]
        squares = _read(accumulator, rows) + ops.square(gradients)
        _write(accumulator, rows, squares)
        _write(variable, rows, _read(variable, rows) - learning_rate * gradients * ops.rsqrt(squares))

    def _update_all(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        import tensorflow as tf

        accumulator = self._accumulators[self._get_variable_index(variable)]
        tf.raw_ops.ResourceApplyAdagradV2(
            var=variable.handle, accum=accumulator.handle, lr=learning_rate, epsilon=0.0, grad=gradient
        )


@keras.saving.register_keras_serializable("penstock")
class Adam(_ByRow, keras.optimizers.Adam):
    """Adam (Kingma & Ba 2015, algorithm 1), lazy: the moments of a row that the batch did not touch stand still.

    `m ← m + (1 − β₁)(g − m)`, `v ← v + (1 − β₂)(g² − v)`, `w ← w − η √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)`, with t
    the number of the step, not of the row's updates. Where every row is touched at each step it is Adam.
    """

    def _update_rows(self, rows: Any, gradients: Any, variable: Any, learning_rate: Any) -> None:
        place = self._get_variable_index(variable)
        step = ops.cast(self.iterations + 1, variable.dtype)
        rate = learning_rate * ops.sqrt(1.0 - self.beta_2**step) / (1.0 - self.beta_1**step)
        first, second = _read(self._momentums[place], rows), _read(self._velocities[place], rows)
        first += (gradients - first) * (1.0 - self.beta_1)
        second += (ops.square(gradients) - second) * (1.0 - self.beta_2)
        _write(self._momentums[place], rows, first)
        _write(self._velocities[place], rows, second)
        _write(variable, rows, _read(variable, rows) - rate * first / (ops.sqrt(second) + self.epsilon))

    def _update_all(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        import tensorflow as tf

        place = self._get_variable_index(variable)
        step = ops.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[place].handle,
            v=self._velocities[place].handle,
            beta1_power=self.beta_1**step,
            beta2_power=self.beta_2**step,
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


@keras.saving.register_keras_serializable("penstock")
class LossScale(keras.optimizers.LossScaleOptimizer):
    """Keras's dynamic loss scaling, which leaves out a step whose gradients are not finite in float16.

    Keras would look at whole tables, and each replica at its own gradients alone: here the rows that there are count,
    and all replicas leave out a step or none. Micikevicius et al., ICLR 2018, section 3.2.
    """

    def check_finite(self, grads: list[Any]) -> Any:
        finite = super().check_finite([gradient.values if _is_sparse(gradient) else gradient for gradient in grads])
        return ops.equal(distribution.summed(ops.cast(ops.logical_not(finite), "float32")), 0.0)


def build(name: str, learning_rate: Any, scaled: bool = False) -> keras.optimizers.Optimizer:
    """The optimiser of a name, at a rate or a schedule of rates, with loss scaling if it is asked for.

    Raises:
        ValueError: an unknown name.
    """
    known = {"adagrad": Adagrad, "adam": Adam}
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}: there are {', '.join(sorted(known))}")
    optimizer = known[name](learning_rate)
    return LossScale(optimizer) if scaled else optimizer


def _is_sparse(gradient: Any) -> bool:
    return hasattr(gradient, "indices") and hasattr(gradient, "values")


def _summed(gradient: Any) -> Any:
    """A sparse gradient with each row once; any other as it is."""
    if not _is_sparse(gradient):
        return gradient
    import tensorflow as tf  # only its backend has sparse gradients

    rows, place = tf.unique(gradient.indices)

    def sums() -> Any:
        # of what stands together: half the time of tf.math.unsorted_segment_sum
        order = tf.argsort(place)
        return tf.math.segment_sum(tf.gather(gradient.values, order), tf.gather(place, order))

    values = tf.cond(tf.size(rows) == tf.size(place), lambda: gradient.values, sums)
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def _read(variable: Any, rows: Any) -> Any:
    import tensorflow as tf  # only its backend has sparse gradients

    return tf.raw_ops.ResourceGather(resource=variable.handle, indices=rows, dtype=variable.dtype)


def _write(variable: Any, rows: Any, values: Any) -> None:
    # whole rows are copied: a third of the time of the operations that compute in place, row by row
    import tensorflow as tf  # only its backend has sparse gradients

    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=rows, updates=values)
