"""Exported models on the held-out slices: what they retrieve, what they predict, how good it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import tensorflow as tf

from penstock import baselines, metrics
from penstock.events import LABELS
from penstock.examples import read_slice
from penstock.features import PRIOR_IMPRESSIONS
from penstock.ranking import BINARY, WATCH_TIME
from penstock.scoring import feed, score_rows
from penstock.sessions import GAP_MS
from penstock.training import RECALL_LABEL

DEPTHS = (50, 200)


@dataclass(frozen=True)
class Queries:
    """What a recall model is asked on a slice, and what would be right.

    Attributes:
        rows: the first row in the slice of each of its users.
        relevant: the items each user long-viewed in the slice, raw ids; none for many.
    """

    rows: pl.DataFrame
    relevant: list[np.ndarray]

    @staticmethod
    def of(examples: Path, part: str) -> Queries:
        """The queries of `validation` or `test`."""
        rows = read_slice(examples, part)
        relevant = rows.filter(pl.col(RECALL_LABEL) == 1).group_by("user_id").agg(relevant=pl.col("item_id").unique())
        first = rows.unique("user_id", keep="first", maintain_order=True)
        joined = first.join(relevant, "user_id", how="left", maintain_order="left")
        lists = joined["relevant"].fill_null([]).to_list()
        return Queries(joined.drop("relevant"), [np.asarray(items, np.int64) for items in lists])


class Kinds(NamedTuple):
    """Raw ids of the items that a recall model finds hard: those training has not seen, and the tail.

    The tail is half of the items that were shown in training: those with the fewest long views there.
    """

    new: np.ndarray
    tail: np.ndarray

    @staticmethod
    def of(examples: Path) -> Kinds:
        """Those of an examples directory."""
        shown = read_slice(examples, "train").group_by("item_id").agg(views=pl.col(RECALL_LABEL).cast(pl.Int64).sum())
        catalogue = pl.read_parquet(examples / "items.parquet")["item_id"]
        fewest = shown.sort("views", "item_id").head(shown.height // 2)
        return Kinds(np.setdiff1d(catalogue.to_numpy(), shown["item_id"].to_numpy()), fewest["item_id"].to_numpy())


def recall_metrics(examples: Path, saved_model: Path) -> dict[str, dict]:
    """What a model and the baselines find of the whole catalogue on both slices: `ranking_metrics` by slice.

    A query is a user with the features of its first row in the slice; items of its history are left out of the answer,
    as in serving.
    """
    signature = _recommends(saved_model)
    kinds = Kinds.of(examples)
    queries = {part: Queries.of(examples, part) for part in ("validation", "test")}
    found: dict[str, dict] = {
        part: ranking_metrics(retrieve(signature, asked.rows, max(DEPTHS)), asked, kinds)
        for part, asked in queries.items()
    }
    asked_of = pl.concat([asked.rows.select("history_items") for asked in queries.values()])
    for name, answer in {"popularity": baselines.popular, "item_item_cf": baselines.item_item}.items():
        answers = answer(examples, asked_of, max(DEPTHS))  # fitted once for both slices
        parts = np.split(answers, [queries["validation"].rows.height])
        found[name] = {
            part: ranking_metrics(ranked, asked, kinds)
            for (part, asked), ranked in zip(queries.items(), parts, strict=True)
        }
    return found


def ranking_metrics(ranked: np.ndarray, queries: Queries, kinds: Kinds) -> dict[str, float]:
    """Recall@50, recall@200 and NDCG@50 of the users with a relevant item, and what the answers of all users cover.

    Coverage is the share of the tail and of the new items that stand in at least one user's first 200. A kind of which
    there is none is left out.

    Args:
        ranked: raw ids `[queries, 200]`, best first; negative = empty place.
    """
    figures = {f"recall@{k}": metrics.recall_at_k(ranked[:, :k], queries.relevant) for k in DEPTHS}
    figures[f"ndcg@{DEPTHS[0]}"] = metrics.ndcg_at_k(ranked[:, : DEPTHS[0]], queries.relevant)
    for name, items in kinds._asdict().items():
        if len(items):
            figures[f"{name}_coverage@{DEPTHS[-1]}"] = metrics.coverage(ranked, items)
    return figures


def retrieve_from(saved_model: Path, queries: pl.DataFrame, k: int) -> np.ndarray:
    """`retrieve`, by a recall SavedModel."""
    return retrieve(_recommends(saved_model), queries, k)


def _recommends(saved_model: Path) -> tf.types.experimental.ConcreteFunction:
    return tf.saved_model.load(str(saved_model)).signatures["serving_default"]


def retrieve(signature: tf.types.experimental.ConcreteFunction, queries: pl.DataFrame, k: int) -> np.ndarray:
    """The `k` ids a recall signature answers for each row, the row's history left out: int64 `[rows, k]`."""
    return np.concatenate([np.empty((0, k), np.int64), *(found["ids"] for found in _answers(signature, queries, k))])


