"""Sessions: which of a user's last actions are of the one that runs, and which are older interests.

One graph for training and for serving, of padded lists: `[batch, length]`, oldest first, padding behind. A session ends
where the next action is of another of the log's sessions; where the log does not know one of the two, where
`GAP_MS` or more lie between them. It has at most so many actions as `short`: what was before goes to the session before
it (Lv et al., CIKM 2019, arXiv 1909.00385, section 3.1, which also joins sessions of the log that lie less than the gap
apart; here the log's own are kept).
"""

from __future__ import annotations

from typing import Any

from keras import ops

from penstock.events import DAY_MS
from penstock.examples import PADDING

GAP_MS = 10 * 60 * 1000


def split(
    items: Any, times: Any, sessions: Any, now: Any, short: int = 50, long: int = 20, days: float = 7.0
) -> tuple[Any, Any]:
    """The items of the last session, and the last ones before it that are of the last so many days.

    The last session is that of the last action, however long ago that was. A clock that went back by the gap or more
    ends a session as one that went on.

    Args:
        items: item indices, 0 is padding.
        times: when each of them was, int64, ms since 1970.
        sessions: the log's session of each of them, int64, negative where it is not known.
        now: when the request is made, int64 `[batch]`, ms since 1970.

    Returns:
        Item indices `[batch, short]` and `[batch, long]`, oldest first; 0 where there is none.
    """
    present = ops.not_equal(items, PADDING)
    count = ops.sum(ops.cast(present, "int32"), axis=1, keepdims=True)
    known = ops.logical_and(sessions[:, 1:] >= 0, sessions[:, :-1] >= 0)
    apart = ops.where(
        known,
        ops.not_equal(sessions[:, 1:], sessions[:, :-1]),
        ops.absolute(times[:, 1:] - times[:, :-1]) >= GAP_MS,
    )
    places = ops.arange(1, items.shape[1], dtype="int32")
    begins = ops.where(ops.logical_and(apart, present[:, 1:]), places, 0)
    start = ops.maximum(ops.max(begins, axis=1, keepdims=True, initial=0), count - short)
    stale = ops.expand_dims(now, 1) - times > round(days * DAY_MS)
    before = ops.maximum(start - long, 0)
    return _taken(items, start, count, short), _taken(ops.where(stale, PADDING, items), before, start, long)


def _taken(items: Any, start: Any, end: Any, length: int) -> Any:
    """The items from place start to end, both `[batch, 1]`, as `[batch, length]`."""
    places = start + ops.arange(length, dtype="int32")
    inside = places < end
    return ops.where(inside, ops.take_along_axis(items, ops.where(inside, places, 0), axis=1), PADDING)
