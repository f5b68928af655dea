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

import numpy as np
import polars as pl
import pyarrow as pa

from feature_repo.configuration import StoreError
from penstock.durable import replace_file, sync_directory, sync_file
from penstock.features import VIEWS, Column, Ragged, View, default

IN_MEMORY = tuple(view for view in VIEWS if view.freshness == "materialised")
"""The views that change with a materialisation only."""

NOBODY = np.iinfo(np.int64).max
"""The key of a table's last row, which holds the defaults."""


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


class ServingTable:
    """The rows of a view in memory, with the defaults for whom it does not hold.

    Of a row, whole numbers lie together, and so do fractions: reading it touches few pages.

    Raises:
        StoreError: the file is missing, or holds other features.
    """

    def __init__(self, path: Path, view: View) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(f"{path} cannot be read: run the prepare DAG") from error
        if table.schema.metadata != _described(view):
            raise StoreError(f"{path} holds other features than are defined now: run the prepare DAG")
        columns = {name: table[name].chunk(0) for name in table.column_names}
        self._keys = columns["key"].to_numpy()[:-1]
        self._blocks = {
            kind: columns[kind].values.to_numpy().reshape(table.num_rows, -1) for kind in BLOCKS if kind in columns
        }
        self._names = {kind: _names(view, kind) for kind in self._blocks}
        self._lists = {
            name: Ragged(columns[name].values.to_numpy(), columns[name].offsets.to_numpy())
            for name in _names(view, "lists")
        }
        self._texts = {name: columns[name] for name in _names(view, "texts")}

    def take(self, keys: np.ndarray) -> dict[str, Column]:
        """The columns of some entities, in their order."""
        places, found = self._find(keys)
        rows = np.where(found, places, len(self._keys))
        taken: dict[str, Column] = {}
        for kind, block in self._blocks.items():
            taken.update(zip(self._names[kind], np.ascontiguousarray(block[rows].T), strict=True))
        for name, lists in self._lists.items():
            taken[name] = lists.take(rows)
        for name, texts in self._texts.items():
            taken[name] = texts.take(pa.array(rows)).to_numpy(zero_copy_only=False)
        return taken

    @property
    def keys(self) -> np.ndarray:
        """The entities that it holds, in order."""
        return self._keys

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Which of some entities it holds."""
        return self._find(keys)[1]

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.searchsorted(self._keys, keys)
        found = places < len(self._keys)
        found[found] = self._keys[places[found]] == keys[found]
        return places, found


BLOCKS = {"integers": np.int64, "floats": np.float32}


def _names(view: View, kind: str) -> list[str]:
    """The features of a view that are integers, floats, lists or texts."""

    def kind_of(dtype: pl.DataType) -> str:
        if isinstance(dtype, pl.List):
            return "lists"
        return "texts" if isinstance(dtype, pl.String) else "floats" if dtype.is_float() else "integers"

    return [feature.name for feature in view.features if kind_of(feature.dtype) == kind]


def _described(view: View) -> dict[bytes, bytes]:
    return {b"features": json.dumps([[feature.name, str(feature.dtype)] for feature in view.features]).encode()}


def _serving_table(view: View, rows: pl.DataFrame) -> pa.Table:
    """Rows by key, and one of defaults, as `ServingTable` reads them."""
    missing = pl.DataFrame(
        {view.key: [NOBODY], **{feature.name: [default(feature.dtype)] for feature in view.features}},
        schema_overrides={feature.name: feature.dtype for feature in view.features},
    )
    table = pl.concat([rows.select(missing.columns).sort(view.key), missing])
    columns = {"key": pa.array(table[view.key].to_numpy())}
    for kind, dtype in BLOCKS.items():
        if names := _names(view, kind):
            block = np.column_stack([table[name].to_numpy() for name in names]).astype(dtype)
            columns[kind] = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), len(names))
    for name in (*_names(view, "lists"), *_names(view, "texts")):
        columns[name] = table[name].rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    return pa.table(columns, metadata=_described(view))


def write_materialised(home: Path, materialised: Materialised, newest: Mapping[str, pl.DataFrame]) -> None:
    """Makes a materialisation the newest one: its tables, then the file that names it.

    The tables before the last ones are removed; a process that still reads them keeps them.
    """
    folder = table_path(home, materialised.version, "").parent
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    for view in IN_MEMORY:
        table = _serving_table(view, newest[view.name])
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
