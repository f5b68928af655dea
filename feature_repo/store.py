"""The feature store under a home directory: tables → offline files → point-in-time joins and online values."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import secrets
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from feast import FeatureStore, FeatureView, RepoConfig
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from feature_repo.definitions import define
from penstock.durable import sync_directory, sync_file
from penstock.features import SERVICES, VIEWS, View, default, feature_tables, fill_missing, view

HERE = Path(__file__).resolve().parent
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class StoreError(RuntimeError):
    """The feature store cannot answer; the message says what to do."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Feast's progress bars, colours and warnings off the screen."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def open_store(home: Path) -> FeatureStore:
    """Feast's own store on HOME, as feature_store.yaml describes it."""
    text = (HERE / "feature_store.yaml").read_text()
    (home / "feast").mkdir(parents=True, exist_ok=True)
    with _quiet():
        config = RepoConfig(**yaml.safe_load(text.replace("${PENSTOCK_HOME}", str(home.resolve()))))
        config.repo_path = HERE
        return FeatureStore(config=config)


def write_tables(home: Path, tables: Mapping[str, pl.DataFrame]) -> None:
    """Replaces HOME/features/<view>.parquet, each in one step: a reader finds the old table or the new one."""
    folder = home / "features"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        temporary = folder / f".{name}-{secrets.token_hex(4)}.parquet"
        try:
            table.write_parquet(temporary)
            sync_file(temporary)
            temporary.replace(folder / f"{name}.parquet")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(folder)


