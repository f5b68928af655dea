"""Next-item data in the layout `user item` a line, in time order, split leave-one-out: the last item of a user is test,
the one before it validation.

The protocol is that of Klenitskiy & Vasilev (RecSys 2023, arXiv 2309.07602): every item of the file competes, those the
user already had are removed, and nothing is sampled. A next item that the user already had is therefore never found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from penstock import baselines, training
from penstock.events import ITEMS
from penstock.examples import FEATURES, FIRST, Schema, encode_ids, fit_schema, read_slice
from penstock.retrieval import Retrieval
from penstock.training import RECALL_LABEL

READ = ("user_id", "history_items", "history_times", "history_sessions", "time_ms", "item_id")
"""All that a next-item model is told."""

DEPTH = 10
START = datetime(2024, 1, 1, tzinfo=UTC)
STEP_MS = 60_000
"""The file has no times. A minute lies between two items: all of a history is one session."""

SCORES = 2**24
"""So many are held at once."""


class Figures(NamedTuple):
    """Of queries with one relevant item each: whether it is among the first ten, and 1 / log₂(1 + its rank) if so."""

    hit_rate: float
    ndcg: float


def read(path: Path) -> list[np.ndarray]:
    """The items of each user, in order of time."""
    table = pl.read_csv(path, separator=" ", has_header=False, new_columns=["user", "item"])
    return [np.asarray(items) for items in table.group_by("user", maintain_order=True).agg("item")["item"].to_list()]


def write(sequences: list[np.ndarray], out: Path) -> None:
    """Writes an examples directory: each item with those before it as its history.

    Users with fewer than three items train, and are asked nothing. All items are known, also those of no training row.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends = {"train": -2, "validation": -1, "test": None}
    rows = {part: [] for part in ends}  # type: dict[str, list[tuple[int, int, np.ndarray]]]
    for user, items in enumerate(sequences):
        asked = len(items) >= 3
        learnt = items[: ends["train"]] if asked else items
        rows["train"] += [(user, place, learnt) for place in range(len(learnt))]
        if asked:
            for part in ("validation", "test"):
                given = items[: ends[part]]
                rows[part].append((user, len(given) - 1, given))
    for part, listed in rows.items():
        _table(listed).write_parquet(out / f"{part}.parquet")
    features = tuple(replace(feature, minimum=1) for feature in FEATURES if feature.name in READ)
    known = np.unique(np.concatenate(sequences)).astype(np.int64)
    fitted = fit_schema(read_slice(out, "train"), features)
    replace(fitted, vocabularies={**fitted.vocabularies, "item_id": known}).save(out / "schema")
    empty = {name: pl.lit(None, dtype) for name, dtype in ITEMS.schema.items() if name != "item_id"}
    pl.DataFrame({"item_id": known}).with_columns(**empty).select(list(ITEMS.schema)).write_parquet(
        out / "items.parquet"
    )
    (out / "window.json").write_text(json.dumps({part: len(listed) for part, listed in rows.items()}))


def _table(rows: list[tuple[int, int, np.ndarray]]) -> pl.DataFrame:
    """(user, place of the item that comes next, items) as rows of examples, in order of time."""
    places = np.array([place for _, place, _ in rows], np.int64)
    start = int(START.timestamp() * 1000)
    frame = pl.DataFrame(
        {
            "user_id": np.array([user for user, _, _ in rows], np.int64),
            "item_id": np.array([items[place] for _, place, items in rows], np.int64),
            "event_time": [START + timedelta(milliseconds=STEP_MS * place) for place in places.tolist()],
            "time_ms": start + STEP_MS * places,
            "history_items": [items[:place].tolist() for _, place, items in rows],
            "history_times": [[start + STEP_MS * before for before in range(place)] for place in places.tolist()],
            "history_sessions": [[-1] * place for place in places.tolist()],
        },
        schema_overrides={"history_items": pl.List(pl.Int64)},
    )
    return frame.with_columns(pl.lit(1, pl.Int8).alias(RECALL_LABEL)).sort("event_time", "user_id")


def ranks(scores: np.ndarray, wanted: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    """The rank of each row's wanted item among those not seen, ties to its disadvantage: `[rows]`.

    Args:
        scores: `[rows, items]`.
        wanted: places in `items`, `[rows]`.
        seen: places in `items` of what each row's user had. One that is wanted ranks behind all.
    """
    scores = scores.copy()
    own = scores[np.arange(len(scores)), wanted]
    for row, places in enumerate(seen):
        scores[row, places] = -np.inf
    found = (scores >= own[:, None]).sum(axis=1)
    was_seen = np.array([item in places for item, places in zip(wanted, seen, strict=True)], bool)
    return np.where(was_seen, scores.shape[1], found)


def figures(of_ranks: np.ndarray) -> Figures:
    """HitRate@10 and NDCG@10."""
    hit = of_ranks <= DEPTH
    return Figures(float(hit.mean()), float((hit / np.log2(1.0 + of_ranks)).mean()))


def of_model(model: Retrieval, schema: Schema, examples: Path, part: str) -> Figures:
    """What a trained model finds of a slice."""
    rows = read_slice(examples, part)
    vocabulary = schema.vocabularies["item_id"]
    vectors = training.item_vectors(model, np.arange(FIRST, schema.size("item_id")))
    queries = training.query_vectors(model, rows, schema)
    wanted = encode_ids(rows["item_id"].to_numpy(), vocabulary) - FIRST
    seen = [encode_ids(np.asarray(items), vocabulary) - FIRST for items in rows["history_items"].to_list()]
    step = max(SCORES // len(vectors), 1)
    parts = [
        ranks(queries[at : at + step] @ vectors.T, wanted[at : at + step], seen[at : at + step])
        for at in range(0, len(queries), step)
    ]
    return figures(np.concatenate(parts))


def of_baseline(answer: Callable[[Path, pl.DataFrame, int], np.ndarray], examples: Path, part: str) -> Figures:
    """What one of `penstock.baselines` finds of a slice."""
    rows = read_slice(examples, part)
    found = answer(examples, rows, DEPTH) == rows["item_id"].to_numpy()[:, None]
    return figures(np.where(found.any(axis=1), found.argmax(axis=1) + 1, DEPTH + 1))


BASELINES = {"popularity": baselines.popular, "item-item CF": baselines.item_item}
