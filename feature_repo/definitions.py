"""What Feast is told: entities, sources, views and services, made from `penstock.features`.

Feast's command imports this file as `definitions`, from the folder and with PENSTOCK_HOME; our own code calls `define`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import polars as pl
from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Array, FeastType, Float32, Int64, String

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # the feast command knows this folder only

from penstock.features import SERVICES, VIEWS  # noqa: E402

NEVER = timedelta(0)
"""No expiry: an old value is better than a missing one, and a missing one would be silent."""


@dataclass(frozen=True)
class Definitions:
    """All objects of the repository, in the order in which Feast needs them."""

    entities: tuple[Entity, ...]
    sources: tuple[FileSource, ...]
    views: tuple[FeatureView, ...]
    services: tuple[FeatureService, ...]


def _type(dtype: pl.DataType) -> FeastType:
    if isinstance(dtype, pl.List):
        return Array(Int64)
    if isinstance(dtype, pl.String):
        return String
    return Float32 if dtype.is_float() else Int64


def define(home: Path) -> Definitions:
    """The repository's objects, reading HOME/features/<view>.parquet."""
    entities = {
        name: Entity(name=name, join_keys=[f"{name}_id"], value_type=ValueType.INT64, description=description)
        for name, description in (("user", "who is recommended to"), ("item", "what is recommended"))
    }
    sources = {
        view.name: FileSource(
            name=f"{view.name}_source",
            path=str(home / "features" / f"{view.name}.parquet"),
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
            description=f"snapshots of {view.name} as penstock.features makes them of the log",
        )
        for view in VIEWS
    }
    views = {
        view.name: FeatureView(
            name=view.name,
            entities=[entities[view.entity]],
            schema=[
                Field(name=view.key, dtype=Int64),
                *(Field(name=f.name, dtype=_type(f.dtype), description=f.description) for f in view.features),
            ],
            source=sources[view.name],
            ttl=NEVER,
            online=True,
            description=view.description,
            tags={"room": "features", "entity": view.entity, "window": view.window},
        )
        for view in VIEWS
    }
    services = [
        FeatureService(
            name=name,
            features=[views[view] for view in members],
            description=f"what the {name.split('_')[0]} model is given",
            tags={"stage": name.split("_")[0], "version": name.split("_v")[1]},
        )
        for name, members in SERVICES.items()
    ]
    return Definitions(tuple(entities.values()), tuple(sources.values()), tuple(views.values()), tuple(services))


_all = define(Path(os.environ.get("PENSTOCK_HOME", ROOT / "var" / "current")))
user, item = _all.entities
user_profile, user_history, user_activity, item_profile, item_statistics = _all.views
recall_v1, rank_v1 = _all.services
