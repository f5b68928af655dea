"""The on-demand features of `penstock.features` as Feast calls them: lists by name in, lists by name out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from penstock.features import KEYS, ON_DEMAND, REQUEST, VIEWS, Column, Ragged, default

DTYPES: dict[str, pl.DataType] = {
    **dict.fromkeys((*KEYS.values(), *REQUEST), pl.Int64()),
    **{feature.name: feature.dtype for view in VIEWS for feature in view.features},
}
"""What an on-demand feature may read: keys, the request and stored features."""


def transform(name: str, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The features of an on-demand view, from lists of what it reads; None stands for the default of its dtype."""
    on_demand = next(on_demand for on_demand in ON_DEMAND if on_demand.name == name)
    read = {column: as_column(columns[column], DTYPES[column]) for column in (*on_demand.inputs, *on_demand.request)}
    # scalars of NumPy: Feast takes the dtype of a feature from its values
    return {feature: list(values) for feature, values in on_demand.compute(read).items()}


def as_column(values: list[Any], dtype: pl.DataType) -> Column:
    """Python values, None where there is none, as the column that `penstock.features` computes with."""
    if isinstance(dtype, pl.List):
        return Ragged.of([[] if value is None else value for value in values])
    missing = default(dtype)
    filled = [missing if value is None else value for value in values]
    if isinstance(dtype, pl.String):
        return np.array(filled, object)
    return np.array(filled, np.float32 if dtype.is_float() else np.int64)
