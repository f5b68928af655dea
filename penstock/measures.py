"""Exact AUC, GAUC and NDCG of weighted sums, for thousands of weights on the same rows.

Nothing is sorted. An evaluation forms the sums, puts the rows into buckets by a monotone map that is learnt from a
sample, a few rows a bucket, and compares the rows of a bucket (or a user, or a session) pair by pair, those with other
labels only. Places are counted in integers, so nothing is rounded before the last division; ties are ties of float64.

Memory: 8 bytes a row and head (4 if the values are those of float32, as a model's probabilities are) and 1 a row for
the labels, twice if AUC is measured beside the others, and 22 bytes a row for each thread that evaluates.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from penstock.metrics import Array, Integers, MetricError, checked

MOST_LABELS = 8  # a row's labels are the bits of one byte

_CELLS = 2048
_SAMPLED = 16  # one row in so many tells where the buckets lie
_ROWS_A_BUCKET = 8
_PAIRS = 256  # up to so many rows it is quicker to compare each with each than to sort


def _compiled(function: Callable[..., Any]) -> Any:
    """A function as machine code that does not hold the interpreter's lock, kept on disk where that can be."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the source tree nor the user's cache can be written: each process compiles
        return numba.njit(nogil=True)(function)


class _Workspace(NamedTuple):
    """What one evaluation writes to: of each row up to `ordered_codes`, then of each bucket."""

    scores: Array
    bucket: npt.NDArray[np.int32]
    ordered: Array
    ordered_codes: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int32]
    cursors: npt.NDArray[np.int32]
    asked: npt.NDArray[np.bool_]


class _Rows(NamedTuple):
    """The rows in an order in which those of one group stand together, and in a group those of equal labels.

    Attributes:
        codes: the labels of a row as bits [rows].
        columns: [heads, rows].
    """

    codes: npt.NDArray[np.uint8]
    columns: npt.NDArray[np.floating]


class _Groups(NamedTuple):
    """Runs of rows, and of which labels each can be measured.

    Attributes:
        starts: first row of each run, and the end of the last [groups + 1].
        positives: integers [groups, labels].
        counts: whether the group has what the measure of the label needs [groups, labels].
    """

    starts: Integers
    positives: Integers
    counts: npt.NDArray[np.bool_]


