"""Feast's online store as one packed row an entity and view, on SQLite: `PackedOnlineStore`.

feature_store.yaml names it by its full path, `type: feature_repo.online_store.PackedOnlineStore`, and the repository
root must be importable. Feast's own SQLite store keeps a row for each feature of each entity; here all features of an
entity are one BLOB, which is read in one step and unpacked without protobufs.

A database of format 1 has, beside a table a view,

    layouts(number, features)   what the rows of a layout hold: [[name, kind], …], written once

and a row is, little-endian, each part from a multiple of 8 bytes on:

    layout number and, for each list, text or message, its length: uint32 each. Float32 values. Int64 values.
    One bit a feature that is null. Then lists, texts and messages. The two high bits of a list's length say how many
    bytes each of its integers has: 1, 2, 4 or 8, the least that hold all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import polars as pl
from feast import Entity, FeatureView, RepoConfig, ValueType
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.online_store import OnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Int64List, Value
from feast.repo_config import FeastConfigBaseModel
from feast.type_map import python_values_to_proto_values
from feast.types import Int64

from feature_repo.configuration import StoreError
from penstock.features import Column, Ragged

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FORMAT = 1
APPLICATION = 0x50454E53
"""What marks a file as one of these databases: "PENS"."""

PATIENCE_SECONDS = 60.0
"""How long one process waits for another that writes."""

JOURNAL_BYTES = 1 << 24
"""What is left of the log of writes when all of it is in the database; else it stays as large as a materialisation."""

PACKED_AT_ONCE = 20_000
"""Rows whose bytes are in memory at once."""

KEYS_AT_ONCE = 10_000
"""Keys of one SQL statement; SQLite takes 32,766."""

WIDTHS = (1, 2, 4, 8)
INTEGERS = {width: np.dtype(f"<i{width}") for width in WIDTHS}
LENGTH_BITS = 30
LENGTHS = (1 << LENGTH_BITS) - 1

KINDS = {
    ValueType.INT64: "int64_val",
    ValueType.FLOAT: "float_val",
    ValueType.STRING: "string_val",
    ValueType.INT64_LIST: "int64_list_val",
}
"""The types that rows hold as they are: type → its field in Feast's message, which is the name of the kind."""

MESSAGE = "message"
"""The kind of all others: the bytes of Feast's message."""

LONG = ("int64_list_val", "string_val", MESSAGE)

Key = int | bytes
Row = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
Answer = list[tuple[datetime | None, dict[str, Value] | None]]


class PackedOnlineStoreConfig(FeastConfigBaseModel):
    """Where the database is."""

    type: Literal["feature_repo.online_store.PackedOnlineStore"] = "feature_repo.online_store.PackedOnlineStore"
    path: str


