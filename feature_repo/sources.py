"""Where the offline tables lie for the offline store of the configuration, and how they get there.

The tables are Parquet files of the home. Our store, DuckDB and Spark read them as they are; PostgreSQL has a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl
from feast import FileSource, RepoConfig
from feast.data_source import DataSource
from feast.infra.utils.postgres.postgres_config import PostgreSQLConfig

from penstock.features import STAMPS, View, view


def table_file(home: Path, definition: View) -> Path:
    """The offline table of a view."""
    return home / "features" / f"{definition.name}.parquet"


def source(definition: View, home: Path, configuration: RepoConfig) -> DataSource:
    """The offline table of a view as the offline store of the configuration finds it."""
    event, created = STAMPS
    described = {
        "name": f"{definition.name}_source",
        "timestamp_field": event,
        "created_timestamp_column": created,
        "description": f"snapshots of {definition.name} as penstock.features makes them of the log",
        "owner": definition.owner,
    }
    # imported where they are used: a home that has neither need not load them
    if hasattr(configuration.offline_store, "spark_conf"):
        from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource

        return SparkSource(path=str(table_file(home, definition)), file_format="parquet", **described)
    if _is_postgres(configuration):
        from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource

        return PostgreSQLSource(table=definition.name, **described)
    return FileSource(path=str(table_file(home, definition)), **described)


def copy_tables(configuration: RepoConfig, tables: Mapping[str, pl.DataFrame]) -> None:
    """Replaces the tables that the offline store keeps itself, all in one transaction; others read the files."""
    if _is_postgres(configuration):
        from feature_repo.postgres_offline_store import replace_tables

        keys = {name: (view(name).key, *STAMPS) for name in tables}
        replace_tables(configuration.offline_store, tables, keys)


def _is_postgres(configuration: RepoConfig) -> bool:
    return isinstance(configuration.offline_store, PostgreSQLConfig)
