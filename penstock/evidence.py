"""What the gate judges by: a candidate's artifacts, read; and the champion and the baselines, on the same rows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from penstock import baselines, fusion, scoring
from penstock.events import LABELS
from penstock.examples import Schema, read_slice
from penstock.metrics import Array

RECALL_DEPTH = 200


@dataclass(frozen=True)
class Champion:
    """What is live, on the candidate's test rows.

    Attributes:
        score: the fused score.
        answers: what its recall model answers the test's queries, `[users, RECALL_DEPTH]`.
    """

    number: int
    heads: Mapping[str, Array]
    score: Array
    answers: np.ndarray
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """All that is judged.

    Attributes:
        predictions: the rank model's predictions on the test rows.
        score: the fused score of them.
        test: event_id, event_time and labels of the test rows, as the examples have them.
        seen: event_id and event_time of the training and validation rows.
        single_head: the head that alone was best on validation.
        users: who asks the recall models.
        relevant: by user, what would have been right to answer.
        answers: what the recall model and the baselines answer, `[users, RECALL_DEPTH]` by name.
        items: the items training has seen; `indexed`, those that the recall model can retrieve.
        trained_on: by model, the data window that its own files name; `window`, that of the examples.
        rehearsal: what a fresh server made of the candidate; None if there was none.
        champion: None if nothing is live; a sentence if there is a champion that could not be scored.
    """

    predictions: pl.DataFrame
    score: Array
    test: pl.DataFrame
    seen: pl.DataFrame
    single_head: str
    users: np.ndarray
    relevant: list[np.ndarray]
    answers: Mapping[str, np.ndarray]
    items: np.ndarray
    indexed: np.ndarray
    trained_on: Mapping[str, Any]
    window: Mapping[str, Any]
    rehearsal: Mapping[str, Any] | None
    champion: Champion | str | None


def gather(
    examples: Path, recall: Path, rank: Path, weights: Path, rehearsal: Path | None, champion: Path | None
) -> Evidence:
    """Reads what is to be judged, and asks the champion (a release directory) about the candidate's test rows.

    Raises:
        OSError, ValueError, KeyError: an artifact of the candidate is missing or not as it should be.
    """
    from penstock.evaluation import Queries, retrieve_from

    keys = ["event_id", "event_time"]
    test = read_slice(examples, "test")
    seen = pl.concat(pl.read_parquet(examples / f"{part}.parquet", columns=keys) for part in ("train", "validation"))
    document = _document(weights / "weights.json")
    predictions = pl.read_parquet(rank / "predictions" / "test.parquet")
    needed = {"event_id", "user_id", "scenario", "session", "new_user", "new_item", "tail_item", *LABELS}
    needed |= {f"{kind}_{label}" for kind in ("popularity", "p") for label in LABELS}
    missing = sorted(needed - set(predictions.columns))
    if missing:
        raise ValueError(f"the predictions lack the column {', '.join(missing)}")
    queries = Queries.of(examples, "test")
    heads = {label: predictions[f"p_{label}"].cast(pl.Float64).to_numpy() for label in LABELS}
    return Evidence(
        predictions=predictions,
        score=fusion.fuse(heads, document["weights"], document["fusion"]),
        test=test.select(*keys, *LABELS),
        seen=seen,
        single_head=fusion.best_single_head(pl.read_parquet(weights / "grid.parquet")),
        users=queries.rows["user_id"].to_numpy(),
        relevant=queries.relevant,
        answers={
            "candidate": retrieve_from(recall / "saved_model", queries.rows, RECALL_DEPTH),
            "popularity": baselines.popular(examples, queries.rows, RECALL_DEPTH),
            "item_item_cf": baselines.item_item(examples, queries.rows, RECALL_DEPTH),
        },
        items=Schema.load(examples / "schema").vocabularies["item_id"],
        indexed=pl.read_parquet(recall / "items.parquet", columns=["item_id"])["item_id"].to_numpy(),
        trained_on={name: _document(path / "window.json") for name, path in (("recall", recall), ("rank", rank))},
        window=_document(examples / "window.json"),
        rehearsal=_document(rehearsal / "rehearsal.json") if rehearsal else None,
        champion=_champion(champion, test, queries.rows) if champion else None,
    )


def _document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _champion(release: Path, test: pl.DataFrame, queries: pl.DataFrame) -> Champion | str:
    from penstock.evaluation import retrieve_from

    try:
        manifest = _document(release / "manifest.json")
        document = _document(release / "weights.json")
        heads = scoring.score_rows(release / "rank", test)
        score = fusion.fuse(heads, document["weights"], document["fusion"])
        missing = [label for label in LABELS if label not in heads]
        if missing or not np.isfinite(score).all() or not all(np.isfinite(heads[label]).all() for label in LABELS):
            return f"The champion's scores on the test rows are not finite, or a head is missing ({release.name})."
        answers = retrieve_from(release / "recall", queries, RECALL_DEPTH)
        return Champion(int(manifest["release"]), heads, score, answers, manifest)
    except Exception as error:  # whatever TensorFlow or a broken file raises: no champion, no comparison
        reason = re.sub(r"\{\{.*?\}\}", "", str(error)).strip().splitlines() or [type(error).__name__]
        return f"Champion {release.name} cannot be loaded and scored on the test rows: {reason[0]}."
