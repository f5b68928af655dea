"""Our offline store through Feast itself: ten thousand histories, what Feast's own stores make of them, each option."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    RepoConfig,
    RequestSource,
    ValueType,
)
from feast.data_format import DeltaFormat
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float64, Int64, String

from feature_repo import offline_store
from penstock.point_in_time import PointInTimeError
from tests.histories import MINUTE, SPAN, START, TIME, histories, known

OURS = "feature_repo.offline_store.PointInTimeOfflineStore"
HISTORIES = 10_000
SEED = 20240502
FEATURES = {"value": Int64, "words": String, "numbers": Array(Int64)}
NAMES = [f"facts:{name}" for name in FEATURES]
ENTITY = Entity(name="entity", join_keys=["entity_id"], value_type=ValueType.INT64)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Feast prints and warns of (experiments, casts of its own joins) out of the test's sight."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.filterwarnings("ignore", module="(?!penstock|feature_repo)")
        yield


def a_view(path: Path, name: str = "facts", ttl: timedelta = timedelta(0), **options: Any) -> FeatureView:
    stamps = {"timestamp_field": "event", "created_timestamp_column": "created"}
    return FeatureView(
        name=name,
        entities=[ENTITY],
        schema=[Field(name="entity_id", dtype=Int64), *(Field(name=n, dtype=t) for n, t in FEATURES.items())],
        source=FileSource(name=f"{name}_source", path=str(path), **stamps | options),
        ttl=ttl,
    )


def a_store(folder: Path, objects: Sequence[Any], kind: str = OURS, latest: bool = True) -> FeatureStore:
    folder.mkdir(parents=True, exist_ok=True)
    config = RepoConfig(
        project="trial",
        provider="local",
        registry={"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
        offline_store={"type": kind},
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        materialization={"pull_latest_features": latest},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    with quiet():
        store.apply([ENTITY, *objects])
    return store


def written(path: Path, source: pl.DataFrame) -> Path:
    """A source file of `source` with features of each kind, all made of `value`."""
    source.with_columns(
        words=pl.format("row {}", "value"),
        numbers=pl.int_ranges(pl.col("value"), pl.col("value") + pl.col("value") % 4),
    ).write_parquet(path)
    return path


def of(value: int | None) -> tuple[int | None, str | None, list[int] | None]:
    """The features that `written` made of a value."""
    return (None, None, None) if value is None else (value, f"row {value}", list(range(value, value + value % 4)))


def facts(*rows: tuple[float, float], entity: int = 1) -> pl.DataFrame:
    """Source rows of an entity from (event, created) in minutes; `value` is the place."""
    return pl.DataFrame(
        {
            "entity_id": pl.Series([entity] * len(rows), dtype=pl.Int64),
            "event": pl.Series([START + event * MINUTE for event, _ in rows], dtype=TIME),
            "created": pl.Series([START + created * MINUTE for _, created in rows], dtype=TIME),
            "value": pl.Series(range(len(rows)), dtype=pl.Int64),
        }
    )


def at(*times: float, entity: Any = 1, **others: Any) -> pd.DataFrame:
    stamps = pd.Series([START + time * MINUTE for time in times], dtype="datetime64[us, UTC]")
    return pd.DataFrame({"entity_id": entity, "event_timestamp": stamps} | others)


def ask(store: FeatureStore, rows: pd.DataFrame, features: Any = ("facts:value",), **options: Any) -> pa.Table:
    with quiet():
        features = list(features) if isinstance(features, tuple) else features
        return store.get_historical_features(rows, features, **options).to_arrow()


def values(store: FeatureStore, rows: pd.DataFrame, **options: Any) -> list[int | None]:
    return ask(store, rows, **options)["value"].to_pylist()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame, pl.DataFrame]:
    """The file of ten thousand histories, its rows, and the entity rows."""
    source, asked = histories(HISTORIES, SEED)
    return written(tmp_path_factory.mktemp("many") / "facts.parquet", source), source, asked.with_row_index("row")


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame, pl.DataFrame]:
    """As `many`, a tenth of it."""
    source, asked = histories(HISTORIES // 10, SEED + 1)
    return written(tmp_path_factory.mktemp("some") / "facts.parquet", source), source, asked.with_row_index("row")


def test_ten_thousand_histories(many: tuple[Path, pl.DataFrame, pl.DataFrame], tmp_path: Path) -> None:
    path, source, asked = many
    brief = a_view(path, "brief", 4 * MINUTE)
    store = a_store(tmp_path, [a_view(path), brief])
    rows = asked.to_pandas()
    features = [*NAMES, *(f"brief:{name}" for name in FEATURES)]
    joined = ask(store, rows, tuple(features), full_feature_names=True, filter_by_created_timestamp=True)
    assert joined.column_names == [*asked.columns, *(feature.replace(":", "__") for feature in features)]
    pd.testing.assert_frame_equal(joined.select(asked.columns).to_pandas(), rows)
    for view, ttl in (("facts", None), ("brief", brief.ttl)):
        expected = [of(value) for value in known(source.rows(named=True), asked.rows(named=True), ttl=ttl)]
        found = [joined[f"{view}__{name}"].to_pylist() for name in FEATURES]
        assert list(zip(*found, strict=True)) == expected


def outcome(store: FeatureStore, source: pl.DataFrame, asked: pl.DataFrame, **options: Any) -> dict[str, list[int]]:
    """Numbers of the entity rows that a store lost, gave what had not arrived, or gave anything else than was known."""
    expected = known(source.rows(named=True), asked.rows(named=True))
    arrived = dict(source.select("value", "created").iter_rows())
    times = asked["event_timestamp"].to_list()
    joined = ask(store, asked.to_pandas(), **options)
    found = dict(zip(joined["row"].to_pylist(), joined["value"].to_pandas(), strict=True))
    plain = {row: None if pd.isna(value) else int(value) for row, value in found.items()}
    return {
        "lost": [row for row in range(asked.height) if row not in found],
        "leaked": [row for row, value in plain.items() if value is not None and arrived[value] > times[row]],
        "wrong": [row for row, value in plain.items() if value != expected[row]],
    }


def test_the_default_join_of_feast_leaks_and_loses(
    some: tuple[Path, pl.DataFrame, pl.DataFrame], tmp_path: Path
) -> None:
    """Why there is a store of ours: Feast's default store fails the comparison that ours passes.

    It gives rows that arrived after the entity row's time, and leaves out, in silence, entity rows whose features all
    lie in the future and all but one of equal entity rows. Measured on ten thousand histories: 37,321 rows asked,
    24,252 came back, of which 2,958 held a value that had not arrived. Its flag filter_by_created_timestamp ends the
    leak and loses as many rows.
    """
    path, source, asked = some
    assert not any(outcome(a_store(tmp_path / "ours", [a_view(path)]), source, asked).values())
    theirs = outcome(a_store(tmp_path / "file", [a_view(path)], "file"), source, asked)
    assert len(theirs["leaked"]) > 0
    assert len(theirs["lost"]) > 0
    assert len(theirs["wrong"]) > 0


def test_the_duckdb_join_of_feast_leaks_without_its_flag_and_draws_lots_with_it(
    some: tuple[Path, pl.DataFrame, pl.DataFrame], tmp_path: Path
) -> None:
    """Feast's DuckDB store keeps all entity rows, in no order, and leaks unless it is told not to at each call.

    With filter_by_created_timestamp it agrees with the oracle but where two rows of an entity have both stamps equal:
    it takes one of them, now this and now that (2,911 and 2,997 of 37,321 rows differed in two equal runs).
    """
    path, source, asked = some
    store = a_store(tmp_path, [a_view(path)], "duckdb")
    theirs = outcome(store, source, asked)
    assert len(theirs["leaked"]) > 0
    assert len(theirs["lost"]) == 0
    flagged = outcome(store, source, asked, filter_by_created_timestamp=True)
    assert len(flagged["lost"]) == len(flagged["leaked"]) == 0
    equal = set(source.filter(pl.struct("entity_id", "event", "created").is_duplicated())["value"])
    expected = known(source.rows(named=True), asked.rows(named=True))
    assert all(expected[row] in equal for row in flagged["wrong"])


def test_the_flag_changes_nothing(tmp_path: Path) -> None:
    store = a_store(tmp_path, [a_view(written(tmp_path / "facts.parquet", facts((0, 0), (1, 5))))])
    for flag in (False, True):
        assert values(store, at(0, 1, 4, 5), filter_by_created_timestamp=flag) == [0, 0, 0, 1]


def test_dtypes_of_both_sides_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "facts.parquet", facts((0, 0), (1, 1), (2, 2), (3, 3)))
    types = {"value": pa.int64(), "words": pa.string(), "numbers": pa.list_(pa.int64())}
    narrow = pq.read_table(path)
    schema = [pa.field(field.name, types.get(field.name, field.type)) for field in narrow.schema]
    pq.write_table(narrow.cast(pa.schema(schema)), path, store_schema=False)
    store = a_store(tmp_path, [a_view(path)])
    rows = at(
        3,
        -1,
        2,
        entity=pd.array([1, 1, None], dtype="Int64"),
        label=pd.Categorical(["a", "b", "a"]),
        weight=pd.array([1, 2, 3], dtype="int8"),
        said=pd.array([True, None, False], dtype="boolean"),
        name=["x", None, "y"],
    )
    rows.index = [7, 7, 5]
    joined = ask(store, rows, tuple(NAMES))
    assert {name: joined.schema.field(name).type for name in FEATURES} == types
    assert joined.select(FEATURES).to_pylist() == [dict(zip(FEATURES, of(v), strict=True)) for v in (3, None, None)]
    pd.testing.assert_frame_equal(joined.select(list(rows)).to_pandas(), rows.reset_index(drop=True))


def test_chunks_make_no_difference(
    some: tuple[Path, pl.DataFrame, pl.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, asked = some
    store = a_store(tmp_path, [a_view(path)])
    whole = ask(store, asked.to_pandas(), tuple(NAMES))
    monkeypatch.setattr(offline_store, "CHUNK_ROWS", 100)
    parts = ask(store, asked.to_pandas(), tuple(NAMES))
    assert parts["value"].num_chunks > 10
    assert parts.equals(whole)


def test_a_view_joined_twice_under_other_names(tmp_path: Path) -> None:
    source = pl.concat([facts((0, 0), (5, 5)), facts((0, 0), (5, 9), entity=2).with_columns(pl.col("value") + 10)])
    view = a_view(written(tmp_path / "facts.parquet", source))
    service = FeatureService(
        name="both",
        features=[
            view.with_name("sender").with_join_key_map({"entity_id": "from_id"})[["value"]],
            view.with_name("receiver").with_join_key_map({"entity_id": "to_id"})[["value", "words"]],
        ],
    )
    store = a_store(tmp_path, [view, service])
    rows = at(4, 5, 9).drop(columns="entity_id").assign(from_id=[1, 2, 2], to_id=[2, 1, 7])
    joined = ask(store, rows, store.get_feature_service("both"), full_feature_names=True)
    assert joined.column_names == [*rows, "sender__value", "receiver__value", "receiver__words"]
    assert joined["sender__value"].to_pylist() == [0, 10, 11]
    assert joined["receiver__value"].to_pylist() == [10, 1, None]
    assert joined["receiver__words"].to_pylist() == ["row 10", "row 1", None]
    with pytest.raises(PointInTimeError, match=r"feature view receiver: the entity rows have no to_id"):
        ask(store, rows.drop(columns="to_id"), store.get_feature_service("both"), full_feature_names=True)


@pytest.mark.parametrize("stamps", [("happened", "arrived"), ("event", "created")])
def test_fields_of_other_names_in_the_file(stamps: tuple[str, str], tmp_path: Path) -> None:
    """Stamps may be given by the file's names or by those they are mapped to; materialisation reads them alike."""
    mapping = {"id": "entity_id", "happened": "event", "arrived": "created", "amount": "value"}
    path = written(tmp_path / "facts.parquet", facts((0, 0), (1, 5)))
    pl.read_parquet(path).rename({new: old for old, new in mapping.items()}).write_parquet(path)
    view = a_view(path, field_mapping=mapping, timestamp_field=stamps[0], created_timestamp_column=stamps[1])
    store = a_store(tmp_path, [view])
    joined = ask(store, at(0, 4, 5), ("facts:value", "facts:words"))
    assert joined["value"].to_pylist() == [0, 0, 1]
    assert joined["words"].to_pylist() == ["row 0", "row 0", "row 1"]
    if stamps[0] == "event":  # what Feast's engine for materialisation looks for after renaming
        with quiet():
            store.materialize(START - timedelta(days=1), START + 4 * MINUTE)
        assert online(store, [1]) == {1: of(0)}


