"""A log that is already laid out as `penstock.events` describes: one's own data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.events import EVENTS, HISTORIES, ITEMS, USERS, LogError, event_files, read_table, write_events


@dataclass(frozen=True)
class Config:
    """`path`: a directory with events/dt=YYYY-MM-DD/, users.parquet, items.parquet and maybe histories.parquet."""

    path: str


def write_log(config: Config, log: Path) -> None:
    """Copies the log at `config.path` to the directory `log`, one file at a time, each checked and cast to its table.

    Copied, not linked: what is later written to `log` must not reach the files of the user. Events are put under the
    day of their `event_time`, whatever folder they were found in.

    Raises:
        LogError: a file is missing, truncated or does not conform, or `path` is `log` itself.
    """
    source = Path(config.path)
    if not source.is_dir():
        raise LogError(f"{source}: no such directory; give a log in the layout of penstock/events.py")
    if source.resolve() == log.resolve():
        raise LogError(f"{source}: is the log to be written; give another directory")
    files = event_files(source)
    # the small tables first: what is wrong with them is told before the long work
    for name, table in (("users", USERS), ("items", ITEMS), ("histories", HISTORIES)):
        path = source / f"{name}.parquet"
        if table is HISTORIES and not path.exists():
            continue
        frame = read_table(path, table)
        log.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(log / path.name)
    rows = 0
    for path in files:
        events = read_table(path, EVENTS)
        write_events(events, log, f"{path.parent.name.removeprefix('dt=')}-{path.stem}")
        rows += events.height
    print(f"{source}: {rows:,} impressions in {len(files):,} files", flush=True)
