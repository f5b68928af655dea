"""Grids of weights: the points of a search, those that rank alike told apart from those that do not.

A point is a vector of integers, one a head; its weights are these over the grid's `denominator`. Points that differ by
a positive factor order rows alike: they have one direction, the point with the common divisor taken out.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

import numpy as np

from penstock.metrics import Array, Integers

GRIDS = ("linear", "log", "signed", "simplex")

MOST_POINTS = 1_000_000


class Grid(NamedTuple):
    """Points and their directions.

    Attributes:
        points: integers [points, heads], in order; the point of zeros ranks nothing and is left out.
        denominator: what they are parts of.
        directions: integers without a common divisor [directions, heads], in order.
        direction_of: the place of each point's direction [points].
    """

    points: Integers
    denominator: int
    directions: Integers
    direction_of: Integers

    @property
    def weights(self) -> Array:
        """The weights of each point. [points, heads]"""
        weights: Array = self.points / self.denominator
        return weights

    @property
    def units(self) -> Array:
        """The directions at length 1. [directions, heads]"""
        lengths: Array = np.linalg.norm(self.directions, axis=1, keepdims=True)
        return self.directions / lengths

    def largest(self, direction: int) -> Array:
        """The weights [heads] of a direction's largest point."""
        places = np.flatnonzero(self.direction_of == direction)
        largest: Array = self.weights[places[np.argmax(np.abs(self.points[places]).sum(axis=1))]]
        return largest


def make(kind: str, heads: int, steps: int, base: int) -> Grid:
    """The grid of a kind.

    `linear`: each weight 0, 1/`steps`, … 1. `signed`: the same from -1. `log`: each weight 0, or `base`^-j for
    j = 0 … `steps`. `simplex`: the weights of `linear` that sum to 1.

    Raises:
        ValueError: a kind that there is not, fewer than 1 step, a base below 2, or more points than `MOST_POINTS`.
    """
    if kind not in GRIDS:
        raise ValueError(f"grid {kind!r} is not known; there are {', '.join(GRIDS)}")
    if steps < 1 or base < 2 or heads < 1:
        raise ValueError(f"a grid of {heads} heads, {steps} steps and base {base}: at least 1, 1 and 2")
    levels = {"linear": steps + 1, "log": steps + 2, "signed": 2 * steps + 1}.get(kind, 0)
    count = math.comb(steps + heads - 1, heads - 1) if kind == "simplex" else levels**heads
    if count > MOST_POINTS or (kind == "log" and base**steps > 2**53):
        raise ValueError(
            f"a {kind} grid of {steps} steps for {heads} heads has {count:,} points; at most {MOST_POINTS:,}"
            " (of a log grid also base^steps at most 2^53): take fewer steps, or the simplex"
        )
    denominator = base**steps if kind == "log" else steps
    if kind == "simplex":
        bars = np.array(list(combinations(range(steps + heads - 1), heads - 1)), np.int64).reshape(count, heads - 1)
        edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, steps + heads - 1)))
        points = np.diff(edges, axis=1) - 1
    else:
        values = np.arange(-steps if kind == "signed" else 0, steps + 1, dtype=np.int64)
        if kind == "log":
            values = np.array([0, *(base**power for power in range(steps + 1))], np.int64)
        points = np.stack(np.meshgrid(*[values] * heads, indexing="ij"), axis=-1).reshape(-1, heads)
    divisors = np.gcd.reduce(points, axis=1)
    points, divisors = points[divisors > 0], divisors[divisors > 0]
    directions, direction_of = np.unique(points // divisors[:, None], axis=0, return_inverse=True)
    return Grid(points, denominator, directions, direction_of.reshape(-1))
