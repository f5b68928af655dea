"""A benchmark that compares stores says when their values differ, in a bit of a number as in an item of a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.online_features import OF_ITEMS, OF_USER, DifferentError, check_parts, check_whole
from penstock.features import ON_DEMAND, VIEWS, Column, Ragged, default

ITEMS = 3
RATE = np.float32(0.1)


def columns_of(features: list[Any], rows: int) -> dict[str, Column]:
    """Values that differ by feature and row."""
    found: dict[str, Column] = {}
    for number, feature in enumerate(features):
        if isinstance(default(feature.dtype), list):
            found[feature.name] = Ragged.of([[number, row] for row in range(rows)])
        elif isinstance(default(feature.dtype), str):
            found[feature.name] = np.array([f"{number} {row}" for row in range(rows)], object)
        else:
            dtype = np.float32 if feature.dtype.is_float() else np.int64
            found[feature.name] = (np.arange(rows) + number).astype(dtype) * dtype(RATE if dtype is np.float32 else 1)
    return found


def answer() -> tuple[dict[str, Column], dict[str, Column]]:
    """What our store gives: a row of the user, three of items."""
    of_items = {name for view in VIEWS if view.entity == "item" for name in (f.name for f in view.features)}
    features = [feature for view in VIEWS for feature in view.features]
    for on_demand in ON_DEMAND:
        if of_items & set(on_demand.inputs):
            of_items |= {feature.name for feature in on_demand.features}
        features += on_demand.features
    user = columns_of([feature for feature in features if feature.name not in of_items], 1)
    return user, columns_of([feature for feature in features if feature.name in of_items], ITEMS)


def as_feast(columns: dict[str, Column], rows: int) -> dict[str, list[Any]]:
    """The same as Feast's to_dict() gives it."""
    return {
        name: [value.tolist() for value in column.take(np.arange(rows) % len(column)).lists()]
        if isinstance(column, Ragged)
        else column.take(np.arange(rows) % len(column)).tolist()
        for name, column in columns.items()
    }


def test_equal_values_pass() -> None:
    user, items = answer()
    check_parts("a peer", (user, items), (as_feast(user, 1), as_feast(items, ITEMS)))
    check_whole("a peer", (user, items), as_feast(user, ITEMS) | as_feast(items, ITEMS))
    assert {name.partition(":")[2] for name in (*OF_USER, *OF_ITEMS)} <= user.keys() | items.keys()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("item_click_rate_7d", lambda value: float(np.nextafter(np.float32(value), np.float32(2)))),
        ("item_clicks_7d", lambda value: value + 1),
        ("tags", lambda value: [*value, 1]),
        ("title", lambda value: value + "."),
        ("title", lambda value: None),
    ],
)
def test_another_value_is_told(name: str, change: Callable[[Any], Any]) -> None:
    user, items = answer()
    theirs = as_feast(items, ITEMS)
    theirs[name][1] = change(theirs[name][1])
    with pytest.raises(DifferentError, match=f"a peer gives another {name}"):
        check_parts("a peer", (user, items), (as_feast(user, 1), theirs))
    with pytest.raises(DifferentError, match=f"a peer gives another {name}"):
        check_whole("a peer", (user, items), as_feast(user, ITEMS) | theirs)


def test_what_is_computed_on_demand_is_compared_too() -> None:
    user, items = answer()
    user["user_idle_hours"] = np.zeros(1, np.float32)
    theirs = as_feast(user, ITEMS) | as_feast(items, ITEMS)
    check_whole("a peer", (user, items), theirs)
    theirs["user_idle_hours"][2] = -0.0
    with pytest.raises(DifferentError, match="another user_idle_hours"):
        check_whole("a peer", (user, items), theirs)
