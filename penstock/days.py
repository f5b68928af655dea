"""Each day of a log against the days before it: rows and label rates, with the bands in which they are expected.

The window of a day are the up to w days before it. With m the median of the window's rows, n all of them, p the share
of them with the label, n_d the day's own rows and o · p the share whose odds are o times those of p:

    rows of the day    in  [ min(low m, max(√m − z/2, 0)²),     max(high m, (√m + z/2)²)     ]
    share of the day   in  [ min(1/o · p, sin²(max(α − δ, 0))), max(o · p, sin²(min(α + δ, π/2))) ]

    α = asin √p,   δ = z/2 · √(1/n_d + 1/n)

The first part of each end says how far off a day may be, the second how far chance alone takes a small one (√ and
asin √ make the deviation of a count and of a share the same for all sizes: Anscombe, Biometrika 1948). A day is out
only if it is both.

The log may begin late on its first day, which is therefore in no window of rows, and end early on its last, which is
held against the same hours of the days before. Only rows that Penstock did not answer itself are counted: its own are
too few at first, come at any time of a replay, and are meant to differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from penstock.events import LABELS

_BAND = {name: pl.Float64() for name in ("rows.lowest", "rows.highest")}
SCHEMA: dict[str, pl.DataType] = {
    "day": pl.Date(),
    "rows": pl.Int64(),
    **_BAND,
    **{f"{label}{end}": pl.Float64() for label in LABELS for end in ("", ".lowest", ".highest")},
}


@dataclass(frozen=True)
class Config:
    """How far a day may be from those before it. The days of KuaiRand-Pure have .71 to 1.46 times the rows of their
    window, and .77 to 1.25 times its odds of a label.

    Raises:
        ValueError: a number out of range.

    Args:
        window_days: w.
        min_days: with fewer days before it a day is not held.
        low: of the window's median rows.
        high: of the window's median rows.
        odds: o.
        deviations: z, in standard deviations.
    """

    window_days: int = 7
    min_days: int = 3
    low: float = 0.1
    high: float = 3.0
    odds: float = 2.0
    deviations: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_days <= self.window_days:
            raise ValueError(f"min_days must be between 1 and window_days ({self.window_days}), not {self.min_days}")
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(f"low must be between 0 and 1 and high at least 1, not {self.low} and {self.high}")
        if not self.odds >= 1:
            raise ValueError(f"odds must be at least 1, not {self.odds}")
        if not self.deviations >= 0:
            raise ValueError(f"deviations must be at least 0, not {self.deviations}")


def by_day(events: pl.DataFrame, config: Config) -> pl.DataFrame:
    """One row a UTC day from the first to the last, in the columns of `SCHEMA`.

    A band is null where the day is not held: it has too few days before it, or they have no rows. The share of a day
    without rows is null.
    """
    own = events.filter(pl.col("release").is_null()).select("event_time", *LABELS)
    if own.is_empty():
        return pl.DataFrame(schema=SCHEMA)
    day, last = pl.col("event_time").dt.date(), own["event_time"].max()
    counts = own.group_by(day.alias("day")).agg(
        pl.len().cast(pl.Int64).alias("rows"),
        (pl.col("event_time").dt.time() <= pl.lit(last).dt.time()).sum().cast(pl.Int64).alias("until"),
        *(pl.col(label).cast(pl.Int64).sum() for label in LABELS),
    )
    calendar = counts.select(pl.date_range(pl.col("day").min(), pl.col("day").max()))
    counts = calendar.join(counts, on="day", how="left", maintain_order="left").fill_null(0)
    rows, until = counts["rows"].to_numpy(), counts["until"].to_numpy()
    found: dict[str, list[float | None]] = {name: [] for name in SCHEMA if name not in ("day", "rows")}
    for place in range(counts.height):
        window = slice(max(0, place - config.window_days), place)
        whole = slice(max(1, window.start), place)
        usual = (until if place == counts.height - 1 else rows)[whole]
        ends = _rows_band(usual, config) if usual.size >= config.min_days else (None, None)
        _add(found, "rows", *ends)
        held = place >= config.min_days and rows[place] > 0 and rows[window].sum() > 0
        for label in LABELS:
            labels = counts[label].to_numpy()
            found[label].append(float(labels[place] / rows[place]) if rows[place] else None)
            share = labels[window].sum() / max(rows[window].sum(), 1)
            ends = _share_band(share, rows[place], rows[window].sum(), config) if held else (None, None)
            _add(found, label, *ends)
    return counts.select("day", "rows").with_columns(
        pl.Series(name, values, pl.Float64) for name, values in found.items()
    )


def _add(found: dict[str, list[float | None]], name: str, lowest: float | None, highest: float | None) -> None:
    found[f"{name}.lowest"].append(lowest)
    found[f"{name}.highest"].append(highest)


def _rows_band(window: NDArray[np.int64], config: Config) -> tuple[float | None, float | None]:
    median = float(np.median(window))
    if median == 0:
        return None, None
    root, chance = np.sqrt(median), config.deviations / 2
    lowest, highest = max(root - chance, 0) ** 2, (root + chance) ** 2
    return float(min(config.low * median, lowest)), float(max(config.high * median, highest))


def _share_band(share: float, rows: int, window_rows: int, config: Config) -> tuple[float, float]:
    angle, chance = np.arcsin(np.sqrt(share)), config.deviations / 2 * np.sqrt(1 / rows + 1 / window_rows)
    lowest, highest = np.sin(max(angle - chance, 0)) ** 2, np.sin(min(angle + chance, np.pi / 2)) ** 2

    def times(odds: float) -> float:
        return odds * share / (1 - share + odds * share)

    return float(min(times(1 / config.odds), lowest)), float(max(times(config.odds), highest))