def query_vectors(saved_model: Path, queries: pl.DataFrame) -> np.ndarray:
    """The vector of each row's user by a recall SavedModel, float32 `[rows, dim]`.

    Raises:
        ValueError: no rows, or a model of before it told them.
    """
    parts = list(_answers(_recommends(saved_model), queries, 1))
    if not parts or "query" not in parts[0]:
        raise ValueError(f"{saved_model} tells no vectors of these {queries.height} users; train it again")
    return np.concatenate([found["query"] for found in parts])


def _answers(
    signature: tf.types.experimental.ConcreteFunction, queries: pl.DataFrame, k: int
) -> Iterator[dict[str, np.ndarray]]:
    inputs = signature.structured_input_signature[1]
    for start in range(0, queries.height, 512):
        part = queries.slice(start, 512)
        fed = {
            name: tf.constant(feed(part, name, spec.dtype.as_numpy_dtype, len(spec.shape)))
            for name, spec in inputs.items()
            if name not in ("k", "exclude")
        }
        exclude = tf.constant(feed(part, "history_items", np.dtype(np.int64), 2))
        found = signature(**fed, k=tf.constant(k), exclude=exclude)
        yield {name: value.numpy() for name, value in found.items()}


def predict(examples: Path, saved_model: Path, part: str) -> pl.DataFrame:
    """A slice's rows with what each head says, and what the gate compares by.

    That is `session`, a number for each visit of a user (the log's own, else without a pause of `GAP_MS`); `new_user`,
    `new_item`, `tail_item` (see `Kinds`); and `popularity_LABEL`, the item's rate of the label in the training slice,
    smoothed by `PRIOR_IMPRESSIONS` at the mean rate, which an item has that was not there.
    """
    train, rows = read_slice(examples, "train"), read_slice(examples, part)
    rates = {label: train[label].cast(pl.Float64).to_numpy().mean() for label in LABELS}
    popularity = train.group_by("item_id").agg(
        **{
            f"popularity_{label}": (pl.col(label).cast(pl.Float64).sum() + PRIOR_IMPRESSIONS * rate)
            / (pl.len() + PRIOR_IMPRESSIONS)
            for label, rate in rates.items()
        }
    )
    scores = score_rows(saved_model, rows)
    keys = ["event_id", "user_id", "item_id", "event_time", "scenario", *BINARY, "watch_time_ms"]
    return (
        rows.select(keys)
        .with_columns(**{f"p_{task}": pl.Series(values) for task, values in scores.items()})
        .join(popularity, "item_id", how="left", maintain_order="left")
        .with_columns(
            *(pl.col(f"popularity_{label}").fill_null(rate) for label, rate in rates.items()),
            new_user=~pl.col("user_id").is_in(train["user_id"].unique().implode()),
            new_item=~pl.col("item_id").is_in(train["item_id"].unique().implode()),
            tail_item=pl.col("item_id").is_in(pl.Series(Kinds.of(examples).tail).implode()),
            session=_sessions(rows),
        )
    )


def _sessions(rows: pl.DataFrame) -> pl.Series:
    """A number for each session of each user, in the order of the rows."""
    ordered = rows.select("user_id", "event_time", "session_id").with_row_index().sort("user_id", "event_time", "index")
    own = pl.col("session_id").is_not_null() & pl.col("session_id").shift(1).is_not_null()
    apart = (
        pl.when(own)
        .then(pl.col("session_id") != pl.col("session_id").shift(1))
        .otherwise(pl.col("event_time") - pl.col("event_time").shift(1) >= pl.duration(milliseconds=GAP_MS))
    )
    begins = (pl.col("user_id") != pl.col("user_id").shift(1)) | apart
    return ordered.with_columns(session=begins.fill_null(True).cum_sum()).sort("index")["session"].cast(pl.Int64)


def rank_metrics(predictions: pl.DataFrame) -> dict[str, float]:
    """AUC, GAUC, log loss and calibration error of each probability; of watch time the error and the mean's.

    A slice without a positive of a task that is not ranked for has no AUC of it.
    `watch_time_error` is the mean absolute error in seconds; `watch_time_bias` the mean that is expected over that
    which was, less 1.
    """
    users = predictions["user_id"].to_numpy()
    figures = {}
    for task in BINARY:
        if f"p_{task}" not in predictions.columns:
            continue
        labels, scores = predictions[task].to_numpy(), predictions[f"p_{task}"].to_numpy()
        if task in LABELS or labels.min() < labels.max():
            figures[f"auc_{task}"] = metrics.auc(labels, scores)
            figures[f"gauc_{task}"] = metrics.gauc(labels, scores, users)
        figures[f"log_loss_{task}"] = metrics.log_loss(labels, scores)
        figures[f"calibration_error_{task}"] = metrics.calibration(labels, scores).error
    if f"p_{WATCH_TIME}" in predictions.columns:
        expected, watched = predictions[f"p_{WATCH_TIME}"].to_numpy(), predictions["watch_time_ms"].to_numpy() / 1000
        figures["watch_time_error"] = float(np.abs(expected - watched).mean())
        figures["watch_time_bias"] = float(expected.mean() / watched.mean() - 1.0)
    return figures
