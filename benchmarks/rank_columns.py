"""What LightGBM reads: the features that the rank models read, as trees take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from penstock.examples import Schema, read_slice
from penstock.ranking import BINARY, SIDES

SLICES = ("validation", "test")
LARGE = 100
"""Whether the trees read categories with more values than this, the validation slice says."""

TOKENS = 10_000
"""A trait is `(feature + 1) · TOKENS + value`: the trees get a column a feature."""


def columns(examples: Path) -> dict[str, np.ndarray]:
    """What `lightgbm_peer` reads: the features that our models read, as trees take them.

    Numbers are as the log has them, ids their indices, a trait is a column a feature; of an item's tags the first two
    are columns, of a history its length.
    """
    schema = Schema.load(examples / "schema")
    rows = {part: read_slice(examples, part) for part in ("train", *SLICES)}
    traits = (rows["train"]["traits"].explode(empty_as_null=False) // TOKENS).unique().sort().to_list()
    found: dict[str, np.ndarray] = {"tasks": np.array(BINARY)}
    for part, of_part in rows.items():
        categories, numbers = _categories(of_part, schema, traits), _numbers(of_part, schema)
        table = np.column_stack([values.astype(np.float32) for values in (*categories.values(), *numbers.values())])
        found |= {f"{part}_columns": table, f"{part}_labels": of_part.select(BINARY).to_numpy()}
    kinds = np.array([len(np.unique(column)) for column in found["train_columns"][:, : len(categories)].T])
    return found | {
        "names": np.array([*categories, *numbers]),
        "small": np.flatnonzero(kinds <= LARGE),
        "large": np.flatnonzero(kinds > LARGE),
    }


def _categories(rows: pl.DataFrame, schema: Schema, traits: Sequence[int]) -> dict[str, np.ndarray]:
    """Columns of indices, NaN where there is none, `[rows]` by name."""
    found = {}
    for feature in schema.of(*SIDES):
        if feature.kind == "id":
            found[feature.name] = schema.encode(feature, rows[feature.name])
        elif feature.name == "tags":
            found |= {f"tag {place}": tags for place, tags in enumerate(schema.encode(feature, rows["tags"]).T[:2])}
    tokens = rows.select("traits").with_row_index("row").explode("traits", empty_as_null=False)
    for trait in traits:
        values = np.full(rows.height, np.nan)
        own = tokens.filter(pl.col("traits") // TOKENS == trait)
        values[own["row"].to_numpy()] = own["traits"].to_numpy() % TOKENS
        found[f"trait {trait}"] = values
    return found


def _numbers(rows: pl.DataFrame, schema: Schema) -> dict[str, np.ndarray]:
    """Columns of numbers, NaN where there is none, `[rows]` by name."""
    numbers = [feature.name for feature in schema.of(*SIDES) if feature.kind in ("count", "number")]
    found = {name: rows[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in numbers}
    return found | {"history": rows["history_items"].list.len().to_numpy()}
