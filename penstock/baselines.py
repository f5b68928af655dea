"""What every recommender must beat: the most popular items, and the items liked by those who liked the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from scipy import sparse

from penstock.examples import pad, read_slice
from penstock.features import HISTORY_LENGTH
from penstock.training import RECALL_LABEL

NEIGHBOURS = 500
"""An item's nearest items that count; on KuaiRand-Pure more find no more than 1 % more."""

_CELLS = 2**24
"""So many similarities, or scores, are held at once."""


def popular(examples: Path, queries: pl.DataFrame, k: int) -> np.ndarray:
    """The `k` items with most long views in the training slice that are not in each query's history: `[queries, k]`.

    Args:
        queries: rows of examples, with `history_items`.

    Returns:
        Raw ids, best first; -1 where there are no more.
    """
    best = (
        read_slice(examples, "train")
        .filter(pl.col(RECALL_LABEL) == 1)["item_id"]
        .value_counts(sort=True)
        .sort(["count", "item_id"], descending=[True, False])["item_id"]
        .to_numpy()
    )
    wide = best[: k + HISTORY_LENGTH]
    ranked = np.full((queries.height, k), -1, np.int64)
    for start in range(0, len(ranked), 4096):
        histories = pad(queries["history_items"].slice(start, 4096), HISTORY_LENGTH)
        seen = (wide[None, :, None] == histories[:, None, :]).any(axis=2)
        order = np.argsort(seen, axis=1, kind="stable")[:, :k]
        left = np.where(np.take_along_axis(seen, order, axis=1), -1, wide[order])
        ranked[start : start + 4096, : left.shape[1]] = left
    return ranked


def long_views(examples: Path) -> pl.DataFrame:
    """All that a model may learn from: each user's items, long-viewed before or in the training slice, once each."""
    train = read_slice(examples, "train")
    first = train.unique("user_id", keep="first", maintain_order=True)
    before = first.select("user_id", item_id="history_items").explode("item_id", empty_as_null=False)
    during = train.filter(pl.col(RECALL_LABEL) == 1).select("user_id", "item_id")
    return pl.concat([before, during]).unique(maintain_order=True)


def item_item(examples: Path, queries: pl.DataFrame, k: int) -> np.ndarray:
    """The `k` items nearest to those of each query's history, these left out: `[queries, k]`; as `popular`.

    Score(u, i) = Σ_{j ∈ history(u)} cos(i, j), with the cosine of the items' columns of users, over the `NEIGHBOURS`
    nearest of each j (Sarwar et al., WWW 2001, sections 3.1.1 and 3.2.1, on views instead of ratings).
    """
    pairs = long_views(examples)
    users, items = (np.unique(pairs[name].to_numpy(), return_inverse=True) for name in ("user_id", "item_id"))
    ids = items[0]
    seen = sparse.csr_matrix((np.ones(pairs.height, np.float32), (users[1], items[1])))
    near = _nearest(seen)
    lists = queries["history_items"].to_list()
    flat = np.concatenate([np.empty(0, np.int64), *(np.asarray(row, np.int64) for row in lists)])
    place = np.minimum(np.searchsorted(ids, flat), len(ids) - 1)
    row = np.repeat(np.arange(len(lists)), [len(row) for row in lists])
    known = ids[place] == flat
    asked = sparse.csr_matrix(
        (np.ones(known.sum(), np.float32), (row[known], place[known])), shape=(len(lists), len(ids))
    )
    asked.data[:] = 1.0  # an item that was viewed twice is asked for once
    ranked = np.full((len(lists), k), -1, np.int64)
    step = max(1, _CELLS // len(ids))
    for start in range(0, len(lists), step):
        part = asked[start : start + step]
        scores = part @ near
        scores = scores - scores.multiply(part)  # not those that they are asked with
        scores.eliminate_zeros()
        for query, best in enumerate(_largest(scores, k), start):
            ranked[query, : len(best)] = ids[scores.indices[best]]
    return ranked


def _largest(values: sparse.csr_matrix, k: int) -> Iterator[np.ndarray]:
    """Where in `data` the `k` largest of each row stand, in their order and of equals the first column."""
    for start, end in itertools.pairwise(values.indptr):
        of_row, places = values.data[start:end], np.arange(start, end)
        if k < len(of_row):
            places = places[of_row >= np.partition(of_row, len(of_row) - k)[len(of_row) - k]]  # k or, of equals, more
        yield places[np.lexsort((values.indices[places], -values.data[places]))][:k]


def _nearest(seen: sparse.csr_matrix) -> sparse.csr_matrix:
    """Cosines of items by the users who saw them, `[items, items]`: of each row the nearest, none of an item itself."""
    columns = seen / np.sqrt(np.maximum(seen.sum(axis=0), 1.0))
    columns = sparse.csc_matrix(columns)
    count = columns.shape[1]
    blocks = []
    step = max(1, _CELLS // count)
    for start in range(0, count, step):
        cosines = sparse.csr_matrix(columns[:, start : start + step].T @ columns)
        cosines = cosines - sparse.diags([cosines.diagonal(start)], [start], cosines.shape)
        kept = np.zeros(cosines.nnz, bool)
        for nearest in _largest(cosines, NEIGHBOURS):
            kept[nearest] = True
        cosines.data[~kept] = 0.0
        cosines.eliminate_zeros()
        blocks.append(cosines)
    return sparse.vstack(blocks, format="csr")
