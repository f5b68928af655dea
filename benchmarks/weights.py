"""The search of the output weights beside loops over scikit-learn, on the same rows and the same points of the grid.

`python -m benchmarks.weights` prints the tables and writes build/bench/weights.json; `--quick` is a smaller form of it,
which has no goals of speed. The grid is the usual one, three heads by tenths. A loop is timed on all points where that
takes minutes, else on some spread over the grid, and its rate is taken from these. Ours is one search: it sorts out the
directions, sets up and evaluates on both cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import ndcg_score, roc_auc_score

from benchmarks.table import Comparison, machine, show, show_columns, write
from penstock import fusion, grids

BASE = {"click": -0.4, "long_view": -0.8, "like": -3.5}

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows and users of the speed trials, points of each loop, rows and seeds of the trials of methods."""

    rows: int
    users: int
    points: int
    points_of_three: int
    points_of_groups: int
    trial_rows: int
    trials: int


FULL = Size(1_000_000, 20_000, 1330, 60, 2, 5_000, 30)
QUICK = Size(50_000, 1_000, 60, 20, 2, 2_000, 2)


def log(rows: int, users: int, seed: int) -> tuple[Columns, Columns, np.ndarray, np.ndarray]:
    """Labels of one taste, heads that know them more or less well, users of uneven activity and their requests."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=rows)
    labels, heads = {}, {}
    for label, base in BASE.items():
        logit = base + 1.2 * (0.8 * shared + 0.6 * generator.normal(size=rows))
        labels[label] = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
        noise = generator.uniform(0.2, 1.5) * generator.normal(size=rows)
        heads[label] = (1 / (1 + np.exp(-(logit + noise)))).astype(np.float32).astype(np.float64)  # as models say them
    of_user = generator.choice(users, rows, p=(active := generator.exponential(size=users)) / active.sum())
    requests = of_user * 1000 + generator.integers(
        0, np.maximum(np.bincount(of_user, minlength=users) // 8, 1)[of_user]
    )
    return labels, heads, of_user, requests


def spread(count: int) -> list[dict[str, float]]:
    """Points of the usual grid, evenly out of all, in tenths: as integers, since 0.1 in binary breaks ties."""
    points = grids.make("linear", len(BASE), 10, 2).points
    return [
        dict(zip(BASE, points[place].tolist(), strict=True))
        for place in np.linspace(0, len(points) - 1, count).astype(int)
    ]


def loop(
    points: Sequence[Mapping[str, float]], heads: Columns, measure: Callable[[np.ndarray], list[float]]
) -> tuple[float, np.ndarray]:
    """Points a second, and the measures of each. [points, labels]"""
    began = time.perf_counter()
    found = [measure(sum(weight * heads[name] for name, weight in point.items())) for point in points]  # type: ignore[arg-type]
    return len(points) / (time.perf_counter() - began), np.array(found)


def gauc(users: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], list[float]]:
    parts = [part for part in _parts(users) if 0 < labels[part].sum() < part.size]
    weights = [part.size for part in parts]
    return lambda scores: [
        float(np.average([roc_auc_score(labels[part], scores[part]) for part in parts], weights=weights))
    ]


def ndcg(requests: np.ndarray, labels: np.ndarray, k: int) -> Callable[[np.ndarray], list[float]]:
    parts = [part for part in _parts(requests) if labels[part].any()]

    def of(labels: np.ndarray, scores: np.ndarray) -> float:
        return float(ndcg_score([labels], [scores], k=k)) if labels.size > 1 else 1.0

    return lambda scores: [float(np.mean([of(labels[part], scores[part]) for part in parts]))]


def _parts(groups: np.ndarray) -> list[np.ndarray]:
    """The rows of each group."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def speed(size: Size) -> list[Comparison]:
    """Points a second, and how far the measures are from scikit-learn's."""
    labels, heads, users, requests = log(size.rows, size.users, 0)
    like = {"like": labels["like"]}
    at_least = 30.0 if size is FULL else None
    fusion.search(
        labels,
        heads,
        fusion.Config(steps=1, objective={"auc_like": 1, "gauc_like": 1, "ndcg@10_like": 1}),
        users=users,
        sessions=requests,
    )  # compiles
    cases: list[tuple[str, Columns, str, int, Callable[[np.ndarray], list[float]]]] = [
        ("AUC of one label", like, "auc_like", size.points, lambda scores: [roc_auc_score(labels["like"], scores)]),
        (
            "AUC of three labels",
            labels,
            "mean_auc",
            size.points_of_three,
            lambda scores: [roc_auc_score(labels[name], scores) for name in BASE],
        ),
        ("GAUC of one label", like, "gauc_like", size.points_of_groups, gauc(users, labels["like"])),
        ("NDCG@10 of one label", like, "ndcg@10_like", size.points_of_groups, ndcg(requests, labels["like"], 10)),
    ]
    rows = []
    for what, of, objective, count, measure in cases:
        began = time.perf_counter()
        found = fusion.search(of, heads, fusion.Config(objective=objective), users=users, sessions=requests)
        took = time.perf_counter() - began
        points = spread(count)
        rate, theirs = loop(points, heads, measure)
        peer = f"a loop over scikit-learn, {count:,} points"
        rows.append(
            Comparison(
                f"{what}, {size.rows:,} rows", found.grid.height / took, rate, peer, "points/s", at_least=at_least
            )
        )
        rows.append(Comparison(f"{what}, by direction", found.evaluations / took, rate, peer, "evaluations/s"))
        by_point = {point[:-1]: point[-1] for point in found.grid.select(*BASE, "objective").iter_rows()}
        apart = max(
            abs(by_point[tuple(part / 10 for part in point.values())] - float(np.mean(measures)))
            for point, measures in zip(points, theirs, strict=True)
        )
        rows.append(Comparison(f"{what}, largest difference", apart, 1e-9, "what is allowed", "", at_most=1.0))
    return rows


