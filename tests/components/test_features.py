"""The way of a log through ingest, validate, materialise and build_examples, as the components run it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from kfp import dsl

from components.build_examples import build_examples
from components.ingest import ingest
from components.materialise import materialise
from components.validate import validate
from penstock.events import EVENTS, ITEMS, LogError, read_events, read_table
from penstock.feedback import FeedbackLog
from tests.small_log import START, Row, an_event, write_log


def artifact(path: Path) -> dsl.Dataset:
    return dsl.Dataset(uri=str(path))


def a_week(rows: int = 300) -> list[Row]:
    """Events over six days, all good."""
    return [
        an_event(n, n % 5, n % 7, START + timedelta(days=6) * (n / rows), click=n % 2, long_view=n % 2, like=n % 3 // 2)
        for n in range(rows)
    ]


def run_validate(log: Path, out: Path, max_bad_share: float = 0.1) -> tuple[int, int, float]:
    outputs: tuple[int, int, float] = validate.python_func(
        max_bad_share=max_bad_share,
        log=artifact(log),
        validated=artifact(out / "validated"),
        quarantine=artifact(out / "quarantine"),
        docs=artifact(out / "docs"),
    )
    return outputs


@pytest.mark.parametrize("with_feedback", [False, True])
def test_ingest_adds_the_gateways_feedback(tmp_path: Path, with_feedback: bool) -> None:
    source = write_log(tmp_path / "source", a_week(20))
    feedback = tmp_path / "feedback"
    if with_feedback:
        with FeedbackLog(feedback) as told:
            told.impressions(
                2**52,
                1,
                [3, 4],
                time_ms=1_772_000_000_000,
                scenario=0,
                device=1,
                release=2,
                variant="champion",
                features_us=1_771_999_200_000_000,
            )
            told.outcomes(2**52, [{"item_id": 4, "click": 1}])
    ingest.python_func(
        source="canonical",
        options=json.dumps({"path": str(source)}),
        feedback=str(feedback),
        log=artifact(tmp_path / "log"),
    )
    events = read_events(tmp_path / "log")
    assert events.filter(pl.col("release").is_null()).equals(read_events(source))
    shown = events.filter(pl.col("release") == 2).sort("position")
    assert shown.select("item_id", "click").rows() == ([(3, 0), (4, 1)] if with_feedback else [])


def test_ingest_names_what_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown datasets 'nowhere': there are .*simulator"):
        ingest.python_func(source="nowhere", options="{}", feedback="", log=artifact(tmp_path / "log"))
    with pytest.raises(ValueError, match=r"unknown parameter colour"):
        ingest.python_func(source="simulator", options='{"colour": 1}', feedback="", log=artifact(tmp_path / "log"))


def test_a_good_log_passes_whole(tmp_path: Path) -> None:
    histories = [{"user_id": 1, "event_time": START, "created_time": START, "items": [1, 2]}]
    log = write_log(tmp_path / "log", a_week(), histories)
    rows, quarantined, share = run_validate(log, tmp_path, max_bad_share=0.0)
    assert (rows, quarantined, share) == (300 + 5 + 7 + 1, 0, 0.0)
    assert read_events(tmp_path / "validated").equals(read_events(log))
    for name in ("users", "items", "histories"):
        left, right = (pl.read_parquet(folder / f"{name}.parquet") for folder in (log, tmp_path / "validated"))
        assert left.equals(right)
        assert f"{name}.html" in (tmp_path / "docs" / "index.html").read_text()
    assert "must be between 0 and 1000" not in (tmp_path / "docs" / "index.html").read_text()
    quarantine = pl.read_parquet(tmp_path / "quarantine")
    assert quarantine.is_empty()
    assert {"table", "reason", *EVENTS.schema} <= set(quarantine.columns)


def spoil(log: Path) -> dict[int, str]:
    """Makes one bad row for each kind of rule; event id → reason."""
    events = read_events(log)
    first = pl.col("event_id")
    spoilt = events.with_columns(
        click=pl.when(first == 10).then(2).otherwise("click").cast(pl.Int8),
        scenario=pl.when(first == 20).then(-1).otherwise("scenario"),
        watch_time_ms=pl.when(first == 30).then(None).otherwise("watch_time_ms"),
        created_time=pl.when(first == 40).then(pl.col("event_time") - timedelta(seconds=1)).otherwise("created_time"),
        user_id=pl.when(first == 50).then(999).otherwise("user_id"),
        item_id=pl.when(first == 60).then(999).when(first == 10).then(999).otherwise("item_id"),
        position=pl.when(first == 70).then(None).otherwise("position"),  # may be null
    )
    spoilt = pl.concat([spoilt, spoilt.filter(first == 80)])
    for path in (log / "events").glob("*/*.parquet"):
        day = path.parent.name.removeprefix("dt=")
        spoilt.filter(pl.col("event_time").dt.date().cast(pl.String) == day).write_parquet(path)
    items = pl.read_parquet(log / "items.parquet")
    tags = [[-5], [1, None], *items["tags"].to_list()[2:]]
    items.with_columns(tags=pl.Series(tags, dtype=items.schema["tags"])).write_parquet(log / "items.parquet")
    return {
        10: "click must be between 0 and 1; item_id must be in items",
        20: "scenario must be between 0 and 1000",
        30: "watch_time_ms must not be null",
        40: "created_time must not be before event_time",
        50: "user_id must be in users",
        60: "item_id must be in items",
        80: "event_id must be unique",
    }


def test_bad_rows_are_put_aside_with_every_reason(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", a_week())
    expected = spoil(log)
    rows, quarantined, share = run_validate(log, tmp_path, max_bad_share=0.5)

    quarantine = pl.read_parquet(tmp_path / "quarantine")
    bad = quarantine.filter(pl.col("table") == "events")
    # the items 0 and 1 are bad themselves, and with them the events that show them
    shown = {n for n in range(300) if n % 7 in (0, 1) and n not in (10, 60)}
    why = {n: [] for n in [*expected, *shown]}
    for n in why:
        why[n] = [*([expected[n]] if n in expected else []), *(["item_id must be in items"] if n in shown else [])]
    assert dict(bad.select("event_id", "reason").iter_rows()) == {n: "; ".join(reasons) for n, reasons in why.items()}
    items = quarantine.filter(pl.col("table") == "items").select("item_id", "reason").rows()
    assert items == [(0, "tags must be at least 0; tags must be at least 0"), (1, "tags must not hold nulls")]

    good = read_events(tmp_path / "validated")
    assert good.height + bad.height == 301
    assert quarantined == bad.height + 2
    assert rows == 301 + 5 + 7
    assert share == pytest.approx(max(bad.height / 301, 2 / 7))
    assert good["event_id"].to_list().count(80) == 1
    assert read_table(tmp_path / "validated" / "items.parquet", ITEMS)["item_id"].to_list() == [2, 3, 4, 5, 6]
    assert "events.item_id must be in items" in (tmp_path / "docs" / "index.html").read_text()


def test_too_many_bad_rows_fail_the_run(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", a_week())
    spoil(log)
    with pytest.raises(LogError, match=r"2 of 7 items \(28\.57%\) break the rules .* max_bad_share = 10\.00% .*tags"):
        run_validate(log, tmp_path)
    assert not (tmp_path / "validated").exists()
    with pytest.raises(ValueError, match="between 0 and 1, not 3"):
        run_validate(log, tmp_path, max_bad_share=3)


def test_a_log_becomes_features_and_examples(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", a_week())
    home = tmp_path / "home"
    features, examples = artifact(tmp_path / "features"), artifact(tmp_path / "examples")
    materialise.python_func(home=str(home), validated=artifact(log), features=features)
    tables = json.loads((tmp_path / "features" / "tables.json").read_text())
    assert {name: table["online"] for name, table in tables.items()} == {
        "user_profile": 5,
        "user_history": 5,
        "user_activity": 5,
        "item_profile": 7,
        "item_statistics": 7,
    }
    build_examples.python_func(
        home=str(home), validation_days=1, test_days=1, validated=artifact(log), features=features, examples=examples
    )
    slices = [pl.read_parquet(tmp_path / "examples" / f"{name}.parquet") for name in ("train", "validation", "test")]
    rows = pl.concat(slices)
    assert rows.select(*EVENTS.schema).sort("event_id").equals(read_events(log).sort("event_id"))
    assert {"history_items", "item_click_rate", "hour", "weekday", "item_age_hours"} <= set(rows.columns)
    assert (rows["hour"] == rows["event_time"].dt.hour()).all()
    assert rows.filter(pl.col("event_time") == START)["history_items"].to_list() == [[]]
