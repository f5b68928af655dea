"""Rows that another engine gave back right are counted: lost rows, other values and nulls are not."""

from __future__ import annotations

import polars as pl

from benchmarks.offline_join import equal_rows

TRUTH = pl.DataFrame({"row": [0, 1, 2, 3], "count": [1, None, 3, 4], "lists": [[1], [2, 2], None, []]})


def test_the_same_rows_in_any_order_are_right() -> None:
    assert equal_rows(TRUTH, TRUTH[[2, 0, 3, 1]]) == TRUTH.height


def test_lost_rows_and_other_values_are_not() -> None:
    assert equal_rows(TRUTH, TRUTH[[0, 2]]) == 2
    assert equal_rows(TRUTH, TRUTH.with_columns(count=pl.Series([1, 2, 3, 5]))) == 2
    assert equal_rows(TRUTH, TRUTH.with_columns(lists=pl.Series([[1], [2, 3], [], []]))) == 2


def test_whole_numbers_that_became_floats_are_right() -> None:
    counts = pl.Series([1.0, float("nan"), 3.0, 4.0])
    assert equal_rows(TRUTH, TRUTH.with_columns(count=counts)) == TRUTH.height
    assert equal_rows(TRUTH, TRUTH.with_columns(count=counts + 0.5)) == 1
