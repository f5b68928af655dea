"""Mended rows come back: each is held to the rules of its log, and the good ones wait for the next ingest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from components.expectations import Validator, read_log, split_log
from components.rules import held
from penstock import quarantine
from penstock.events import TABLES, LogError


@dataclass(frozen=True)
class Mended:
    """What became of the rows of a file.

    Args:
        taken: how many came back, by table.
        kept_in: the file they are in; None if there are none.
        refused: those that are still bad, in the columns of a quarantine.
        left_in: the file of the refused; None if there are none.
    """

    taken: dict[str, int]
    kept_in: Path | None
    refused: pl.DataFrame
    left_in: Path | None


def newest_log(home: Path) -> Path:
    """The log that was ingested last.

    Raises:
        LogError: there is none.
    """
    done = (home / "runs" / "prepare").glob("*/ingest/_SUCCESS.json")
    newest = max(done, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise LogError(f"{home}: no log has been ingested here that the rows could belong to; run prepare first")
    return newest.parent / "log"


def mend(file: Path, home: Path) -> Mended:
    """Takes the good rows of a corrected quarantine file into `home`/mended, and writes the others beside `file`.

    A row is good if it keeps every rule, whatever its severity, in the newest log with all mended rows in it. Done
    twice, it does nothing new.

    Raises:
        LogError: the file or the log cannot be read.
    """
    rows = quarantine.read(file)
    log = newest_log(home)
    print(f"{file}: {sum(frame.height for frame in rows.values()):,} rows, held to the rules in {log}", flush=True)
    _, bad = split_log(_with_mended(read_log(log), rows, quarantine.files(home / "mended")), Validator(held(1.0, {})))
    taken: dict[str, pl.DataFrame] = {}
    refused: dict[str, pl.DataFrame] = {}
    for name, frame in rows.items():
        # found among the bad ones by what they say now
        now = frame.with_columns(quarantine.text(frame.drop("original")).alias("now"))
        why = bad[name].select("reason", "rules", now="original").unique("now", keep="first")
        taken[name] = now.join(why, on="now", how="anti", maintain_order="left").drop("now")
        refused[name] = now.join(why, on="now", maintain_order="left").drop("now")
    left = quarantine.in_file(refused)
    left_in = None
    if left.height:
        left_in = file.with_name(f"{file.stem.removesuffix('-rest')}-rest.parquet")
        left.write_parquet(left_in)
    counts = {name: frame.height for name, frame in taken.items() if frame.height}
    return Mended(counts, quarantine.bring_back(taken, home / "mended") if counts else None, left, left_in)


def _with_mended(
    tables: dict[str, pl.DataFrame], rows: dict[str, pl.DataFrame], before: list[Path]
) -> dict[str, pl.DataFrame]:
    """The tables of a log with mended rows: those that came back before, and `rows`, which replace only themselves."""
    found = {}
    batches = [quarantine.read(path) for path in before]
    for table in TABLES:
        if not any(table.name in batch for batch in (tables, rows, *batches)):
            continue
        frame = quarantine.traced(tables.get(table.name, pl.DataFrame(schema=table.schema)))
        for batch in batches:
            if table.name in batch:
                frame = quarantine.replace(frame, batch[table.name], table.key)
        if table.name in rows:
            frame = pl.concat([quarantine.without(frame, rows[table.name]), rows[table.name]], how="diagonal")
        found[table.name] = frame.select(*table.schema)
    return found
