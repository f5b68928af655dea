"""Feast as it comes, on a home's offline tables and definitions: the peer of our stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feast import FeatureStore, RepoConfig

from feature_repo.definitions import define
from feature_repo.store import quiet


def plain_feast(home: Path, folder: Path, *, offline: dict[str, Any], online: dict[str, Any]) -> FeatureStore:
    """A store of Feast's own classes, with HOME's definitions registered in a folder and nothing materialised.

    The registry is a file that is read once: no request waits for it.

    Args:
        offline, online: Feast's settings.
    """
    configuration = RepoConfig(
        project="penstock",
        provider="local",
        registry={"path": str(folder / "registry.pb"), "cache_ttl_seconds": 0},
        offline_store=offline,
        online_store=online,
        # the faster way; without batches a table of several Arrow chunks is written up to its first only
        materialization={"pull_latest_features": True, "online_write_batch_size": 10_000},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=configuration)
    found = define(home.resolve(), configuration)
    with quiet():
        store.apply([*found.entities, *found.sources, *found.views, *found.on_demand, *found.services])
    return store
