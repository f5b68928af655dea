"""Reading features for serving, and telling the store what users did since the last materialisation."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
from feast import FeatureStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from feature_repo.configuration import StoreError, addresses, reaching
from feature_repo.materialised import IN_MEMORY, Materialised, ServingTable, path_of, read_materialised, table_path
from feature_repo.on_demand import as_column
from feature_repo.online_store import PackedOnlineStore
from feature_repo.store import EPOCH, check_service, open_store
from penstock.activity import Activity
from penstock.features import SERVICES, STAMPS, VIEWS, Column, OnDemand, Ragged, View, on_demand_of, views_of

ACTIVITY = next(view for view in VIEWS if view.name == "user_activity")
OF_ITEMS = {feature.name for view in VIEWS if view.entity == "item" for feature in view.features}


@dataclass(frozen=True)
class Request:
    """What a request says of itself: when it is made (ms since 1970), and the log's columns of that name."""

    time_ms: int
    scenario: int
    device: int

    def columns(self) -> dict[str, Column]:
        """One row each, as on-demand features read them."""
        return {
            "time_ms": np.array([self.time_ms], np.int64),
            "scenario": np.array([self.scenario], np.int64),
            "device": np.array([self.device], np.int64),
        }


class Online:
    """Reads the newest values for serving; one for a process, shared by its threads.

    What is pushed is read from the online store at each call. What changes with a materialisation lies in memory as
    the last one left it; the next one is taken up, all its tables together, when it is complete. Definitions are looked
    up once: after `apply` of others, open a new one.

    Raises:
        StoreError: the definitions are not registered, or there was no materialisation; and so do all methods when the
            online store does not answer.
    """

    def __init__(self, home: Path) -> None:
        self._home, self._path = home, str(path_of(home))
        # a connection on which one thread writes is none that others can read on
        self._store, self._pushes = open_store(home), open_store(home)
        self._pushing = threading.Lock()
        for service in SERVICES:
            check_service(self._store, service)
        with reaching(self._store.config):
            self._views = {view.name: self._store.get_feature_view(view.name) for view in VIEWS}
        source = f"{ACTIVITY.name}_push"
        self._pushed = [
            name for name, view in self._views.items() if view.stream_source and view.stream_source.name == source
        ]
        self._switching = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._current: tuple[Materialised, dict[str, ServingTable]] = (Materialised(0, 0, 0), {})
        self.materialised()

    def materialised(self) -> Materialised:
        """The materialisation that is served."""
        return self._tables()[0]

    def user(self, user_id: int, service: str, request: Request, *, pushed: bool = True) -> dict[str, Column]:
        """One row: stored features of the user and the request's scenario, and what is computed without an item.

        Args:
            pushed: False leaves the online store alone: what it holds is taken to be nothing, as of a new user.
        """
        tables = self._tables()[1]
        keys = {"user": user_id, "scenario": request.scenario}
        columns: dict[str, Column] = {}
        for view in views_of(service):
            if view.freshness == "pushed":
                columns |= self._read(view, [user_id]) if pushed else _nothing(view)
            elif view.entity in keys:
                columns |= tables[view.name].take(np.array([keys[view.entity]]))
        return columns | _computed(on_demand_of(service), columns | request.columns(), of_items=False)

    def items(
        self, ids: Sequence[int] | np.ndarray, service: str, user: Mapping[str, Column], request: Request
    ) -> dict[str, Column]:
        """A row an item: stored features, and what is computed of them, of the request and of what `user` returned."""
        tables = self._tables()[1]
        keys = np.asarray(ids, np.int64)
        columns: dict[str, Column] = {}
        for view in views_of(service):
            if view.entity == "item":
                columns |= tables[view.name].take(keys)
        return columns | _computed(on_demand_of(service), {**user, **columns, **request.columns()}, of_items=True)

    def activity(self, user_ids: Sequence[int]) -> dict[int, Activity]:
        """What users did, as the store holds it; an empty one of whom it does not know."""
        columns = self._read(ACTIVITY, user_ids)
        lists = {name: column.lists() if isinstance(column, Ragged) else column for name, column in columns.items()}
        return {
            user: Activity.of({name: values[row] for name, values in lists.items()})  # type: ignore[misc]
            for row, user in enumerate(user_ids)
        }

    def authors_and_tags(self, item_ids: Sequence[int]) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Author and tags of those items that the last materialisation knew."""
        profiles, keys = self._tables()[1]["item_profile"], np.array(item_ids, np.int64)
        keys = keys[profiles.holds(keys)]
        columns = profiles.take(keys)
        authors, tags = columns["author_id"], columns["tags"]
        assert isinstance(authors, np.ndarray)
        assert isinstance(tags, Ragged)
        return {
            item: (author, tuple(of.tolist()))
            for item, author, of in zip(keys.tolist(), authors.tolist(), tags.lists(), strict=True)
        }

    def catalogue(self) -> pl.DataFrame:
        """The items that the last materialisation knew: id, author, category, music and tags."""
        profiles = self._tables()[1]["item_profile"]
        columns = profiles.take(profiles.keys)
        found: dict[str, Any] = {"item_id": profiles.keys}
        for name in ("author_id", "category", "music_id", "tags"):
            column = columns[name]
            found[name] = [of.tolist() for of in column.lists()] if isinstance(column, Ragged) else column
        return pl.DataFrame(found, schema_overrides={"tags": pl.List(pl.Int64)})

    def push(self, activities: Mapping[int, Activity]) -> None:
        """Writes what users did, through Feast's push source: the next read has it."""
        # later than anything that was materialised, whatever clock the log has: some stores keep the later row
        now = max(datetime.now(UTC), EPOCH + timedelta(microseconds=self.materialised().cutoff_us + 1))
        frame = pd.DataFrame(
            [
                {ACTIVITY.key: user, **activity.stored(), **dict.fromkeys(STAMPS, now)}
                for user, activity in activities.items()
            ]
        )
        if frame.empty:
            return
        try:
            # Feast's push, without its look through the registry for services that are computed ahead: there are none,
            # and it takes three times as long as the rest
            with self._pushing:
                for name in self._pushed:
                    self._pushes.write_to_online_store(name, frame)
        except Exception as error:
            raise _away(self._pushes, error) from error

    def _tables(self) -> tuple[Materialised, dict[str, ServingTable]]:
        """The newest materialisation and its tables."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError as error:
            raise StoreError(f"nothing is materialised in {self._home}: run the prepare DAG") from error
        seen = (status.st_ino, status.st_mtime_ns)
        if seen != self._seen:
            with self._switching:
                newest = read_materialised(self._home)
                if newest != self._current[0]:
                    tables = {
                        view.name: ServingTable(table_path(self._home, newest.version, view.name), view)
                        for view in IN_MEMORY
                    }
                    self._current = (newest, tables)
                self._seen = seen
        return self._current

    def _read(self, view: View, ids: Sequence[int]) -> dict[str, Column]:
        """What the store holds of each entity, defaults where it holds nothing."""
        config, table = self._store.config, self._views[view.name]
        try:
            online = self._store._get_provider().online_store
            if isinstance(online, PackedOnlineStore):
                rows = online.read_rows(config, table, [int(key) for key in ids])
            else:
                keys = [EntityKey(join_keys=[view.key], entity_values=[Value(int64_val=int(key))]) for key in ids]
                found = online.online_read(config, table, keys, [feature.name for feature in view.features])
                rows = [{name: _value(value) for name, value in (values or {}).items()} for _, values in found]
        except Exception as error:
            raise _away(self._store, error) from error
        return {
            feature.name: as_column([row.get(feature.name) for row in rows], feature.dtype) for feature in view.features
        }


def _nothing(view: View) -> dict[str, Column]:
    """One row of defaults."""
    return {feature.name: as_column([None], feature.dtype) for feature in view.features}


def _away(store: FeatureStore, error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    store._provider = None  # a connection that is broken stays so: the next call makes another
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return StoreError(f"the online store ({addresses(store.config)['online store']}) does not answer: {reason}")


def _computed(wanted: Sequence[OnDemand], columns: Mapping[str, Column], *, of_items: bool) -> dict[str, Column]:
    """The on-demand features that read an item, or those that do not."""
    found: dict[str, Column] = {}
    for on_demand in wanted:
        if of_items == any(name in OF_ITEMS for name in on_demand.inputs):
            found |= on_demand.compute(columns)
    return found


def _value(value: Value) -> Any:
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    found = getattr(value, kind)
    return found.val if hasattr(found, "val") else found