def test_on_demand_views_are_computed_on_the_joined_rows(tmp_path: Path) -> None:
    view = a_view(written(tmp_path / "facts.parquet", facts((0, 0), (1, 1), (2, 9))))
    request = RequestSource(name="request", schema=[Field(name="factor", dtype=Int64)])

    @on_demand_feature_view(sources=[view, request], schema=[Field(name="scaled", dtype=Float64)], mode="python")
    def scaled(inputs: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(inputs["value"], inputs["factor"], strict=True)
        return {"scaled": [None if value is None else value * factor / 2 for value, factor in pairs]}

    store = a_store(tmp_path, [view, scaled])
    rows = at(-1, 1, 8, 9, factor=[3, 3, 5, 5])
    joined = ask(store, rows, ("facts:value", "scaled:scaled"))
    assert joined["value"].to_pylist() == [None, 1, 1, 2]
    assert joined["scaled"].to_pylist() == [None, 1.5, 2.5, 5.0]
    assert joined["factor"].to_pylist() == [3, 3, 5, 5]
    full = ask(store, rows, ("facts:value", "scaled:scaled"), full_feature_names=True)
    assert full["scaled__scaled"].to_pylist() == [None, 1.5, 2.5, 5.0]
    alone = ask(store, rows, ("scaled:scaled",))
    assert alone["scaled"].to_pylist() == [None, 1.5, 2.5, 5.0]


def test_no_rows_on_either_side(tmp_path: Path) -> None:
    full, empty = (
        written(tmp_path / f"{n}.parquet", rows) for n, rows in (("full", facts((0, 0))), ("empty", facts()))
    )
    store = a_store(tmp_path, [a_view(full), a_view(empty, "nothing")])
    assert (
        ask(store, at(1, 2), tuple(f"nothing:{name}" for name in FEATURES)).select(FEATURES).to_pylist()
        == [dict.fromkeys(FEATURES)] * 2
    )
    nobody = ask(store, at().astype({"entity_id": "int64"}), tuple(NAMES))
    assert nobody.num_rows == 0
    assert nobody.schema.types[2:] == ask(store, at(1), tuple(NAMES)).schema.types[2:]
    with quiet():
        store.materialize(START - timedelta(days=1), START, feature_views=["nothing"])


def test_naive_times_are_utc(tmp_path: Path) -> None:
    naive = facts((0, 0), (60, 60)).with_columns(pl.col("event", "created").dt.replace_time_zone(None))
    store = a_store(tmp_path, [a_view(written(tmp_path / "facts.parquet", naive))])
    rows = at(59, 60)
    assert values(store, rows) == [0, 1]
    assert values(store, rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_localize(None))) == [0, 1]
    assert values(store, rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_convert("Asia/Tokyo"))) == [0, 1]
    assert values(store, rows.rename(columns={"event_timestamp": "asked_at"})) == [0, 1]


