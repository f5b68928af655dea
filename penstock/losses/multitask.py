"""The losses of several tasks: one binary label, and a sum of tasks that no task loses by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from keras import ops

from penstock import backends, distribution

_MOST_TASKS = 10
_RIDGE = 1e-11
_TIE = 1e-12


def binary_cross_entropy(labels: Any, logits: Any, positive_weight: float = 1.0) -> Any:
    """`w y softplus(−s) + (1 − y) softplus(s)`: the logistic loss from logits, positives weighing w, `[batch]`.

    The weight multiplies the odds: what is learned is `s = log w + log(p / (1 − p))`. `unweighted_logits` takes it off.

    Args:
        labels: 0 or 1, or a probability, `[batch]`.
        logits: s, `[batch]`.
        positive_weight: w, above 0.
    """
    return positive_weight * labels * ops.softplus(-logits) + (1.0 - labels) * ops.softplus(logits)


def unweighted_logits(logits: Any, positive_weight: float) -> Any:
    """`s − log w`: logits learned with positives that weigh w, such that their sigmoid is the probability again."""
    return logits - math.log(positive_weight)


def min_norm(gram: Any) -> Any:
    """The weights `α ≥ 0, Σ α_t = 1` that make `‖Σ α_t g_t‖²` smallest, of the Gram matrix `⟨g_t, g_u⟩`.

    With `d = Σ α_t g_t` all `⟨g_t, d⟩ ≥ ‖d‖²`: a step along −d makes no task worse to first order, and `d = 0` where no
    direction does so, at a Pareto-stationary point. Désidéri 2012; Sener & Koltun, NeurIPS 2018, eq. 3.

    Among the tasks that have weight, `α ∝ G⁻¹ 1`: all 2^tasks − 1 sets are solved at once, and the best one is it. For
    two tasks that is their eq. 4. Their Algorithm 2 (Frank-Wolfe) takes hundreds of steps to a rough answer where
    several tasks share the weight, and more the more the gradients differ in length; few tasks have few sets.

    The shortest gradients get most of the weight, as d is no longer than any: scale losses of different units first. A
    gradient of 0 gets all. Gradients that are alike share theirs equally, as the largest of equally good sets is taken.

    Args:
        gram: `[tasks, tasks]`; best float64, in which opposite gradients stay opposite.

    Returns:
        α, float64 `[tasks]`.

    Raises:
        ValueError: more than 10 tasks.
    """
    gram = ops.cast(gram, "float64")
    tasks = gram.shape[0]
    if tasks > _MOST_TASKS:
        raise ValueError(f"the sets of {tasks} tasks are too many to solve each; at most {_MOST_TASKS} are")
    sets = _sets(tasks)
    lengths = ops.sqrt(ops.diagonal(gram))
    lengths = ops.maximum(lengths, ops.maximum(1e-12 * ops.max(lengths), 1e-150))
    # with gradients of length 1 no scale is lost in rounding: G = D Ĝ D, α = D⁻¹ β, Ĝ β ∝ D⁻¹ 1
    inverse = ops.min(lengths) / lengths
    cosines = gram / (lengths[:, None] * lengths[None, :])
    # of gradients that are not finite the weights are not either; the solver would end the program
    cosines = ops.where(ops.isfinite(cosines), cosines, 0.0)
    # a task outside the set has an equation of its own, 1 · β = 0; the ridge decides between gradients that are alike
    own = (1.0 - sets + _RIDGE)[:, :, None] * np.eye(tasks)
    systems = sets[:, :, None] * cosines * sets[:, None, :] + own
    weights = inverse * ops.solve(systems, (sets * inverse)[:, :, None])[:, :, 0]
    weights = ops.maximum(weights / ops.sum(weights, axis=1, keepdims=True), 0.0)
    weights = weights / ops.sum(weights, axis=1, keepdims=True)
    scaled = weights / inverse
    norms = ops.einsum("st,tu,su->s", scaled, cosines, scaled)
    best = norms <= ops.min(norms) + _TIE
    return weights[ops.argmax(ops.cast(best, "int32"))]


def _sets(tasks: int) -> np.ndarray:
    """Which tasks are in each set but the empty one, 0 or 1, `[2^tasks − 1, tasks]`; the largest sets first."""
    sets = np.array(list(itertools.product([1.0, 0.0], repeat=tasks)))[:-1]
    return sets[np.argsort(-sets.sum(axis=1), kind="stable")]


def pareto(losses: Callable[[Any], Mapping[str, Any]], shared: Any) -> tuple[Any, dict[str, Any]]:
    """`Σ α_t L_t` with the α of `min_norm`, of the gradients of each loss to what the tasks share.

    Those gradients stand for the ones to the shared parameters: their smallest combination bounds that of the latter,
    and is 0 at the same points where the parameters reach every representation (MGDA-UB: Sener & Koltun, NeurIPS 2018,
    section 3.3). They need a pass back through each task's tower alone, not through what is shared. No gradient flows
    through α. The towers' own gradients are those of the weighted sum too, as in one loss; their Algorithm 2 leaves
    them unweighted.

    Args:
        losses: what is shared → the loss of each task, `[]`; called once.
        shared: `[batch, dim]`, or a structure of such. Of tasks that each read a part of their own no conflict is seen:
            their gradients are at right angles, and `α ∝ 1 / ‖g_t‖²`.

    Returns:
        The sum `[]`, and α by task, `[]` each.

    Raises:
        ValueError: a loss that does not depend on what is shared, where the backend can tell; its gradient of 0 would
            get all the weight.
    """
    by_task, gradients = backends.each_gradient(losses, shared)
    # gradients to the rows of other replicas are elsewhere, and products of gradients are sums over rows
    gram = distribution.summed(ops.matmul(gradients, ops.transpose(gradients)))
    alpha = ops.unstack(ops.cast(ops.stop_gradient(min_norm(gram)), "float32"), len(by_task))
    weights = dict(zip(by_task, alpha, strict=True))
    return sum(weights[task] * ops.cast(loss, "float32") for task, loss in by_task.items()), weights
