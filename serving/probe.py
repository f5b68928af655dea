"""What a release answers to a request that says nothing: how a loaded version is known to be the one it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penstock.release import ReleaseError
from serving.model_client import Input, ModelClient

ITEMS = 10

TOLERANCE = 1e-4
"""Of the largest value: another processor rounds otherwise; other weights differ by far more."""

Answers = Mapping[str, Mapping[str, Sequence[Any]]]


def answers(client: ModelClient, number: int) -> dict[str, dict[str, list[Any]]]:
    """What version `number` of recall and rank answer for a user of whom nothing is known.

    Returns:
        {"recall": {"ids", "scores"}, "rank": {head: a value an id}}.

    Raises:
        ReleaseError: recall gives no items with finite scores.
        ModelError: a call failed.
    """
    inputs = {name: _blank(spec, 1) for name, spec in client.signature("recall", number).inputs.items()}
    inputs |= {"k": np.array(ITEMS, np.int32)}
    found = client.predict("recall", number, inputs)
    there = found["ids"][0] >= 0
    scores = found["scores"][0][there]
    if not there.any() or not np.isfinite(scores).all():
        raise ReleaseError(f"recall of release {number} gives no items with finite scores; do not use it")
    ids = found["ids"][0][there]
    inputs = {name: _blank(spec, len(ids)) for name, spec in client.signature("rank", number).inputs.items()}
    if "item_id" in inputs:
        inputs["item_id"] = ids
    heads = client.predict("rank", number, inputs)
    return {
        "recall": {"ids": ids.tolist(), "scores": scores.tolist()},
        "rank": {name: values.tolist() for name, values in heads.items()},
    }


def check(client: ModelClient, number: int, heads: Sequence[str], expected: Answers) -> None:
    """Holds what is loaded as version `number` against what the release is known to answer.

    Args:
        heads: those of the rank model that the release fuses.
        expected: as `answers` gave it when the release was rehearsed; outputs that it lacks are not held against it.

    Raises:
        ReleaseError: an answer differs, is missing or is not finite.
        ModelError: a call failed.
    """
    found = answers(client, number)
    for head in heads:
        if head not in found["rank"] or not np.isfinite(found["rank"][head]).all():
            raise ReleaseError(f"rank of release {number} gives no finite {head}; do not use it")
    wrong = differing(found, expected)
    if wrong:
        raise ReleaseError(
            f"what the model server at {client.address} has loaded as release {number} is not that release: "
            f"{', '.join(wrong)} differ; look at the server's base paths, and load it again"
        )


def differing(found: Answers, expected: Answers) -> list[str]:
    """The outputs by which two `answers` are not of the same models; items that score alike may change places."""
    places = {item: place for place, item in enumerate(found["recall"]["ids"])}
    wanted = expected["recall"]["scores"]
    scale = TOLERANCE * max(np.abs(wanted).max(), np.finfo(np.float32).tiny)
    last = min(wanted)
    # items that score alike may change places, and at the cut-off one may stand for another
    missing = [
        score
        for item, score in zip(expected["recall"]["ids"], wanted, strict=True)
        if item not in places and score > last + scale
    ]
    if missing or len(places) != len(wanted):
        return ["the recalled items"]
    both = [(place, places[item]) for place, item in enumerate(expected["recall"]["ids"]) if item in places]
    if not both:
        return ["the recalled items"]
    here, there = np.array(both).T
    outputs = [("recall scores", wanted, found["recall"]["scores"])]
    outputs += [(f"rank {name}", values, found["rank"].get(name, [])) for name, values in expected["rank"].items()]
    return [name for name, one, other in outputs if not _alike(one, other, here, there)]


def _alike(expected: Sequence[Any], found: Sequence[Any], here: np.ndarray, there: np.ndarray) -> bool:
    if len(expected) != len(found):
        return False
    one, other = np.array(expected, np.float64)[here], np.array(found, np.float64)[there]
    bound = TOLERANCE * max(np.abs(one).max(), np.finfo(np.float32).tiny)
    return bool((np.abs(one - other) <= bound).all())


def _blank(spec: Input, rows: int) -> np.ndarray:
    """An input that says nothing: zeros, or lists of nothing but padding."""
    if spec.rank == 2:
        return np.full((rows, 1), -1, spec.dtype)
    return np.full(rows if spec.rank else (), b"" if spec.dtype.kind == "O" else 0, spec.dtype)