def test_integer_keys_that_pandas_made_floats(tmp_path: Path) -> None:
    store = a_store(tmp_path, [a_view(written(tmp_path / "facts.parquet", facts((0, 0))))])
    rows = at(1, 1, 1, entity=[1, None, 2])
    assert rows["entity_id"].dtype == float
    joined = ask(store, rows)
    assert joined["value"].to_pylist() == [0, None, None]
    assert joined["entity_id"].type == pa.float64()
    with pytest.raises(PointInTimeError, match="entity_id of the entity rows is Float64, of the source Int64"):
        ask(store, at(1, entity=[1.5]))
    with pytest.raises(PointInTimeError, match="entity_id of the entity rows is Float64, of the source Int64"):
        ask(store, at(1, entity=[2.0**60]))


def test_what_cannot_be_joined_is_said_in_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "facts.parquet", facts((0, 0), (1, 1)))
    lacking = a_view(path, "lacking", timestamp_field="absent")
    gone = a_view(written(tmp_path / "gone.parquet", facts((0, 0))), "gone")
    unstamped = facts((0, 0), (1, 1)).with_columns(created=pl.lit(None, TIME))
    timeless = a_view(written(tmp_path / "timeless.parquet", unstamped), "timeless")
    store = a_store(tmp_path, [a_view(path), lacking, gone, timeless])
    (tmp_path / "gone.parquet").unlink()
    rows = at(1)
    for error, given, features, message in (
        (PointInTimeError, at(1, entity="1"), "facts", "feature view facts: entity_id of the entity rows is String"),
        (PointInTimeError, rows.drop(columns="entity_id"), "facts", "the entity rows have no entity_id"),
        (PointInTimeError, rows.assign(value=0), "facts", "two columns would be value: ask for full feature names"),
        (PointInTimeError, rows.astype({"event_timestamp": str}), "facts", "event_timestamp .* is String"),
        (PointInTimeError, rows, "lacking", r"feature view lacking: its source .*facts.parquet has no column absent"),
        (PointInTimeError, rows, "gone", r"feature view gone: its source .*gone.parquet cannot be read: No such file"),
        (PointInTimeError, rows, "timeless", "2 of the 2 rows of the source have no created"),
        (NotImplementedError, "SELECT 1 AS entity_id", "facts", "a pandas DataFrame, not to SQL"),
        (NotImplementedError, None, "facts", "a pandas DataFrame, not to a range of time"),
    ):
        with pytest.raises(error, match=message) as raised:
            ask(store, given, (f"{features}:value",))
        assert "\n" not in str(raised.value)


