"""What Keras's backends do each in its own way, behind one set of names.

Models, layers, losses, samplers and objectives are written in `keras.ops`. What that has no word for, or what takes
longer in it, is here, and nowhere else in the training of a model: a module for each backend, with the same functions,
of which one is taken by `KERAS_BACKEND`, as Keras takes its own.

| | `tensorflow` | `jax` |
|---|---|---|
| shapes | may follow from values: distinct ids, the longest of a batch | fixed: a step is compiled whole, by XLA |
| rows of a table | gathered from the variable, with a sparse gradient | taken, with a dense gradient |
| negatives that are the positive | their places | a mask `[batch, sample]` |
| experts that a row does not ask | are not computed | are, and weigh 0 |
| batches | `tf.data`, cut by threads | NumPy, cut between two steps |

Weights are the same by name and shape, so that those of one load under the other. Beside this package, TensorFlow's
alone are the sparse half of `penstock.optimizers` and `penstock.distribution`, which do nothing on another backend,
`penstock.pretraining`, and what comes after training: export, index, evaluation and look-alike.
"""

from __future__ import annotations

import keras

# name by name, so that linter and type checker hold each backend to having them all
if keras.config.backend() == "tensorflow":
    from penstock.backends.tensorflow import (
        FIXED_SHAPES,
        STEPS_AT_ONCE,
        at,
        compiled,
        cut,
        distinct,
        each_gradient,
        first_places,
        hold,
        leading,
        log_frequency,
        log_one_plus_sum_exp,
        mean_log_one_plus_sum_exp,
        mean_of_rows,
        mixed,
        once,
        parted,
        rows,
        those,
        write_rows,
    )
elif keras.config.backend() == "jax":
    from penstock.backends.jax import (
        FIXED_SHAPES,
        STEPS_AT_ONCE,
        at,
        compiled,
        cut,
        distinct,
        each_gradient,
        first_places,
        hold,
        leading,
        log_frequency,
        log_one_plus_sum_exp,
        mean_log_one_plus_sum_exp,
        mean_of_rows,
        mixed,
        once,
        parted,
        rows,
        those,
        write_rows,
    )
else:
    raise ImportError(f"KERAS_BACKEND is tensorflow or jax, not {keras.config.backend()}")

__all__ = [
    "FIXED_SHAPES",
    "STEPS_AT_ONCE",
    "at",
    "compiled",
    "cut",
    "distinct",
    "each_gradient",
    "first_places",
    "hold",
    "leading",
    "log_frequency",
    "log_one_plus_sum_exp",
    "mean_log_one_plus_sum_exp",
    "mean_of_rows",
    "mixed",
    "once",
    "parted",
    "rows",
    "those",
    "write_rows",
]
