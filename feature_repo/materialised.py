"""What a materialisation leaves for serving beside the online store, under HOME/features.

    materialised.json             version, cutoff, sequence: written last, so what it names is there
    serving-<version>/<view>.arrow  the rows of each materialised view, by key

The tables are the very rows that were written online. They are mapped into memory, so that all processes share one
copy and opening one costs nothing; a reader takes up the next ones, all together, when materialised.json is replaced.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from penstock.durable import replace_file, sync_directory, sync_file
from penstock.features import VIEWS

IN_MEMORY = tuple(view for view in VIEWS if view.freshness == "materialised")
"""The views that change with a materialisation only."""


@dataclass(frozen=True)
class Materialised:
    """One materialisation.

    Attributes:
        version: one more each time, from 1.
        cutoff_us: the online store holds the newest rows at or before it; µs since 1970.
        sequence: the number of the last feedback record that the log held.
    """

    version: int
    cutoff_us: int
    sequence: int


def path_of(home: Path) -> Path:
    """The file that names the newest materialisation."""
    return home / "features" / "materialised.json"


def read_materialised(home: Path) -> Materialised:
    """The newest materialisation; version 0 when there was none."""
    try:
        return Materialised(**json.loads(path_of(home).read_text()))
    except FileNotFoundError:
        return Materialised(0, 0, 0)


def table_path(home: Path, version: int, view: str) -> Path:
    """The table of a view as it is kept in memory."""
    return home / "features" / f"serving-{version}" / f"{view}.arrow"


def write_materialised(home: Path, materialised: Materialised, newest: Mapping[str, pl.DataFrame]) -> None:
    """Makes a materialisation the newest one: its tables, then the file that names it.

    The tables before the last ones are removed; a process that still reads them keeps them.
    """
    folder = table_path(home, materialised.version, "").parent
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    for view in IN_MEMORY:
        table = newest[view.name].sort(view.key).to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        path = table_path(home, materialised.version, view.name)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        sync_file(path)
    sync_directory(folder)
    sync_directory(folder.parent)
    replace_file(path_of(home), json.dumps(asdict(materialised)).encode())
    for old in folder.parent.glob("serving-*"):
        if int(old.name.removeprefix("serving-")) < materialised.version - 1:
            shutil.rmtree(old, ignore_errors=True)