def test_a_source_must_be_parquet(tmp_path: Path) -> None:
    view = a_view(tmp_path / "table", file_format=DeltaFormat())
    store = a_store(tmp_path, [])
    job = offline_store.PointInTimeOfflineStore.get_historical_features(
        store.config, [view], ["facts:value"], at(1), store.registry, store.project
    )
    with pytest.raises(PointInTimeError, match="feature view facts: its source facts_source is no Parquet file"):
        job.to_arrow()


def test_a_view_that_is_pushed_to_has_the_file_of_its_source(tmp_path: Path) -> None:
    view = a_view(written(tmp_path / "facts.parquet", facts((0, 0), (1, 5))))
    pushed = FeatureView(
        name="pushed",
        entities=[ENTITY],
        schema=view.schema,
        source=PushSource(name="push", batch_source=view.batch_source),
        ttl=timedelta(0),
    )
    assert ask(a_store(tmp_path, [pushed]), at(4, 5), ("pushed:value",))["value"].to_pylist() == [0, 1]


def online(store: FeatureStore, entities: Sequence[int]) -> dict[int, tuple[Any, ...]]:
    with quiet():
        found = store.get_online_features(NAMES, [{"entity_id": entity} for entity in entities]).to_dict()
    rows = zip(*(found[name] for name in FEATURES), strict=True)
    return dict(zip(found["entity_id"], rows, strict=True))


