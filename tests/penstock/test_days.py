from __future__ import annotations

import math
import random
import statistics
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from penstock.days import SCHEMA, Config, by_day
from penstock.events import EVENTS, LABELS

START = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def events(days: list[list[tuple[float, int, int, int]]], release: int | None = None) -> pl.DataFrame:
    """Rows by day: (hour, click, long_view, like)."""
    rows = [
        {"event_time": START + place * DAY + timedelta(hours=hour), "release": release}
        | dict(zip(LABELS, labels, strict=True))
        for place, day in enumerate(days)
        for hour, *labels in day
    ]
    return pl.DataFrame(rows, schema={name: EVENTS.schema[name] for name in ("event_time", "release", *LABELS)})


def even(count: int, click: int = 0, hours: float = 24) -> list[tuple[float, int, int, int]]:
    """A day of rows evenly over its hours, the first `click` of every 100 clicked."""
    return [(hours * place / count, int(place % 100 < click), 0, 0) for place in range(count)]


def out(frame: pl.DataFrame, name: str) -> list[int]:
    """The days, from 0, that are outside of their band."""
    return [
        place
        for place, row in enumerate(frame.to_dicts())
        if row[name] is not None
        and row[f"{name}.lowest"] is not None
        and not row[f"{name}.lowest"] <= row[name] <= row[f"{name}.highest"]
    ]


def by_hand(days: list[list[tuple[float, int, int, int]]], config: Config) -> list[dict[str, Any]]:
    """`by_day` in plain loops."""
    found = []
    last = days[-1][-1][0]
    for place, day in enumerate(days):
        row: dict[str, Any] = {"day": date(2026, 3, 1) + place * DAY, "rows": len(day)}
        earlier = range(max(0, place - config.window_days), place)
        sizes = [
            sum(1 for event in days[other] if place < len(days) - 1 or event[0] <= last) for other in earlier if other
        ]
        row["rows.lowest"] = row["rows.highest"] = None
        if len(sizes) >= config.min_days and (median := statistics.median(sizes)):
            root, half = math.sqrt(median), config.deviations / 2
            row["rows.lowest"] = min(config.low * median, max(0.0, root - half) ** 2)
            row["rows.highest"] = max(config.high * median, (root + half) ** 2)
        total = sum(len(days[other]) for other in earlier)
        for label, name in enumerate(LABELS, 1):
            row[name] = sum(event[label] for event in day) / len(day) if day else None
            row[f"{name}.lowest"] = row[f"{name}.highest"] = None
            if place < config.min_days or not day or not total:
                continue
            share = sum(event[label] for other in earlier for event in days[other]) / total
            half = config.deviations / 2 * math.sqrt(1 / len(day) + 1 / total)
            ends = []
            for sign, odds in ((-1, 1 / config.odds), (1, config.odds)):
                by_odds = 1.0 if share == 1 else odds * share / (1 - share) / (1 + odds * share / (1 - share))
                angle = min(max(math.asin(math.sqrt(share)) + sign * half, 0), math.pi / 2)
                ends.append((by_odds, math.sin(angle) ** 2))
            row[f"{name}.lowest"], row[f"{name}.highest"] = min(ends[0]), max(ends[1])
        found.append(row)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_bands_are_those_of_plain_loops(seed: int) -> None:
    rng = random.Random(seed)
    rates = [rng.choice([0, 0.02, 0.5, 1]) for _ in LABELS]
    days = [
        sorted(
            (rng.uniform(0, 24), *(int(rng.random() < rate) for rate in rates))
            for _ in range(rng.choice([0, 0, 1, 7, 40, 90]))
        )
        for _ in range(rng.choice([1, 4, 5, 12]))
    ]
    days[0], days[-1] = even(5), days[-1] or even(3, hours=rng.choice([1, 20]))
    config = Config(window_days=rng.choice([3, 7]), min_days=rng.choice([1, 3]), deviations=rng.choice([0.0, 2.0, 5.0]))
    found = by_day(events(days), config).to_dicts()
    for row, expected in zip(found, by_hand(days, config), strict=True):
        assert row == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}


def test_the_limits_say_what_is_out() -> None:
    usual = [even(400, click=40) for _ in range(8)]
    assert not any(out(by_day(events(usual), Config()), name) for name in ("rows", *LABELS))
    gap = [*usual[:5], [], *usual[5:]]
    assert out(by_day(events(gap), Config()), "rows") == [5]
    assert out(by_day(events([*usual[:5], even(2000, click=40), *usual[5:]]), Config()), "rows") == [5]
    assert out(by_day(events([*usual[:5], even(2000, click=40), *usual[5:]]), Config(high=6)), "rows") == []
    assert out(by_day(events([*usual[:6], even(400), *usual[6:]]), Config()), "click") == [6]
    assert out(by_day(events([*usual[:6], even(400, click=65), *usual[6:]]), Config()), "click") == [6]
    assert out(by_day(events([*usual[:6], even(400, click=65), *usual[6:]]), Config(odds=3)), "click") == []


def test_chance_alone_fails_no_small_day() -> None:
    rng = random.Random(3)
    for _ in range(50):
        days = [even(rng.choice([1, 2, 3]), click=rng.choice([0, 100])) for _ in range(10)]
        frame = by_day(events(days), Config())
        assert out(frame, "rows") == []
        assert out(frame, "click") == []


def test_the_last_day_is_held_against_the_same_hours() -> None:
    morning = even(100, hours=6)
    usual = [morning + [(hour + 6, *labels) for hour, *labels in even(900, hours=18)] for _ in range(6)]
    assert out(by_day(events([*usual, morning]), Config(low=0.9, high=1.1)), "rows") == []
    # as a whole day, or with half its rows, the same is out
    assert out(by_day(events([*usual, morning, *usual]), Config(low=0.9, high=1.1)), "rows")[0] == 6
    assert out(by_day(events([*usual, morning[::2]]), Config(low=0.9, high=1.1)), "rows") == [6]


def test_the_first_day_may_begin_late_and_early_days_are_not_held() -> None:
    frame = by_day(events([even(3), even(400), even(1), even(400), even(400), even(400)]), Config())
    assert frame["rows.lowest"].null_count() == 4
    assert frame["click.lowest"].null_count() == 3


def test_only_rows_of_the_log_itself_count() -> None:
    own = events([even(100) for _ in range(5)])
    assert by_day(pl.concat([own, events([even(9000, click=100)] * 9, release=1)]), Config()).equals(
        by_day(own, Config())
    )
    nothing = by_day(events([even(5)], release=1), Config())
    assert nothing.is_empty()
    assert nothing.schema == SCHEMA


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_days": 0}, "min_days must be between 1 and window_days"),
        ({"min_days": 8}, r"min_days must be between 1 and window_days \(7\), not 8"),
        ({"low": 1.5}, "low must be between 0 and 1"),
        ({"high": 0.5}, "high at least 1"),
        ({"odds": 0.5}, "odds must be at least 1"),
        ({"deviations": -1.0}, "deviations must be at least 0"),
    ],
)
def test_limits_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)
