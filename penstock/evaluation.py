"""Exported models on the held-out slices: what they retrieve, what they predict, how good it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import tensorflow as tf

from penstock import metrics
from penstock.events import LABELS
from penstock.examples import pad, read_slice
from penstock.features import HISTORY_LENGTH, PRIOR_IMPRESSIONS
from penstock.scoring import feed, score_rows
from penstock.training import RECALL_LABEL

DEPTHS = (50, 200)


def recall_metrics(examples: Path, saved_model: Path) -> dict[str, dict]:
    """Recall@50, recall@200 and NDCG@50 over the whole catalogue, of the model and of popularity, on both slices.

    A query is a user with at least one long view in the slice, with the features of its first row there; relevant are
    the items it long-viewed in the slice; items of its history are left out of the answer, as in serving.
    """
    signature = tf.saved_model.load(str(saved_model)).signatures["serving_default"]
    train = read_slice(examples, "train")
    popular = (
        train.filter(pl.col(RECALL_LABEL) == 1)["item_id"]
        .value_counts(sort=True)
        .sort(["count", "item_id"], descending=[True, False])["item_id"]
        .to_numpy()
    )
    found: dict[str, dict] = {"popularity": {}}
    for part in ("validation", "test"):
        rows = read_slice(examples, part)
        relevant = rows.filter(pl.col(RECALL_LABEL) == 1).group_by("user_id").agg(relevant=pl.col("item_id").unique())
        queries = rows.unique("user_id", keep="first", maintain_order=True).join(
            relevant, "user_id", maintain_order="left"
        )
        sets = [np.asarray(items) for items in queries["relevant"].to_list()]
        found[part] = _at_depths(retrieve(signature, queries, max(DEPTHS)), sets)
        found["popularity"][part] = _at_depths(_popular(queries, popular, max(DEPTHS)), sets)
    return found


def retrieve(signature: tf.types.experimental.ConcreteFunction, queries: pl.DataFrame, k: int) -> np.ndarray:
    """The `k` ids a recall signature answers for each row, the row's history left out: int64 `[rows, k]`."""
    inputs = signature.structured_input_signature[1]
    answers = []
    for start in range(0, queries.height, 512):
        part = queries.slice(start, 512)
        fed = {
            name: tf.constant(feed(part, name, spec.dtype.as_numpy_dtype, len(spec.shape)))
            for name, spec in inputs.items()
            if name not in ("k", "exclude")
        }
        exclude = tf.constant(feed(part, "history_items", np.dtype(np.int64), 2))
        answers.append(signature(**fed, k=tf.constant(k), exclude=exclude)["ids"].numpy())
    return np.concatenate(answers)


def _popular(queries: pl.DataFrame, popular: np.ndarray, k: int) -> np.ndarray:
    """The `k` most popular ids that are not in each row's history, padded with -1."""
    histories = pad(queries["history_items"], HISTORY_LENGTH)
    wide = popular[: k + histories.shape[1]]
    seen = (wide[None, :, None] == histories[:, None, :]).any(axis=2)
    order = np.argsort(seen, axis=1, kind="stable")[:, :k]
    ranked = np.where(np.take_along_axis(seen, order, axis=1), -1, wide[order])
    return np.pad(ranked, ((0, 0), (0, k - ranked.shape[1])), constant_values=-1)


def _at_depths(ranked: np.ndarray, relevant: list[np.ndarray]) -> dict[str, float]:
    figures = {f"recall@{k}": metrics.recall_at_k(ranked[:, :k], relevant) for k in DEPTHS}
    return figures | {f"ndcg@{DEPTHS[0]}": metrics.ndcg_at_k(ranked[:, : DEPTHS[0]], relevant)}


def predict(examples: Path, saved_model: Path, part: str) -> pl.DataFrame:
    """A slice's rows with each head's probability, and what the gate compares by: popularity, new users and items.

    An item's popularity for a label is its rate of that label in the training slice, smoothed by `PRIOR_IMPRESSIONS` at
    the mean rate; an item that was not there has the mean rate.
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
    keys = ["event_id", "user_id", "item_id", "event_time", "scenario", *LABELS]
    return (
        rows.select(keys)
        .with_columns(**{f"p_{label}": pl.Series(scores[label]) for label in LABELS})
        .join(popularity, "item_id", how="left", maintain_order="left")
        .with_columns(
            *(pl.col(f"popularity_{label}").fill_null(rate) for label, rate in rates.items()),
            new_user=~pl.col("user_id").is_in(train["user_id"].unique().implode()),
            new_item=~pl.col("item_id").is_in(train["item_id"].unique().implode()),
        )
    )


def rank_metrics(predictions: pl.DataFrame) -> dict[str, float]:
    """AUC and GAUC of each head for its own label."""
    users = predictions["user_id"].to_numpy()
    figures = {}
    for label in LABELS:
        labels, scores = predictions[label].to_numpy(), predictions[f"p_{label}"].to_numpy()
        figures[f"auc_{label}"] = metrics.auc(labels, scores)
        figures[f"gauc_{label}"] = metrics.gauc(labels, scores, users)
    return figures
