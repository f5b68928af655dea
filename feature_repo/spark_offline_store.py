"""Feast's Spark offline store with a join that grows with its rows: `PointInTimeSparkOfflineStore`.

stores/spark.yaml names it by its full path, and the repository root must be importable. Feast's own join pairs each
entity row with all earlier rows of its entity, and takes the result through the driver's heap and pandas, where whole
numbers beside nulls become floats. Here asked and known rows stand together in the order in which they became visible,
a running maximum says what was in force, and rows travel as Parquet. What it gives is what `penstock.point_in_time`
defines: a row counts from the time it arrived, and every entity row comes back in its place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
from feast import FeatureView, RepoConfig
from feast.data_source import DataSource
from feast.infra.offline_stores.contrib.spark_offline_store.spark import (
    SparkOfflineStore,
    SparkOfflineStoreConfig,
    get_spark_session_or_start_new_with_repoconfig,
)
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.registry.base_registry import BaseRegistry
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F  # noqa: N812 - as all of Spark's documentation has it

from feature_repo.look_up import ROW, TIME, Asked, looked_up
from feature_repo.offline_store import PointInTimeRetrievalJob


class PointInTimeSparkOfflineStoreConfig(SparkOfflineStoreConfig):
    """The settings are SparkOfflineStore's. `staging_location` is a directory that driver and executors share."""

    type: str = "feature_repo.spark_offline_store.PointInTimeSparkOfflineStore"


class PointInTimeSparkOfflineStore(SparkOfflineStore):
    """SparkOfflineStore, with another join and materialisation."""

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
            spark = get_spark_session_or_start_new_with_repoconfig(config.offline_store)
            with tempfile.TemporaryDirectory(dir=config.offline_store.staging_location) as folder:
                return _look_up(spark, asked, Path(folder))

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

        def pull() -> pa.Table:
            spark = get_spark_session_or_start_new_with_repoconfig(config.offline_store)
            visible = _visible(stamps)
            newest = (
                _rows(spark, data_source)
                .where(visible <= F.lit(end_date))
                .groupBy(*join_key_columns)
                .agg(F.max(F.struct(*stamps, *feature_name_columns)).alias("found"))
                .select(*join_key_columns, "found.*")
                .where(visible >= F.lit(start_date))
                .select(*join_key_columns, *feature_name_columns, *stamps)
            )
            with tempfile.TemporaryDirectory(dir=config.offline_store.staging_location) as folder:
                return _collected(newest, Path(folder)).to_arrow(compat_level=pl.CompatLevel.oldest())

        return PointInTimeRetrievalJob(pull, str(config.repo_path), False, [], None)


def _look_up(spark: SparkSession, asked: Asked, folder: Path) -> pl.DataFrame:
    path = folder / "asked.parquet"
    asked.rows.write_parquet(path)
    known = _rows(spark, asked.source).dropna(subset=asked.keys)
    rows = known.select(
        *asked.keys,
        _visible(asked.stamps).alias(TIME),
        F.lit(None).cast("bigint").alias(ROW),
        F.struct(*asked.stamps, *asked.features).alias("found"),
    )
    stacked = rows.unionByName(spark.read.parquet(str(path)), allowMissingColumns=True)
    # what becomes visible at the very time that is asked is seen
    order = Window.partitionBy(*asked.keys).orderBy(TIME, F.col(ROW).isNotNull())
    newest = F.max("found").over(order.rowsBetween(Window.unboundedPreceding, 0))
    found = stacked.withColumn("found", newest).where(F.col(ROW).isNotNull())
    if asked.ttl:
        expired = F.col(f"found.{asked.stamps[0]}") < F.col(TIME) - F.lit(asked.ttl)
        found = found.withColumn("found", F.when(~expired, F.col("found")))
    features = found.select(ROW, *(f"found.{feature}" for feature in asked.features))
    return _collected(features, folder).sort(ROW).drop(ROW)


def _rows(spark: SparkSession, source: DataSource) -> DataFrame:
    if source.path:
        return spark.read.format(source.file_format).load(source.path)
    return spark.sql(f"SELECT * FROM {source.get_table_query_string()}")


def _visible(stamps: Sequence[str]) -> Any:
    return F.greatest(*stamps) if len(stamps) > 1 else F.col(stamps[0])


def _collected(frame: DataFrame, folder: Path) -> pl.DataFrame:
    """The rows of a frame, by way of files: they need not fit the driver's heap."""
    frame.write.parquet(str(folder / "found"))
    return pl.read_parquet(folder / "found" / "*.parquet")