class Measures:
    """The measures of Σ_h w_h c_h for any weights w, several labels at once; safe for many threads.

    `auc_LABEL` is `metrics.auc`, `gauc_LABEL` is `metrics.gauc`, `ndcg@K_LABEL` is `metrics.session_ndcg`.

    Args:
        labels: name → 0 or 1 [rows].
        columns: the c_h by name [rows].
        kinds: of `auc`, `gauc` and `ndcg@K`: each is measured of every label.
        users: whose row it is [rows]; for `gauc`.
        sessions: the session of the row [rows]; of one user each. For `ndcg@K`.

    Attributes:
        names: what a call returns, in order: `KIND_LABEL`.

    Raises:
        MetricError: labels of one class, values that are not finite, or no user or session with both classes.
        ValueError: users or sessions that are asked for are not given.
    """

    def __init__(
        self,
        labels: Mapping[str, npt.ArrayLike],
        columns: Mapping[str, npt.ArrayLike],
        kinds: Sequence[str] = ("auc",),
        *,
        users: npt.ArrayLike | None = None,
        sessions: npt.ArrayLike | None = None,
    ) -> None:
        self.names = [f"{kind}_{label}" for kind in kinds for label in labels]
        self._kinds = tuple(kinds)
        codes = _codes(labels)
        self._size = rows = codes.size
        for head, values in columns.items():
            try:
                checked(codes & 1, values)
            except MetricError as error:
                raise MetricError(f"head {head}: {error}") from None
        bits = np.unpackbits(codes[:, None], axis=1, count=len(labels), bitorder="little")
        self._positives = bits.sum(axis=0, dtype=np.int64)
        self._discounts = {kind: _discounts(int(kind.partition("@")[2])) for kind in kinds if kind.startswith("ndcg@")}
        self._ungrouped = self._grouped = None
        if "auc" in kinds:
            self._ungrouped = _rows(np.argsort(codes, kind="stable"), codes, columns)
        keys: list[Integers] = []  # sessions stand within users
        for needed, given, what in (
            (bool(self._discounts), sessions, "sessions"),
            ("gauc" in kinds, users, "users"),
        ):
            if needed:
                if given is None:
                    raise ValueError(f"{', '.join(kinds)}: the {what} of the rows are needed")
                keys.append(np.unique(np.asarray(given), return_inverse=True)[1].reshape(-1))
                if keys[-1].size != rows:
                    raise MetricError(f"{keys[-1].size} {what} for {rows} labels")
        self._groups: dict[str, _Groups] = {}
        if keys:
            by: list[npt.NDArray[Any]] = [codes, *keys]
            order = np.lexsort(by)
            self._grouped = _rows(order, codes, columns)
            keys, bits = [key[order] for key in keys], bits[order]
            for kind in kinds:
                if kind == "gauc":
                    self._groups[kind] = _groups(keys[-1:], bits, list(labels), both=True)
                elif kind != "auc":
                    self._groups[kind] = _groups(keys, bits, list(labels), both=False)
        self._free: queue.SimpleQueue[_Workspace] = queue.SimpleQueue()

    def __call__(self, weights: npt.ArrayLike) -> Array:
        """The measures of one vector of weights [heads]. [names]"""
        try:
            space = self._free.get_nowait()
        except queue.Empty:
            space = _workspace(self._size)
        given = np.asarray(weights, dtype=np.float64)
        labels = self._positives.size
        found = np.empty((len(self._kinds), labels))
        if self._ungrouped:
            span = _fuse(self._ungrouped.columns, given, space.scores)
            sums = _rank_sums(space.scores, *span, self._ungrouped.codes, 1 << labels, *space[1:])
            found[self._kinds.index("auc")] = _auc(sums, self._positives, self._size)
        if self._grouped:
            _fuse(self._grouped.columns, given, space.scores)
            for kind, groups in self._groups.items():
                into = found[self._kinds.index(kind)]
                if kind == "gauc":
                    _gauc(space.scores, self._grouped.codes, *groups, into)
                else:
                    _ndcg(space.scores, self._grouped.codes, *groups, self._discounts[kind], into)
        self._free.put(space)
        return found.reshape(-1)


def _rows(order: Integers, codes: npt.NDArray[np.uint8], columns: Mapping[str, npt.ArrayLike]) -> _Rows:
    ordered = np.empty((len(columns), order.size))
    for place, values in enumerate(columns.values()):
        ordered[place] = np.asarray(values, dtype=np.float64)[order]
    if all((row.astype(np.float32) == row).all() for row in ordered):
        return _Rows(codes[order], ordered.astype(np.float32))  # half of what each evaluation reads
    return _Rows(codes[order], ordered)


def _codes(labels: Mapping[str, npt.ArrayLike]) -> npt.NDArray[np.uint8]:
    """The labels of each row as bits."""
    if not 1 <= len(labels) <= MOST_LABELS:
        raise MetricError(f"{len(labels)} labels: there must be 1 to {MOST_LABELS}")
    found = []
    for name, values in labels.items():
        try:
            found.append(checked(values, np.zeros(np.shape(values)))[0])
        except MetricError as error:
            raise MetricError(f"label {name}: {error}") from None
    sizes = {values.size for values in found}
    if len(sizes) > 1:
        raise MetricError(f"labels of {' and '.join(map(str, sorted(sizes)))} rows")
    codes = np.zeros(found[0].size, np.uint8)
    for bit, values in enumerate(found):
        codes |= values.astype(np.uint8) << np.uint8(bit)
    return codes


def _groups(keys: Sequence[Integers], bits: npt.NDArray[np.uint8], labels: Sequence[str], *, both: bool) -> _Groups:
    """The runs of rows whose keys are equal; `bits` [rows, labels]. Each counts that has a positive, and if `both` a
    negative too.
    """
    changed = np.zeros(bits.shape[0] - 1, bool)
    for key in keys:
        changed |= key[1:] != key[:-1]
    starts = np.concatenate(([0], np.flatnonzero(changed) + 1, [bits.shape[0]]))
    positives = np.add.reduceat(bits, starts[:-1], axis=0, dtype=np.int64)
    counts = positives > 0
    if both:
        counts &= positives < np.diff(starts)[:, None]
        for place, name in enumerate(labels):
            if not counts[:, place].any():
                raise MetricError(f"label {name}: no user has both a positive and a negative, so GAUC is not defined")
    return _Groups(starts, positives, counts)


