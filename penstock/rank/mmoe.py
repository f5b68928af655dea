"""Multi-gate mixture of experts (Ma et al., KDD 2018; Zhao et al., RecSys 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock.examples import Schema
from penstock.layers.embedding import inputs_of
from penstock.layers.experts import ExpertMixture, Experts
from penstock.ranking import SIDES, RankConfig, Trunk, join_sets, tower


@dataclass(frozen=True)
class Config(RankConfig):
    """Parameters of the model and of its fit.

    Attributes:
        own: each task has embeddings and experts that learn from it alone, which the other tasks read as they are. If
            not, all tasks teach all of them, as it was published, and rare ones read what frequent ones make of an id.
        experts: of each task, or those that all share.
        own_share: of its own experts, from which a task's gate departs.
        gate_dropout: in training a gate leaves out each expert with this probability, so that none relies on one.
    """

    own: bool = True
    experts: int = 1
    own_share: float = 0.5
    expert_units: tuple[int, ...] = (256, 96)
    gate_dropout: float = 0.1
    epochs: int = 2


class Mixture(keras.layers.Layer):
    """A task's mixture of the experts, through its tower: `h_t(Σₑ g_{t,e}(x) fₑ(x))`, of `[x, f(x)]`."""

    def __init__(self, config: Config, start: Sequence[float] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mixture = ExpertMixture(config.experts * sets_of(config), config.gate_dropout, start=start)
        self.tower = tower(config)

    def call(self, shared: Any, training: bool = False) -> Any:
        return self.tower(self.mixture(*shared, training=training), training=training)


def sets_of(config: Config) -> int:
    """How many sets of embeddings there are."""
    return len(config.tasks) if config.own else 1


def start_of(config: Config, place: int) -> list[float] | None:
    """The shares of all experts from which the gate of the task at a place departs; None if they are equal.

    Raises:
        ValueError: an `own_share` outside (0, 1).
    """
    if not 0.0 < config.own_share < 1.0:
        raise ValueError(f"own_share is a part of 1, not {config.own_share}")
    others = sets_of(config) - 1
    if not others:
        return None
    shares = [(1.0 - config.own_share) / others] * (others + 1)
    shares[place] = config.own_share
    return [share / config.experts for share in shares for _ in range(config.experts)]


def build(config: Config, schema: Schema) -> Trunk:
    """Experts read all there is; each task has a gate that mixes them and a tower.

    `y_t = h_t(Σₑ g_{t,e}(x) fₑ(x))` with `g_t = softmax(x W_t)` (Ma et al. 2018, eq. 5–7). Experts of its own read a
    task's own embeddings, as its gate does, and the gradient of another task ends at what they answer (Su et al., AAAI
    2024: "all forward task-specific backward"). There the gate departs from a share `s` of the task's own, so that a
    rare task, which can hardly move it, begins near a net of its own: `g_t = softmax(x W_t + log s_t)`.
    """
    inputs = inputs_of(schema.of(*SIDES))
    vectors = join_sets(config, schema, inputs, sets_of(config))
    experts = [
        Experts(config.experts, config.expert_units, config.activation, config.dropout_of_experts) for _ in vectors
    ]
    outputs = [layer(vector) for layer, vector in zip(experts, vectors, strict=True)]
    mixtures = {
        task: Mixture(config, start_of(config, place), name=f"tower_{task}") for place, task in enumerate(config.tasks)
    }
    if not config.own:
        gates = {task: mixture.mixture.gates(vectors[0]) for task, mixture in mixtures.items()}
        return Trunk(keras.Model(inputs, [vectors[0], outputs[0]], name="shared"), mixtures, keras.Model(inputs, gates))
    shared, gates = {}, {}
    for place, (task, vector) in enumerate(zip(config.tasks, vectors, strict=True)):
        read = [output if of == place else ops.stop_gradient(output) for of, output in enumerate(outputs)]
        shared[task] = [vector, ops.concatenate(read, axis=1)]
        gates[task] = mixtures[task].mixture.gates(vector)
    return Trunk(keras.Model(inputs, shared, name="shared"), mixtures, keras.Model(inputs, gates))
