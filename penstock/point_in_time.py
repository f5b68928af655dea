"""The point-in-time join: which row of a feature source was in force for an entity at a time, as known at that time.

A source row is visible from max(event time, created time) on: it has happened and it has arrived. In force for a key at
t is, of its rows visible at t, the one of the largest (event time, created time, place in the source). So a late row
enters when it arrives and not before, and a backfilled row older than the one in force replaces nothing.

Of a key's rows in the order of becoming visible, only those larger than all before them are ever in force. What is left
is one as-of join on integers, and its answer is row numbers: the features are gathered by whoever holds them, and
columns of lists are never joined.

Times are Datetime columns of any unit and are compared exactly; those without a time zone are UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import polars as pl

TICKS = {"ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Ticks a second of each unit of a Datetime."""

LARGEST = 2**63 - 1


class PointInTimeError(ValueError):
    """A join that is not defined on what it was given; the message names the column and says why."""


def rows_as_of(
    entities: pl.DataFrame,
    source: pl.DataFrame,
    *,
    keys: Mapping[str, str],
    time: str,
    event_time: str,
    created_time: str | None = None,
    ttl: timedelta | None = None,
) -> pl.Series:
    """The number of the source row in force for each entity row: UInt32 [entities.height], null where there is none.

    `keys` maps the key columns of `entities` to those of `source`; `time` is a column of `entities`, `event_time` and
    `created_time` are of `source`. Without a created time, rows are known when they happen. With a `ttl` above zero, a
    row in force whose event time lies before t - ttl has expired and gives null, as do a null key, a null time and a
    key that the source lacks. Every entity row has its answer in its own place, duplicates too.

    Raises:
        PointInTimeError: two keys are of different dtypes, a time is none, or a source row lacks one.
    """
    stamps = _stamps(source, event_time, created_time)
    asked = _datetimes(entities, time, "entity rows")
    unit = _finest([asked, *stamps])
    changes = _changes(source, list(keys.values()), stamps, unit)
    left = pl.DataFrame(
        [
            *(
                _matching(entities[name], changes[key].dtype).alias(key)
                for key, name in zip(_places(keys), keys, strict=True)
            ),
            _ticks(asked, unit).alias("time"),
        ]
    ).with_row_index("place")
    # sorted here by time over all keys, so that within a key it is too: Polars cannot see that and would warn
    found = (
        left.sort("time")
        .join_asof(changes, left_on="time", right_on="visible", by=_places(keys), check_sortedness=False)
        .sort("place")
    )
    if ttl:
        life = ttl // timedelta(microseconds=1) * TICKS[unit] // TICKS["us"]
        oldest = pl.col("time").cast(pl.Int128) - pl.lit(life, pl.Int128)  # in 64 bits a long life would wrap round
        found = found.with_columns(pl.when(pl.col("event") >= oldest).then("row").alias("row"))
    return found["row"]


def rows_since(
    source: pl.DataFrame,
    *,
    keys: Sequence[str],
    event_time: str,
    created_time: str | None = None,
    since: datetime,
    until: datetime,
) -> pl.Series:
    """The numbers of the source rows that are in force at `until` and came into force at `since` or later: UInt32.

    At most one a key, in the source's order: what a store that was filled until `since` lacks to be right at `until`.
    Each is the row that `rows_as_of` gives its key at `until`.

    Raises:
        PointInTimeError: a time is none, or a source row lacks one.
    """
    stamps = _stamps(source, event_time, created_time)
    bounds = pl.Series(
        [bound if bound.tzinfo else bound.replace(tzinfo=UTC) for bound in (since, until)],
        dtype=pl.Datetime("us", "UTC"),
    )
    unit = _finest([bounds, *stamps])
    first, last = _ticks(bounds, unit)
    changes = _changes(source, keys, stamps, unit).filter(pl.col("visible").is_between(first, last))
    return changes.unique(_places(keys), keep="last", maintain_order=True)["row"].sort()


def _changes(source: pl.DataFrame, keys: Sequence[str], stamps: Sequence[pl.Series], unit: str) -> pl.DataFrame:
    """The rows that are ever in force, in the order in which they come to be: keys, row, event and visible in ticks."""
    if not keys:
        raise PointInTimeError("a join needs a key")
    event, created = _ticks(stamps[0], unit), _ticks(stamps[-1], unit)
    rows = pl.DataFrame(
        [_plain(source[name]).alias(key) for key, name in zip(_places(keys), keys, strict=True)]
        + [event.alias("event"), created.alias("created")]
    )
    return (
        rows.with_row_index("row")
        .drop_nulls(_places(keys))
        .sort("event", "created", "row")
        .with_row_index("rank")
        .with_columns(visible=pl.max_horizontal("event", "created"))
        .sort("visible")
        .filter(pl.col("rank") == pl.col("rank").cum_max().over(_places(keys)))
        .select(*_places(keys), "row", "event", "visible")
    )


def _places(keys: Iterable[str]) -> list[str]:
    return [f"key_{place}" for place, _ in enumerate(keys)]


def _stamps(source: pl.DataFrame, *names: str | None) -> list[pl.Series]:
    """The stamps that a source has, each in every row."""
    stamps = [_datetimes(source, name, "source") for name in names if name is not None]
    for stamp in stamps:
        if missing := stamp.null_count():
            raise PointInTimeError(f"{missing} of the {len(stamp)} rows of the source have no {stamp.name}")
    return stamps


def _datetimes(table: pl.DataFrame, name: str, of: str) -> pl.Series:
    if not isinstance(table[name].dtype, pl.Datetime):
        raise PointInTimeError(f"{name} of the {of} is {table[name].dtype}: a Datetime is needed")
    return table[name]


def _finest(times: Iterable[pl.Series]) -> str:
    return max((column.dtype.time_unit for column in times), key=TICKS.__getitem__)  # type: ignore[attr-defined]


def _ticks(times: pl.Series, unit: str) -> pl.Series:
    """Int64 counts of `unit` since 1970 in UTC; what the unit cannot hold becomes the farthest that it can."""
    factor = TICKS[unit] // TICKS[times.dtype.time_unit]  # type: ignore[attr-defined]
    return times.to_physical().clip(-(LARGEST // factor), LARGEST // factor) * factor


def _plain(keys: pl.Series) -> pl.Series:
    return keys.cast(pl.String) if keys.dtype in (pl.Categorical, pl.Enum) else keys


def _matching(keys: pl.Series, dtype: pl.DataType) -> pl.Series:
    """Entity keys in the dtype of the source's; an integer that does not fit is a key that the source lacks."""
    plain = _plain(keys)
    if plain.dtype in (dtype, pl.Null) or (plain.dtype.is_integer() and dtype.is_integer()):
        return plain.cast(dtype, strict=False)
    raise PointInTimeError(f"{keys.name} of the entity rows is {keys.dtype}, of the source {dtype}: they must be alike")