def _discounts(k: int) -> Array:
    """Σ_{j = 1..i} 1 / log2(j + 1) for i = 0 … k."""
    return np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))))


def _workspace(rows: int) -> _Workspace:
    buckets = max(1, rows // _ROWS_A_BUCKET)
    return _Workspace(
        np.empty(rows),
        np.empty(rows, np.int32),
        np.empty(rows),
        np.empty(rows, np.uint8),
        np.empty(buckets + 1, np.int32),
        np.empty(buckets + 1, np.int32),
        np.empty(buckets, bool),
    )


def _auc(sums: Integers, positives: Integers, rows: int) -> Array:
    """AUC = (Σ midrank - m (m + 1) / 2) / (m (n - m)) of each label, from twice the midranks' sums by code."""
    codes = np.arange(sums.size)
    twice = np.array([int(sums[(codes >> bit) & 1 == 1].sum()) for bit in range(positives.size)], np.int64)
    wins: Array = (twice - positives * (positives + 1)) / (2 * positives * (rows - positives))
    return wins


@_compiled
def _fuse(columns, weights, scores):  # type: ignore[no-untyped-def]
    """scores_i = Σ_h w_h c_hi, added in the order of the heads, and the least and the greatest of them.

    Block by block, so that the sums stay in the cache.
    """
    low, high = np.inf, -np.inf
    for start in range(0, scores.size, 2048):
        block = scores[start : start + 2048]
        block[:] = 0.0
        for head in range(weights.size):
            weight = weights[head]
            column = columns[head, start : start + 2048]
            for i in range(block.size):
                block[i] += weight * column[i]
        for i in range(block.size):
            low = block[i] if block[i] < low else low  # min and max would ask for NaN, one by one
            high = block[i] if block[i] > high else high
    return low, high


@_compiled
def _add_ranks(scores, codes, start, stop, before, sums):  # type: ignore[no-untyped-def]
    """Adds twice the midrank of each row of start … stop to the sum of its code; `before` rows lie below them all.

    The rows stand in the order of their codes. Twice a midrank is rows + 1 + Σ_j sign(s_i - s_j), and in the sum over a
    code the signs among its own rows cancel.
    """
    rows = stop - start
    if rows == 1:
        sums[codes[start]] += 2 * before + 2
    elif rows <= _PAIRS:
        first = start
        while first < stop:
            code = codes[first]
            last = first + 1
            while last < stop and codes[last] == code:
                last += 1
            sums[code] += (last - first) * (2 * before + rows + 1)
            others = last
            while others < stop:
                other = codes[others]
                end = others + 1
                while end < stop and codes[end] == other:
                    end += 1
                signs = np.int64(0)
                for i in range(first, last):
                    own = scores[i]
                    for j in range(others, end):
                        signs += np.int64(own > scores[j]) - np.int64(own < scores[j])
                sums[code] += signs
                sums[other] -= signs
                others = end
            first = last
    else:
        order = np.argsort(scores[start:stop])
        first = 0
        while first < rows:
            last = first + 1
            while last < rows and scores[start + order[last]] == scores[start + order[first]]:
                last += 1
            for place in range(first, last):
                sums[codes[start + order[place]]] += 2 * before + first + last + 1
            first = last


@_compiled
def _rank_sums(scores, low, high, codes, kinds, bucket, ordered, ordered_codes, starts, cursors, asked):  # type: ignore[no-untyped-def]
    """Twice the sum of the midranks of the rows of each code but 0; scores lie from `low` to `high`. [kinds]

    Rows of code 0 have no label, and nobody asks for their ranks: buckets of these alone are counted and left.
    """
    rows = scores.size
    buckets = starts.size - 1
    scale = (_CELLS - 1) / (high - low) if high > low else 0.0
    if not np.isfinite(scale):
        scale = 0.0
    share = np.full(_CELLS, 0.25)
    for i in range(0, rows, _SAMPLED):
        share[int((scores[i] - low) * scale)] += 1.0
    # cell edges are whole buckets: within a cell and from cell to cell the map then is monotone in float64 too
    edges = np.empty(_CELLS + 1)
    edges[0] = 0.0
    total, under = share.sum(), 0.0
    for cell in range(_CELLS):
        under += share[cell]
        edges[cell + 1] = min(float(buckets - 1), np.floor(under / total * (buckets - 1)))
    starts[:] = 0
    asked[:] = False
    for i in range(rows):
        place = (scores[i] - low) * scale
        cell = int(place)
        mine = int(edges[cell] + (place - cell) * (edges[cell + 1] - edges[cell]))
        bucket[i] = mine
        starts[mine + 1] += 1
        if codes[i]:
            asked[mine] = True
    for at in range(1, starts.size):
        starts[at] += starts[at - 1]
    cursors[:] = starts
    for i in range(rows):
        mine = bucket[i]
        if asked[mine]:
            to = cursors[mine]
            cursors[mine] = to + 1
            ordered[to] = scores[i]
            ordered_codes[to] = codes[i]
    sums = np.zeros(kinds, np.int64)
    for at in range(buckets):
        if asked[at]:
            start = np.int64(starts[at])
            _add_ranks(ordered, ordered_codes, start, np.int64(starts[at + 1]), start, sums)
    return sums


@_compiled
def _gauc(scores, codes, starts, positives, counts, found):  # type: ignore[no-untyped-def]
    """Σ_u n_u AUC_u / Σ_u n_u over the users with both classes, of each label, into `found` [labels]."""
    labels = found.size
    sums = np.zeros(1 << labels, np.int64)
    weight = np.zeros(labels, np.int64)
    found[:] = 0.0
    for user in range(starts.size - 1):
        if not counts[user].any():
            continue
        sums[:] = 0
        _add_ranks(scores, codes, starts[user], starts[user + 1], 0, sums)
        rows = starts[user + 1] - starts[user]
        for label in range(labels):
            if counts[user, label]:
                twice = np.int64(0)
                for code in range(sums.size):
                    if code >> label & 1:
                        twice += sums[code]
                m = positives[user, label]
                found[label] += rows * ((twice - m * (m + 1)) / (2 * m * (rows - m)))
                weight[label] += rows
    for label in range(labels):
        found[label] /= weight[label]


@_compiled
def _add_gain(codes, row, above, tied, discounts, gains):  # type: ignore[no-untyped-def]
    """Adds the expected discount of a row with `above` rows over it, among `tied` that tie, to its labels' gains."""
    last = discounts.size - 1
    if above < last:
        gain = (discounts[min(above + tied, last)] - discounts[above]) / tied
        for label in range(gains.size):
            if codes[row] >> label & 1:
                gains[label] += gain


@_compiled
def _ndcg(scores, codes, starts, positives, counts, discounts, found):  # type: ignore[no-untyped-def]
    """The mean NDCG over the sessions with a positive, of each label, into `found` [labels]."""
    labels = found.size
    gains = np.zeros(labels)
    sessions = np.zeros(labels, np.int64)
    found[:] = 0.0
    for session in range(starts.size - 1):
        if not counts[session].any():
            continue
        start, stop = starts[session], starts[session + 1]
        rows = stop - start
        gains[:] = 0.0
        if rows <= _PAIRS:
            for i in range(start, stop):
                if codes[i]:
                    above = tied = 0
                    for j in range(start, stop):
                        above += scores[j] > scores[i]
                        tied += scores[j] == scores[i]
                    _add_gain(codes, i, above, tied, discounts, gains)
        else:
            order = np.argsort(scores[start:stop])
            first = 0
            while first < rows:
                last = first + 1
                while last < rows and scores[start + order[last]] == scores[start + order[first]]:
                    last += 1
                for place in range(first, last):
                    _add_gain(codes, start + order[place], rows - last, last - first, discounts, gains)
                first = last
        for label in range(labels):
            if counts[session, label]:
                found[label] += gains[label] / discounts[min(positives[session, label], discounts.size - 1)]
                sessions[label] += 1
    for label in range(labels):
        found[label] /= sessions[label]
