from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.layers.quantile import Cumulative


def _of(quantiles, numbers) -> np.ndarray:
    return np.asarray(Cumulative(quantiles)(np.asarray(numbers, np.float32)))


def test_places_lie_on_lines_between_quantiles():
    found = _of([0.0, 1.0, 3.0], [0.0, 0.5, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(found[:, 0], [0.0, 0.25, 0.5, 0.75, 1.0], atol=1e-6)
    np.testing.assert_allclose(found[:, 1], found[:, 0] ** 2, atol=1e-6)
    np.testing.assert_allclose(found[:, 2], np.sqrt(found[:, 0]), atol=1e-6)


def test_numbers_beyond_all_are_at_the_ends():
    np.testing.assert_array_equal(_of([0.0, 1.0], [-9.0, 9.0])[:, 0], [0.0, 1.0])


def test_what_many_rows_have_stands_in_the_middle_of_theirs():
    # of five quantiles the first three are 2: half of the rows
    np.testing.assert_allclose(_of([2.0, 2.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0])[:, 0], [0.25, 0.5, 0.75], atol=1e-6)
    np.testing.assert_allclose(_of([7.0, 7.0, 7.0], [6.0, 7.0, 8.0])[:, 0], [0.5, 0.5, 0.5])


def test_the_last_digit_of_a_number_decides_nothing():
    edges = [0.0, 0.0, 0.0, 1.0, 1.0]
    near = _of(edges, [-1e-6, 0.0, 1e-6, 1.0 - 1e-6, 1.0, 1.0 + 1e-6])[:, 0]
    np.testing.assert_allclose(near, [0.25, 0.25, 0.25, 0.875, 0.875, 0.875], atol=1e-5)


def test_quantiles_that_differ_by_a_rounding_are_one():
    np.testing.assert_allclose(_of([0.0, np.nextafter(1.0, 0.0), 1.0], [0.5, 1.0])[:, 0], [0.375, 0.75], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=40), st.integers(1, 8))
def test_the_order_is_kept_within_0_and_1(values, pieces):
    values = np.array(values, np.float32)
    quantiles = np.quantile(values, np.linspace(0.0, 1.0, pieces + 1))
    asked = np.sort(np.concatenate([values, values + 0.3, [-99.0, 99.0]]))
    found = _of(quantiles, asked)[:, 0]
    assert (np.diff(found) >= -1e-6).all()
    assert 0.0 <= found.min() <= found.max() <= 1.0


def test_of_the_rows_it_was_fitted_on_it_is_uniform():
    numbers = np.random.default_rng(0).lognormal(0.0, 1.5, 20_000).astype(np.float32)
    found = _of(np.quantile(numbers, np.linspace(0.0, 1.0, 33)), numbers)[:, 0]
    shares = np.histogram(found, bins=8, range=(0.0, 1.0))[0] / len(found)
    np.testing.assert_allclose(shares, 1 / 8, atol=0.002)


def test_it_is_made_again_from_its_config():
    layer = Cumulative([0.0, 2.0, 5.0])
    again = Cumulative.from_config(layer.get_config())
    numbers = np.array([0.5, 4.0], np.float32)
    np.testing.assert_array_equal(layer(numbers), again(numbers))
    assert np.asarray(layer(numbers)).shape == (2, 3)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    assert _of([0.0, 1.0], np.zeros(rows)).shape == (rows, 3)
