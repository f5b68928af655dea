"""The directories a trained model becomes: exported, evaluated on the held-out slices, and described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from penstock import evaluation, export, training
from penstock.catalogue import Catalogue
from penstock.examples import read_slice
from penstock.layers.experts import spread


def write_recall(examples: Path, trained: Path, out: Path) -> dict[str, float]:
    """Writes `saved_model/`, `items.parquet`, `metrics.json`, `config.json` and `history.json`.

    The figures are those of the exported model, so that they are of what will serve.

    Returns:
        The validation figures by name.
    """
    model, schema = training.load_recall(examples, trained)
    out.mkdir(parents=True, exist_ok=True)
    users = evaluation.Queries.of(examples, "validation").rows
    queries = training.query_vectors(model, users.sample(min(users.height, 1024), seed=0), schema)
    searched = export.export_recall(model, schema, Catalogue.read(examples, schema), out, queries)
    figures = evaluation.recall_metrics(examples, out / "saved_model") | {"index": searched}
    _describe(trained, out, figures)
    return figures["validation"]


def write_rank(examples: Path, trained: Path, out: Path) -> dict[str, float]:
    """Writes `saved_model/`, `predictions/{validation,test}.parquet`, `metrics.json`, `config.json`, `history.json`.

    Returns:
        The validation figures by name.
    """
    model, schema = training.load_rank(examples, trained)
    (out / "predictions").mkdir(parents=True, exist_ok=True)
    export.export_rank(model, schema, out)
    figures: dict[str, Any] = {}
    for part in ("validation", "test"):
        predictions = evaluation.predict(examples, out / "saved_model", part)
        predictions.write_parquet(out / "predictions" / f"{part}.parquet")
        figures[part] = evaluation.rank_metrics(predictions)
    shares = training.gates(model, read_slice(examples, "validation"), schema)
    if shares:
        figures["gates"] = {task: spread(found) for task, found in shares.items()}
    _describe(trained, out, figures)
    return figures["validation"]


def _describe(trained: Path, out: Path, figures: dict) -> None:
    (out / "metrics.json").write_text(json.dumps(figures, indent=1))
    for name in ("config.json", "history.json"):
        shutil.copyfile(trained / name, out / name)
    for part in ("validation", "test"):
        print(part, "  ".join(f"{name} {value:.4f}" for name, value in figures[part].items()), flush=True)
