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
from penstock.examples import Feature, fit_schema

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
    def rehearsal(self) -> Path:
        return self.root / "rehearsal"

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
        "tail_item": generator.random(rows) < 0.3,
        "session": np.arange(rows) // 5,
        "history_items": generator.integers(0, 200, (rows, 3)).tolist(),
    }
    for label in LABELS:
        columns[f"popularity_{label}"] = _sigmoid(BASE[label] + 0.25 * shared + 0.5 * generator.normal(size=rows))
        logit = BASE[label] + 1.2 * (0.8 * shared + 0.6 * generator.normal(size=rows))
        columns[label] = (generator.random(rows) < _sigmoid(logit)).astype(np.int8)
        columns[f"p_{label}"] = _sigmoid(logit + noise * generator.normal(size=rows))
        columns[f"champion_{label}"] = (logit + 0.8 * generator.normal(size=rows)).astype(np.float32)
    schema: dict[str, Any] = {"event_time": pl.Datetime("us", "UTC"), "event_id": pl.Int64, "scenario": pl.Int64}
    schema["history_items"] = pl.List(pl.Int64)
    return pl.DataFrame(columns, schema_overrides=schema)


def write_candidate(root: Path, *, rows: int = 5000, noise: float = 0.3, seed: int = 0) -> Artifacts:
    """A candidate whose scores are the truth but for `noise` in the logits (the champion's noise is 0.8)."""
    found = Artifacts(root)
    generator = np.random.default_rng(seed)
    slices = {
        name: _slice(name, rows, day, noise, generator) for name, day in (("train", 0), ("validation", 2), ("test", 4))
    }
    for folder in (found.examples, found.rank / "predictions", found.recall, found.weights, found.rehearsal):
        folder.mkdir(parents=True)
    truth = ["event_id", "user_id", "item_id", "event_time", "scenario", *LABELS]
    for name, frame in slices.items():
        frame.select(*truth, "history_items", *(f"champion_{label}" for label in LABELS)).write_parquet(
            found.examples / f"{name}.parquet"
        )
    fit_schema(slices["train"], (Feature("item_id", "item", "id", vocabulary="item_id"),)).save(
        found.examples / "schema"
    )
    write_recall_model(found.recall / "saved_model", slices["test"], 0.5, generator)
    for name in ("validation", "test"):
        extra = [*(f"{kind}_{label}" for kind in ("p", "popularity") for label in LABELS)]
        extra += ["new_user", "new_item", "tail_item", "session"]
        slices[name].select(*truth, *extra).write_parquet(found.rank / "predictions" / f"{name}.parquet")
    days = {"train_start": 0, "train_end": 2, "validation_end": 4, "test_end": 6}
    window = {name: (START + timedelta(days=day)).isoformat() for name, day in days.items()}
    window |= {"rows": dict.fromkeys(slices, rows), "digests": {name: f"of {name}" for name in slices}}
    _write(found.examples / "window.json", window)
    figures = {"recall@50": 0.31, "recall@200": 0.55, "ndcg@50": 0.2}
    popular = {"recall@50": 0.22, "recall@200": 0.41, "ndcg@50": 0.12}
    both = {"validation": popular, "test": popular}
    baselines = {"popularity": both, "item_item_cf": both}
    _write(
        found.recall / "metrics.json",
        {"inputs": ["user_id", "hour"], "validation": figures, "test": figures, **baselines},
    )
    answered = {"requests": 300, "finite": True, "largest_difference": 2e-7, "p50_ms": 9.0, "p99_ms": 14.0}
    _write(found.rehearsal / "rehearsal.json", answered | {"error": None})
    pl.DataFrame({"item_id": np.arange(1000), "vector": np.zeros((1000, 2), np.float32)}).write_parquet(
        found.recall / "items.parquet"
    )
    of_recall = {"model": "youtube_dnn", "config": {"dim": 32}, "seed": 1}
    _write(found.recall / "config.json", of_recall)
    of_rank = {"model": "mmoe", "config": {"experts": 4, "settings": {"epochs": 2}}, "seed": 1}
    _write(found.rank / "config.json", of_rank)
    for folder in (found.recall, found.rank):
        _write(folder / "window.json", window)
    gates = {label: {"mean": [0.5, 0.3, 0.2], "low": [0.3, 0.1, 0.1], "high": [0.7, 0.5, 0.3]} for label in LABELS}
    rank_figures = {"validation": {"auc_click": 0.7}, "test": {"auc_click": 0.7}, "gates": gates}
    rank_figures["inputs"] = ["item_id", "device"]
    _write(found.rank / "metrics.json", rank_figures)
    for folder, losses in ((found.recall, (5.0, 4.1, 3.9)), (found.rank, (1.2, 1.0, 0.97))):
        history = [{"epoch": at + 1, "loss": loss, "val_loss": loss + 0.05} for at, loss in enumerate(losses)]
        _write(folder / "history.json", history)
    if rows > 1:
        fusion.search_predictions(found.rank, found.weights)
    return found


def write_recall_model(path: Path, test: pl.DataFrame, share: float, generator: np.random.Generator) -> None:
    """A SavedModel that answers each user of a test slice so much of what he long-views there, behind it anything."""
    import tensorflow as tf

    answers = np.stack([generator.permutation(1000)[:200] for _ in range(int(test["user_id"].max() or 0) + 1)])
    viewed = test.filter(pl.col("long_view") == 1).group_by("user_id").agg(pl.col("item_id").unique().sort())
    for user, items in viewed.sort("user_id").iter_rows():
        known = [item for item in items if generator.random() < share][:50]
        others = [item for item in answers[user] if item not in known]
        answers[user] = [*known, *others[: 200 - len(known)]]
    module = tf.Module()
    module.answers = tf.Variable(answers.astype(np.int64), trainable=False)
    inputs = {
        "user_id": tf.TensorSpec([None], tf.int64, "user_id"),
        "k": tf.TensorSpec([], tf.int32, "k"),
        "exclude": tf.TensorSpec([None, None], tf.int64, "exclude"),
    }
    module.recommend = tf.function(
        lambda raw: {"ids": tf.gather(module.answers, raw["user_id"])[:, : raw["k"]]}, input_signature=[inputs]
    )
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.recommend})


def write_release(path: Path, number: int, weights: dict[str, float] | None = None) -> Path:
    """A release whose rank SavedModel answers sigmoid(champion_LABEL), and its recall model less than a candidate's."""
    import tensorflow as tf

    generator = np.random.default_rng(number)
    write_recall_model(path / "recall", _slice("test", 5000, 4, 0.3, np.random.default_rng(0)), 0.4, generator)

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
        "inputs": {"recall": ["user_id", "hour"], "rank": ["item_id", "position"]},
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
