"""The items nearest to a query by inner product."""

from __future__ import annotations

import numpy as np
import tensorflow as tf


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k best vectors for each query, best first, ties by row: int64 `[queries, k]`."""
    scores = queries @ vectors.T
    k = min(k, vectors.shape[0])
    nearest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.lexsort((nearest, -np.take_along_axis(scores, nearest, axis=1)), axis=1)
    return np.take_along_axis(nearest, order, axis=1)


def top_k(
    queries: tf.Tensor, vectors: tf.Tensor, ids: tf.Tensor, k: tf.Tensor, exclude: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Exact search with ordinary ops: the k best items that are not excluded.

    Args:
        queries: `[batch, dim]`.
        vectors: `[items, dim]`.
        ids: raw ids `[items]`, int64.
        k: how many, int32 `[]`.
        exclude: raw ids to leave out `[batch, excluded]`, padded with -1.

    Returns:
        Ids `[batch, k]` (-1 where fewer than k are left) and scores `[batch, k]`.
    """
    k = tf.maximum(k, 0)
    wide = tf.minimum(k + tf.shape(exclude)[1], tf.shape(vectors)[0])
    scores, rows = tf.math.top_k(tf.matmul(queries, vectors, transpose_b=True), wide)
    found = tf.gather(ids, rows)
    barred = tf.reduce_any(tf.equal(found[:, :, None], exclude[:, None, :]), axis=2)
    scores = tf.where(barred, scores.dtype.min, scores)
    scores, order = tf.math.top_k(scores, tf.minimum(k, wide))
    found = tf.where(scores > scores.dtype.min, tf.gather(found, order, batch_dims=1), tf.constant(-1, tf.int64))
    lacking = [[0, 0], [0, k - tf.shape(found)[1]]]
    return tf.pad(found, lacking, constant_values=-1), tf.pad(scores, lacking, constant_values=scores.dtype.min)
