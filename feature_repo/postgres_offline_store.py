"""Feast's PostgreSQL offline store with a join that PostgreSQL can do: `PointInTimePostgreSQLOfflineStore`.

stores/postgres.yaml names it by its full path, and the repository root must be importable. Feast's own join pairs each
entity row with all earlier rows of its entity, in steps that PostgreSQL cannot plan: 50,000 rows took longer than eight
minutes. Here each view is one look-up in an index a distinct entity row, and rows travel by COPY. What it gives is what
`penstock.point_in_time` defines: a row counts from the time it arrived, and every entity row comes back in its place.

An index on keys, event time and created time is what makes it fast; `replace_tables` makes it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
from feast import FeatureView, RepoConfig
from feast.data_source import DataSource
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import (
    PostgreSQLOfflineStore,
    PostgreSQLOfflineStoreConfig,
)
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.utils.postgres.connection_utils import _get_conn
from feast.infra.utils.postgres.postgres_config import PostgreSQLConfig
from psycopg import Connection, sql

from feature_repo.look_up import ROW, TIME, Asked, looked_up
from feature_repo.offline_store import PointInTimeRetrievalJob
from penstock.point_in_time import PointInTimeError

SENT_AT_ONCE = 10_000
"""Rows of one piece of text that is sent: some 30 MB where a row holds long lists."""

ASKED_AT_ONCE = 100_000
"""Rows of one answer: some 300 MB of text where a row holds long lists."""

STAMP = pl.Datetime("us", "UTC")
LISTS = pl.List(pl.Int64)
TYPES: dict[pl.DataType, tuple[str, int]] = {
    pl.Boolean(): ("boolean", 16),
    pl.Int64(): ("bigint", 20),
    pl.Int32(): ("integer", 23),
    pl.String(): ("text", 25),
    pl.Float32(): ("real", 700),
    pl.Float64(): ("double precision", 701),
    LISTS: ("bigint[]", 1016),
    STAMP: ("timestamptz", 1184),
}
"""Dtype → PostgreSQL's name and number of it: the types of columns that this store takes and gives."""

DTYPES = {number: dtype for dtype, (_, number) in TYPES.items()}


class PointInTimePostgreSQLOfflineStoreConfig(PostgreSQLOfflineStoreConfig):
    """The settings are PostgreSQLOfflineStore's."""

    type: str = "feature_repo.postgres_offline_store.PointInTimePostgreSQLOfflineStore"


class PointInTimePostgreSQLOfflineStore(PostgreSQLOfflineStore):
    """PostgreSQLOfflineStore, with another join and materialisation."""

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
        **kwargs: Any,
    ) -> RetrievalJob:
        """The job of `looked_up`.

        `filter_by_created_timestamp` changes nothing: what had not arrived is never seen, with False as with True.
        """

        def look_up(asked: Asked) -> pl.DataFrame:
            with _get_conn(config.offline_store) as connection:
                return _look_up(connection, asked)

        return looked_up(config, feature_views, feature_refs, entity_df, registry, project, full_feature_names, look_up)

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
        """A job that gives the row in force at `end_date` of each key, if it came into force since `start_date`."""
        stamps = [name for name in (timestamp_field, created_timestamp_column) if name]
        query = sql.SQL(
            "SELECT * FROM (SELECT DISTINCT ON ({keys}) {columns} FROM {source} AS source"
            " WHERE greatest({stamps}) <= {end} ORDER BY {keys}, {newest}) AS newest"
            " WHERE greatest({stamps}) >= {start}"
        ).format(
            keys=_names(join_key_columns),
            columns=_names([*join_key_columns, *feature_name_columns, *stamps]),
            source=sql.SQL(data_source.get_table_query_string()),
            stamps=_names(stamps),
            newest=_newest(stamps, data_source),
            start=sql.Literal(start_date),
            end=sql.Literal(end_date),
        )

        def pull() -> pa.Table:
            with _get_conn(config.offline_store) as connection:
                return _copy_out(connection, query).to_arrow(compat_level=pl.CompatLevel.oldest())

        return PointInTimeRetrievalJob(pull, str(config.repo_path), False, [], None)


def replace_tables(
    settings: PostgreSQLConfig, tables: Mapping[str, pl.DataFrame], keys: Mapping[str, Sequence[str]]
) -> None:
    """Replaces tables by name, all in one transaction: a reader finds the old ones or the new ones.

    Args:
        keys: the columns by which rows of a table are looked up.
    """
    with _get_conn(settings) as connection:
        schema = sql.Identifier(settings.db_schema)
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema))
        for name, table in tables.items():
            new = sql.SQL("{}.{}").format(schema, sql.Identifier(f"{name}_new"))
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(new))
            connection.execute(sql.SQL("CREATE TABLE {} ({})").format(new, _declared(table.schema)))
            _copy_in(connection, new, table)
            connection.execute(sql.SQL("CREATE INDEX ON {} ({})").format(new, _names(keys[name])))
            connection.execute(sql.SQL("ANALYZE {}").format(new))
        # from here to the end of the transaction readers wait
        for name in tables:
            old, new = (sql.SQL("{}.{}").format(schema, sql.Identifier(found)) for found in (name, f"{name}_new"))
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(old))
            connection.execute(sql.SQL("ALTER TABLE {} RENAME TO {}").format(new, sql.Identifier(name)))


