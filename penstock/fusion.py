"""Heads of a rank model → one score, and the search for the weights."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from penstock.events import LABELS
from penstock.metrics import Array, MetricError, auc, auc_many

STEPS = 10
"""The grid: each weight is 0, 1/10, … 1."""

OBJECTIVE = "mean_auc"
"""The mean over the labels of the AUC of the fused score: what the search maximises and the gate judges by."""


@dataclass(frozen=True)
class Search:
    """What a search found: the best point, its objective, and every point of the grid.

    `grid` has a row a point: the weights, named as the heads; `auc_LABEL`; `objective`.
    """

    weights: dict[str, float]
    value: float
    objective: str
    grid: pl.DataFrame


def fuse(heads: Mapping[str, npt.ArrayLike], weights: Mapping[str, float]) -> Array:
    """The fused score Σ_h w_h p_h [n] in float64; heads without a weight do not count.

    Raises:
        ValueError: a weight names a head that is not there, or there are no weights.
    """
    missing = [name for name in weights if name not in heads]
    if missing or not weights:
        raise ValueError(f"weights {', '.join(missing) or '(none)'} do not fit the heads {', '.join(heads)}")
    total = np.zeros(np.shape(heads[next(iter(weights))]))
    for name, weight in weights.items():
        total += np.asarray(heads[name], dtype=np.float64) * weight
    return total


def directions(heads: int, steps: int = STEPS) -> dict[tuple[int, ...], list[int]]:
    """The grid's points as integers 0…`steps`, those that differ only by scale together: they rank alike.

    Returns the multiples on the grid by direction, a direction being a point whose parts share no divisor. The point
    of zeros ranks nothing and is left out.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for point in product(range(steps + 1), repeat=heads):
        scale = math.gcd(*point)
        if scale:
            found.setdefault(tuple(part // scale for part in point), []).append(scale)
    return found


def search(
    labels: Mapping[str, npt.ArrayLike], heads: Mapping[str, npt.ArrayLike], objective: str = OBJECTIVE
) -> Search:
    """The best point of the whole grid by the exact AUC of the fused score, each direction evaluated once.

    Points of one objective are told apart so that the answer never depends on chance: the direction with the smallest
    sum of (integer) parts, then the one that leans on the earlier heads, at its largest scale on the grid.

    Args:
        labels: name → 0 or 1 [n].
        heads: name → probabilities [n].
        objective: `mean_auc`, or `auc_LABEL` of one label.

    Raises:
        MetricError: labels of one class, or scores that are not finite.
        ValueError: an objective that is not known.
    """
    known = [OBJECTIVE, *(f"auc_{name}" for name in labels)]
    if objective not in known:
        raise ValueError(f"objective {objective!r} is not known; there are {', '.join(known)}")
    for label, values in labels.items():
        for head, scores in heads.items():
            try:
                auc(values, scores)
            except MetricError as error:
                raise MetricError(f"label {label}, head {head}: {error}") from None
    matrix = np.stack([np.asarray(values, dtype=np.float64) for values in labels.values()])
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in heads.items()}
    found = directions(len(columns))

    def evaluate(direction: tuple[int, ...]) -> Array:
        return auc_many(matrix, fuse(columns, dict(zip(columns, direction, strict=True))))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        aucs = np.stack(list(_watched(pool.map(evaluate, found), len(found))))
    values = aucs.mean(axis=1) if objective == OBJECTIVE else aucs[:, known.index(objective) - 1]
    cases = zip(values.tolist(), found, strict=True)
    value, best = min(cases, key=lambda case: (-case[0], sum(case[1]), tuple(-part for part in case[1])))
    scale = max(found[best])
    return Search(
        weights={name: part * scale / STEPS for name, part in zip(columns, best, strict=True)},
        value=value,
        objective=objective,
        grid=_grid(list(columns), list(labels), found, aucs, values),
    )


def _grid(
    heads: Sequence[str], labels: Sequence[str], found: Mapping[tuple[int, ...], list[int]], aucs: Array, values: Array
) -> pl.DataFrame:
    """Every point of the grid with its direction's result, in order of the weights."""
    rows = [
        (*(part * scale / STEPS for part in direction), *aucs[place].tolist(), float(values[place]))
        for place, (direction, scales) in enumerate(found.items())
        for scale in scales
    ]
    names = [*heads, *(f"auc_{name}" for name in labels), "objective"]
    return pl.DataFrame(sorted(rows), schema=dict.fromkeys(names, pl.Float64), orient="row")


def _watched(results: Iterable[Array], total: int) -> Iterable[Array]:
    """`results`, with a line of progress every two seconds."""
    start = shown = time.monotonic()
    for done, result in enumerate(results, 1):
        now = time.monotonic()
        if now - shown > 2:
            left = (now - start) / done * (total - done)
            print(f"weights: {done} of {total} directions, about {left:.0f} s left", flush=True)
            shown = now
        yield result


def best_single_head(grid: pl.DataFrame, heads: Iterable[str] = LABELS) -> str:
    """The head that alone has the highest objective in a search's `grid`; of equals the earlier."""
    alone = {
        head: grid.filter((pl.col(head) == 1) & (pl.sum_horizontal(*heads) == 1))["objective"].item() for head in heads
    }
    return max(alone, key=lambda head: alone[head])


def search_predictions(rank: Path, weights: Path, objective: str = OBJECTIVE) -> Search:
    """Searches on a rank artifact's validation predictions and writes `weights.json` and `grid.parquet`."""
    predictions = pl.read_parquet(rank / "predictions" / "validation.parquet")
    found = search(
        {label: predictions[label].to_numpy() for label in LABELS},
        {label: predictions[f"p_{label}"].to_numpy() for label in LABELS},
        objective,
    )
    weights.mkdir(parents=True, exist_ok=True)
    found.grid.write_parquet(weights / "grid.parquet")
    document = {
        "fusion": "weighted_sum",
        "weights": found.weights,
        "objective": found.objective,
        "validation": found.value,
    }
    (weights / "weights.json").write_text(json.dumps(document, indent=2) + "\n")
    return found