def apply(home: Path) -> None:
    """Registers the definitions; harmless when they are registered, or when others have the store open."""
    definitions = define(home.resolve())
    store = open_store(home)
    with _quiet():
        store.apply([*definitions.entities, *definitions.sources, *definitions.views, *definitions.services])
    with contextlib.closing(sqlite3.connect(store.config.online_store.path, timeout=60)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # the gateway reads on while a materialisation writes


def materialise(home: Path, until: datetime) -> dict[str, int]:
    """Fills the online store with each entity's newest snapshot of at most `until`; view → entities written.

    Everything is written again, in transactions of one batch: a run that was killed is mended by the next. Entities
    that the tables no longer hold are removed, so that online is never more than offline.
    """
    store = open_store(home)
    written = {}
    for definition in VIEWS:
        with _quiet():
            store.materialize(EPOCH, until, feature_views=[definition.name])
        path = home / "features" / f"{definition.name}.parquet"
        kept = (
            pl.scan_parquet(path).filter(pl.col("event_timestamp") <= until).select(definition.key).unique().collect()
        )
        written[definition.name] = kept.height
        _remove_others(store, definition, kept.to_series())
    return written


def _remove_others(store: FeatureStore, definition: View, kept: pl.Series) -> None:
    """Deletes what the online table of a view holds of entities other than `kept`."""
    keys = {_packed_key(definition, entity) for entity in kept}
    table = f"{store.project}_{definition.name}"
    with contextlib.closing(sqlite3.connect(store.config.online_store.path, timeout=60)) as connection, connection:
        stored = {key for (key,) in connection.execute(f'SELECT DISTINCT entity_key FROM "{table}"')}
        connection.executemany(f'DELETE FROM "{table}" WHERE entity_key = ?', [(key,) for key in stored - keys])
        if len(stored & keys) != len(keys):
            raise StoreError(
                f"{table} holds {len(stored & keys)} of {len(keys)} entities after materialisation: run it again"
            )


def _entity_key(definition: View, entity: int) -> EntityKey:
    return EntityKey(join_keys=[definition.key], entity_values=[Value(int64_val=int(entity))])


def _packed_key(definition: View, entity: int) -> bytes:
    return serialize_entity_key(_entity_key(definition, entity), entity_key_serialization_version=3)


def refresh(home: Path, log: Path, out: Path) -> dict[str, dict[str, Any]]:
    """A log → offline tables → registry → online store, one process at a time; what there is goes to out/tables.json.

    Raises:
        LogError: the log cannot be read; nothing was changed.
    """
    tables = feature_tables(log)
    stamps = {name: table["event_timestamp"].max() for name, table in tables.items()}
    newest = max(stamp for stamp in stamps.values() if isinstance(stamp, datetime))
    (home / "feast").mkdir(parents=True, exist_ok=True)
    with (home / "feast" / ".refresh.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_tables(home, tables)
        apply(home)
        online = materialise(home, newest)
    found = {
        name: {"rows": table.height, "online": online[name], "newest": str(stamps[name])}
        for name, table in tables.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.json").write_text(json.dumps(found, indent=1))
    return found


CHUNK_ROWS = 50_000
"""Entity rows joined at once: Feast's join pairs each with all earlier snapshots of its entity before it picks one."""


def historical(home: Path, entity_rows: pl.DataFrame, service: str) -> pl.DataFrame:
    """`entity_rows` (keys and event_time) in their order, with the features of `service` as they were at event_time.

    What was not known by then is filled with the default of its dtype.

    Raises:
        StoreError: Feast lost or doubled a row, or the store lacks the service.
    """
    store = open_store(home)
    features = _service(store, service)
    views = [view(name) for name in SERVICES[service]]
    keys = sorted({definition.key for definition in views})
    asked = entity_rows.select(*keys, event_timestamp="event_time").with_row_index("row")
    wanted = [feature for definition in views for feature in definition.features]
    parts = []
    for chunk in asked.iter_slices(CHUNK_ROWS):
        with _quiet():
            joined = pl.from_arrow(store.get_historical_features(chunk.to_pandas(), features).to_arrow())
        assert isinstance(joined, pl.DataFrame)
        joined = joined.with_columns(pl.col("row").cast(pl.UInt32)).sort("row")
        if not joined["row"].equals(chunk["row"]):
            raise StoreError(
                f"the point-in-time join of {service} made {joined['row'].n_unique()} of {chunk.height} rows,"
                f" {joined.height} in all: no row may be lost or doubled; are two views' features of the same name?"
            )
        parts.append(joined.select(feature.name for feature in wanted))
    if not parts:
        return entity_rows.with_columns(pl.lit(None, feature.dtype).alias(feature.name) for feature in wanted)
    filled = fill_missing(pl.concat(parts), wanted)
    return entity_rows.hstack(filled)


def _service(store: FeatureStore, name: str) -> Any:
    if name not in SERVICES:
        raise StoreError(f"unknown feature service {name!r}: there are {', '.join(SERVICES)}")
    try:
        with _quiet():
            return store.get_feature_service(name)
    except Exception as error:
        raise StoreError(
            f"feature service {name} is not registered in {store.config.registry.path}: run apply"
        ) from error


REMEMBERED = 100_000
"""Items whose values a reader keeps in memory, some 2 kB each."""


class Online:
    """Reads the newest values for serving; one for a process, shared by its threads.

    Views are looked up once, so that a call does no work in the registry: after `apply` of other definitions, open a
    new one. Users are read from the store at each call. Items, of which a request asks hundreds, are kept in memory
    until anyone writes to the store.

    Raises:
        StoreError: the definitions are not registered.
    """

    def __init__(self, home: Path) -> None:
        self._store = open_store(home)
        self._views: dict[str, FeatureView] = {}
        for service, names in SERVICES.items():
            _service(self._store, service)
            with _quiet():
                self._views |= {name: self._store.get_feature_view(name) for name in names}
        self._provider = self._store._get_provider()
        self._writes = sqlite3.connect(self._store.config.online_store.path, check_same_thread=False)
        self._remembered: tuple[int, dict[tuple[str, int], Values]] = (-1, {})
        self.users([0], next(iter(SERVICES)))  # opens Feast's connection before there are threads

    def users(self, ids: Sequence[int], service: str) -> dict[str, np.ndarray | list[Any]]:
        """Feature name → value a user: an int64 or float32 array [len(ids)], or a list of int64 arrays."""
        columns: dict[str, np.ndarray | list[Any]] = {}
        for definition in _views(service, "user"):
            columns |= _columns(definition, self._read(definition, ids))
        return columns

    def items(self, ids: Sequence[int], service: str) -> dict[str, np.ndarray | list[Any]]:
        """Feature name → value an item: an int64 or float32 array [len(ids)], or a list of int64 arrays or strings."""
        # changes when another connection has committed; asked before reading, so that what is kept is never older
        (version,) = self._writes.execute("PRAGMA data_version").fetchone()
        if self._remembered[0] != version or len(self._remembered[1]) > REMEMBERED:
            self._remembered = (version, {})
        remembered = self._remembered[1]
        columns: dict[str, np.ndarray | list[Any]] = {}
        for definition in _views(service, "item"):
            known = [remembered.get((definition.name, identity)) for identity in ids]
            if unknown := [identity for identity, values in zip(ids, known, strict=True) if values is None]:
                read = dict(zip(unknown, self._read(definition, unknown), strict=True))
                remembered.update({(definition.name, identity): values for identity, values in read.items()})
                known = [
                    read[identity] if values is None else values for identity, values in zip(ids, known, strict=True)
                ]
            columns |= _columns(definition, [values for values in known if values is not None])
        return columns

    def _read(self, definition: View, ids: Sequence[int]) -> list[Values]:
        """What the store holds of each entity, defaults where it holds nothing."""
        names = [feature.name for feature in definition.features]
        keys = [_entity_key(definition, identity) for identity in ids]
        rows = self._provider.online_read(self._store.config, self._views[definition.name], keys, names)
        return [
            tuple(_value((found or {}).get(feature.name), feature.dtype) for feature in definition.features)
            for _, found in rows
        ]


Values = tuple[Any, ...]
"""An entity's features of one view, in the view's order."""


def _views(service: str, entity: str) -> list[View]:
    return [found for found in (view(name) for name in SERVICES[service]) if found.entity == entity]


def _value(value: Value | None, dtype: pl.DataType) -> Any:
    if value is None or value.WhichOneof("val") in (None, "null_val"):
        missing = default(dtype)
        return np.array(missing, np.int64) if isinstance(missing, list) else missing
    if isinstance(dtype, pl.List):
        return np.array(value.int64_list_val.val, np.int64)
    if isinstance(dtype, pl.String):
        return value.string_val
    return value.float_val if dtype.is_float() else value.int64_val


def _columns(definition: View, rows: list[Values]) -> dict[str, np.ndarray | list[Any]]:
    columns: dict[str, np.ndarray | list[Any]] = {}
    for place, feature in enumerate(definition.features):
        values = [row[place] for row in rows]
        if isinstance(feature.dtype, (pl.List, pl.String)):
            columns[feature.name] = values
        else:
            columns[feature.name] = np.array(values, np.float32 if feature.dtype.is_float() else np.int64)
    return columns
