"""Heads of a rank model → one score, and the search for the weights."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

import penstock
from penstock import grids
from penstock.events import LABELS
from penstock.metrics import Array, Bools, Integers, MetricError

FUSION = "weighted_sum"

EPSILON = 1e-6
"""How near 0 or 1 a probability may come before its logarithm is taken: isotonic heads say 0 and 1."""

OBJECTIVE = "mean_auc"
"""The mean over the labels of the AUC of the fused score: what the search maximises and the gate judges by."""

METHODS = ("exhaustive", "coarse_to_fine", "bayesian")

SHARE = 0.1
"""Of the directions of a grid so many are evaluated at most, unless all are."""

KIND = r"auc|gauc|ndcg@[1-9][0-9]*"
"""A pattern: how the name of a measure begins, before `_LABEL`."""


def _logit(p: Array) -> Array:
    p = np.clip(p, EPSILON, 1 - EPSILON)
    return np.log(p) - np.log1p(-p)


def _log(p: Array) -> Array:
    return np.log(np.maximum(p, EPSILON))


FUSIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {FUSION: lambda p: p, "weighted_logits": _logit, "weighted_product": _log}
)
"""T of each fusion; a fused score is Σ_h w_h T(p_h).

Of the product Π_h p_h^w_h it is the logarithm, which orders rows alike and does not underflow.
"""


@dataclass(frozen=True)
class Config:
    """What is searched, and for what.

    Attributes:
        fusion: of `FUSIONS`.
        grid: `linear`, `log`, `signed` or `simplex`: see `grids.make`, as for `steps` and `base`.
        objective: a measure, or measure → weight for their weighted mean. Measures are `auc_LABEL`, `gauc_LABEL`
            (within users), `ndcg@K_LABEL` (within sessions); over the labels `mean_auc`, `mean_gauc`, `mean_ndcg@K`.
        constraints: measure → how far it may fall below that of the reference weights.
        method: of `METHODS`; those that are not exhaustive evaluate a tenth of the directions at most.
        seed: of the Bayesian search.
    """

    fusion: str = FUSION
    grid: str = "linear"
    steps: int = 10
    base: int = 2
    objective: str | Mapping[str, float] = OBJECTIVE
    constraints: Mapping[str, float] = field(default_factory=dict)
    method: str = "exhaustive"
    seed: int = 0

    def __post_init__(self) -> None:
        for what, value, known in (("fusion", self.fusion, FUSIONS), ("method", self.method, METHODS)):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not known; there are {', '.join(known)}")
        for name, allowed in self.constraints.items():
            if isinstance(allowed, bool) or not isinstance(allowed, int | float) or not allowed >= 0:
                raise ValueError(f"the constraint of {name} is how far it may fall, at least 0, not {allowed!r}")


def settings(overrides: Mapping[str, Any], labels: Sequence[str] = LABELS) -> Config:
    """A Config with some settings overridden, as they come from JSON, that fits as many heads as labels.

    Raises:
        ValueError: an unknown setting or name, the message lists those there are; or a value that cannot be.
    """
    config: Config = penstock.config(sys.modules[__name__], overrides)
    grids.make(config.grid, len(labels), config.steps, config.base)
    _parts(config.objective, labels)
    for name in config.constraints:
        _parts(name, labels)
    return config


@dataclass(frozen=True)
class Reference:
    """Weights that a candidate's are held against; `name` says whose they are."""

    name: str
    weights: Mapping[str, float]
    fusion: str = FUSION


@dataclass(frozen=True)
class Search:
    """What a search found: the best point, its objective, and every point that was evaluated.

    Attributes:
        measures: of the best point, by name.
        reference: what the constraints are relative to; its own measures are `reference_measures`.
        grid: a row a point: the weights, named as the heads; the measures of every label; `objective`; `feasible`,
            whether the constraints are kept; `front`, whether no other point is as good on all labels and better on one
            (by the first kind of measure in the objective).
        evaluations: how many vectors of weights were evaluated, of `directions` of the grid that rank differently.
    """

    weights: dict[str, float]
    value: float
    config: Config
    measures: dict[str, float]
    reference: Reference
    reference_measures: dict[str, float]
    grid: pl.DataFrame
    evaluations: int
    directions: int