def memory(size: Size) -> list[Comparison]:
    """Bytes a row at the peak of a search, and of one AUC of scikit-learn's."""
    labels, heads, users, _ = log(size.rows, size.users, 0)
    rows = []
    for objective in ("mean_auc", "mean_gauc"):
        tracemalloc.start()
        fusion.search(labels, heads, fusion.Config(steps=1, objective=objective), users=users)
        ours = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        roc_auc_score(labels["like"], heads["like"])
        theirs = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        rows.append(
            Comparison(
                f"memory beyond the inputs, {objective}",
                ours / size.rows,
                theirs / size.rows,
                "one roc_auc_score",
                "bytes a row",
            )
        )
    return rows


CASES = (
    fusion.Config(),
    fusion.Config("weighted_logits"),
    fusion.Config(objective="auc_like"),
    fusion.Config(grid="signed", steps=5),
    fusion.Config(grid="simplex", steps=40),
    fusion.Config("weighted_product", "log", 8),
    fusion.Config(objective="auc_click", constraints={"auc_like": 0.002}),
)


def few(size: Size) -> tuple[list[Comparison], dict[str, Any]]:
    """How often the methods that evaluate a tenth find what the exhaustive search finds, and how far they are off."""
    methods = [method for method in fusion.METHODS if method != "exhaustive"]
    columns: dict[str, Any] = {name: [] for name in ("method", "search", "found", "largest loss", "evaluations")}
    rows = []
    for case in CASES:
        losses: dict[str, list[float]] = {method: [] for method in methods}
        evaluations = {}
        for seed in range(size.trials):
            labels, heads, _, _ = log(size.trial_rows, 10, 1000 + seed)
            every = fusion.search(labels, heads, case)
            for method in methods:
                one = fusion.search(labels, heads, dataclasses.replace(case, method=method))
                losses[method].append(every.value - one.value)
                evaluations[method] = one.evaluations
        what = f"{case.fusion}, {case.grid} by {case.steps}, {case.objective}{', constrained' * bool(case.constraints)}"
        for method in methods:
            found = np.mean(np.array(losses[method]) == 0)
            shares = (found, max(losses[method]), evaluations[method] / every.directions)
            for name, value in zip(columns, (method, what, *shares), strict=True):
                columns[name].append(value)
    for method in methods:
        mine = np.array(columns["method"]) == method
        found = float(np.array(columns["found"])[mine].mean())
        most = float(np.array(columns["evaluations"])[mine].max())
        runs = size.trials * len(CASES)
        goal = 0.95 if size is FULL else None
        rows.append(Comparison(f"{method}, optima found of {runs}", found, 1.0, "exhaustive", "share", at_least=goal))
        rows.append(Comparison(f"{method}, most evaluations", most, 1.0, "exhaustive", "share", at_most=0.1))
    return rows, columns


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute")
    size = QUICK if parser.parse_args().quick else FULL
    print(machine())
    rows = speed(size) + memory(size)
    show(f"The usual grid on {size.rows:,} rows", rows)
    methods, columns = few(size)
    show("Methods", methods)
    show_columns(f"A tenth of the evaluations, {size.trials} data sets of {size.trial_rows:,} rows each", columns)
    print(f"written to {write('weights', rows + methods)}")


if __name__ == "__main__":
    main()
