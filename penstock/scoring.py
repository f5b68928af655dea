"""Scores of an exported model for rows of features, fed by the names of its inputs as a client would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from penstock.examples import MISSING, pad


def feed(rows: pl.DataFrame, name: str, dtype: np.dtype, ndim: int) -> np.ndarray:
    """Column `name` of `rows` as an input of `ndim` dimensions: lists padded with -1 to the longest."""
    column = rows[name]
    if ndim == 2:
        longest = column.list.len().fill_null(0).to_numpy().max(initial=1)
        return pad(column, int(longest)).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return column.fill_null(MISSING).to_numpy().astype(dtype)
    return column.cast(pl.Float64).fill_null(0.0).to_numpy().astype(dtype)


def score_rows(saved_model: Path, rows: pl.DataFrame, batch: int = 8192) -> dict[str, np.ndarray]:
    """Every output of a rank SavedModel's `serving_default` for each row: float64 `[rows]` by name.

    Raises:
        OSError: the model cannot be loaded.
        ValueError: the rows lack one of its inputs.
    """
    import tensorflow as tf

    loaded = tf.saved_model.load(str(saved_model))
    signature = loaded.signatures["serving_default"]
    inputs = signature.structured_input_signature[1]
    missing = sorted(set(inputs) - set(rows.columns))
    if missing:
        raise ValueError(f"{saved_model} reads {', '.join(missing)}, which the rows do not have")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in signature.structured_outputs}
    for start in range(0, rows.height, batch):
        part = rows.slice(start, batch)
        fed = {
            name: tf.constant(feed(part, name, spec.dtype.as_numpy_dtype, len(spec.shape)))
            for name, spec in inputs.items()
        }
        for name, value in signature(**fed).items():
            parts[name].append(value.numpy().astype(np.float64))
    return {name: np.concatenate(values) if values else np.empty(0) for name, values in parts.items()}
