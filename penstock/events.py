"""Every column of the log: dtype, range, role. The one description that reading, validating and serving obey.

A *log* is a directory in this layout; every source in `penstock.datasets` writes it and every stage reads it:

    LOG/events/dt=YYYY-MM-DD/*.parquet   impressions and what users did with them (EVENTS), by UTC day
    LOG/users.parquet                    one row a user (USERS)
    LOG/items.parquet                    one row an item (ITEMS)
    LOG/histories.parquet                optional: what users long-viewed before the log begins (HISTORIES)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import polars as pl

Role = Literal["key", "time", "label", "context", "attribute", "provenance"]

TIME = pl.Datetime("us", "UTC")
DAY_MS = 24 * 60 * 60 * 1000


@dataclass(frozen=True)
class Column:
    """One column, and what each of its values must be.

    Args:
        minimum, maximum: inclusive, in the column's unit; they hold for list elements too.
        references: the table that must have the value in its column of the same name.
        not_before, not_after: a time of the same row that this one may not precede, or not follow.
        constant_in: a column; rows that agree in it have the same value here.
        distinct_in: a column; rows that agree in it have different values here.
    """

    name: str
    dtype: pl.DataType
    role: Role
    description: str
    nullable: bool = False
    minimum: int | None = None
    maximum: int | None = None
    unique: bool = False
    references: str = ""
    not_before: str = ""
    not_after: str = ""
    constant_in: str = ""
    distinct_in: str = ""


@dataclass(frozen=True)
class Table:
    """A named set of columns."""

    name: str
    columns: tuple[Column, ...]

    @property
    def schema(self) -> dict[str, pl.DataType]:
        return {column.name: column.dtype for column in self.columns}

    @property
    def key(self) -> str:
        """The column that tells the rows apart."""
        return next(column.name for column in self.columns if column.unique)

    def names(self, *roles: Role) -> list[str]:
        """Names of the columns in any of `roles`, in table order."""
        return [column.name for column in self.columns if column.role in roles]


def _id(name: str, description: str, *, unique: bool = False) -> Column:
    return Column(name, pl.Int64(), "key", description, minimum=0, unique=unique)


def _label(name: str, description: str) -> Column:
    return Column(name, pl.Int8(), "label", description, minimum=0, maximum=1)


def _attribute(name: str, description: str, *, maximum: int | None = None) -> Column:
    return Column(name, pl.Int64(), "attribute", description, minimum=0, maximum=maximum)


_CREATED = Column(
    "created_time", TIME, "time", "when the row arrived: nothing may use it earlier", not_before="event_time"
)
_OUTCOME = Column(
    "outcome_time",
    TIME,
    "time",
    "when what the user did arrived; null = with the row itself",
    nullable=True,
    not_before="event_time",
)

EVENTS = Table(
    "events",
    (
        _id("event_id", "one impression of one item", unique=True),
        _id("request_id", "the request (slate) that showed it"),
        Column("user_id", pl.Int64(), "key", "who saw it", minimum=0, references="users", constant_in="request_id"),
        Column("item_id", pl.Int64(), "key", "what was shown", minimum=0, references="items"),
        Column("event_time", TIME, "time", "when it was shown", constant_in="request_id"),
        _CREATED,
        _OUTCOME,
        Column("session_id", pl.Int64(), "context", "the log's own session, if it has one", nullable=True, minimum=0),
        Column("scenario", pl.Int64(), "context", "surface of the product (tab, page)", minimum=0, maximum=1000),
        Column("device", pl.Int64(), "context", "device class; 0 = unknown", minimum=0, maximum=1000),
        Column(
            "position",
            pl.Int64(),
            "context",
            "place in the slate, from 0",
            nullable=True,
            minimum=0,
            maximum=1000,
            distinct_in="request_id",
        ),
        _label("click", "opened, or played by choice"),
        _label("long_view", "watched long for its duration"),
        _label("like", "liked"),
        _label("profile_enter", "went to the author's page"),
        Column("watch_time_ms", pl.Int64(), "label", "time watched, in ms", minimum=0, maximum=DAY_MS),
        Column(
            "release", pl.Int64(), "provenance", "release that answered; null = not Penstock", nullable=True, minimum=1
        ),
        Column("variant", pl.String(), "provenance", "champion or challenger; null = not Penstock", nullable=True),
        Column(
            "features_time",
            TIME,
            "provenance",
            "newest snapshot that the answer could use of features made by the hour; null = not Penstock",
            nullable=True,
            not_after="event_time",
        ),
    ),
)

USERS = Table(
    "users",
    (
        _id("user_id", "the user", unique=True),
        Column("event_time", TIME, "time", "since when these values hold"),
        _CREATED,
        _attribute("activity_level", "how active, as a class; 0 = unknown", maximum=1000),
        _attribute("register_days", "days since registration"),
        _attribute("follow_count", "accounts the user follows"),
        _attribute("fans_count", "accounts that follow the user"),
        _attribute("friend_count", "mutual follows"),
        _attribute("is_creator", "1 if the user publishes", maximum=1),
        Column("traits", pl.List(pl.Int64()), "attribute", "categorical traits, one token each", minimum=0),
    ),
)

ITEMS = Table(
    "items",
    (
        _id("item_id", "the item", unique=True),
        Column("event_time", TIME, "time", "when it was uploaded"),
        _CREATED,
        _attribute("author_id", "who made it"),
        _attribute("category", "main category; 0 = unknown"),
        Column("tags", pl.List(pl.Int64()), "attribute", "tags", minimum=0),
        _attribute("music_id", "its music; 0 = none"),
        _attribute("item_type", "class of item; 0 = unknown", maximum=1000),
        _attribute("duration_ms", "length in ms", maximum=DAY_MS),
        Column("title", pl.String(), "attribute", "title; may be empty"),
    ),
)

HISTORIES = Table(
    "histories",
    (
        _id("user_id", "the user", unique=True),
        Column("event_time", TIME, "time", "time of the last action in it"),
        _CREATED,
        Column("items", pl.List(pl.Int64()), "attribute", "items long-viewed, oldest first", minimum=0),
    ),
)

TABLES = (USERS, ITEMS, HISTORIES, EVENTS)
"""The tables of a log; a table comes after those it refers to."""

LABELS = ("click", "long_view", "like")
"""The labels that are ranked for, in the order of a rank model's heads."""

