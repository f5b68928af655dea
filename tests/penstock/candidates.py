"""Small candidates and releases on disk, in the artifacts' formats, with scores of a known quality."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from penstock import fusion
from penstock.events import LABELS

BASE = {"click": -0.4, "long_view": -0.8, "like": -2.0}
START = datetime(2026, 3, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Artifacts:
    """The directories of one candidate, as the stages before the gate leave them."""

    root: Path

    @property
    def examples(self) -> Path:
        return self.root / "examples"

    @property
    def recall(self) -> Path:
        return self.root / "recall"

    @property
    def rank(self) -> Path:
        return self.root / "rank"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def verdict(self) -> Path:
        return self.root / "verdict"

    @property
    def test_predictions(self) -> Path:
        return self.rank / "predictions" / "test.parquet"

    def change(self, path: Path, **columns: Any) -> None:
        """Replaces columns of a Parquet file."""
        pl.read_parquet(path).with_columns(**columns).write_parquet(path)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def _slice(name: str, rows: int, first_day: int, noise: float, generator: np.random.Generator) -> pl.DataFrame:
    """Rows of two days with labels drawn from a known logit, and scores that know the logit but for some noise.

    `p_*` are the candidate's, `champion_*` the logits (float32) that the champion's SavedModel reads.
    """
    offset = {"train": 0, "validation": 1, "test": 2}[name] * 1_000_000
    shared = generator.normal(size=rows)
    columns: dict[str, Any] = {
        "event_id": offset + np.arange(rows),
        "user_id": generator.integers(0, max(rows // 8, 2), rows),
        "item_id": generator.integers(0, 200, rows),
        "event_time": [START + timedelta(days=first_day, seconds=172_000 * at / max(rows, 1)) for at in range(rows)],
        "scenario": generator.integers(0, 3, rows),
        "new_user": generator.random(rows) < 0.2,
        "new_item": generator.random(rows) < 0.02,
    }
    for label in LABELS:
        columns[f"popularity_{label}"] = _sigmoid(BASE[label] + 0.25 * shared + 0.5 * generator.normal(size=rows))
        logit = BASE[label] + 1.2 * (0.8 * shared + 0.6 * generator.normal(size=rows))
        columns[label] = (generator.random(rows) < _sigmoid(logit)).astype(np.int8)
        columns[f"p_{label}"] = _sigmoid(logit + noise * generator.normal(size=rows))
        columns[f"champion_{label}"] = (logit + 0.8 * generator.normal(size=rows)).astype(np.float32)
    schema = {"event_time": pl.Datetime("us", "UTC"), "event_id": pl.Int64, "scenario": pl.Int64}
    return pl.DataFrame(columns, schema_overrides=schema)


def write_candidate(root: Path, *, rows: int = 5000, noise: float = 0.3, seed: int = 0) -> Artifacts:
    """A candidate whose scores are the truth but for `noise` in the logits (the champion's noise is 0.8)."""
    found = Artifacts(root)
    generator = np.random.default_rng(seed)
    slices = {
        name: _slice(name, rows, day, noise, generator) for name, day in (("train", 0), ("validation", 2), ("test", 4))
    }
    for folder in (found.examples, found.rank / "predictions", found.recall, found.weights):
        folder.mkdir(parents=True)
    truth = ["event_id", "user_id", "item_id", "event_time", "scenario", *LABELS]
    for name, frame in slices.items():
        frame.select(*truth, *(f"champion_{label}" for label in LABELS)).write_parquet(
            found.examples / f"{name}.parquet"
        )
    for name in ("validation", "test"):
        extra = [*(f"{kind}_{label}" for kind in ("p", "popularity") for label in LABELS), "new_user", "new_item"]
        slices[name].select(*truth, *extra).write_parquet(found.rank / "predictions" / f"{name}.parquet")
    days = {"train_start": 0, "train_end": 2, "validation_end": 4, "test_end": 6}
    window = {name: (START + timedelta(days=day)).isoformat() for name, day in days.items()}
    _write(found.examples / "window.json", window | {"rows": dict.fromkeys(slices, rows)})
    figures = {"recall@50": 0.31, "recall@200": 0.55, "ndcg@50": 0.2}
    popular = {"recall@50": 0.22, "recall@200": 0.41, "ndcg@50": 0.12}
    both = {"validation": popular, "test": popular}
    _write(found.recall / "metrics.json", {"validation": figures, "test": figures, "popularity": both})
    pl.DataFrame({"item_id": np.arange(1000), "vector": np.zeros((1000, 2), np.float32)}).write_parquet(
        found.recall / "items.parquet"
    )
    _write(found.recall / "config.json", {"model": "youtube_dnn", "config": {"dim": 32}, "seed": 1})
    _write(
        found.rank / "config.json", {"model": "mmoe", "config": {"experts": 4, "settings": {"epochs": 2}}, "seed": 1}
    )
    gates = {label: {"mean": [0.5, 0.3, 0.2], "low": [0.3, 0.1, 0.1], "high": [0.7, 0.5, 0.3]} for label in LABELS}
    rank_figures = {"validation": {"auc_click": 0.7}, "test": {"auc_click": 0.7}, "gates": gates}
    _write(found.rank / "metrics.json", rank_figures)
    for folder, losses in ((found.recall, (5.0, 4.1, 3.9)), (found.rank, (1.2, 1.0, 0.97))):
        history = [{"epoch": at + 1, "loss": loss, "val_loss": loss + 0.05} for at, loss in enumerate(losses)]
        _write(folder / "history.json", history)
    if rows > 1:
        fusion.search_predictions(found.rank, found.weights)
    return found


def write_release(path: Path, number: int, weights: dict[str, float] | None = None) -> Path:
    """A release whose rank SavedModel answers sigmoid(champion_LABEL) for each label."""
    import tensorflow as tf

    module = tf.Module()
    inputs = {f"champion_{label}": tf.TensorSpec([None], tf.float32, f"champion_{label}") for label in LABELS}
    module.predict = tf.function(
        lambda raw: {label: tf.sigmoid(raw[f"champion_{label}"]) for label in LABELS}, input_signature=[inputs]
    )
    tf.saved_model.save(module, str(path / "rank"), signatures={"serving_default": module.predict})
    weights = weights or {"click": 1.0, "long_view": 1.0, "like": 1.0}
    _write(path / "weights.json", {"fusion": "weighted_sum", "weights": weights})
    manifest = {
        "release": number,
        "created_at": "2026-02-20T08:00:00+00:00",
        "approved_by": "reviewer",
        "weights": weights,
        "recall": {"model": "youtube_dnn", "config": {"dim": 16}, "seed": 1},
        "rank": {"model": "mmoe", "config": {"experts": 4, "settings": {"epochs": 1}}, "seed": 1},
        "metrics": {"recall": {"recall@50": 0.3}, "rank": {"auc_click": 0.69}},
        "files": {"rank/saved_model.pb": "…"},
    }
    _write(path / "manifest.json", manifest)
    days = {"train_start": -9, "train_end": -7, "validation_end": -5, "test_end": -3}
    window = {name: (START + timedelta(days=day)).isoformat() for name, day in days.items()}
    _write(path / "verdict.json", {"approved": True, "data_window": window | {"rows": {"train": 4000}}})
    return path


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))
