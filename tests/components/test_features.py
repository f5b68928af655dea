"""The way of a validated log through materialise and build_examples, as the components run it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import polars as pl
from kfp import dsl

from components.build_examples import build_examples
from components.materialise import materialise
from penstock.events import EVENTS, read_events
from penstock.examples import FEATURES
from tests.small_log import START, Row, an_event, write_log


def artifact(path: Path) -> dsl.Dataset:
    return dsl.Dataset(uri=str(path))


def a_week(rows: int = 300) -> list[Row]:
    """Events over six days."""
    return [
        an_event(n, n % 5, n % 7, START + timedelta(days=6) * (n / rows), click=n % 2, long_view=n % 2, like=n % 3 // 2)
        for n in range(rows)
    ]


def test_a_log_becomes_features_and_examples(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", a_week())
    home = tmp_path / "home"
    features, examples = artifact(tmp_path / "features"), artifact(tmp_path / "examples")
    materialise.python_func(home=str(home), validated=artifact(log), features=features)
    tables = json.loads((tmp_path / "features" / "tables.json").read_text())
    assert {name: table["online"] for name, table in tables.items()} == {
        "user_profile": 5,
        "user_activity": 5,
        "item_profile": 7,
        "item_statistics": 7,
        "scenario_statistics": 1,
    }
    build_examples.python_func(
        home=str(home), validation_days=1, test_days=1, validated=artifact(log), features=features, examples=examples
    )
    slices = [pl.read_parquet(tmp_path / "examples" / f"{name}.parquet") for name in ("train", "validation", "test")]
    rows = pl.concat(slices)
    assert rows.select(*EVENTS.schema).sort("event_id").equals(read_events(log).sort("event_id"))
    assert {*(feature.name for feature in FEATURES), "hour", "weekday"} <= set(rows.columns)
    assert (rows["hour"] == rows["event_time"].dt.hour()).all()
    assert rows.filter(pl.col("event_time") == START)["history_items"].to_list() == [[]]