MAX_LOOPS = 100
"""An item is watched at most so many times over: of KuaiRand-Pure's 222,869 events the longest loop is 63 durations."""

UPLOAD_SLACK = timedelta(days=1)
"""An event may precede its item's upload by so much: logs know the day of an upload, in a time zone of their own."""


class LogError(ValueError):
    """A log that cannot be read as described here; the message says which file or column, and what to do."""


def conform(frame: pl.DataFrame, table: Table, source: str) -> pl.DataFrame:
    """`frame` with exactly the columns of `table`, in order and cast.

    Args:
        source: file or place the frame came from, for the message.

    Raises:
        LogError: a column is missing, unknown, or has values that do not fit its dtype.
    """
    missing = [name for name in table.schema if name not in frame.columns]
    if missing:
        raise LogError(
            f"{source}: column {', '.join(missing)} is missing from the {table.name} table; see penstock/events.py"
        )
    unknown = [name for name in frame.columns if name not in table.schema]
    if unknown:
        raise LogError(
            f"{source}: column {', '.join(unknown)} is not in the {table.name} table; see penstock/events.py"
        )
    columns = []
    for name, dtype in table.schema.items():
        try:
            columns.append(_cast(frame[name], dtype))
        except (pl.exceptions.PolarsError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise LogError(f"{source}: column {name} is {frame[name].dtype}, not {dtype}: {reason}") from error
    return pl.DataFrame(columns)


def _cast(values: pl.Series, dtype: pl.DataType) -> pl.Series:
    """`values` as `dtype`, where that keeps what they say: a number is no time, and half an id no id."""
    kinds = _kind(values.dtype), _kind(dtype)
    # digits in a text say which number they are
    if kinds[0] not in ("none", kinds[1]) and kinds != ("text", "number"):
        raise TypeError(f"a {kinds[0]} is no {kinds[1]}")
    inner = values.explode() if values.dtype == pl.List else values
    if inner.dtype.is_float() and not (inner == inner.round()).all():
        raise TypeError("it holds fractions")
    if isinstance(dtype, pl.List) and values.dtype == pl.List:
        assert isinstance(dtype.inner, pl.DataType)
        _cast(inner, dtype.inner)
    return values.cast(dtype)


def _kind(dtype: pl.DataType) -> str:
    if dtype == pl.Null:
        return "none"
    if dtype.is_temporal():
        return "time"
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return "text"
    return "list" if dtype == pl.List else "number" if dtype.is_numeric() or dtype == pl.Boolean else str(dtype)


def read_table(path: Path, table: Table) -> pl.DataFrame:
    """One Parquet file as `table`.

    Raises:
        LogError: the file is missing, truncated, or does not conform.
    """
    if not path.is_file():
        raise LogError(f"{path}: no such file; a log needs events/, users.parquet and items.parquet")
    try:
        frame = pl.read_parquet(path, hive_partitioning=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise LogError(f"{path}: not readable as Parquet (truncated?): {str(error).splitlines()[0]}") from error
    return conform(frame, table, str(path))


def event_files(log: Path) -> list[Path]:
    """The event files of a log in order of day.

    Raises:
        LogError: the log has none.
    """
    files = sorted((log / "events").glob("dt=*/*.parquet"))
    if not files:
        raise LogError(f"{log}: no events/dt=YYYY-MM-DD/*.parquet in it; is it a log directory?")
    return files


def read_events(log: Path) -> pl.DataFrame:
    """All events of a log, in order of time (ties by event id)."""
    frames: Iterable[pl.DataFrame] = (read_table(path, EVENTS) for path in event_files(log))
    return pl.concat(frames).sort("event_time", "event_id")


def write_events(events: pl.DataFrame, log: Path, part: str) -> None:
    """Adds events to a log, one file `part`.parquet a UTC day."""
    frame = conform(events, EVENTS, part)
    for (day,), rows in frame.group_by(pl.col("event_time").dt.date(), maintain_order=True):
        folder = log / "events" / f"dt={day}"
        folder.mkdir(parents=True, exist_ok=True)
        rows.write_parquet(folder / f"{part}.parquet")
