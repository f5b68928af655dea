"""The items nearest to a query by inner product: all compared, or those in the blocks that look best."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

EXACT_BELOW = 50_000
"""So many items or fewer are all compared: choosing would save less than half a millisecond."""
BLOCK = 64
"""Vectors that lie together and are read together."""
NEAREST = 200
"""For how many results the number of blocks that are read is chosen."""
SPREADS = (0.0, 2.0, 3.0, 4.0, 6.0)
"""What is tried for how many deviations above its mean a block is judged by."""
SAMPLE = 256
"""Queries that the number of blocks is chosen on."""
SCORES = 2**24
"""Scores that are held at once."""


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k best vectors for each query, best first, ties by row: int64 `[queries, k]`."""
    scores = queries @ vectors.T
    k = min(k, vectors.shape[0])
    nearest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.lexsort((nearest, -np.take_along_axis(scores, nearest, axis=1)), axis=1)
    return np.take_along_axis(nearest, order, axis=1)


class Exact(tf.Module):
    """All vectors, compared with each query: `scores = queries · vectorsᵀ`, then the best k."""

    def __init__(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        super().__init__()
        self._vectors = tf.Variable(vectors, trainable=False)
        self._ids = tf.Variable(ids, trainable=False)
        self.recall = 1.0

    def search(self, queries: tf.Tensor, k: tf.Tensor, exclude: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The k best items that are not excluded.

        Args:
            queries: `[batch, dim]`; one that is not finite finds nothing.
            k: how many, int32 `[]`.
            exclude: raw ids to leave out `[batch, excluded]`, padded with -1.

        Returns:
            Ids `[batch, k]` (-1 where fewer than k are left) and scores `[batch, k]`.
        """
        k = tf.maximum(k, 0)

        def best(queries: tf.Tensor, exclude: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            wide = tf.minimum(k + tf.shape(exclude)[1], tf.shape(self._ids)[0])
            scores, rows = tf.math.top_k(tf.matmul(queries, self._vectors, transpose_b=True), wide)
            return _without(tf.gather(self._ids, rows), scores, k, exclude)

        return _in_parts(best, max(SCORES // max(self._ids.shape[0], 1), 1), queries, exclude)


class Blocks(tf.Module):
    """Vectors in blocks of near ones, of which those are compared whose mean looks best.

    The items are parted by k-means (squared distance, so by norm as well as by direction), each cell is halved until
    its parts fit in a block, and a block of mean m and deviation σ (of a coordinate) is judged by

        q · m + β ‖q‖ σ,

    what its items score on average and, β deviations above that, what the best of them may score. The vectors of
    the best blocks are compared exactly: scores are those of `Exact`.

    A request for more results than the number of blocks was chosen for reads more blocks in proportion, always so many
    that they hold k items besides the excluded ones, and all of them if that would be a quarter or more.

    Attributes:
        blocks: how many there are.
        probes: blocks that are read for a request of up to `NEAREST` results.
        spread: β.
        recall: share of the `NEAREST` best that they held, on the queries they were chosen on.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        ids: np.ndarray,
        parts: list[np.ndarray],
        queries: np.ndarray,
        recall: float,
    ) -> None:
        """The index of some vectors.

        Args:
            vectors: float32 `[items, dim]`.
            ids: raw ids, int64 `[items]`.
            parts: the rows that lie together, for each block: at most `BLOCK`, at least one.
            queries: those that `probes` is chosen on `[queries, dim]`.
            recall: what `probes` must hold of the best.
        """
        super().__init__()
        self.blocks = len(parts)
        sizes = np.array([len(part) for part in parts])
        rows = np.concatenate(parts)
        block = np.repeat(np.arange(len(parts)), sizes)
        slot = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        shape = (len(parts), BLOCK)
        held = np.zeros((*shape, vectors.shape[1]), np.float32)
        held[block, slot] = vectors[rows]
        held_ids = np.full(shape, -1, np.int64)
        held_ids[block, slot] = ids[rows]
        means = held.sum(axis=1) / sizes[:, None]
        variances = np.maximum(np.square(held).sum(axis=1) / sizes[:, None] - np.square(means), 0.0)
        deviations = np.sqrt(variances.mean(axis=1))
        where = np.empty(len(rows), np.int64)
        where[rows] = block
        self.probes, self.spread, self.recall = _choose(queries, vectors, where, means, deviations, recall)
        self._vectors = tf.Variable(held, trainable=False)
        self._ids = tf.Variable(held_ids, trainable=False)
        self._padding = tf.Variable(np.where(held_ids < 0, -np.inf, 0.0).astype(np.float32), trainable=False)
        judged = np.concatenate([means, self.spread * deviations[:, None]], axis=1).astype(np.float32)
        self._means = tf.Variable(judged, trainable=False)
        # the fewest items that so many blocks can hold
        self._least = tf.Variable(np.cumsum(np.sort(sizes)).astype(np.int32), trainable=False)

    def search(self, queries: tf.Tensor, k: tf.Tensor, exclude: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """About the k best items that are not excluded, as `Exact.search`."""
        k = tf.maximum(k, 0)
        wide = k + tf.shape(exclude)[1]
        wanted = tf.cast(tf.math.ceil(tf.cast(wide, tf.float32) * (self.probes / NEAREST)), tf.int32)
        enough = tf.searchsorted(self._least, wide[None])[0] + 1
        probes = tf.reduce_max([self.probes, wanted, enough])

        # values, not variables: gathering from a variable makes TensorFlow copy all of it whenever it is read whole
        table = [held.value() for held in (self._vectors, self._padding, self._ids)]

        def some(queries: tf.Tensor, exclude: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            """One query `[1, dim]`."""
            judged = tf.concat([queries, tf.norm(queries, axis=1, keepdims=True)], axis=1)
            chosen = tf.math.top_k(tf.matmul(judged, self._means, transpose_b=True), probes, sorted=False)[1][0]
            return best(queries, exclude, *(tf.gather(held, chosen) for held in table))

        def best(
            queries: tf.Tensor, exclude: tf.Tensor, vectors: tf.Tensor, padding: tf.Tensor, ids: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor]:
            vectors = tf.reshape(vectors, [-1, self._vectors.shape[2]])
            scores = tf.matmul(queries, vectors, transpose_b=True) + tf.reshape(padding, [1, -1])
            scores, places = tf.math.top_k(scores, tf.minimum(wide, tf.shape(scores)[1]))
            return _without(tf.gather(tf.reshape(ids, [-1]), places), scores, k, exclude)

        def every(queries: tf.Tensor, exclude: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return best(queries, exclude, *table)

        return tf.cond(
            probes * 4 < self.blocks,
            lambda: _in_parts(some, 1, queries, exclude),
            lambda: _in_parts(every, max(SCORES // (self.blocks * BLOCK), 1), queries, exclude),
        )


def build(
    vectors: np.ndarray,
    ids: np.ndarray,
    kind: str = "auto",
    queries: np.ndarray | None = None,
    recall: float = 0.95,
    seed: int = 0,
) -> Exact | Blocks:
    """The index of some vectors.

    How many blocks are read is chosen so that, for queries, at least the share `recall` of the `NEAREST` best is in
    them, by the mean less twice its standard error. Users and items are distributed differently, so give vectors of
    users, of whom `SAMPLE` are taken; without them items stand in, whose neighbours are easier to find.

    Args:
        vectors: float32 `[items, dim]`; a last coordinate may be a bias, if queries end in 1.
        ids: raw ids, int64 `[items]`.
        kind: "exact", "blocks", or "auto": exact up to `EXACT_BELOW` items, and where a quarter of the blocks does not
            hold the share.
        queries: float32 `[queries, dim]`.
        recall: above 0, at most 1; 1 reads all that the sample needed.
        seed: of the samples and of k-means.

    Raises:
        ValueError: no such kind; vectors or queries that are not finite, or of another width.
    """
    if kind not in ("auto", "exact", "blocks"):
        raise ValueError(f"no index {kind!r}: auto, exact or blocks")
    if not 0 < recall <= 1:
        raise ValueError(f"recall is above 0 and at most 1, not {recall}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    ids = np.asarray(ids, np.int64)
    if not np.isfinite(vectors).all():
        raise ValueError("item vectors are not finite")
    if vectors.shape[:1] != ids.shape:
        raise ValueError(f"{vectors.shape[0]} vectors for {len(ids)} ids")
    if queries is not None and not (queries.shape[1] == vectors.shape[1] and np.isfinite(queries).all()):
        raise ValueError("queries are not finite, or not as wide as the items")
    if kind == "exact" or len(ids) == 0 or (kind == "auto" and len(ids) <= EXACT_BELOW):
        return Exact(vectors, ids)
    random = np.random.default_rng(seed)
    pool = vectors if queries is None or not len(queries) else np.asarray(queries, np.float32)
    sample = pool[random.permutation(len(pool))[:SAMPLE]]
    began = time.monotonic()
    blocks = Blocks(vectors, ids, _part(vectors, random), sample, recall)
    took = time.monotonic() - began
    if took > 2:
        print(
            f"index: {len(ids):,} items in {blocks.blocks:,} blocks, {blocks.probes:,} read for recall@{NEAREST}"
            f" {blocks.recall:.3f}, in {took:.1f} s",
            flush=True,
        )
    if kind == "auto" and blocks.probes * 4 >= blocks.blocks:
        return Exact(vectors, ids)
    return blocks


def _part(vectors: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Rows of near vectors, at most `BLOCK` together: cells of k-means, halved."""
    means = _means(vectors, max(round(len(vectors) ** 0.5 / 2), 1), random)
    cell = _nearest(vectors, means)
    counts = np.bincount(cell, minlength=len(means))
    cells = np.split(np.argsort(cell, kind="stable"), np.cumsum(counts)[:-1])
    return [part for rows in cells if len(rows) for part in _halved(vectors, rows)]


def _means(vectors: np.ndarray, cells: int, random: np.random.Generator) -> np.ndarray:
    """The means `[cells, dim]` that ten rounds of k-means on a sample end with; one that nothing is near to stays."""
    sample = vectors[random.permutation(len(vectors))[: cells * 128]]
    means = sample[:cells].copy()
    for _ in range(10):
        cell = _nearest(sample, means)
        counts = np.bincount(cell, minlength=cells)
        filled = np.flatnonzero(counts)
        sums = np.add.reduceat(sample[np.argsort(cell, kind="stable")], (np.cumsum(counts) - counts)[filled], axis=0)
        means[filled] = sums / counts[filled, None]
    return means


def _nearest(vectors: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The place of the nearest mean: argmin ‖x − m‖² = argmax x · m − ‖m‖² / 2, int64 `[items]`."""
    half = np.square(means).sum(axis=1) / 2
    rows = max(SCORES // 4 // len(means), 1)
    found = [np.argmax(vectors[at : at + rows] @ means.T - half, axis=1) for at in range(0, len(vectors), rows)]
    return np.concatenate(found)


def _halved(vectors: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Rows in parts of at most `BLOCK`, as few as can be, by 2-means whose parts have a given size.

    With the sizes given, the nearest of two means is told by the place along the line between them.
    """
    parts, left = [], [rows]
    while left:
        rows = left.pop()
        needed = -(-len(rows) // BLOCK)
        if needed == 1:
            parts.append(rows)
            continue
        cut = len(rows) * (needed // 2) // needed
        points = vectors[rows]
        points = points - points.mean(axis=0)
        line = points[np.argmax(np.square(points).sum(axis=1))]
        for _ in range(5):
            order = np.argpartition(points @ line, cut)
            line = points[order[cut:]].sum(axis=0)
        left += [rows[order[:cut]], rows[order[cut:]]]
    return parts


def _choose(
    queries: np.ndarray,
    vectors: np.ndarray,
    block: np.ndarray,
    means: np.ndarray,
    deviations: np.ndarray,
    recall: float,
) -> tuple[int, float, float]:
    """The fewest blocks that hold a share of the best, with β, and the share they hold.

    Args:
        queries: `[queries, dim]`.
        vectors: `[items, dim]`.
        block: of each item, int64 `[items]`.
        means: of each block `[blocks, dim]`.
        deviations: of each block `[blocks]`.
        recall: the share.
    """
    k = min(NEAREST, len(vectors))
    rows = max(SCORES // len(vectors), 1)
    items = tf.constant(vectors)
    best = [
        tf.math.top_k(tf.matmul(queries[at : at + rows], items, transpose_b=True), k, sorted=False)[1].numpy()
        for at in range(0, len(queries), rows)
    ]
    holding = block[np.concatenate(best)]
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    chosen: list[tuple[int, float, float]] = []
    for spread in SPREADS:
        order = np.argsort(-(queries @ means.T + spread * norms * deviations), axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(len(means))[None], axis=1)
        held = np.zeros((len(queries), len(means)))
        np.add.at(held, (np.arange(len(queries))[:, None], np.take_along_axis(rank, holding, axis=1)), 1)
        shares = held.cumsum(axis=1) / k
        mean = shares.mean(axis=0)
        fewest = np.flatnonzero(mean - 2 * shares.std(axis=0) / len(queries) ** 0.5 >= recall)[0]
        chosen.append((int(fewest) + 1, spread, float(mean[fewest])))
    return min(chosen)


def _in_parts(
    search: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
    rows: int,
    queries: tf.Tensor,
    exclude: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """`search` of so many queries after the other, which bounds the memory that a batch takes."""
    batch = tf.shape(queries)[0]
    rows = tf.clip_by_value(batch, 1, rows)

    def in_turn() -> tuple[tf.Tensor, tf.Tensor]:
        parts = tf.maximum((batch + rows - 1) // rows, 1)
        lacking = [[0, parts * rows - batch], [0, 0]]
        held = (
            tf.reshape(tf.pad(queries, lacking), [parts, rows, queries.shape[1]]),
            tf.reshape(tf.pad(exclude, lacking), [parts, rows, tf.shape(exclude)[1]]),
        )
        found = tf.map_fn(
            lambda part: search(*part), held, parallel_iterations=1, fn_output_signature=(tf.int64, tf.float32)
        )
        ids, scores = (tf.reshape(tensor, [parts * rows, tf.shape(tensor)[2]])[:batch] for tensor in found)
        return ids, scores

    return tf.cond(tf.equal(rows, batch), lambda: search(queries, exclude), in_turn)


def _without(found: tf.Tensor, scores: tf.Tensor, k: tf.Tensor, exclude: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The k best of `[batch, wide]` that are neither in `exclude` nor padding, filled up with -1."""
    barred = tf.reduce_any(tf.equal(found[:, :, None], exclude[:, None, :]), axis=2)
    scores = tf.where(barred | (found < 0) | tf.math.is_nan(scores), scores.dtype.min, scores)
    scores, order = tf.math.top_k(scores, tf.minimum(k, tf.shape(found)[1]))
    found = tf.where(scores > scores.dtype.min, tf.gather(found, order, batch_dims=1), tf.constant(-1, tf.int64))
    lacking = [[0, 0], [0, k - tf.shape(found)[1]]]
    return tf.pad(found, lacking, constant_values=-1), tf.pad(scores, lacking, constant_values=scores.dtype.min)
