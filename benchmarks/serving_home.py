"""A home to serve from, made once: features of simulated users and of as many items as are asked for, and one release.

The users and their activity are the simulator's, written to the online store; items are drawn from its items, with
rows in the tables that the gateway maps into memory. The release is real as far as serving sees it: an exported recall
model with the item index in its graph, and an exported rank model. Their weights are not trained: what they cost does
not depend on it. A user's vector is the mean of the vectors of his history and a little of a network over his profile;
histories are of items that lie near one of `benchmarks.index.of_topics`' users, so that the index has what it is for.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import keras
import numpy as np
import polars as pl

import penstock
from benchmarks import index as made_up
from benchmarks.kept import ROOT, code, statements
from feature_repo.materialised import Materialised, write_materialised
from feature_repo.store import EPOCH, apply, newest_rows, write_online
from penstock import export, objectives, release, routing
from penstock.catalogue import Catalogue
from penstock.datasets import simulator
from penstock.events import LABELS
from penstock.examples import FEATURES, Schema
from penstock.features import HISTORY_LENGTH, VIEWS, feature_tables, log_end, pushed_end
from penstock.layers.embedding import Embedding, embed, inputs_of
from penstock.ranking import Ranking
from penstock.retrieval import RecallConfig, Retrieval, Towers
from penstock.routing import Routing

SEED = 17
DIM = made_up.DIM
NEAR = 20_000
"""Histories are of so many of the items."""
QUERIES = 1024

MADE_BY = (
    "benchmarks/index.py",
    "benchmarks/serving_home.py",
    "feature_repo/materialised.py",
    "feature_repo/online_store.py",
    "penstock/examples.py",
    "penstock/export.py",
    "penstock/features.py",
    "penstock/index.py",
    "penstock/ranking.py",
)
"""A home is made again when one of these has changed."""


@dataclass(frozen=True)
class Size:
    """How many items the release and the feature store hold, and the simulated users."""

    items: int
    users: int
    rank: str = "mmoe"


FULL = Size(1_000_000, 5_000)
QUICK = Size(30_000, 500)


def home(build: Path, size: Size) -> Path:
    """The home of a size below `build`, made if it is not there as the code would make it now."""
    files = [ROOT / name for name in (*MADE_BY, f"penstock/rank/{size.rank}.py")]
    made_by = code(statement for file in files for statement in statements(file))
    mark = json.dumps({"size": asdict(size), "code": made_by})
    path = build / f"home-{size.items}"
    if (path / "made.json").exists() and (path / "made.json").read_text() == mark:
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    vectors, users = made_up.of_topics(made_up.Size(size.items, size.users))
    newest = _features(path, size, vectors, users[: size.users])
    schema = _schema(newest)
    folder = release.directory(path, 1)
    with _step("recall model"):
        _recall(schema, newest, vectors, folder / ".recall")
    with _step("rank model"):
        _rank(schema, size.rank, folder / ".rank")
    _release(folder, newest)
    release.link(path, 1)
    routing.write(path / "routing.json", Routing(champion=1))
    (path / "made.json").write_text(mark)
    return path


@contextmanager
def _step(what: str) -> Iterator[None]:
    began = time.monotonic()
    print(f"home: {what} …", flush=True)
    yield
    print(f"home: {what}: {time.monotonic() - began:.0f} s", flush=True)


def _features(path: Path, size: Size, vectors: np.ndarray, users: np.ndarray) -> dict[str, pl.DataFrame]:
    """The newest row of each entity by view, which are in the home's store."""
    random = np.random.default_rng(SEED)
    with _step("features"):
        config = simulator.Config(users=size.users, items=400, items_per_day=10, days=8, sessions_per_day=1.0)
        simulator.write_log(config, path / "log")
        tables, cutoff = feature_tables(path / "log"), log_end(path / "log")
        at, pushed_at = (EPOCH + timedelta(microseconds=us) for us in (cutoff, pushed_end(path / "log", cutoff)))
        newest = {
            one.name: newest_rows(tables[one.name], one, pushed_at if one.freshness == "pushed" else at)
            for one in VIEWS
        }
        known = newest["item_profile"].height
        for one in VIEWS:
            if one.entity == "item":
                rows = random.integers(0, min(known, newest[one.name].height), size.items)
                newest[one.name] = newest[one.name][rows].with_columns(pl.Series(one.key, np.arange(size.items)))
        profile = newest["item_profile"]
        newest["item_profile"] = profile.with_columns(
            author_id=pl.Series(1 + random.integers(0, max(size.items // 20, 2), size.items)),
        )
        newest["user_activity"] = _with_histories(newest["user_activity"], vectors, users, random)
    with _step("feature store"):
        apply(path)
        # the gateway reads items from the tables in memory; online are those of users and scenarios
        write_online(path, {one.name: newest[one.name] for one in VIEWS if one.entity != "item"}, at, pushed_at)
        write_materialised(path, Materialised(1, cutoff, 0), newest)
    return newest


def _with_histories(
    activity: pl.DataFrame, vectors: np.ndarray, users: np.ndarray, random: np.random.Generator
) -> pl.DataFrame:
    """Each user's history with items near a user of the made-up ones, of the length that it had."""
    among = random.permutation(len(vectors))[:NEAR]
    histories = []
    for row, history in enumerate(activity["history_items"]):
        scores = vectors[among] @ users[row % len(users)]
        nearest = among[np.argpartition(-scores, HISTORY_LENGTH)[:HISTORY_LENGTH]]
        histories.append(random.permutation(nearest)[: len(history)].tolist())
    return activity.with_columns(history_items=pl.Series(histories, dtype=pl.List(pl.Int64)))


def _schema(newest: Mapping[str, pl.DataFrame]) -> Schema:
    """What examples of such features would have given; numbers are taken as they come."""
    ids: dict[str, set[int]] = {
        "scenario": {0, 1, 2},
        "device": {0, 1},
        "hour": set(range(24)),
        "weekday": set(range(7)),
    }
    columns = {feature.name: newest[one.name] for one in VIEWS for feature in one.features}
    columns |= {"user_id": newest["user_profile"], "item_id": newest["item_profile"]}
    for feature in FEATURES:
        if feature.vocabulary and feature.name in columns and feature.name not in ("history_items", "scenario"):
            column = columns[feature.name][feature.name]
            ids.setdefault(feature.vocabulary, set()).update(
                (column.explode().drop_nulls() if feature.kind == "ids" else column).unique().to_list()
            )
    numbers = [feature for feature in FEATURES if feature.kind in ("count", "number")]
    return Schema(
        FEATURES,
        {name: np.array(sorted(values), np.int64) for name, values in ids.items()},
        {feature.name: (1.0, 1.5) for feature in numbers},
        rows=1_000_000,
    )


def _query(schema: Schema, vectors: np.ndarray) -> tuple[keras.Model, Embedding]:
    """A query tower, and the table of item vectors that it shares with the item tower."""
    table = Embedding(len(vectors) + 2, DIM, "zeros", "item_id")
    table.build(None)
    table.table.assign(np.concatenate([np.zeros((2, DIM), np.float32), vectors]))
    features = tuple(feature for feature in schema.of("user") if feature.name != "user_id")
    others = tuple(feature for feature in features if feature.name != "history_items")
    inputs = inputs_of(features)
    hidden = keras.ops.concatenate(embed(inputs, others, schema, 32), axis=-1)
    for units in (128, 64):
        hidden = keras.layers.Dense(units, "relu")(hidden)
    user = keras.layers.Dense(DIM, kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3))(hidden)
    return keras.Model(inputs, user + table(inputs["history_items"], mean=True), name="query"), table


def _recall(schema: Schema, newest: Mapping[str, pl.DataFrame], vectors: np.ndarray, out: Path) -> None:
    keras.utils.set_random_seed(SEED)
    query, table = _query(schema, vectors)
    config = RecallConfig(dim=DIM)
    model = Retrieval(Towers(query, table), objectives.build(config, np.ones(len(vectors) + 2, np.int64), SEED))
    histories = newest["user_activity"]["history_items"].head(QUERIES)
    queries = np.stack([vectors[row].mean(axis=0) for row in histories if len(row)]).astype(np.float32)
    profile = newest["item_profile"]
    catalogue = Catalogue(profile["item_id"].to_numpy(), profile.height, {}, ())
    found = export.export_recall(model, schema, catalogue, out, queries)
    print(f"home: recall@200 of the index {found['recall@200']:.3f}", flush=True)


def _rank(schema: Schema, name: str, out: Path) -> None:
    keras.utils.set_random_seed(SEED)
    module = penstock.module("rank", name)
    config = penstock.config(module, {})
    model = Ranking(module.build(config, schema), config, 10.0, schema.size("device"))
    model.build()
    export.export_rank(model, schema, out)


def _release(folder: Path, newest: Mapping[str, pl.DataFrame]) -> None:
    """The directory of release 1 of exported models, with what serving reads of a manifest."""
    for model in release.MODELS:
        (folder / f".{model}" / "saved_model").rename(folder / model)
    (folder / ".recall" / "items.parquet").rename(folder / "items.parquet")
    for model in release.MODELS:
        shutil.rmtree(folder / f".{model}")
    most = newest["item_statistics"].sort("item_long_views_7d", descending=True)["item_id"].head(500)
    popular = {"segment": [""] * len(most), "rank": range(len(most)), "item_id": most}
    pl.DataFrame(popular, schema={"segment": pl.String, "rank": pl.Int32, "item_id": pl.Int64}).write_parquet(
        folder / "popular.parquet"
    )
    manifest: dict[str, Any] = {
        "release": 1,
        "parent": None,
        "weights": {"click": 1.0, "long_view": 2.0, "like": 0.5},
        "fusion": "weighted_product",
        "heads": list(LABELS),
        "feature_services": release.FEATURE_SERVICES,
    }
    (folder / release.MANIFEST).write_text(json.dumps(manifest))


if __name__ == "__main__":
    home(Path("build/serve"), FULL)
