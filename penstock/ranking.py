"""A rank model: what its tasks share, a tower a task, and a head a task, trained and served as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
from keras import ops

import penstock
from penstock import distribution
from penstock.calibration import Calibrator
from penstock.events import LABELS
from penstock.examples import CONTEXT, Schema, Side
from penstock.fitting import Settings
from penstock.layers.concrete_dropout import ConcreteDropout
from penstock.layers.embedding import IdDropout, embed, sizes_of
from penstock.layers.examination import Examination
from penstock.layers.latent_cross import LatentCross
from penstock.layers.position_bias import PositionBias
from penstock.layers.task_weights import HomoscedasticWeights
from penstock.losses.multitask import binary_cross_entropy, pareto, unweighted_logits
from penstock.losses.uncertain import (
    binary_uncertainty,
    bounded,
    logit_normal_nll,
    logit_normal_probability,
    normal_quantiles,
    regression_uncertainty,
)
from penstock.losses.watch_time import (
    DAY_SECONDS,
    expected_watch_time,
    log_normal_expectation,
    log_normal_nll,
    weighted_logistic,
)

BINARY = (*LABELS, "profile_enter")
"""Tasks whose head is a probability."""

WATCH_TIME = "watch_time"
"""The task whose head is an expectation, in seconds."""

TASKS = (*BINARY, WATCH_TIME)

WEIGHTINGS = ("fixed", "uncertainty", "pareto")
POSITION_BIASES = ("none", "logit", "examination")

CALIBRATIONS = ("temperature", "isotonic", "none")

NOISE = normal_quantiles(16)
"""The logit of a head with a variance is integrated over these quantiles: without chance, in training as in serving."""

MANY = 1000
"""An id with more values than this is withheld from a share of the rows."""

POSITION = "position"
"""An input of training alone: the place in the slate, int32 `[batch]`, -1 where it is not known."""

SIDES: tuple[Side, ...] = ("user", "item", "context")
"""What of the schema rank models read."""


@dataclass(frozen=True)
class RankConfig:
    """How a rank model is trained; each model's own `Config` adds its parameters and its defaults.

    Attributes:
        dim: width of embeddings.
        embedding_scale: they start uniform in ± this.
        match: width of the product of user and item.
        tower_units: layers of a task's own, between what is shared and its head.
        tasks: what is learnt, of `TASKS`; those of `penstock.events.LABELS` are served and always among them.
        id_dropout: the share of rows in which training withholds an id of many values, user and item among them.
        loss_weights: by task; 1 if not named. A rare label has a small loss, and little say in what tasks share.
        positive_weights: of rows whose label is 1, by task; 1 if not named. Probabilities are corrected for it.
        weighting: of the tasks' losses, beside `loss_weights`: `fixed`; `uncertainty`, by a noise of each task that is
            learnt (Kendall, Gal & Cipolla 2018); `pareto`, by the combination of gradients that is best for all (Sener
            & Koltun 2018).
        variance: heads have a variance of their own: of the logit, and of log(1 + seconds) (Kendall & Gal 2017).
        position_bias: what the place on the screen does is learnt beside, so that it is not taken for the item's worth;
            serving does not know of it. `logit`: it is added to a logit (Zhao et al., RecSys 2019); `examination`: it
            is a factor of the probability, the share of users who look there (Guo et al., RecSys 2019); or `none`.
        positions: so many places of a slate have a bias of their own.
        position_dropout: the share of rows of which training withholds the place.
        latent_cross: scenario, device, hour and the time since the last action multiply what is read (Beutel et al.,
            WSDM 2018).
        pretrained: items start from vectors that were learnt before, a name in `penstock.pretraining`; or `none`.
        frozen: and stay as they are.
        passes: so many passes with dropout left on are served as their mean, and with how uncertain it is; the rate of
            dropout is learnt, as otherwise more data would not make the passes agree. 0: one without dropout.
        calibration: of each probability on the validation slice, a name in `penstock.calibration`, or `none`.
        learning_rate: at the first step; it falls evenly to `last_rate` times that at the last step of the last epoch.
        precision: what layers compute in, a name in `penstock.fitting.PRECISIONS`.
    """

    dim: int = 32
    embedding_scale: float = 0.2
    match: int = 48
    tower_units: tuple[int, ...] = (24,)
    activation: str = "relu"
    dropout: float = 0.1
    id_dropout: float = 0.5
    tasks: tuple[str, ...] = TASKS
    loss_weights: Mapping[str, float] = field(default_factory=lambda: {"like": 5.0, "profile_enter": 5.0})
    positive_weights: Mapping[str, float] = field(default_factory=dict)
    weighting: str = "fixed"
    position_bias: str = "none"
    positions: int = 32
    position_dropout: float = 0.1
    latent_cross: bool = False
    pretrained: str = "none"
    frozen: bool = False
    variance: bool = False
    passes: int = 0
    calibration: str = "temperature"
    epochs: int = 3
    batch_size: int = 512
    learning_rate: float = 0.002
    last_rate: float = 0.02
    patience: int = 1
    precision: str = "float32"

    @property
    def dropout_of_experts(self) -> float:
        """Where passes are made, what experts read is dropped at a rate that is learnt."""
        return 0.0 if self.passes else self.dropout

    @property
    def settings(self) -> Settings:
        return Settings(self.epochs, self.batch_size, self.learning_rate, self.patience)


class Trunk(NamedTuple):
    """What a file in `rank/` builds.

    Attributes:
        shared: encoded features by name → what the tasks share, a tensor or several, `[batch, …]`; by task if each has
            its own.
        towers: by task, of what is shared → `[batch, units]`.
        gates: encoded features by name → the shares of experts by task, `[batch, experts]`; of a model that has some.
    """

    shared: keras.Model
    towers: Mapping[str, keras.layers.Layer]
    gates: keras.Model | None = None


def join(config: RankConfig, schema: Schema, inputs: dict[str, keras.KerasTensor]) -> keras.KerasTensor:
    """What every rank model reads: embeddings and numbers of user, item and context, and how user and item match.

    `x = [user; item; context; (A·user) ∘ (B·item)]` `[batch, width]`: without the product an MLP learns slowly which
    user meets which item (Rendle et al., RecSys 2020, arXiv 2005.09683).

    Args:
        inputs: of the encoded features of all `SIDES`, by name.
    """
    (vector,) = join_sets(config, schema, inputs, 1)
    return vector


def join_sets(
    config: RankConfig, schema: Schema, inputs: dict[str, keras.KerasTensor], sets: int
) -> list[keras.KerasTensor]:
    """`join` with so many sets of embeddings, each with a product of its own.

    A table holds all vectors of an id side by side: however many there are, they are looked up at once.
    """
    features = schema.of(*SIDES)
    wide = embed(withheld(config, schema, inputs), features, schema, sets * config.dim, config.embedding_scale)
    parts = [
        [v] * sets if f.kind in ("count", "number") else ops.split(v, sets, axis=-1)
        for f, v in zip(features, wide, strict=True)
    ]
    vectors = []
    for own in zip(*parts, strict=True):
        by_side = {
            side: ops.concatenate([v for f, v in zip(features, own, strict=True) if f.side == side], axis=-1)
            for side in SIDES
        }
        match = keras.layers.Dense(config.match)(by_side["user"]) * keras.layers.Dense(config.match)(by_side["item"])
        vector = ops.concatenate([*by_side.values(), match], axis=-1)
        if config.passes:
            vector = ConcreteDropout(schema.rows)(vector)
        if config.latent_cross:
            contexts = schema.named(*CONTEXT)
            crossed = LatentCross(sizes_of(contexts, schema))
            vector = crossed(vector, [inputs[feature.name] for feature in contexts])
        vectors.append(vector)
    return vectors


def withheld(config: RankConfig, schema: Schema, inputs: dict[str, keras.KerasTensor]) -> dict[str, keras.KerasTensor]:
    """The inputs, single ids of more than `MANY` values dropped in training as the config says.

    Where passes are served nothing is: their dropout is of what is known, not of who is asked for.
    """
    many = {f.name for f in schema.of(*SIDES) if f.kind == "id" and schema.size(f.vocabulary) > MANY}
    if config.passes:
        return inputs
    return {name: IdDropout(config.id_dropout)(value) if name in many else value for name, value in inputs.items()}


def dense(config: RankConfig, schema: Schema, units: tuple[int, ...]) -> keras.Sequential:
    """Dense layers, each with dropout behind it."""
    layers = []
    for width in units:
        dropout = ConcreteDropout(schema.rows) if config.passes else keras.layers.Dropout(config.dropout)
        layers += [keras.layers.Dense(width, config.activation), dropout]
    return keras.Sequential(layers)


def tower(config: RankConfig) -> keras.Sequential:
    """The layers of one task's own, below its head."""
    return keras.Sequential([keras.layers.Dense(units, config.activation) for units in config.tower_units])