def fuse(heads: Mapping[str, npt.ArrayLike], weights: Mapping[str, float], fusion: str = FUSION) -> Array:
    """The fused score Σ_h w_h T(p_h) [n] in float64; heads without a weight do not count.

    Raises:
        ValueError: a fusion that is not known, a weight names a head that is not there, or there are no weights.
    """
    missing = [name for name in weights if name not in heads]
    if missing or not weights:
        raise ValueError(f"weights {', '.join(missing) or '(none)'} do not fit the heads {', '.join(heads)}")
    columns = _transformed({name: heads[name] for name in weights}, fusion)
    total = np.zeros(np.shape(next(iter(columns.values()))))
    for name, weight in weights.items():
        total += columns[name] * weight
    return total


def _transformed(heads: Mapping[str, npt.ArrayLike], fusion: str) -> dict[str, Array]:
    if fusion not in FUSIONS:
        raise ValueError(f"fusion {fusion!r} is not known; there are {', '.join(FUSIONS)}")
    return {name: FUSIONS[fusion](np.asarray(values, dtype=np.float64)) for name, values in heads.items()}


def _parts(objective: str | Mapping[str, float], labels: Iterable[str]) -> dict[str, float]:
    """An objective as the weighted mean of measures `KIND_LABEL`: measure → weight, which sum to 1."""
    labels = list(labels)
    wanted = {objective: 1.0} if isinstance(objective, str) else objective
    parts: dict[str, float] = {}
    for name, weight in wanted.items():
        found = re.fullmatch(rf"mean_({KIND})|({KIND})_({'|'.join(map(re.escape, labels))})", name)
        if not found:
            known = [f"{kind}_{{{', '.join(labels)}}}" for kind in ("auc", "gauc", "ndcg@K")]
            raise ValueError(
                f"objective {name!r} is not known; there are {', '.join(known)}, mean_auc, mean_gauc, mean_ndcg@K"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < np.inf:
            raise ValueError(f"the weight of {name} in the objective must be above 0, not {weight!r}")
        of = [f"{found[1]}_{label}" for label in labels] if found[1] else [name]
        for part in of:
            parts[part] = parts.get(part, 0.0) + weight / len(of)
    if not parts:
        raise ValueError("an objective without a measure")
    total = sum(parts.values())
    return {name: weight / total for name, weight in parts.items()}


def _kinds(*parts: Iterable[str]) -> list[str]:
    """The kinds of measures, each once, in order."""
    return list(dict.fromkeys(name.partition("_")[0] for names in parts for name in names))


def search(
    labels: Mapping[str, npt.ArrayLike],
    heads: Mapping[str, npt.ArrayLike],
    config: Config | None = None,
    *,
    users: npt.ArrayLike | None = None,
    sessions: npt.ArrayLike | None = None,
    reference: Reference | None = None,
) -> Search:
    """The best point of a grid by an exact measure of the fused score, each direction evaluated once.

    Points of one direction, those that differ by scale, rank alike but for the rounding of their sums. A direction is
    evaluated at its smallest point of integers, where rows that tie do so: in tenths their sums would round apart.
    Points of one objective are told apart so that the answer never depends on chance: the direction with the smallest
    sum of (integer) parts without their signs, then the one that leans on the earlier heads, at its largest scale on
    the grid.

    Memory as in `penstock.measures`, with as many threads as there are cores.

    Args:
        labels: name → 0 or 1 [n].
        heads: name → probabilities [n].
        users, sessions: whose row it is and of which session [n]; for the measures that are taken within them.
        reference: what the constraints are relative to; all weights equal if none is given.

    Raises:
        MetricError: labels of one class, scores that are not finite, or no point that keeps the constraints.
        ValueError: a name that is not known, users or sessions missing, or weights that do not fit the heads.
    """
    # compiled code and what it brings are no part of a gateway, which fuses too
    from penstock import grid_search
    from penstock.measures import Measures

    config = config or Config()
    reference = reference or Reference("all weights equal", dict.fromkeys(heads, 1.0), config.fusion)
    goal = _parts(config.objective, labels)
    limits = {name: _parts(name, labels) for name in config.constraints}
    kinds = _kinds(goal, *limits.values())
    grid = grids.make(config.grid, len(heads), config.steps, config.base)
    measures = Measures(labels, _transformed(heads, config.fusion), kinds, users=users, sessions=sessions)
    standing = _evaluated(labels, heads, reference, kinds, users, sessions)
    value_of = np.array([goal.get(name, 0.0) for name in measures.names])
    kept_of = np.array([[parts.get(name, 0.0) for name in measures.names] for parts in limits.values()])
    kept_of = kept_of.reshape(len(limits), len(measures.names))
    # rounding of the sums may break ties of the reference otherwise than of the same point on the grid
    least = kept_of @ standing - np.array(list(config.constraints.values()), np.float64) - 1e-12
    table = np.full((len(grid.directions), len(measures.names)), np.nan)

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def evaluate(places: Integers) -> Array:
            results = pool.map(measures, grid.directions[places])
            table[places] = np.stack(list(_watched(results, len(places))))
            return np.column_stack([table[places] @ value_of, table[places] @ kept_of.T - least])

        every = config.method == "exhaustive"
        budget = len(grid.directions) if every else max(len(heads), int(SHARE * len(grid.directions)))
        trials = grid_search.Trials(grid.units, evaluate, budget, len(limits))
        grid_search.METHODS[config.method](trials, config.seed)

    tried = np.flatnonzero(trials.tried)
    merits = trials.merits[tried]
    directions = grid.directions[tried]
    best = int(tried[np.lexsort((*-directions.T[::-1], np.abs(directions).sum(axis=1), -merits))[0]])
    weights = dict(zip(heads, grid.largest(best).tolist(), strict=True))
    if (trials.figures[best, 1:] < 0).any():
        raise MetricError(_missed(weights, trials.figures[best, 1:], least, list(limits), len(tried), reference))
    front = np.zeros(len(table), bool)
    front[tried] = undominated(table[tried][:, : len(labels)])
    rows = trials.tried[grid.direction_of]
    of = grid.direction_of[rows]
    frame = pl.DataFrame(
        {
            **dict(zip(heads, grid.weights[rows].T, strict=True)),
            **dict(zip(measures.names, table[of].T, strict=True)),
            "objective": trials.figures[of, 0],
            "feasible": (trials.figures[of, 1:] >= 0).all(axis=1),
            "front": front[of],
        }
    )
    return Search(
        weights=weights,
        value=float(trials.figures[best, 0]),
        config=config,
        measures=dict(zip(measures.names, table[best].tolist(), strict=True)),
        reference=reference,
        reference_measures=dict(zip(measures.names, standing.tolist(), strict=True)),
        grid=frame,
        evaluations=len(tried),
        directions=len(grid.directions),
    )


def _evaluated(
    labels: Mapping[str, npt.ArrayLike],
    heads: Mapping[str, npt.ArrayLike],
    point: Reference,
    kinds: Sequence[str],
    users: npt.ArrayLike | None,
    sessions: npt.ArrayLike | None,
) -> Array:
    """The measures of the kinds of one vector of weights, of every label."""
    from penstock.measures import Measures

    return Measures(labels, {"fused": fuse(heads, point.weights, point.fusion)}, kinds, users=users, sessions=sessions)(
        [1.0]
    )


def _missed(
    weights: Mapping[str, float],
    slack: Array,
    least: Array,
    names: Sequence[str],
    evaluations: int,
    reference: Reference,
) -> str:
    worst = int(np.argmin(slack))
    point = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    return (
        f"none of the {evaluations} directions evaluated keeps the constraints: the nearest, {point}, has"
        f" {names[worst]} {least[worst] + slack[worst]:.6f}, {-slack[worst]:.6f} less than the {least[worst]:.6f} that"
        f" are asked for ({reference.name}, less what it may fall)"
    )


def undominated(values: Array) -> Bools:
    """The Pareto front: which rows of `values` [n, m] no other is as good as everywhere and better than somewhere."""
    keep = np.ones(len(values), bool)
    # from the best sum down, no row is dominated by a later one
    order = np.argsort(-values.sum(axis=1), kind="stable")
    front = np.empty((0, values.shape[1]))
    for place in order:
        value = values[place]
        if ((front >= value).all(axis=1) & (front > value).any(axis=1)).any():
            keep[place] = False
        else:
            front = np.vstack([front, value])
    return keep


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
    heads = list(heads)
    alone = {
        head: grid.filter(pl.col(head) == 1, *(pl.col(other) == 0 for other in heads if other != head))["objective"]
        for head in heads
    }
    return max(heads, key=lambda head: alone[head].item())


def _slice(rows: pl.DataFrame) -> dict[str, Any]:
    """The arguments of `search` out of a rank artifact's predictions."""
    return {
        "labels": {label: rows[label].to_numpy() for label in LABELS},
        "heads": {label: rows[f"p_{label}"].to_numpy() for label in LABELS},
        "users": rows["user_id"].to_numpy() if "user_id" in rows.columns else None,
        "sessions": rows["session"].to_numpy() if "session" in rows.columns else None,
    }


def measure(
    rows: pl.DataFrame, weights: Mapping[str, float], fusion: str, objective: str | Mapping[str, float]
) -> float:
    """The objective of weights on a rank artifact's predictions.

    Raises:
        MetricError, ValueError: what `search` refuses.
    """
    parts = _parts(objective, LABELS)
    kinds = _kinds(parts)
    found = _evaluated(point=Reference("", weights, fusion), kinds=kinds, **_slice(rows))
    names = [f"{kind}_{label}" for kind in kinds for label in LABELS]
    return float(sum(parts.get(name, 0.0) * value for name, value in zip(names, found.tolist(), strict=True)))


def search_predictions(rank: Path, weights: Path, config: Config | None = None, champion: str = "") -> Search:
    """Searches on a rank artifact's validation predictions and writes `weights.json` and `grid.parquet`.

    Args:
        champion: the champion's release directory, whose weights are the reference; "" if nothing is live.
    """
    reference = None
    if champion:
        try:
            live = json.loads((Path(champion) / "weights.json").read_text())
            reference = Reference(f"champion {Path(champion).name}", live["weights"], live["fusion"])
        except (OSError, ValueError, KeyError) as error:  # the gate will say so, and reject
            print(f"weights: those of {Path(champion).name} cannot be read, equal ones are the reference: {error}")
    found = search(
        config=config, reference=reference, **_slice(pl.read_parquet(rank / "predictions" / "validation.parquet"))
    )
    weights.mkdir(parents=True, exist_ok=True)
    found.grid.write_parquet(weights / "grid.parquet")
    document = {
        "fusion": found.config.fusion,
        "weights": found.weights,
        "objective": found.config.objective,
        "validation": found.value,
        "measures": found.measures,
        "reference": dataclasses.asdict(found.reference) | {"measures": found.reference_measures},
        "search": dataclasses.asdict(found.config),
        "evaluations": found.evaluations,
        "directions": found.directions,
    }
    (weights / "weights.json").write_text(json.dumps(document, indent=2) + "\n")
    return found
