"""Weights of tasks that are learned with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

_SCALES = {"regression": 0.5, "classification": 1.0}
_KINDS = (*_SCALES, "likelihood")


@keras.saving.register_keras_serializable("penstock")
class HomoscedasticWeights(keras.layers.Layer):
    """Sums the losses of tasks, each weighted by a noise σ that is learned (Kendall, Gal & Cipolla, CVPR 2018).

    | kind | loss | adds | is smallest at |
    |---|---|---|---|
    | `regression` | mean squared error | `L / (2σ²) + log σ` (eq. 7) | σ² = L |
    | `classification` | mean cross-entropy | `L / σ² + log σ` (eq. 10) | σ² = 2L |
    | `likelihood` | mean negative log-likelihood that has a variance of its own | `L` | |

    Call with the losses by task, `[]` each; gives their total, `[]`. What is learned is log σ², from σ = 1. With σ at
    its smallest the gradient of a task is `½ ∇ log L`: each counts by how much of its own loss a step takes away.
    Losses of the first two kinds must not be negative: σ of one that is would go to 0 and the total to −∞.

    Args:
        kinds: by task; others than these are refused when called.

    Raises:
        ValueError: there is no such kind; or, when called, the losses are of other tasks.
    """

    def __init__(self, kinds: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for task, kind in kinds.items():
            if kind not in _KINDS:
                raise ValueError(f"the kind of task {task} is one of {', '.join(_KINDS)}, not {kind}")
        self.autocast = False  # a sum of losses in half precision is no sum
        self.kinds = dict(kinds)
        self._learned = [task for task, kind in self.kinds.items() if kind in _SCALES]
        self._factors = np.array([_SCALES[self.kinds[task]] for task in self._learned], np.float32)

    def build(self, input_shape: Any = None) -> None:
        shape = (len(self._learned),)
        self.log_variances = self.add_weight(shape, "zeros", dtype="float32", autocast=False, name="log_variances")

    def call(self, losses: Mapping[str, Any]) -> Any:
        if losses.keys() != self.kinds.keys():
            raise ValueError(f"the tasks are {', '.join(self.kinds)}, the losses of {', '.join(losses)}")
        total = sum((losses[task] for task, kind in self.kinds.items() if kind not in _SCALES), ops.zeros(()))
        if not self._learned:
            return total
        learned = ops.stack([losses[task] for task in self._learned])
        log_variances = ops.convert_to_tensor(self.log_variances)
        return total + ops.sum(self._factors * ops.exp(-log_variances) * learned + 0.5 * log_variances)

    def by_task(self) -> dict[str, float]:
        """What the loss of each task is multiplied by as σ is now: `1/(2σ²)`, `1/σ²` or 1."""
        weights = self._factors * np.exp(-ops.convert_to_numpy(self.log_variances))
        return dict.fromkeys(self.kinds, 1.0) | dict(zip(self._learned, weights.tolist(), strict=True))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kinds": self.kinds}