class Head(NamedTuple):
    """What a head says, `[batch]` each: a logit, and with `RankConfig.variance` the log of its variance.

    Of `WATCH_TIME` the logit's odds are the expected seconds; with a variance it is the mean of log(1 + seconds).
    """

    mean: Any
    log_variance: Any = None


class Ranking(distribution.Model):
    """Trains a trunk for its tasks; `scores` is what is served.

    Inputs are encoded features by name. With `RankConfig.position_bias` what is said of a row is at its `POSITION`,
    among the inputs in training, and otherwise at an average place of its device. Targets are by task, float32
    `[batch]`: 0 or 1, of `WATCH_TIME` seconds.

    Args:
        seconds: the mean watch time of a training row, the unit in which it is learnt.
        devices: number of device indices, which `RankConfig.position_bias` reads.

    Attributes:
        calibrators: by task, what makes its head right on average; fitted after training.

    Raises:
        ValueError: tasks or weights of tasks that there are not, or an unknown weighting.
    """

    def __init__(self, trunk: Trunk, config: RankConfig, seconds: float = 1.0, devices: int = 1) -> None:
        super().__init__()
        check_tasks(config)
        self.config = config
        self.shared = trunk.shared
        self.towers = dict(trunk.towers)
        self.gates = trunk.gates
        outputs = 2 if config.variance else 1
        # what heads and position add up to is a logit, and losses are of logits: float32 whatever layers compute in
        self.heads = {task: keras.layers.Dense(outputs, name=f"head_{task}", dtype="float32") for task in config.tasks}
        if config.weighting == "uncertainty":
            self.task_weights = HomoscedasticWeights({task: _kind(task, config) for task in config.tasks})
        self.position_bias: PositionBias | None = None
        if config.position_bias == "logit":
            self.position_bias = PositionBias(
                config.positions, devices, len(config.tasks), config.position_dropout, dtype="float32"
            )
        elif config.position_bias == "examination":
            self.position_bias = Examination(config.positions, devices, config.position_dropout, dtype="float32")
        self.seconds = self.add_weight((), keras.initializers.Constant(seconds), trainable=False, name="seconds")
        self.calibrators: dict[str, Calibrator] = {}

    def build(self, input_shape: Any = None) -> None:
        """Makes the weights of towers and heads; what is shared has its own already."""
        shared = keras.tree.map_structure(lambda tensor: ops.zeros((1, *tensor.shape[1:])), self.shared.output)
        self.heads_of(shared)
        if self.config.weighting == "uncertainty":
            self.task_weights.build()
        if self.position_bias is not None:
            self.position_bias.build()
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        return self.shared({tensor.name: inputs[tensor.name] for tensor in self.shared.inputs}, training=training)

    def heads_of(self, shared: Any, training: bool = False, effect: Any | None = None) -> dict[str, Head]:
        """The heads, by task.

        Args:
            effect: what `position_bias` says of the places of the rows.
        """
        found = {}
        for place, (task, head) in enumerate(self.heads.items()):
            outputs = head(self.towers[task](_of(task, shared), training=training))
            mean = outputs[:, 0]
            if self.position_bias is not None and effect is not None:
                of_task = self.position_bias.of_task(effect, place)
                # the odds of watch time are the expected seconds: a factor of these is a term of the logit
                mean = mean + of_task if task == WATCH_TIME else self.position_bias.applied(mean, of_task)
            found[task] = Head(mean, bounded(outputs[:, 1]) if self.config.variance else None)
        return found

    def effect(self, inputs: dict[str, Any], training: bool = False) -> Any:
        """What `position_bias` says of the places of rows, of an average place where inputs have none; or None."""
        if self.position_bias is None:
            return None
        device = inputs["device"]
        position = inputs[POSITION] if POSITION in inputs else -ops.ones_like(device)
        return self.position_bias(position, device, training=training)

    def losses_of(
        self, shared: Any, targets: dict[str, Any], training: bool, effect: Any | None = None
    ) -> dict[str, Any]:
        """The mean loss of each task times its weight, `[]` by name; `effect` as for `heads_of`."""
        found = {}
        for task, head in self.heads_of(shared, training, effect).items():
            losses = self._row_losses(task, head, targets[task])
            found[task] = self.config.loss_weights.get(task, 1.0) * ops.mean(losses)
        return found

    def _row_losses(self, task: str, head: Head, target: Any) -> Any:
        """The loss of each row, `[batch]`."""
        if task == WATCH_TIME:
            if head.log_variance is not None:
                return log_normal_nll(target, *head)
            seconds = target / self.seconds
            return weighted_logistic(seconds, ops.ones_like(seconds), head.mean, exact=True)
        weight = self.config.positive_weights.get(task, 1.0)
        if head.log_variance is None:
            return binary_cross_entropy(target, head.mean, weight)
        return (1.0 + (weight - 1.0) * target) * logit_normal_nll(target, *head, NOISE)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        effect = self.effect(x, training)
        if self.config.weighting == "pareto":
            total, _ = pareto(lambda shared: self.losses_of(shared, y, training, effect), y_pred)
        else:
            losses = self.losses_of(y_pred, y, training, effect)
            weighted = self.config.weighting == "uncertainty"
            total = self.task_weights(losses) if weighted else ops.sum(ops.stack([*losses.values()]))
        return distribution.share(ops.sum(ops.stack([total, *self.losses])))

    def uncalibrated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Logits of probabilities and seconds by task, `[batch]`; `TASK_epistemic` and `TASK_aleatoric` if asked for.

        With `RankConfig.passes` dropout stays on and the mean over so many passes is taken, of probabilities and of
        seconds. The variance of a label is in two parts, of which more data takes away the first: the passes' means
        differ, and each has a variance of its own. That of watch time is of log(1 + seconds), and without
        `RankConfig.variance` it has the first part alone.
        """
        passes = self.config.passes
        repeated = {name: ops.concatenate([value] * passes) for name, value in inputs.items()} if passes else inputs
        shared = self.call(repeated, training=passes > 0)
        heads = self.heads_of(shared, training=passes > 0, effect=self.effect(repeated))
        found: dict[str, Any] = {}
        for task, head in heads.items():
            if not passes and head.log_variance is None and task != WATCH_TIME:
                found[task] = unweighted_logits(head.mean, self.config.positive_weights.get(task, 1.0))
                continue
            predicted = self._expected(task, head)
            if not passes:
                found[task] = _logit(predicted) if task in BINARY else predicted
                continue
            of_passes = ops.reshape(predicted, (passes, -1))
            mean = ops.mean(of_passes, axis=0)
            if task in BINARY:
                found[task] = _logit(mean)
                parts = binary_uncertainty(of_passes)
                found |= {f"{task}_epistemic": parts.epistemic, f"{task}_aleatoric": parts.aleatoric}
                continue
            found[task] = mean
            if head.log_variance is None:
                found[f"{task}_epistemic"] = ops.var(ops.log1p(of_passes), axis=0)
            else:
                means, variances = head.mean, ops.exp(head.log_variance)
                parts = regression_uncertainty(*(ops.reshape(part, (passes, -1)) for part in (means, variances)))
                found |= {f"{task}_epistemic": parts.epistemic, f"{task}_aleatoric": parts.aleatoric}
        return found

    def _expected(self, task: str, head: Head) -> Any:
        """A head's probability, or its seconds, `[batch]`."""
        if task == WATCH_TIME:
            if head.log_variance is None:
                return ops.minimum(self.seconds * expected_watch_time(head.mean), DAY_SECONDS)
            return log_normal_expectation(*head)
        weight = self.config.positive_weights.get(task, 1.0)
        if head.log_variance is None:
            return ops.sigmoid(unweighted_logits(head.mean, weight))
        return ops.sigmoid(unweighted_logits(_logit(logit_normal_probability(*head, NOISE)), weight))

    def scores(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What serving answers, `[batch]` by task: calibrated probabilities, the expected seconds of `WATCH_TIME`.

        What else `uncalibrated` gives is among it.
        """
        found = self.uncalibrated(inputs)
        for task in self.config.tasks:
            if task in self.calibrators:
                found[task] = self.calibrators[task].graph(found[task])
            elif task in BINARY:
                found[task] = ops.sigmoid(found[task])
        return found


def _kind(task: str, config: RankConfig) -> str:
    """What the loss of a task is to `HomoscedasticWeights`."""
    return "likelihood" if task == WATCH_TIME and config.variance else "classification"


def _logit(probabilities: Any) -> Any:
    kept = ops.clip(probabilities, 1e-7, 1.0 - 1e-7)
    return ops.log(kept) - ops.log1p(-kept)


def _of(task: str, shared: Any) -> Any:
    return shared[task] if isinstance(shared, dict) else shared


def check_tasks(config: RankConfig) -> None:
    """Refuses tasks and ways that there are not, and a model without the tasks that are ranked for.

    Raises:
        ValueError: says which.
    """
    unknown = sorted({*config.tasks, *config.loss_weights, *config.positive_weights} - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}: there are {', '.join(TASKS)}")
    missing = [task for task in LABELS if task not in config.tasks]
    if missing:
        raise ValueError(f"tasks lack {', '.join(missing)}: what is ranked for is learnt")
    for name, known in (("weighting", WEIGHTINGS), ("position_bias", POSITION_BIASES), ("calibration", CALIBRATIONS)):
        if getattr(config, name) not in known:
            raise ValueError(f"unknown {name} {getattr(config, name)!r}: there are {', '.join(known)}")
    if config.pretrained != "none":
        if keras.config.backend() != "tensorflow":
            raise ValueError(f"pretrained vectors are learnt by KERAS_BACKEND=tensorflow, not {keras.config.backend()}")
        penstock.module("pretraining", config.pretrained)