def _look_up(connection: Connection, asked: Asked) -> pl.DataFrame:
    connection.execute(sql.SQL("CREATE TEMPORARY TABLE asked ({}) ON COMMIT DROP").format(_declared(asked.rows.schema)))
    _copy_in(connection, sql.Identifier("asked"), asked.rows)
    connection.execute("ANALYZE asked")
    conditions = [sql.SQL("source.{0} = asked.{0}").format(sql.Identifier(key)) for key in asked.keys]
    conditions += [
        sql.SQL("source.{} <= asked.{}").format(sql.Identifier(stamp), sql.Identifier(TIME)) for stamp in asked.stamps
    ]
    if asked.ttl:
        event = sql.Identifier(asked.stamps[0])
        oldest = sql.SQL("asked.{} - {}").format(sql.Identifier(TIME), sql.Literal(asked.ttl))
        conditions.append(sql.SQL("source.{} >= {}").format(event, oldest))
    parts = []
    for start in range(0, max(asked.rows.height, 1), ASKED_AT_ONCE):
        query = sql.SQL(
            "SELECT {features} FROM asked LEFT JOIN LATERAL (SELECT {features} FROM {source} AS source"
            " WHERE {conditions} ORDER BY {newest} LIMIT 1) AS newest ON true"
            " WHERE {row} >= {start} AND {row} < {end} ORDER BY {row}"
        ).format(
            features=_names(asked.features),
            source=sql.SQL(asked.source.get_table_query_string()),
            conditions=sql.SQL(" AND ").join(conditions),
            newest=_newest(asked.stamps, asked.source),
            row=sql.Identifier(ROW),
            start=sql.Literal(start),
            end=sql.Literal(start + ASKED_AT_ONCE),
        )
        parts.append(_copy_out(connection, query))
    return pl.concat(parts)


def _names(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _newest(stamps: Sequence[str], source: DataSource) -> sql.Composable:
    """The order in which the row in force is first; of equal stamps, in a table, the one that was written last."""
    columns = stamps if _is_query(source) else [*stamps, "ctid"]
    return sql.SQL(", ").join(sql.SQL("{} DESC").format(sql.Identifier(column)) for column in columns)


def _is_query(source: DataSource) -> bool:
    return bool(source.get_table_query_string().startswith("("))


def _declared(schema: Mapping[str, pl.DataType]) -> sql.Composable:
    if unknown := [name for name, dtype in schema.items() if dtype not in TYPES]:
        raise PointInTimeError(f"PostgreSQL is not given {', '.join(f'{name} of {schema[name]}' for name in unknown)}")
    return sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(TYPES[dtype][0])) for name, dtype in schema.items()
    )


def _copy_in(connection: Connection, name: sql.Composable, table: pl.DataFrame) -> None:
    """Adds rows to a table."""
    lists = [column for column, dtype in table.schema.items() if dtype == LISTS]
    with connection.cursor().copy(sql.SQL("COPY {} FROM STDIN (FORMAT csv)").format(name)) as copy:
        for part in table.iter_slices(SENT_AT_ONCE):
            text = part.with_columns(
                pl.concat_str(pl.lit("{"), pl.col(column).cast(pl.List(pl.String)).list.join(","), pl.lit("}")).alias(
                    column
                )
                for column in lists
            )
            # quotes tell an empty text from a null
            stamp = "%Y-%m-%d %H:%M:%S%.6f+00"
            copy.write(text.write_csv(include_header=False, quote_style="non_numeric", datetime_format=stamp))


def _copy_out(connection: Connection, query: sql.Composed) -> pl.DataFrame:
    """The rows of a query."""
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL("{} LIMIT 0").format(query))
        assert cursor.description is not None
        numbers = {column.name: column.type_code for column in cursor.description}
        if unknown := [name for name, number in numbers.items() if number not in DTYPES]:
            raise PointInTimeError(f"{', '.join(unknown)}: this store does not read columns of such a type")
        schema = {name: DTYPES[number] for name, number in numbers.items()}
        cursor.execute("SET TIME ZONE 'UTC'")
        with cursor.copy(sql.SQL("COPY ({}) TO STDOUT (FORMAT csv)").format(query)) as copy:
            text = b"".join(copy)
    told = {name: pl.String() if dtype in (LISTS, STAMP, pl.Boolean()) else dtype for name, dtype in schema.items()}
    if not text:
        return pl.DataFrame(schema=schema)
    return pl.read_csv(io.BytesIO(text), has_header=False, schema=told).with_columns(
        _read(pl.col(name), dtype) for name, dtype in schema.items() if told[name] != dtype
    )


def _read(text: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if dtype == LISTS:
        return text.str.replace("{", "[", literal=True).str.replace("}", "]", literal=True).str.json_decode(LISTS)
    if dtype == STAMP:
        return text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f+00", time_unit="us", time_zone="UTC")
    return text == "t"
