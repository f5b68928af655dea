"""Mended rows come back: each is held to the rules of its log, and the good ones wait for the next ingest."""

from __future__ import annotations

from collections.abc import Mapping
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

    A row is good if what it was is in the newest log, and it keeps every rule, whatever its severity, in that log with
    all mended rows in it. Done twice, it does nothing new.

    Raises:
        LogError: the file or the log cannot be read.
    """
    rows = quarantine.read(file)
    log = newest_log(home)
    print(f"{file}: {sum(frame.height for frame in rows.values()):,} rows, held to the rules in {log}", flush=True)
    tables = _log_with_mended(log, home / "mended")
    rows, strange = _of_this_log(rows, tables, log)
    taken, broken = _held_to_the_rules(rows, tables)
    refused = quarantine.in_file({name: pl.concat([strange[name], broken[name]], how="diagonal") for name in rows})
    left_in = None
    if refused.height:
        left_in = file.with_name(f"{file.stem.removesuffix('-rest')}-rest.parquet")
        refused.write_parquet(left_in)
    counts = {name: frame.height for name, frame in taken.items() if frame.height}
    return Mended(counts, quarantine.bring_back(taken, home / "mended") if counts else None, refused, left_in)


def _log_with_mended(log: Path, mended: Path) -> dict[str, pl.DataFrame]:
    """The traced tables of a log, with the rows that came back before in their places."""
    tables = read_log(log)
    batches = [quarantine.read(path) for path in quarantine.files(mended)]
    found = {}
    for table in TABLES:
        frame = quarantine.traced(tables.get(table.name, pl.DataFrame(schema=table.schema)))
        for batch in batches:
            if table.name in batch:
                frame = quarantine.replace(frame, batch[table.name], table.key)
        found[table.name] = frame
    return found


def _of_this_log(
    rows: Mapping[str, pl.DataFrame], tables: Mapping[str, pl.DataFrame], log: Path
) -> tuple[dict[str, pl.DataFrame], dict[str, pl.DataFrame]]:
    """The rows whose originals the log has or had, and the others with the reason."""
    known, strange = {}, {}
    for name, frame in rows.items():
        originals = pl.concat([tables[name]["original"], tables[name]["was"].drop_nulls()])
        here = pl.col("original").is_in(originals.implode())
        known[name] = frame.filter(here)
        strange[name] = frame.filter(~here).with_columns(
            reason=pl.lit(f"it is not as it was in {log}: correct it in the newest quarantine"),
            rules=pl.lit([], pl.List(pl.String)),
        )
    return known, strange


def _held_to_the_rules(
    rows: Mapping[str, pl.DataFrame], tables: Mapping[str, pl.DataFrame]
) -> tuple[dict[str, pl.DataFrame], dict[str, pl.DataFrame]]:
    """The rows that are good in the place of what they were, and the others with the reason."""
    whole = {}
    for name, frame in tables.items():
        if name in rows:
            frame = pl.concat([quarantine.without(frame, rows[name]), rows[name]], how="diagonal")
        whole[name] = frame.drop("original", "was")
    _, bad = split_log(whole, Validator(held(1.0, {})))
    good, broken = {}, {}
    for name, frame in rows.items():
        # found among the bad ones by what they say now
        now = frame.with_columns(quarantine.text(frame.drop("original")).alias("now"))
        why = bad[name].select("reason", "rules", now="original").unique("now", keep="first")
        good[name] = now.join(why, on="now", how="anti", maintain_order="left").drop("now")
        broken[name] = now.join(why, on="now", maintain_order="left").drop("now")
    return good, broken
