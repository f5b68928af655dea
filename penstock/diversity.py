"""Re-ranking of a slate, so that it is not all of one kind: maximal marginal relevance, and a cap by author."""

from __future__ import annotations

import numpy as np

NOBODY = 0
"""An author id at or below this says that the author is not known: such items are not capped."""


def rerank(
    scores: np.ndarray,
    k: int,
    *,
    trade_off: float = 1.0,
    vectors: np.ndarray | None = None,
    cap: int = 0,
    authors: np.ndarray | None = None,
) -> np.ndarray:
    """The places of the `k` items of a slate, best first.

    Greedily, with S what is chosen so far (Carbonell & Goldstein, SIGIR 1998, section 2):

        argmax_{i ∉ S} λ s̃(i) − (1 − λ) max_{j ∈ S} cos(vᵢ, vⱼ),

    where s̃ are the scores from 0 (the least) to 1 (the best), so that they and the cosine are of one size. Ties go to
    the item that stands first. Of an author at most `cap` items are chosen while there are others left; the slate is
    never shorter for it.

    Args:
        scores: `[items]`, finite.
        trade_off: λ in [0, 1]; 1 is the order of the scores.
        vectors: `[items, dim]`, read if λ < 1; an item whose vector is zero is like no other.
        cap: 0 for none.
        authors: ids `[items]`, read if there is a cap.

    Raises:
        ValueError: λ is not in [0, 1], or the cap is below 0.
    """
    if not 0.0 <= trade_off <= 1.0:
        raise ValueError(f"λ of maximal marginal relevance is 0 to 1, not {trade_off}")
    if cap < 0:
        raise ValueError(f"a cap of items by author is 0 (none) or more, not {cap}")
    k = min(k, len(scores))
    if trade_off < 1.0 and k:
        assert vectors is not None, "maximal marginal relevance is of item vectors"
        return _marginal(scores, k, trade_off, vectors, cap, authors)
    order = np.argsort(-scores, kind="stable")
    if not cap:
        return order[:k]
    assert authors is not None, "a cap is by author"
    over = _place_among_equals(authors[order]) >= cap
    over &= authors[order] > NOBODY
    return np.concatenate([order[~over], order[over]])[:k]


def _marginal(
    scores: np.ndarray, k: int, trade_off: float, vectors: np.ndarray, cap: int, authors: np.ndarray | None
) -> np.ndarray:
    least = scores.min()
    relevance = trade_off * (scores - least) / (np.ptp(scores) or 1.0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.where(norms > 0, norms, 1.0)
    chosen = np.empty(k, np.int64)
    nearest = np.full(len(scores), -np.inf)
    taken = np.zeros(len(scores), bool)
    capped = np.zeros(len(scores), bool)
    value = relevance.copy()
    for place in range(k):
        value[taken | capped] = -np.inf
        best = int(np.argmax(value))
        if value[best] == -np.inf:  # all that is left is of authors that have had their share
            capped[:] = False
            authors = None
            value = relevance - nearest if place else relevance.copy()
            value[taken] = -np.inf
            best = int(np.argmax(value))
        chosen[place] = best
        taken[best] = True
        # a product with one vector at a time: all at once, BLAS would wake its threads for it
        np.maximum(nearest, (1.0 - trade_off) * (directions @ directions[best]), out=nearest)
        value = relevance - nearest
        if cap and authors is not None and authors[best] > NOBODY:
            own = authors == authors[best]
            if np.count_nonzero(own & taken) >= cap:
                capped |= own
    return chosen


def _place_among_equals(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each, `[values]`."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(values) else np.empty(0, bool)
    places = np.arange(len(values))
    found = np.empty(len(values), np.int64)
    found[order] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return found
