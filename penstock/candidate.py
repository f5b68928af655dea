"""The directories a trained model becomes: exported, evaluated on the held-out slices, and described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl

from penstock import evaluation, export, training
from penstock.catalogue import Catalogue
from penstock.examples import read_slice
from penstock.layers.experts import spread
from penstock.popular import write_popular
from penstock.ranking import TASKS

SAMPLE = 500
"""Of so many test rows `trained.parquet` holds what the trained model says, to hold what is served against."""


def write_recall(examples: Path, trained: Path, out: Path) -> dict[str, float]:
    """Writes `saved_model/`, `{items,popular,trained}.parquet`, and `{metrics,config,history,window}.json`.

    The figures are those of the exported model, so that they are of what will serve.

    Returns:
        The validation figures by name.
    """
    model, schema = training.load_recall(examples, trained)
    out.mkdir(parents=True, exist_ok=True)
    users = evaluation.Queries.of(examples, "validation").rows
    queries = training.query_vectors(model, users.sample(min(users.height, 1024), seed=0), schema)
    searched = export.export_recall(model, schema, Catalogue.read(examples, schema), out, queries)
    write_popular(examples, out)
    inputs = [feature.name for feature in export.read_by(model, schema)]
    figures: dict[str, Any] = {"inputs": inputs, "index": searched}
    figures |= evaluation.recall_metrics(examples, out / "saved_model")
    asked = evaluation.Queries.of(examples, "test").rows.head(SAMPLE)
    vectors = training.query_vectors(model, asked, schema)
    asked.select("event_id").with_columns(vector=pl.Series(vectors, dtype=pl.List(pl.Float32))).write_parquet(
        out / "trained.parquet"
    )
    _describe(trained, out, figures)
    return figures["validation"]


def write_rank(examples: Path, trained: Path, out: Path) -> dict[str, float]:
    """Writes `saved_model/`, `predictions/{validation,test}.parquet`, `trained.parquet`, and JSON as `write_recall`.

    Returns:
        The validation figures by name.
    """
    model, schema = training.load_rank(examples, trained)
    (out / "predictions").mkdir(parents=True, exist_ok=True)
    export.export_rank(model, schema, out)
    figures: dict[str, Any] = {"inputs": [feature.name for feature in export.read_by(model, schema)]}
    for part in ("validation", "test"):
        predictions = evaluation.predict(examples, out / "saved_model", part)
        predictions.write_parquet(out / "predictions" / f"{part}.parquet")
        figures[part] = evaluation.rank_metrics(predictions)
    asked = read_slice(examples, "test").head(SAMPLE)
    says = training.scores(model, asked, schema)
    asked.select("event_id").with_columns(**{f"p_{task}": pl.Series(says[task]) for task in TASKS}).write_parquet(
        out / "trained.parquet"
    )
    shares = training.gates(model, read_slice(examples, "validation"), schema)
    if shares:
        figures["gates"] = {task: spread(found) for task, found in shares.items()}
    _describe(trained, out, figures)
    return figures["validation"]


def _describe(trained: Path, out: Path, figures: dict) -> None:
    (out / "metrics.json").write_text(json.dumps(figures, indent=1))
    for name in ("config.json", "history.json", "window.json"):
        shutil.copyfile(trained / name, out / name)
    for part in ("validation", "test"):
        print(part, "  ".join(f"{name} {value:.4f}" for name, value in figures[part].items()), flush=True)
