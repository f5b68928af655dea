"""Feast's offline store for Parquet files with the join of `penstock.point_in_time`: `PointInTimeOfflineStore`.

feature_store.yaml names it by its full path, `type: feature_repo.offline_store.PointInTimeOfflineStore`, and the
repository root must be importable. What it does that Feast's own stores do not: a row counts from the time it arrived,
in training rows and in materialisation alike, and every entity row comes back, once and in its place.

feature_store.yaml must also say `materialization: {pull_latest_features: true}`, or Feast would materialise all rows of
a range of event times and pick the newest itself, whenever it arrived. What is not about joining (writing batches and
logs, reading ranges, monitoring) is DuckDBOfflineStore's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import ibis
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureView, FileSource, OnDemandFeatureView, RepoConfig
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig, _write_data_source
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.saved_dataset import SavedDatasetStorage

from penstock.point_in_time import PointInTimeError, rows_as_of, rows_since

CHUNK_ROWS = 1 << 20
"""Rows of one Arrow chunk: a chunk of lists or strings holds at most 2³¹ elements."""

EXACT = 1 << 53
"""Up to here, either side of zero, a float holds every whole number."""


class PointInTimeOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """The store has no settings of its own."""

    type: str = "feature_repo.offline_store.PointInTimeOfflineStore"


class PointInTimeOfflineStore(DuckDBOfflineStore):
    """DuckDBOfflineStore, with joins and materialisation that never see what had not arrived."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = True,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """A job that gives the columns of `entity_df` as they are, then the features as they were known at its time.

        `filter_by_created_timestamp` changes nothing: what had not arrived is never seen, with False as with True.

        Raises (the first here, the second when the job runs):
            NotImplementedError: `entity_df` is SQL, or missing for a range of time.
            PointInTimeError: a source is no Parquet file or lacks a column, dtypes of keys differ, names collide.
        """

        def join(table: pa.Table, time: str) -> pa.Table:
            for view in feature_views:
                try:
                    table = _with_features(table, time, view, feature_refs, full_feature_names, config.repo_path)
                except PointInTimeError as error:
                    raise PointInTimeError(f"feature view {view.projection.name_to_use()}: {error}") from error
            return table

        return historical_job(config, feature_refs, entity_df, registry, project, full_feature_names, join)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """A job that gives the row in force at `end_date` of each key for which it came into force since `start_date`.

        So the online store holds at `end_date` what the join gives for it. A row that happened before `start_date` and
        arrived after is part of it: materialising from where one stopped misses nothing.
        """
        stamps = [name for name in (timestamp_field, created_timestamp_column) if name]

        def pull() -> pa.Table:
            with _opened(_parquet(data_source), config.repo_path) as file:
                rows = rows_since(
                    _read(file, [*join_key_columns, *stamps]),
                    keys=join_key_columns,
                    event_time=timestamp_field,
                    created_time=created_timestamp_column or None,
                    since=start_date,
                    until=end_date,
                )
                fields = [*join_key_columns, *feature_name_columns, *stamps]
                return pa.table({name: _gathered(file, name, rows) for name in fields})

        return PointInTimeRetrievalJob(pull, str(config.repo_path), False, [], None)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """A job that gives all rows that happened in a range of time, whenever they arrived.

        Raises:
            PointInTimeError: Feast would materialise these rows.
        """
        if created_timestamp_column and not config.materialization_config.pull_latest_features:
            raise PointInTimeError("feature_store.yaml must say materialization: {pull_latest_features: true}")
        return DuckDBOfflineStore.pull_all_from_table_or_query(
            config=config,
            data_source=data_source,
            join_key_columns=join_key_columns,
            feature_name_columns=feature_name_columns,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_timestamp_column,
            start_date=start_date,
            end_date=end_date,
        )


class PointInTimeRetrievalJob(RetrievalJob):
    """A table that is computed when it is asked for; Feast adds what on-demand views make of it."""

    def __init__(
        self,
        evaluate: Callable[[], pa.Table],
        repo_path: str,
        full_feature_names: bool,
        on_demand_feature_views: list[OnDemandFeatureView],
        metadata: RetrievalMetadata | None,
    ) -> None:
        self._evaluate = evaluate
        self._repo_path = repo_path
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views
        self._metadata = metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._evaluate()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._evaluate().to_pandas()

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Writes the table, with what on-demand views made of it, where `storage` says."""
        table = ibis.memtable(self.to_arrow())
        _write_data_source(table, storage.to_data_source(), self._repo_path, "overwrite", allow_overwrite)


