"""Small histories that the tests of sequence models share."""

from __future__ import annotations

import numpy as np

from penstock.catalogue import Catalogue
from penstock.examples import Feature, Schema

LENGTH, ITEMS, USERS = 6, 9, 4
HISTORY = Feature("history_items", "user", "ids", vocabulary="item_id", length=LENGTH)
USER = Feature("user_id", "user", "id", vocabulary="user_id")
TIMES = Feature("history_times", "sequence", "integers", length=LENGTH, beside="history_items")
SESSIONS = Feature("history_sessions", "sequence", "integers", length=LENGTH, beside="history_items")
NOW = Feature("time_ms", "sequence", "integer")
SCHEMA = Schema(
    (USER, HISTORY, TIMES, SESSIONS, NOW), {"item_id": np.arange(ITEMS - 2), "user_id": np.arange(USERS - 2)}, {}
)
CATALOGUE = Catalogue(np.arange(ITEMS - 2), ITEMS - 2, {}, ())


def history(*items: int) -> dict[str, np.ndarray]:
    """One row's history."""
    return {"history_items": np.array([[*items] + [0] * (LENGTH - len(items))], np.int32)}


def moments(*actions: tuple[int, float]) -> dict[str, np.ndarray]:
    """One row's history with its times: (item index, minutes before now)."""
    now = 1_714_600_000_000
    ends = np.full((1, LENGTH), -1)
    ends[0, : len(actions)] = [now - round(minutes * 60_000) for _, minutes in actions]
    items = history(*(item for item, _ in actions))
    return {**items, "history_times": ends, "history_sessions": np.full((1, LENGTH), -1), "time_ms": np.array([now])}
