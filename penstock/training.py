"""Trained models of examples: which rows a model learns from, and what is left of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import polars as pl
from keras import ops

import penstock
from penstock import backends, calibration, distribution, objectives, optimizers
from penstock.catalogue import Catalogue
from penstock.examples import FIRST, Schema, encode_ids, read_slice
from penstock.fitting import Checkpoint, Measure, Rows, TrainingError, check, fit, precision
from penstock.layers.embedding import Embedding
from penstock.metrics import log_loss
from penstock.ranking import BINARY, POSITION, WATCH_TIME, RankConfig, Ranking, check_tasks
from penstock.retrieval import EXAMPLE_AGE, RecallConfig, Retrieval

RECALL_LABEL = "long_view"
"""What a recall model retrieves: items that will be long-viewed, as the histories it reads are of long views."""

VALIDATION_ROWS = 5000
"""So many rows of the validation slice say after each epoch how good a recall model is, against all items."""

DEAD_UNITS = 0.4
"""More dead units of a user's vector than this are worth a warning."""

SCORED = 4096
"""So many rows are scored at once."""

HISTORY = ("history_items", "history_times", "history_sessions")
"""The lists that have a value for each of a user's long views."""

_AGE = "_example_age_days"


@distribution.scope()
def train_recall(
    examples: Path, name: str, overrides: Mapping[str, Any], seed: int, out: Path, checkpoint: Path | None = None
) -> None:
    """Trains `recall/<name>.py` on the long views of the training slice and writes its directory.

    Of several workers (`penstock.distribution`) all call it alike, and the chief writes.

    Args:
        checkpoint: a directory for the state after each epoch, from which a call with the same arguments goes on.

    Raises:
        ValueError: an unknown model or parameter.
        TrainingError: data that cannot be learnt from.
    """
    config = penstock.config(penstock.module("recall", name), overrides)
    schema = Schema.load(examples / "schema")
    keras.utils.set_random_seed(seed)
    rows = _with_prefixes(_positives(examples, "train", schema), examples, config, seed)
    with precision(config.precision):
        model = _build_recall(name, config, schema, examples, rows, seed)
    if model.pairs is not None:
        (read,) = schema.named("history_items")
        rows = _one_for_all(rows, read.length)
    inputs = _query_inputs(model, rows, schema)
    check(inputs, {})
    targets = {"item": _items(rows, schema), "row": np.arange(rows.height, dtype=np.int32)}
    train = Rows(inputs, targets, config.batch_size)
    model.compile(_optimizer(config.optimizer, config, train))
    history = fit(
        model,
        train,
        _ranking(model, _positives(examples, "validation", schema), schema),
        config.settings,
        seed,
        _checkpoint(checkpoint, examples, name, config, seed),
    )
    with distribution.written(out) as folder:
        _write(folder, model, name, config, seed, examples, history)


@distribution.scope()
def train_rank(
    examples: Path, name: str, overrides: Mapping[str, Any], seed: int, out: Path, checkpoint: Path | None = None
) -> None:
    """Trains `rank/<name>.py` on every impression of the training slice and writes its directory.

    Of several workers all call it alike, and the chief writes.

    Args:
        checkpoint: as for `train_recall`.

    Raises:
        ValueError: an unknown model or parameter.
        TrainingError: data that cannot be learnt from.
    """
    module = penstock.module("rank", name)
    config = penstock.config(module, overrides)
    schema = Schema.load(examples / "schema")
    keras.utils.set_random_seed(seed)
    rows = {part: read_slice(examples, part) for part in ("train", "validation")}
    targets = {part: _targets(rows[part], config) for part in rows}
    with precision(config.precision):
        model = _build_rank(module, config, schema, _mean_seconds(targets["train"]))
    inputs = {part: _encoded(model.shared, rows[part], schema) for part in rows}
    check(inputs["train"], {task: values for task, values in targets["train"].items() if task in BINARY})
    validation = shown = Rows(inputs["validation"], (), SCORED)
    if model.position_bias is not None:
        inputs["train"][POSITION] = _positions(rows["train"])
        model.position_bias.adapt(inputs["train"][POSITION], inputs["train"]["device"])
        # epochs are told apart where rows were shown: what is served is of no place, and to be near it is not learnt
        shown = Rows(inputs["validation"] | {POSITION: _positions(rows["validation"])}, (), SCORED)
    if config.pretrained != "none":
        from penstock import pretraining  # learns on TensorFlow

        tables = item_tables(model.shared)
        vectors = pretraining.vectors(
            config.pretrained,
            examples,
            schema,
            Catalogue.read(examples, schema),
            tables[0].table.shape[1],
            seed,
            config.embedding_scale,
        )
        for table in tables:
            table.table.assign(vectors)
            table.trainable = not config.frozen
    train = Rows(inputs["train"], targets["train"], config.batch_size)
    model.compile(_optimizer("adam", config, train))
    history = fit(
        model,
        train,
        _log_losses(model, shown, targets["validation"]),
        config.settings,
        seed,
        _checkpoint(checkpoint, examples, name, config, seed),
    )
    predicted = _predicted(model.uncalibrated, validation)
    calibrators = {
        task: _calibrator(task, targets["validation"][task], predicted[task], config) for task in config.tasks
    }
    described = {task: calibration.to_json(one) for task, one in calibrators.items() if one}
    with distribution.written(out) as folder:
        _write(folder, model, name, config, seed, examples, history)
        (folder / "calibration.json").write_text(json.dumps(described, indent=1))


