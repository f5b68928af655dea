from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import grids


def levels(kind: str, steps: int, base: int) -> list[Fraction]:
    """The weights of one head, from the definition."""
    if kind == "log":
        return [Fraction(0), *(Fraction(1, base**power) for power in range(steps + 1))]
    return [Fraction(part, steps) for part in range(-steps if kind == "signed" else 0, steps + 1)]


@pytest.mark.parametrize(
    ("kind", "heads", "steps"),
    [("linear", 1, 4), ("linear", 3, 10), ("linear", 4, 3), ("log", 2, 5), ("log", 3, 3), ("signed", 3, 3)],
)
@pytest.mark.parametrize("base", [2, 3])
def test_a_grid_has_every_point_once_but_zero(kind: str, heads: int, steps: int, base: int) -> None:
    grid = grids.make(kind, heads, steps, base)
    found = [tuple(Fraction(int(part), grid.denominator) for part in point) for point in grid.points]
    expected = {point for point in product(levels(kind, steps, base), repeat=heads) if any(point)}
    assert len(found) == len(expected)
    assert set(found) == expected
    assert np.array_equal(grid.weights, np.array(found, dtype=np.float64))


@pytest.mark.parametrize(("heads", "steps"), [(1, 5), (2, 7), (3, 10), (5, 4)])
def test_a_simplex_holds_the_linear_points_that_sum_to_one(heads: int, steps: int) -> None:
    points = grids.make("simplex", heads, steps, 2).points
    expected = [point for point in product(range(steps + 1), repeat=heads) if sum(point) == steps]
    assert sorted(map(tuple, points.tolist())) == sorted(expected)


@given(st.sampled_from(grids.GRIDS), st.integers(1, 4), st.integers(1, 4), st.integers(2, 3))
def test_directions_are_the_points_up_to_a_positive_factor(kind: str, heads: int, steps: int, base: int) -> None:
    grid = grids.make(kind, heads, steps, base)
    # exactly: the ratios of a point to its largest part, signs kept
    shapes = [tuple(Fraction(int(part), int(np.abs(point).max())) for part in point) for point in grid.points]
    assert len(grid.directions) == len(set(shapes))
    assert len(set(zip(shapes, grid.direction_of.tolist(), strict=True))) == len(set(shapes))
    assert (np.gcd.reduce(grid.directions, axis=1) == 1).all()
    scales = np.abs(grid.points).max(axis=1) // np.abs(grid.directions[grid.direction_of]).max(axis=1)
    assert np.array_equal(grid.directions[grid.direction_of] * scales[:, None], grid.points)
    assert np.linalg.norm(grid.units, axis=1) == pytest.approx(1)


def test_opposite_points_are_two_directions() -> None:
    grid = grids.make("signed", 2, 2, 2)
    found = {tuple(direction) for direction in grid.directions.tolist()}
    assert {(1, -1), (-1, 1), (1, 1), (-1, -1)} <= found
    assert len(found) == 16


def test_a_direction_is_taken_at_its_largest_point() -> None:
    grid = grids.make("linear", 2, 10, 2)
    place = grid.directions.tolist().index([1, 2])
    assert grid.largest(place).tolist() == [0.5, 1.0]
    grid = grids.make("log", 2, 3, 2)
    assert grid.largest(grid.directions.tolist().index([1, 4])).tolist() == [0.25, 1.0]
    assert (grid.points[grid.direction_of == grid.directions.tolist().index([1, 4])] / 8).max() == 1


@pytest.mark.parametrize(
    ("kind", "heads", "steps", "base", "says"),
    [
        ("cubic", 3, 10, 2, "'cubic' is not known; there are linear, log, signed, simplex"),
        ("linear", 3, 0, 2, "at least 1, 1 and 2"),
        ("log", 3, 4, 1, "at least 1, 1 and 2"),
        ("linear", 8, 10, 2, "214,358,881 points"),
        ("log", 2, 60, 2, "at most 2\\^53"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(kind: str, heads: int, steps: int, base: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grids.make(kind, heads, steps, base)
