"""Multi-gate mixture of experts (Ma et al., KDD 2018; Zhao et al., RecSys 2019)."""

from __future__ import annotations

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
        experts: as many for each set of embeddings.
        embeddings: sets of them, each read by experts of its own. With one the frequent tasks decide what an id means,
            and a rare task's experts have to do with that (Su et al., AAAI 2024: shared and task-specific embeddings).
        gate_dropout: in training a gate leaves out each expert with this probability, so that none relies on one.
    """

    experts: int = 5
    embeddings: int = 5
    expert_units: tuple[int, ...] = (256, 96)
    gate_dropout: float = 0.1
    learning_rate: float = 0.001


class Mixture(keras.layers.Layer):
    """A task's mixture of the experts, through its tower: `h_t(Σₑ g_{t,e}(x) fₑ(x))`, of `[x, f(x)]`."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mixture = ExpertMixture(config.experts, config.gate_dropout)
        self.tower = tower(config)

    def call(self, shared: Any, training: bool = False) -> Any:
        return self.tower(self.mixture(*shared, training=training), training=training)


def build(config: Config, schema: Schema) -> Trunk:
    """Experts read all there is; each task has a gate that mixes them and a tower.

    `y_t = h_t(Σₑ g_{t,e}(x) fₑ(x))` with `g_t = softmax(x W_t)` (Ma et al. 2018, eq. 5–7); an expert reads one of
    several sets of embeddings, gates read all.

    Raises:
        ValueError: experts that cannot be shared evenly by the sets of embeddings.
    """
    if config.embeddings < 1 or config.experts % config.embeddings:
        raise ValueError(f"{config.experts} experts cannot be shared evenly by {config.embeddings} sets of embeddings")
    inputs = inputs_of(schema.of(*SIDES))
    vectors = join_sets(config, schema, inputs, config.embeddings)
    each, rate = config.experts // config.embeddings, config.dropout_of_experts
    outputs = ops.concatenate(
        [Experts(each, config.expert_units, config.activation, rate)(vector) for vector in vectors], axis=1
    )
    everything = ops.concatenate(vectors, axis=-1)
    mixtures = {task: Mixture(config, name=f"tower_{task}") for task in config.tasks}
    gates = {task: mixture.mixture.gates(everything) for task, mixture in mixtures.items()}
    return Trunk(keras.Model(inputs, [everything, outputs], name="shared"), mixtures, keras.Model(inputs, gates))