def load_recall(examples: Path, trained: Path) -> tuple[Retrieval, Schema]:
    """The trained recall model of a directory, and the schema it was built for."""
    about = json.loads((trained / "config.json").read_text())
    schema = Schema.load(examples / "schema")
    config = penstock.config(penstock.module("recall", about["model"]), about["config"])
    rows = _positives(examples, "train", schema)
    model = _build_recall(about["model"], config, schema, examples, rows, about["seed"])
    model.load_weights(trained / "model.weights.h5")
    return model, schema


def load_rank(examples: Path, trained: Path) -> tuple[Ranking, Schema]:
    """The trained rank model of a directory, and the schema it was built for."""
    about = json.loads((trained / "config.json").read_text())
    schema = Schema.load(examples / "schema")
    module = penstock.module("rank", about["model"])
    config = penstock.config(module, about["config"])
    model = _build_rank(module, config, schema)
    model.load_weights(trained / "model.weights.h5")
    described = json.loads((trained / "calibration.json").read_text())
    model.calibrators = {task: calibration.from_json(one) for task, one in described.items()}
    return model, schema


def _build_rank(module: ModuleType, config: RankConfig, schema: Schema, seconds: float = 1.0) -> Ranking:
    check_tasks(config)
    model = Ranking(module.build(config, schema), config, seconds, schema.size("device"))
    model.build()
    return model


def _optimizer(name: str, config: RecallConfig | RankConfig, train: Rows) -> keras.optimizers.Optimizer:
    """Its rate falls to its last share, linear in the steps of all epochs; its loss is scaled if float16 needs it."""
    falling = keras.optimizers.schedules.PolynomialDecay(
        config.learning_rate, train.steps * config.epochs, config.learning_rate * config.last_rate
    )
    return optimizers.build(name, falling, scaled=config.precision == "mixed_float16")


def item_tables(model: keras.Model) -> list[Embedding]:
    """The tables of item ids of a model."""
    return [layer for layer in model.layers if isinstance(layer, Embedding) and layer.vocabulary == "item_id"]


def _targets(rows: pl.DataFrame, config: RankConfig) -> dict[str, np.ndarray]:
    """What each task learns, float32 `[rows]` by name: 0 or 1, or seconds."""
    columns = {task: pl.col("watch_time_ms") / 1000 if task == WATCH_TIME else pl.col(task) for task in config.tasks}
    return {task: rows.select(column.cast(pl.Float32)).to_series().to_numpy() for task, column in columns.items()}


def _mean_seconds(targets: Mapping[str, np.ndarray]) -> float:
    """The unit of watch time."""
    return max(float(np.mean(targets[WATCH_TIME])), 1.0) if WATCH_TIME in targets else 1.0


def _encoded(model: keras.Model, rows: pl.DataFrame, schema: Schema) -> dict[str, np.ndarray]:
    """What a model reads of some rows, encoded."""
    names = {tensor.name for tensor in model.inputs}
    return {
        feature.name: schema.encode(feature, rows[feature.name]) for feature in schema.features if feature.name in names
    }


def _positions(rows: pl.DataFrame) -> np.ndarray:
    return rows["position"].fill_null(-1).to_numpy().astype(np.int32)