@pytest.mark.parametrize("step", [3, SPAN])
def test_online_is_offline_at_the_time_of_materialisation(
    step: int, some: tuple[Path, pl.DataFrame, pl.DataFrame], tmp_path: Path
) -> None:
    """By and by, or in two steps: what arrived after the last is not there, what arrived late between them is."""
    path, source, _ = some
    store = a_store(tmp_path, [a_view(path)])
    until = START + 12 * MINUTE
    ends = [START + minute * MINUTE for minute in range(-1, 12, step)]
    for since, end in itertools.pairwise([START - timedelta(days=1), *ends, until]):
        with quiet():
            store.materialize(since, end)
    entities = range(HISTORIES // 10)
    at_until = [{"entity_id": entity, "event_timestamp": until} for entity in entities]
    expected = known(source.rows(named=True), at_until)
    assert online(store, entities) == {entity: of(value) for entity, value in zip(entities, expected, strict=True)}
    assert values(store, pd.DataFrame(at_until)) == expected
    assert source.filter(pl.col("event") <= until, pl.col("created") > until).height > 0


def test_materialising_in_another_way_is_refused(tmp_path: Path) -> None:
    """Feast's default pulls all rows that happened by then, and takes the newest of them even if it had not arrived."""
    view = a_view(written(tmp_path / "facts.parquet", facts((0, 0), (1, 9))))
    since, until = START - timedelta(days=1), START + 4 * MINUTE
    theirs = a_store(tmp_path / "theirs", [view], "duckdb", latest=False)
    with quiet():
        theirs.materialize(since, until)
    assert online(theirs, [1]) == {1: of(1)}
    ours = a_store(tmp_path / "ours", [view], latest=False)
    with quiet(), pytest.raises(PointInTimeError, match="pull_latest_features: true"):
        ours.materialize(since, until)
    right = a_store(tmp_path / "right", [view])
    with quiet():
        right.materialize(since, until)
    assert online(right, [1]) == {1: of(0)}


def test_a_join_can_be_kept_as_a_data_set(tmp_path: Path) -> None:
    view = a_view(written(tmp_path / "facts.parquet", facts((0, 0), (1, 9))))
    store = a_store(tmp_path, [view])
    kept = tmp_path / "kept.parquet"
    with quiet():
        job = store.get_historical_features(at(0, 2, 9), NAMES)
        store.create_saved_dataset(job, "kept", SavedDatasetFileStorage(str(kept)))
    assert pl.read_parquet(kept)["value"].to_list() == [0, 0, 1]
    assert job.metadata.min_event_timestamp == START
    assert job.metadata.max_event_timestamp == datetime(2024, 5, 1, 0, 9, tzinfo=UTC)
