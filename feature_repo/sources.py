"""Where the offline tables lie for the offline store of the configuration, and how they get there.

The tables are Parquet files of the home. Our store, DuckDB and Spark read them as they are; PostgreSQL has a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import polars as pl
from feast import FileSource, RepoConfig
from feast.data_source import DataSource
from psycopg import Connection, sql

from penstock.features import STAMPS, View, view

ROWS_AT_ONCE = 10_000
"""Rows that are sent at once: some 30 MB where a row holds long lists."""

TYPES: dict[type[pl.DataType], str] = {
    pl.Int64: "bigint",
    pl.Float32: "real",
    pl.String: "text",
    pl.List: "bigint[]",
    pl.Datetime: "timestamptz",
}
"""Polars dtype → PostgreSQL's."""


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
    # imported where they are used: Spark is an extra
    if configuration.offline_store.type == "spark":
        from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            return SparkSource(path=str(table_file(home, definition)), file_format="parquet", **described)
    if configuration.offline_store.type == "postgres":
        from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource

        return PostgreSQLSource(table=definition.name, **described)
    return FileSource(path=str(table_file(home, definition)), **described)


def copy_tables(configuration: RepoConfig, tables: Mapping[str, pl.DataFrame]) -> None:
    """Replaces the tables that the offline store keeps itself, all in one transaction; others read the files."""
    if configuration.offline_store.type != "postgres":
        return
    from feast.infra.utils.postgres.connection_utils import _get_conn

    with _get_conn(configuration.offline_store) as connection:
        schema = sql.Identifier(configuration.offline_store.db_schema)
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema))
        for name, table in tables.items():
            _copy(connection, sql.SQL("{}.{}").format(schema, sql.Identifier(f"{name}_new")), view(name), table)
        # readers wait from the first of these to the end of the transaction
        for name in tables:
            old, new = sql.Identifier(name), sql.Identifier(f"{name}_new")
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}.{}").format(schema, old))
            connection.execute(sql.SQL("ALTER TABLE {}.{} RENAME TO {}").format(schema, new, old))


def _copy(connection: Connection, name: sql.Composable, definition: View, table: pl.DataFrame) -> None:
    columns = [sql.SQL(f"{{}} {TYPES[type(dtype)]}").format(sql.Identifier(c)) for c, dtype in table.schema.items()]
    connection.execute(sql.SQL("CREATE TABLE {} ({})").format(name, sql.SQL(", ").join(columns)))
    lists = [column for column, dtype in table.schema.items() if isinstance(dtype, pl.List)]
    text = table.lazy().with_columns(
        pl.concat_str(pl.lit("{"), pl.col(column).cast(pl.List(pl.String)).list.join(","), pl.lit("}")).alias(column)
        for column in lists
    )
    with connection.cursor().copy(sql.SQL("COPY {} FROM STDIN (FORMAT csv)").format(name)) as copy:
        for start in range(0, table.height, ROWS_AT_ONCE):
            part = text.slice(start, ROWS_AT_ONCE).collect()
            # quotes tell an empty string from a null
            stamp = "%Y-%m-%d %H:%M:%S%.6f+00"
            copy.write(part.write_csv(include_header=False, quote_style="non_numeric", datetime_format=stamp))
    keys = [sql.Identifier(column) for column in (definition.key, STAMPS[0])]
    connection.execute(sql.SQL("CREATE INDEX ON {} ({})").format(name, sql.SQL(", ").join(keys)))
    connection.execute(sql.SQL("ANALYZE {}").format(name))
