"""What the joins of PostgreSQL and Spark have in common: entity rows in, one look-up a view, features out in place.

A store answers only which features were in force for distinct keys and times; here they become the rows that were asked
for, so that none is lost or doubled whatever the store does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import pandas as pd
import polars as pl
import polars.selectors as selectors
import pyarrow as pa
from feast import FeatureView, RepoConfig
from feast.data_source import DataSource
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.registry.base_registry import BaseRegistry

from feature_repo.offline_store import historical_job
from penstock.point_in_time import PointInTimeError

ROW, TIME = "asked_row", "asked_time"


@dataclass(frozen=True)
class Asked:
    """What is asked of one view.

    Attributes:
        source: where its rows lie.
        keys, features: columns of the source.
        stamps: its event time and, if it has one, its created time.
        ttl: rows that happened longer before the time that is asked have expired; zero = never.
        rows: distinct: `keys`, TIME (µs, UTC) and ROW (Int64, from 0).
    """

    source: DataSource
    keys: list[str]
    features: list[str]
    stamps: list[str]
    ttl: timedelta
    rows: pl.DataFrame


LookUp = Callable[[Asked], pl.DataFrame]
"""The features in force for each of the rows, in their order; null where there is none."""


def looked_up(
    config: RepoConfig,
    feature_views: Sequence[FeatureView],
    feature_refs: list[str],
    entity_df: pd.DataFrame | str | None,
    registry: BaseRegistry,
    project: str,
    full_feature_names: bool,
    look_up: LookUp,
) -> RetrievalJob:
    """A job that gives the columns of `entity_df` as they are, then the features as they were known at its time.

    Raises (the first here, the second when the job runs):
        NotImplementedError: `entity_df` is SQL, or missing for a range of time.
        PointInTimeError: names collide, or the entity rows have no such key.
    """

    def join(table: pa.Table, time: str) -> pa.Table:
        for view in feature_views:
            name = view.projection.name_to_use()
            wanted = [feature for of, _, feature in (ref.partition(":") for ref in feature_refs) if of == name]
            prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
            if doubled := [prefix + feature for feature in wanted if prefix + feature in table.column_names]:
                raise PointInTimeError(f"two columns would be {', '.join(doubled)}: ask for full feature names")
            asked, place = _asked(table, time, view, wanted)
            found = look_up(asked)[place].to_arrow(compat_level=pl.CompatLevel.oldest())
            for feature, column in zip(wanted, found.columns, strict=True):
                table = table.append_column(prefix + feature, column)
        return table

    return historical_job(config, feature_refs, entity_df, registry, project, full_feature_names, join)


def _asked(table: pa.Table, time: str, view: FeatureView, wanted: Sequence[str]) -> tuple[Asked, pl.Series]:
    """What is asked of a view, and which of its rows each row of `table` is."""
    source, projection = view.batch_source, view.projection
    stored = {feast: column for column, feast in source.field_mapping.items()}
    keys = {
        projection.join_key_map.get(field.name, field.name): stored.get(field.name, field.name)
        for field in view.entity_columns
    }
    if missing := [name for name in keys if name not in table.column_names]:
        raise PointInTimeError(f"feature view {projection.name_to_use()}: the entity rows have no {', '.join(missing)}")
    rows = pl.DataFrame(table.select([*keys, time]))
    rows.columns = [*keys.values(), TIME]
    times = rows[TIME].dt.cast_time_unit("us")
    utc = times.dt.replace_time_zone("UTC") if times.dtype == pl.Datetime("us") else times.dt.convert_time_zone("UTC")
    rows = rows.with_columns(
        selectors.float().fill_nan(None).cast(pl.Int64),  # pandas made floats of keys of which some are missing
        utc.alias(TIME),
    )
    distinct = rows.unique(maintain_order=True).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias(ROW))
    place = rows.join(distinct, on=rows.columns, how="left", nulls_equal=True, maintain_order="left")[ROW]
    stamps = [stored.get(name, name) for name in (source.timestamp_field, source.created_timestamp_column) if name]
    features = [stored.get(feature, feature) for feature in wanted]
    return Asked(source, list(keys.values()), features, stamps, view.ttl or timedelta(0), distinct), place
