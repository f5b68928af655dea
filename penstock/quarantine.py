"""Rows put aside because they break a rule, and how mended ones come back into the log.

A quarantine is one Parquet file. A person corrects a copy of it in place, and deletes what is past mending:

    table      which table of the log the row is of
    reason     all that is wrong with it, as a sentence
    rules      the names of the rules it breaks
    original   the row as the log has it, as JSON: by this it is found again, whatever is corrected
    …          the columns of all tables; null where they are of others

Files of mended rows have the same columns. They are never changed: a later file has the last word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from penstock import durable
from penstock.events import EVENTS, TABLES, LogError, conform, event_files, read_table, write_events

_COLUMNS: dict[str, pl.DataType] = {
    "table": pl.String(),
    "reason": pl.String(),
    "rules": pl.List(pl.String()),
    "original": pl.String(),
}
SCHEMA = _COLUMNS | {name: dtype for table in TABLES for name, dtype in table.schema.items()}


def text(frame: pl.DataFrame) -> pl.Series:
    """The rows of `frame` as JSON: the column `original`."""
    return frame.select(pl.struct(pl.all()).struct.json_encode().alias("original")).to_series()


def in_file(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Rows by table, in the columns of a quarantine file; a column that a table lacks is null."""
    frames = [frame.with_columns(pl.lit(name).alias("table")) for name, frame in tables.items()]
    return pl.concat([pl.DataFrame(schema=SCHEMA), *frames], how="diagonal")


def read(path: Path) -> dict[str, pl.DataFrame]:
    """The rows of a quarantine file, or of one that was corrected, by table: its columns and `original`.

    Raises:
        LogError: it is no such file, or a value does not fit its column; the message says which.
    """
    if not path.is_file():
        raise LogError(f"{path}: no such file; give a quarantine file of a prepare run, or a copy of it")
    try:
        frame = pl.read_parquet(path, hive_partitioning=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise LogError(f"{path}: not readable as Parquet (truncated?): {str(error).splitlines()[0]}") from error
    missing = [name for name in ("table", "original") if name not in frame.columns]
    if missing:
        raise LogError(f"{path}: column {', '.join(missing)} is missing; is it a quarantine file?")
    names = {table.name: table for table in TABLES}
    for name in frame["table"].unique():
        if name not in names:
            raise LogError(f"{path}: there is no table {name!r} in a log, only {', '.join(names)}")
    # where a number was missing, other tools have written NaN
    frame = frame.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
    found = {}
    for name, table in names.items():
        rows = frame.filter(pl.col("table") == name)
        if rows.is_empty():
            continue
        if rows["original"].null_count():
            raise LogError(f"{path}: a row of {name} has no original; leave that column as it was")
        known = [column for column in table.schema if column in rows.columns]
        found[name] = conform(rows.select(known), table, str(path)).with_columns(rows["original"].cast(pl.String))
    return found


def files(directory: Path) -> list[Path]:
    """The files of mended rows in a directory, the oldest first."""
    return sorted(directory.glob("*.parquet"))


def bring_back(tables: Mapping[str, pl.DataFrame], directory: Path) -> Path:
    """Keeps mended rows as one more file of `directory`, or finds the file that has just these; which it is."""
    rows = in_file(tables).select(name for name in SCHEMA if name not in ("reason", "rules"))
    digest = hashlib.sha256(rows.write_ndjson().encode()).hexdigest()[:12]
    found = [path for path in files(directory) if path.stem.endswith(digest)]
    if found:
        return found[0]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}-{digest}.parquet"
    temporary = directory / f".{path.stem}.part"
    rows.write_parquet(temporary)
    durable.sync_file(temporary)
    temporary.rename(path)
    durable.sync_directory(directory)
    return path


def traced(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of a log with `original`, and with `was`: the original in whose place a row is, which is null."""
    return frame.with_columns(text(frame), was=pl.lit(None, pl.String))


def without(frame: pl.DataFrame, mended: pl.DataFrame) -> pl.DataFrame:
    """The rows of `frame`, as `traced` makes it, that were not mended: of several equal ones go as many as were."""
    count = pl.int_range(pl.len()).over("original").alias("count")
    left = frame.with_columns(count).join(
        mended.select("original", count), on=["original", "count"], how="anti", maintain_order="left"
    )
    again = pl.col("was").is_in(mended["original"].implode())
    return left.filter(~again.fill_null(False)).drop("count")


def replace(frame: pl.DataFrame, mended: pl.DataFrame, key: str) -> pl.DataFrame:
    """`frame` with mended rows at its end, instead of what they were and of any other row with their `key`."""
    left = without(frame, mended)
    left = left.filter(~pl.col(key).is_in(mended[key].implode()).fill_null(False))
    values = mended.drop("original")
    return pl.concat([left, values.with_columns(text(values), was=mended["original"])], how="diagonal")


def add_mended(log: Path, paths: Iterable[Path]) -> int:
    """Puts the rows of files of mended rows into a log; how many of them are in it.

    Raises:
        LogError: a file cannot be read as mended rows.
    """
    batches = [read(path) for path in paths]
    added = 0
    for table in TABLES:
        mended = [rows[table.name] for rows in batches if table.name in rows]
        if not mended:
            continue
        parts = event_files(log) if table is EVENTS else [log / f"{table.name}.parquet"]
        # histories may be gone from the source, or new to it
        frames = [read_table(path, table) if path.exists() else pl.DataFrame(schema=table.schema) for path in parts]
        whole = pl.concat(traced(frame).with_columns(part=pl.lit(number)) for number, frame in enumerate(frames))
        for rows in mended:
            whole = replace(whole, rows, table.key)
        fresh = whole.filter(pl.col("part").is_null()).select(*table.schema)
        added += fresh.height
        for number, (path, frame) in enumerate(zip(parts, frames, strict=True)):
            left = whole.filter(pl.col("part") == number).select(*table.schema)
            if table is not EVENTS:
                pl.concat([left, fresh]).write_parquet(path)
            elif left.height < frame.height:
                left.write_parquet(path)
        if table is EVENTS:
            write_events(fresh, log, "mended")
    return added
