from __future__ import annotations

import numpy as np
import pytest

from penstock import fusion, grid_search, grids
from penstock.metrics import Integers
from tests.penstock.candidates import BASE

FEW = ("coarse_to_fine", "bayesian")


def trials(
    peak: tuple[float, ...], *, budget: int, steps: int = 10, bound: float | None = None
) -> tuple[grid_search.Trials, np.ndarray]:
    """A hill on the linear grid with a known top, and a constraint that may keep it away; the figures of all."""
    grid = grids.make("linear", len(peak), steps, 2)
    top = np.array(peak) / np.linalg.norm(peak)
    height = 0.6 + 0.1 * np.exp(-4 * (1 - grid.units @ top))
    figures = np.column_stack([height] if bound is None else [height, bound - grid.units[:, 0]])

    def evaluate(places: Integers) -> np.ndarray:
        return figures[places]

    return grid_search.Trials(grid.units, evaluate, budget, 0 if bound is None else 1), figures


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("peak", [(1.0, 1.0, 1.0), (10.0, 1.0, 3.0), (1.0, 0.0, 0.0), (1.0, 9.0), (3.0, 1.0, 0.2, 2.0)])
def test_the_top_of_a_hill_is_found_within_the_budget(method: str, peak: tuple[float, ...]) -> None:
    steps = 5 if len(peak) > 3 else 30 if len(peak) < 3 else 10
    found, figures = trials(peak, budget=10**9, steps=steps)
    found, figures = trials(peak, budget=len(figures) // 10, steps=steps)
    grid_search.METHODS[method](found, 0)
    assert found.tried.sum() == len(figures) // 10
    assert found.left == 0
    assert np.nanmax(found.figures[:, 0]) == figures[:, 0].max()


@pytest.mark.parametrize("method", FEW)
def test_a_constraint_that_cuts_the_top_off_is_kept(method: str) -> None:
    found, figures = trials((1.0, 0.3, 0.3), budget=103, bound=0.3)
    grid_search.METHODS[method](found, 0)
    best = int(np.nanargmax(found.merits))
    assert figures[best, 1] >= 0
    assert figures[best, 0] == figures[figures[:, 1] >= 0, 0].max() < figures[:, 0].max()


def test_all_are_evaluated_once_and_the_heads_alone_first() -> None:
    found, figures = trials((1.0, 2.0, 3.0), budget=10**9, steps=4)
    grid_search.exhaustive(found, 0)
    assert np.array_equal(found.figures, figures)
    for method in FEW:
        found, _ = trials((1.0, 2.0, 3.0), budget=3, steps=4)
        grid_search.METHODS[method](found, 0)
        assert sorted(map(tuple, found.units[found.tried].tolist())) == [(0, 0, 1), (0, 1, 0), (1, 0, 0)]


def test_merits_put_all_that_keep_the_constraints_first() -> None:
    found, _ = trials((1.0, 1.0), budget=3, steps=2, bound=1.0)
    found.figures[:4] = [[0.6, 0.0], [0.9, -0.1], [0.5, 0.2], [0.95, -0.3]]
    assert np.argsort(-found.merits[:4]).tolist() == [0, 2, 1, 3]


def test_nothing_is_evaluated_twice_or_beyond_the_budget() -> None:
    asked: list[int] = []
    units = grids.make("linear", 3, 4, 2).units

    def evaluate(places: Integers) -> np.ndarray:
        asked.extend(places.tolist())
        return units[places][:, :1]

    found = grid_search.Trials(units, evaluate, 5, 0)
    found.run([3, 1, 3])
    found.run([1, 4, 7, 9, 2])
    found.run([0])
    assert asked == [3, 1, 4, 7, 9]
    assert found.left == 0


def slice_of(rows: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Three labels of one taste, and heads that know them more or less well."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=rows)
    labels, heads = {}, {}
    for label, base in BASE.items():
        logit = base + 1.2 * (0.8 * shared + 0.6 * generator.normal(size=rows))
        labels[label] = (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
        noise = generator.uniform(0.2, 1.5) * generator.normal(size=rows)
        heads[label] = 1 / (1 + np.exp(-(logit + noise)))
    return labels, heads


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("name", ["weighted_sum", "weighted_logits"])
def test_the_optimum_of_the_grid_is_found_in_a_tenth_of_its_evaluations(method: str, name: str) -> None:
    for seed in range(2):
        labels, heads = slice_of(2000, seed)
        every = fusion.search(labels, heads, fusion.Config(name))
        few = fusion.search(labels, heads, fusion.Config(name, method=method))
        assert (few.value, few.weights) == (every.value, every.weights)
        assert few.evaluations <= 0.1 * every.evaluations == 0.1 * every.directions
        assert few.grid.height < every.grid.height
        assert fusion.best_single_head(few.grid) == fusion.best_single_head(every.grid)
    again = fusion.search(labels, heads, fusion.Config(name, method=method))
    assert again.grid.equals(few.grid)


def test_the_process_asks_where_it_expects_an_improvement() -> None:
    asked: list[float] = []
    full, figures = trials((5.0, 2.0, 3.0), budget=0)

    def evaluate(places: Integers) -> np.ndarray:
        asked.extend(figures[places, 0].tolist())
        return figures[places]

    grid_search.bayesian(grid_search.Trials(full.units, evaluate, 103, 0), 0)
    # a quarter is the net; of a smooth hill it tells where the top is
    assert min(asked[25:29]) > np.quantile(figures[:, 0], 0.95)