def _predicted(predict: Callable[[Any], Mapping[str, Any]], rows: Rows) -> dict[str, np.ndarray]:
    """What a method of a model says of rows, `[rows, …]` by name."""
    parts = [predict(inputs) for inputs, _ in rows.batches()]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def scores(model: Ranking, rows: pl.DataFrame, schema: Schema, position: int | None = None) -> dict[str, np.ndarray]:
    """What a rank model would serve for some rows, `[rows]` by name; or what it says of them all at one position."""
    inputs = _encoded(model.shared, rows, schema)
    if position is not None:
        inputs[POSITION] = np.full(rows.height, position, np.int32)
    return _predicted(model.scores, Rows(inputs, (), SCORED))


def gates(model: Ranking, rows: pl.DataFrame, schema: Schema) -> dict[str, np.ndarray]:
    """The shares of experts by task, `[rows, experts]`; nothing of a model without gates."""
    shares = model.gates
    if shares is None:
        return {}
    inputs = Rows(_encoded(model.shared, rows, schema), (), SCORED)
    return _predicted(lambda batch: shares(batch, training=False), inputs)


def _log_losses(model: Ranking, rows: Rows, targets: Mapping[str, np.ndarray]) -> Measure:
    """The log loss of each probability, and their sum."""
    tasks = [task for task in model.config.tasks if task in BINARY]
    graph = backends.compiled(model.scores, model.variables, rows.batches())

    def figures() -> dict[str, float]:
        predicted = _predicted(graph, rows)
        found = {f"val_{task}": log_loss(targets[task], predicted[task]) for task in tasks}
        return {"val_loss": sum(found.values()), **found}

    return Measure("val_loss", figures, -1)


def _calibrator(
    task: str, observed: np.ndarray, predicted: np.ndarray, config: RankConfig
) -> calibration.Calibrator | None:
    """Fitted on what was observed; None where it is not asked for, or a rare label was observed nowhere."""
    if config.calibration == "none" or (task in BINARY and observed.min() == observed.max()):
        return None
    return calibration.fit("scale" if task == WATCH_TIME else config.calibration, observed, predicted)