class Layout:
    """What the rows of one number hold, and how: see the head of this file."""

    def __init__(self, number: int, features: Sequence[tuple[str, str]]) -> None:
        self.number = number
        self.features = tuple((name, kind) for name, kind in features)
        kinds = [kind for _, kind in self.features]
        self._long = [place for place, kind in enumerate(kinds) if kind in LONG]
        self._floats = [place for place, kind in enumerate(kinds) if kind == "float_val"]
        self._integers = [place for place, kind in enumerate(kinds) if kind == "int64_val"]
        lengths, floats, integers = len(self._long), len(self._floats), len(self._integers)
        nulls = -(-len(kinds) // 8)
        at_floats = _whole(4 + 4 * lengths)
        at_integers = at_floats + _whole(4 * floats)
        at_nulls = at_integers + 8 * integers
        self._dtype = np.dtype(
            {
                "names": ["layout", "lengths", "floats", "integers", "nulls"],
                "formats": ["<u4", ("<u4", (lengths,)), ("<f4", (floats,)), ("<i8", (integers,)), ("u1", (nulls,))],
                "offsets": [0, 4, at_floats, at_integers, at_nulls],
                "itemsize": at_nulls + _whole(nulls),
            }
        )
        self._head = struct.Struct(
            f"<{1 + lengths}I{at_floats - 4 - 4 * lengths}x"
            f"{floats}f{at_integers - at_floats - 4 * floats}x"
            f"{integers}q{nulls}s{_whole(nulls) - nulls}x"
        )

    def pack(self, columns: Sequence[Column], nulls: np.ndarray) -> list[bytes]:
        """Rows as bytes, of columns in the layout's order; texts and messages are Ragged too, of bytes.

        Args:
            nulls: which values are null, [rows, features]; what the columns hold there comes back as None.
        """
        rows = len(nulls)
        head = np.zeros(rows, self._dtype)
        head["layout"] = self.number
        head["nulls"] = np.packbits(nulls, axis=1, bitorder="little")
        for name, places in (("floats", self._floats), ("integers", self._integers)):
            for place, of in enumerate(places):
                head[name][:, place] = columns[of]
        long = [column for column in (columns[of] for of in self._long) if isinstance(column, Ragged)]
        widths = [_widths(column) for column in long]
        sizes = [_whole(column.lengths * width) for column, width in zip(long, widths, strict=True)]
        for place, (column, width) in enumerate(zip(long, widths, strict=True)):
            if (column.lengths >> LENGTH_BITS).any():
                raise ValueError(f"a {self.features[self._long[place]][0]} is longer than {1 << LENGTH_BITS}")
            head["lengths"][:, place] = column.lengths | np.searchsorted(WIDTHS, width) << LENGTH_BITS
        ends = np.cumsum(self._dtype.itemsize + sum(sizes, np.zeros(rows, np.int64)))
        starts = np.append(0, ends[:-1]) if rows else ends
        packed = np.zeros(ends[-1] if rows else 0, np.uint8)
        words = self._dtype.itemsize // 8
        packed.view(np.int64)[(starts // 8)[:, None] + np.arange(words)] = head.view(np.int64).reshape(rows, words)
        at = starts + self._dtype.itemsize
        for column, width, size in zip(long, widths, sizes, strict=True):
            for w in np.unique(width):
                filled = np.flatnonzero((width == w) & (column.lengths > 0))
                part = column.take(filled)
                to = np.arange(len(part.values)) + np.repeat(at[filled] // w - part.offsets[:-1], part.lengths)
                packed.view(INTEGERS[w])[to] = part.values.astype(INTEGERS[w])
            at = at + size
        data = packed.tobytes()
        return [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def unpack(self, row: bytes) -> list[Any]:
        """The values in the layout's order: int, float, str, an int64 array, the bytes of a message, or None."""
        head = self._head.unpack_from(row)
        values: list[Any] = [None] * len(self.features)
        at = 1 + len(self._long)
        for place, value in zip(self._floats, head[at:], strict=False):
            values[place] = value
        at += len(self._floats)
        for place, value in zip(self._integers, head[at:], strict=False):
            values[place] = value
        at = self._head.size
        for place, length in zip(self._long, head[1:], strict=False):
            kind, count, width = self.features[place][1], length & LENGTHS, WIDTHS[length >> LENGTH_BITS]
            if kind == "int64_list_val":
                values[place] = np.frombuffer(row, INTEGERS[width], count, at).astype(np.int64)
            else:
                found = row[at : at + count]
                values[place] = found.decode() if kind == "string_val" else found
            at += _whole(count * width)
        nulls = int.from_bytes(head[-1], "little")
        return [None if nulls >> place & 1 else value for place, value in enumerate(values)] if nulls else values


def _whole(size: Any) -> Any:
    """`size` up to a multiple of 8."""
    return -(-size // 8) * 8


def _widths(column: Ragged) -> np.ndarray:
    """How many bytes the integers of each list need, [rows]."""
    widths = np.ones(len(column), np.int64)
    filled = np.flatnonzero(column.lengths)
    if column.values.dtype == np.int64 and len(filled):
        # v needs as many as -v - 1 does
        largest = np.maximum.reduceat(column.values ^ (column.values >> 63), column.offsets[:-1][filled])
        for width in WIDTHS[:-1]:
            widths[filled[largest >> (8 * width - 1) > 0]] = 2 * width
    return widths


class _Connection:
    """A thread's connection to the database, and the layouts that were seen through it."""

    def __init__(self, path: Path, *, create: bool) -> None:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        mode = "rwc" if create else "rw"
        self.sqlite = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}", timeout=PATIENCE_SECONDS, isolation_level=None, uri=True
        )
        if create and self._marks() == (0, 0):
            self._make(path)
        if self._marks() != (APPLICATION, FORMAT):
            raise StoreError(
                f"{path} is no online store of format {FORMAT} (application and format are {self._marks()}):"
                " remove it and fill it by a run of the prepare DAG"
            )
        self.sqlite.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
        self._file = self._identity(path)
        self._layouts: dict[int, Layout] = {}

    def _marks(self) -> tuple[int, int]:
        (application,), (version,) = (
            self.sqlite.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        return application, version

    def _make(self, path: Path) -> None:
        if self.sqlite.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise StoreError(f"{path} is a database of something else: give the online store another path")
        self.sqlite.execute("PRAGMA journal_mode = WAL")  # readers read on while one writes
        with self.transaction():
            self.sqlite.execute(
                "CREATE TABLE IF NOT EXISTS layouts (number INTEGER PRIMARY KEY, features TEXT NOT NULL UNIQUE)"
            )
            self.sqlite.execute(f"PRAGMA application_id = {APPLICATION}")
            self.sqlite.execute(f"PRAGMA user_version = {FORMAT}")

    @staticmethod
    def _identity(path: Path) -> tuple[Path, int, int]:
        status = os.stat(path)
        return path, status.st_dev, status.st_ino

    def reads(self, path: Path) -> bool:
        """Whether this is a connection to the file that has the name now."""
        try:
            return self._identity(path) == self._file
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, one writer at a time."""
        self.sqlite.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.sqlite.execute("COMMIT")
        finally:
            if self.sqlite.in_transaction:
                self.sqlite.execute("ROLLBACK")

    def unpack(self, row: bytes) -> Iterator[tuple[tuple[str, str], Any]]:
        """The name, the kind and the value of each feature of a row."""
        number = int.from_bytes(row[:4], "little")
        layout = self._layouts.get(number)
        if layout is None:
            (features,) = self.sqlite.execute("SELECT features FROM layouts WHERE number = ?", (number,)).fetchone()
            layout = self._layouts[number] = Layout(number, json.loads(features))
        return zip(layout.features, layout.unpack(row), strict=True)

    def layout_of(self, features: Sequence[tuple[str, str]]) -> Layout:
        """The layout of these features, which gets a number if it has none; in a transaction."""
        text = json.dumps(features)
        self.sqlite.execute("INSERT INTO layouts (features) VALUES (?) ON CONFLICT DO NOTHING", (text,))
        (number,) = self.sqlite.execute("SELECT number FROM layouts WHERE features = ?", (text,)).fetchone()
        return Layout(number, features)

    def make_table(self, name: str, key_type: str) -> None:
        """Makes the table of a view; one for another type of key holds nothing of use, and goes."""
        wanted = (
            f"CREATE TABLE {_quoted(name)}"
            f" (key {key_type} PRIMARY KEY, row BLOB NOT NULL, event_us INTEGER NOT NULL, created_us INTEGER)"
        )
        if self.sqlite.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone() != (wanted,):
            self.drop_table(name)
            self.sqlite.execute(wanted)

    def drop_table(self, name: str) -> None:
        self.sqlite.execute(f"DROP TABLE IF EXISTS {_quoted(name)}")

    def put(self, table: str, rows: Iterable[tuple[Key, bytes, int, int | None]]) -> None:
        """Writes rows, each in place of the former one of its key."""
        self.sqlite.executemany(f"INSERT OR REPLACE INTO {_quoted(table)} VALUES (?, ?, ?, ?)", rows)

    def get(self, table: str, keys: Sequence[Key]) -> dict[Key, tuple[bytes, int]]:
        """Rows and their event_us by key; a view that was never written holds none."""
        found: dict[Key, tuple[bytes, int]] = {}
        for start in range(0, len(keys), KEYS_AT_ONCE):
            part = keys[start : start + KEYS_AT_ONCE]
            places = ",".join("?" * len(part))
            query = f"SELECT key, row, event_us FROM {_quoted(table)} WHERE key IN ({places})"
            try:
                rows = self.sqlite.execute(query, part).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return {}
                raise
            found.update((key, (row, event_us)) for key, row, event_us in rows)
        return found


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


Method = TypeVar("Method", bound=Callable[..., Any])


def _answering(method: Method) -> Method:
    """`method` of a store, its first argument a configuration, with StoreError for what SQLite says."""

    @functools.wraps(method)
    def answering(store: PackedOnlineStore, config: RepoConfig, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(store, config, *args, **kwargs)
        except sqlite3.Error as error:
            path, said = _path(config), str(error)
            if "unable to open" in said:
                reason = "is missing or cannot be read: fill it by a run of the prepare DAG"
            elif "locked" in said:
                reason = f"has been locked by another process for {PATIENCE_SECONDS:.0f} s: see what writes it"
            elif isinstance(error, sqlite3.OperationalError):
                reason = f"does not answer: {said}"
            else:
                reason = f"is damaged ({said}): remove it and fill it by a run of the prepare DAG"
            raise StoreError(f"the online store {path} {reason}") from error

    return cast("Method", answering)


def _path(config: RepoConfig) -> Path:
    return Path(config.repo_path or ".", config.online_store.path)


class PackedOnlineStore(OnlineStore):
    """One packed row an entity and view, in a SQLite database that many processes read while one writes.

    Tables are made when they are first written. Each thread has its own connection.

    Raises:
        StoreError (all methods): the database is missing, locked, damaged or of another format.
    """

    def __init__(self) -> None:
        self._threads = threading.local()

    def _open(self, config: RepoConfig, *, create: bool = False) -> _Connection:
        """This thread's connection; to a new one if the file was replaced."""
        path = _path(config)
        connection: _Connection | None = getattr(self._threads, "connection", None)
        if connection is None or not connection.reads(path):
            connection = self._threads.connection = _Connection(path, create=create)
        return connection

    @_answering
    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None
    ) -> None:
        """Writes rows, each in place of the entity's former one, whatever the stamps are."""
        if not data:
            return
        features = _features(table)
        given = [[values.get(name, NULL) for _, values, _, _ in data] for name, _ in features]
        nulls = [[value.WhichOneof("val") in (None, "null_val") for value in values] for values in given]
        columns = [
            _of_messages(name, kind, values, null)
            for (name, kind), values, null in zip(features, given, nulls, strict=True)
        ]
        keys = [_key(table, entity, config) for entity, _, _, _ in data]
        stamps = [(_us(event), None if created is None else _us(created)) for _, _, event, created in data]
        self._write(config, [(table, [(columns, np.array(nulls).T, keys, stamps)])], replace=False)
        if progress:
            progress(len(data))

    @_answering
    def replace(self, config: RepoConfig, tables: Sequence[tuple[FeatureView, pl.DataFrame]]) -> None:
        """Makes each view hold the rows of its table and no others, all views in one step.

        The rows are those that Feast would write. A table has the view's key, which is one Int64, its features and its
        source's timestamps.
        """
        self._write(config, [(view, _of_frame(view, table)) for view, table in tables], replace=True)

    def _write(
        self, config: RepoConfig, tables: Iterable[tuple[FeatureView, Iterable[_Part]]], *, replace: bool
    ) -> None:
        # rows that are pushed to a database that is away belong in that one
        connection = self._open(config, create=replace)
        with connection.transaction():
            for view, parts in tables:
                name = _table(config, view)
                connection.make_table(name, "INTEGER" if _has_integer_key(view) else "BLOB")
                if replace:
                    connection.sqlite.execute(f"DELETE FROM {_quoted(name)}")
                layout = connection.layout_of(_features(view))
                for columns, nulls, keys, stamps in parts:
                    rows = layout.pack(columns, nulls)
                    connection.put(name, ((key, row, *us) for key, row, us in zip(keys, rows, stamps, strict=True)))

    @_answering
    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> Answer:
        """The event time and the values of each entity; both None where the view does not hold it."""
        keys = [_key(table, entity, config) for entity in entity_keys]
        wanted = requested_features or [feature.name for feature in table.features]
        connection = self._open(config)
        found = connection.get(_table(config, table), keys)
        answers: dict[Key, tuple[datetime | None, dict[str, Value] | None]] = {}
        for key, (row, event_us) in found.items():
            values = {name: _message(kind, value) for (name, kind), value in connection.unpack(row) if name in wanted}
            answers[key] = (EPOCH + timedelta(microseconds=event_us), values)
        return [answers.get(key, (None, None)) for key in keys]

    @_answering
    def read_rows(self, config: RepoConfig, table: FeatureView, keys: Sequence[int]) -> list[dict[str, Any]]:
        """The same of a view whose key is one Int64, without messages: feature → int, float, str or int64 array.

        An empty one where the view does not hold the key.
        """
        connection = self._open(config)
        found = connection.get(_table(config, table), keys)
        return [
            {name: value for (name, _), value in connection.unpack(found[key][0])} if key in found else {}
            for key in keys
        ]

    async def online_write_batch_async(
        self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None
    ) -> None:
        """`online_write_batch` in another thread."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> Answer:
        """`online_read` in another thread."""
        return await asyncio.to_thread(self.online_read, config, table, entity_keys, requested_features)

    @_answering
    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Makes the database, and drops what is no longer defined."""
        connection = self._open(config, create=True)
        if tables_to_delete:
            with connection.transaction():
                for view in tables_to_delete:
                    connection.drop_table(_table(config, view))

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Removes the database."""
        path = _path(config)
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


NULL = Value()
_Part = tuple[Sequence[Column], np.ndarray, Sequence[Key], Sequence[tuple[int, int | None]]]
"""Columns, which of their values are null, keys, and event_us and created_us."""


def _features(view: FeatureView) -> list[tuple[str, str]]:
    return [(field.name, KINDS.get(field.dtype.to_value_type(), MESSAGE)) for field in view.features]


def _table(config: RepoConfig, view: FeatureView) -> str:
    name: str = compute_table_id(config.project, view, config.registry.enable_online_feature_view_versioning)
    return name


def _has_integer_key(view: FeatureView) -> bool:
    return [field.dtype for field in view.entity_columns] == [Int64]


def _key(view: FeatureView, entity: EntityKey, config: RepoConfig) -> Key:
    if not _has_integer_key(view):
        packed: bytes = serialize_entity_key(entity, config.entity_key_serialization_version)
        return packed
    (value,) = entity.entity_values
    if (given := value.WhichOneof("val")) != "int64_val":
        raise ValueError(f"the key {entity.join_keys[0]} of {view.name} must be an integer and is {given or 'null'}")
    key: int = value.int64_val
    return key


def _us(time: datetime) -> int:
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)


def _of_messages(name: str, kind: str, values: Sequence[Value], nulls: Sequence[bool]) -> Column:
    """Feast's messages of one feature as a column."""
    if kind == MESSAGE:
        return _of_bytes(
            [b"" if null else value.SerializeToString() for value, null in zip(values, nulls, strict=True)]
        )
    given = {str(value.WhichOneof("val")) for value, null in zip(values, nulls, strict=True) if not null}
    if given - {kind}:
        raise ValueError(f"{name} is declared as {kind} and given as {', '.join(sorted(given))}")
    found = [getattr(value, kind) for value in values]  # of a null, what is empty
    if kind == "int64_list_val":
        return Ragged.of([value.val for value in found])
    if kind == "string_val":
        return _of_bytes([value.encode() for value in found])
    return np.array(found, np.float32 if kind == "float_val" else np.int64)


def _of_frame(view: FeatureView, frame: pl.DataFrame) -> Iterator[_Part]:
    """The rows of a table."""
    (key,) = view.join_keys
    for part in frame.iter_slices(PACKED_AT_ONCE):
        nulls = np.column_stack([part[field.name].is_null().to_numpy() for field in view.features])
        columns = [_of_series(part[field.name], field.dtype.to_value_type()) for field in view.features]
        stamps = [part[name].dt.epoch("us").to_list() for name in _stamps(view)]
        yield columns, nulls, part[key].to_list(), list(zip(*stamps, strict=True))


def _stamps(view: FeatureView) -> tuple[str, str]:
    source = view.batch_source
    return source.timestamp_field, source.created_timestamp_column or source.timestamp_field


def _of_series(series: pl.Series, value_type: ValueType) -> Column:
    if value_type is ValueType.INT64_LIST:
        return Ragged.of_series(series.fill_null([]))
    if value_type is ValueType.STRING:
        return _of_bytes([value.encode() for value in series.fill_null("")])
    if value_type in KINDS:
        return series.fill_null(0).to_numpy()
    messages = python_values_to_proto_values(series.to_list(), value_type)
    return _of_bytes([message.SerializeToString() for message in messages])


def _of_bytes(values: Sequence[bytes]) -> Ragged:
    offsets = np.cumsum([0, *map(len, values)])
    return Ragged(np.frombuffer(b"".join(values), np.uint8), offsets)


def _message(kind: str, value: Any) -> Value:
    if value is None:
        return Value()
    if kind == MESSAGE:
        return Value.FromString(value)
    return Value(**{kind: Int64List(val=value) if kind == "int64_list_val" else value})