def historical_job(
    config: RepoConfig,
    feature_refs: list[str],
    entity_df: pd.DataFrame | str | None,
    registry: BaseRegistry,
    project: str,
    full_feature_names: bool,
    join: Callable[[pa.Table, str], pa.Table],
) -> RetrievalJob:
    """A job that gives what `join` makes of the entity rows and the name of their time.

    Raises:
        NotImplementedError: `entity_df` is SQL, or missing for a range of time.
    """
    if not isinstance(entity_df, pd.DataFrame):
        given = "SQL" if isinstance(entity_df, str) else "a range of time" if entity_df is None else type(entity_df)
        raise NotImplementedError(f"this store joins to a pandas DataFrame, not to {given}")
    time = infer_event_timestamp_from_entity_df(dict(zip(entity_df.columns, entity_df.dtypes, strict=True)))
    return PointInTimeRetrievalJob(
        lambda: join(pa.Table.from_pandas(entity_df, preserve_index=False), time),
        str(config.repo_path),
        full_feature_names,
        OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
        RetrievalMetadata(
            features=feature_refs,
            keys=[name for name in entity_df.columns if name != time],
            min_event_timestamp=None if entity_df.empty else entity_df[time].min(),
            max_event_timestamp=None if entity_df.empty else entity_df[time].max(),
        ),
    )


def _with_features(
    table: pa.Table,
    time: str,
    view: FeatureView,
    feature_refs: Sequence[str],
    full_feature_names: bool,
    repo_path: Path | None,
) -> pa.Table:
    """The entity rows with the features that are asked of a view."""
    source, projection = _parquet(view.batch_source), view.projection
    in_file = {feast: column for column, feast in source.field_mapping.items()}
    keys = {
        projection.join_key_map.get(field.name, field.name): in_file.get(field.name, field.name)
        for field in view.entity_columns
    }
    if missing := [name for name in keys if name not in table.column_names]:
        raise PointInTimeError(f"the entity rows have no {', '.join(missing)}")
    event, created = (in_file.get(name, name) for name in (source.timestamp_field, source.created_timestamp_column))
    prefix = f"{projection.name_alias or view.name}__" if full_feature_names else ""
    with _opened(source, repo_path) as file:
        rows = rows_as_of(
            _entities(table, [*keys, time]),
            _read(file, [name for name in (*keys.values(), event, created) if name]),
            keys=keys,
            time=time,
            event_time=event,
            created_time=created or None,
            ttl=view.ttl,
        )
        for ref in feature_refs:
            name, _, feature = ref.partition(":")
            if name == projection.name_to_use():
                if prefix + feature in table.column_names:
                    raise PointInTimeError(f"two columns would be {prefix}{feature}: ask for full feature names")
                table = table.append_column(prefix + feature, _gathered(file, in_file.get(feature, feature), rows))
    return table


def _entities(table: pa.Table, columns: Sequence[str]) -> pl.DataFrame:
    """Columns of the entity rows; keys that pandas made floats, because some are missing, are integers again."""
    frame = pl.DataFrame(table.select(columns))
    floats = [column for column in frame.iter_columns() if column.dtype.is_float()]
    return frame.with_columns(
        column.cast(pl.Int64)
        for column in floats
        if column.is_between(-EXACT, EXACT).all() and (column == column.floor()).all()
    )


def _parquet(source: DataSource | None) -> FileSource:
    if not isinstance(source, FileSource) or not isinstance(source.file_format or ParquetFormat(), ParquetFormat):
        raise PointInTimeError(f"its source {source.name if source else None} is no Parquet file")
    return source


@contextmanager
def _opened(source: FileSource, repo_path: Path | None) -> Iterator[BinaryIO]:
    """The file of a source, open once: what replaces it meanwhile does not mix with what is read."""
    path = FileSource.get_uri_for_file_path(repo_path, source.path)
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise PointInTimeError(f"its source {path} cannot be read: {error.strerror}") from error


def _read(file: BinaryIO, columns: Sequence[str]) -> pl.DataFrame:
    held = _schema(file).names
    if missing := [name for name in columns if name not in held]:
        raise PointInTimeError(f"its source {file.name} has no column {', '.join(missing)}")
    return pl.read_parquet(file, columns=list(dict.fromkeys(columns)))


def _schema(file: BinaryIO) -> pa.Schema:
    schema = pq.read_schema(file)
    file.seek(0)  # where Polars begins
    return schema


def _gathered(file: BinaryIO, name: str, rows: pl.Series) -> pa.ChunkedArray:
    """A column of the file in the order of `rows`, null where they are, in the file's own Arrow type."""
    column = _read(file, [name])[name]
    dtype = _schema(file).field(name).type
    chunks = [rows.slice(start, CHUNK_ROWS) for start in range(0, len(rows), CHUNK_ROWS)]
    return pa.chunked_array(
        [column.gather(chunk).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(dtype) for chunk in chunks], dtype
    )