def item_vectors(model: Retrieval, indices: np.ndarray) -> np.ndarray:
    """The vectors of some item indices, float32 `[len(indices), dim]`."""
    parts = np.array_split(indices.astype(np.int32), max(len(indices) // 65536, 1))
    return np.concatenate([np.asarray(model.item_tower(part)) for part in parts]).astype(np.float32)


def query_vectors(model: Retrieval, rows: pl.DataFrame, schema: Schema) -> np.ndarray:
    """The vectors of the users of some rows as serving makes them, float32 `[rows, dim]`."""
    return _predicted(_query(model), _as_served(model, rows, schema))["query"]


def _as_served(model: Retrieval, rows: pl.DataFrame, schema: Schema) -> Rows:
    """What the query tower reads of some rows, of no age."""
    return Rows(_query_inputs(model, rows.with_columns(pl.lit(0.0, pl.Float32).alias(_AGE)), schema), (), 256)


def _query(model: Retrieval) -> Callable[[Any], Mapping[str, Any]]:
    return lambda inputs: {"query": ops.cast(model.query_tower(inputs, training=False), "float32")}


def _build_recall(
    name: str, config: RecallConfig, schema: Schema, examples: Path, rows: pl.DataFrame, seed: int
) -> Retrieval:
    """A recall model with how often each item is a positive of `rows` for its objective."""
    counts = np.bincount(_items(rows, schema), minlength=schema.size("item_id"))
    towers = penstock.module("recall", name).build(config, schema, Catalogue.read(examples, schema))
    model = Retrieval(towers, objectives.build(config, counts, seed))
    model.build()
    return model


def _positives(examples: Path, part: str, schema: Schema) -> pl.DataFrame:
    """The long views of known items, with their age at the end of the slice."""
    rows = read_slice(examples, part).filter(pl.col(RECALL_LABEL) == 1)
    rows = rows.filter(pl.col("item_id").is_in(schema.vocabularies["item_id"].tolist()))
    if rows.is_empty():
        raise TrainingError(f"the {part} slice has no {RECALL_LABEL} of a known item: recall has nothing to learn")
    age = (pl.col("event_time").max() - pl.col("event_time")).dt.total_seconds() / 86400
    return rows.with_columns(age.cast(pl.Float32).alias(_AGE))


def _with_prefixes(rows: pl.DataFrame, examples: Path, config: RecallConfig, seed: int) -> pl.DataFrame:
    """The examples of an epoch: `rows`, the items of histories, and no more of a user than the config allows."""
    if config.prefixes:
        first = read_slice(examples, "train").unique("user_id", keep="first", maintain_order=True)
        known = rows["item_id"].unique().implode()
        age = pl.lit(rows[_AGE].max(), pl.Float32).alias(_AGE)
        long = first.filter(pl.col("history_items").list.len() > 1).with_columns(
            age, pl.int_ranges(1, pl.col("history_items").list.len()).list.tail(config.prefixes).alias("_place")
        )
        long = long.explode("_place", empty_as_null=False)
        long = long.with_columns(
            pl.col("history_items").list.get(pl.col("_place")).alias("item_id"),
            pl.col("history_times").list.get(pl.col("_place")).alias("time_ms"),
            *(pl.col(name).list.head(pl.col("_place")) for name in HISTORY),
        )
        rows = pl.concat([long.filter(pl.col("item_id").is_in(known)).select(rows.columns), rows])
    if config.examples_per_user:
        shuffled = rows.sample(fraction=1.0, shuffle=True, seed=seed)
        rows = shuffled.group_by("user_id", maintain_order=True).head(config.examples_per_user)
    return rows


def _one_for_all(rows: pl.DataFrame, length: int) -> pl.DataFrame:
    """Of each user the last row and each `length`-th before it, whose histories hold the others' items.

    Args:
        length: how many items of a history are read.
    """
    later = (pl.len() - 1 - pl.int_range(pl.len())).over("user_id")
    return rows.filter(later % length == 0)


def _query_inputs(model: Retrieval, rows: pl.DataFrame, schema: Schema) -> dict[str, np.ndarray]:
    """What the query tower reads of some rows, encoded."""
    aged = any(tensor.name == EXAMPLE_AGE for tensor in model.query_tower.inputs)
    return _encoded(model.query_tower, rows, schema) | ({EXAMPLE_AGE: rows[_AGE].to_numpy()} if aged else {})


def _ranking(model: Retrieval, rows: pl.DataFrame, schema: Schema) -> Measure:
    """How high each positive stands among all known items: the mean of 1 / log₂(1 + rank), ties to its disadvantage.

    Beside it the share of the users' units that are dead, of which many are a sign of too high a learning rate.
    """
    rows = rows.gather_every(max(rows.height // VALIDATION_ROWS, 1))
    served, wanted = _as_served(model, rows, schema), _items(rows, schema) - FIRST
    indices = np.arange(FIRST, schema.size("item_id"))
    graph = backends.compiled(_query(model), model.variables, served.batches())

    def figures() -> dict[str, float]:
        vectors, queries = item_vectors(model, indices), _predicted(graph, served)["query"]
        gains = []
        for start in range(0, len(queries), 256):
            scores = queries[start : start + 256] @ vectors.T
            own = np.take_along_axis(scores, wanted[start : start + 256, None], axis=1)
            gains.append(1.0 / np.log2(1.0 + (scores >= own).sum(axis=1)))
        dead = dead_units(queries)
        if dead > DEAD_UNITS:
            print(f"warning: {dead:.0%} of the units of a user's vector are 0 for everybody", flush=True)
        return {"val_ndcg": float(np.concatenate(gains).mean()), "dead_units": dead}

    return Measure("val_ndcg", figures, 1)


def dead_units(vectors: np.ndarray) -> float:
    """The share of the columns that are 0 in every row, of `[rows, dim]`."""
    return float(np.mean(~vectors.any(axis=0)))


def _items(rows: pl.DataFrame, schema: Schema) -> np.ndarray:
    """The item index of each row, `[rows]`."""
    return encode_ids(rows["item_id"].to_numpy(), schema.vocabularies["item_id"])


def _checkpoint(folder: Path | None, examples: Path, name: str, config: Any, seed: int) -> Checkpoint | None:
    if folder is None:
        return None
    window = hashlib.sha256((examples / "window.json").read_bytes()).hexdigest()
    return Checkpoint(folder, {"examples": window, "model": name, "config": dataclasses.asdict(config), "seed": seed})


def _write(
    out: Path,
    model: keras.Model,
    name: str,
    config: Any,
    seed: int,
    examples: Path,
    history: list[dict[str, float]],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_weights(out / "model.weights.h5")
    about = {"model": name, "config": dataclasses.asdict(config), "seed": seed}
    (out / "config.json").write_text(json.dumps(about, indent=1))
    (out / "history.json").write_text(json.dumps(history, indent=1))
    shutil.copyfile(examples / "window.json", out / "window.json")
