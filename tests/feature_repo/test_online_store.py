"""The packed online store by itself: every type of Feast, any key, and whatever happens to a database."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from feast.types import (
    Array,
    Bool,
    Bytes,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    Map,
    String,
    UnixTimestamp,
)

from feature_repo import online_store
from feature_repo.configuration import StoreError
from feature_repo.materialised import read_materialised
from feature_repo.online_store import Layout, PackedOnlineStore
from feature_repo.store import EPOCH, apply, open_store, quiet
from penstock.features import VIEWS, Ragged

NOW = datetime(2026, 3, 1, 12, 30, 15, 123_456, tzinfo=UTC)

Typed = list[tuple[str, FeastType, list[Any]]]
EVERY_TYPE: Typed = [
    ("whole", Int64, [0, -1, 2**63 - 1, -(2**63)]),
    ("fraction", Float32, [0.0, 1.5, np.float32(0.1), -1e30]),
    ("text", String, ["", "a", "ü — 漢字", 'q"\0\n' * 300]),
    ("wholes", Array(Int64), [[], [1], [2**63 - 1, -(2**63)], list(range(-9, 500))]),
    ("small", Int32, [0, -5, 2**31 - 1, 7]),
    ("double", Float64, [0.1, -0.0, 1e300, 5.0]),
    ("flag", Bool, [True, False, True, False]),
    ("raw", Bytes, [b"", b"\0\xff", b"x" * 9, b"y"]),
    ("moment", UnixTimestamp, [NOW, NOW + timedelta(days=1), NOW, NOW]),
    ("texts", Array(String), [["a", ""], [], ["ü"], ["b"] * 50]),
    ("fractions", Array(Float32), [[0.5], [], [1.0, 2.0], [3.0]]),
    ("named", Map, [{"a": 1}, {}, {"b": "c"}, {"d": 2.5}]),
]


def configured(folder: Path) -> RepoConfig:
    return RepoConfig(
        project="test",
        provider="local",
        registry={"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
        offline_store={"type": "duckdb"},
        online_store={
            "type": "feature_repo.online_store.PackedOnlineStore",
            "path": str(folder / "deeper" / "packed.db"),
        },
        entity_key_serialization_version=3,
    )


def a_view(name: str, features: dict[str, FeastType], keys: dict[str, ValueType] | None = None) -> FeatureView:
    keys = {"id": ValueType.INT64} if keys is None else keys
    types = {ValueType.INT64: Int64, ValueType.STRING: String}
    return FeatureView(
        name=name,
        entities=[Entity(name=f"of_{key}", join_keys=[key], value_type=dtype) for key, dtype in keys.items()],
        schema=[
            *(Field(name=key, dtype=types[dtype]) for key, dtype in keys.items()),
            *(Field(name=feature, dtype=dtype) for feature, dtype in features.items()),
        ],
        source=FileSource(path="nowhere.parquet", timestamp_field="event", created_timestamp_column="created"),
    )


def a_key(**values: int | str) -> EntityKey:
    messages = [Value(int64_val=v) if isinstance(v, int) else Value(string_val=v) for v in values.values()]
    return EntityKey(join_keys=list(values), entity_values=messages)


def whole(number: int) -> dict[str, Value]:
    return {"whole": Value(int64_val=number)}


@pytest.fixture
def config(tmp_path: Path) -> RepoConfig:
    return configured(tmp_path)


@pytest.fixture
def packed(config: RepoConfig) -> PackedOnlineStore:
    return applied(PackedOnlineStore(), config)


def applied(packed: PackedOnlineStore, config: RepoConfig) -> PackedOnlineStore:
    """As Feast calls it when definitions are applied."""
    packed.update(config, [], [], [], [], True)
    return packed


def write(packed: PackedOnlineStore, config: RepoConfig, view: FeatureView, rows: dict[int, dict[str, Value]]) -> None:
    packed.online_write_batch(config, view, [(a_key(id=k), values, NOW, None) for k, values in rows.items()], None)


def read(packed: PackedOnlineStore, config: RepoConfig, view: FeatureView, *keys: int) -> list[dict[str, Value] | None]:
    return [values for _, values in packed.online_read(config, view, [a_key(id=key) for key in keys])]


def test_every_type_comes_back_as_it_was(packed: PackedOnlineStore, config: RepoConfig) -> None:
    view = a_view("typed", {name: dtype for name, dtype, _ in EVERY_TYPE})
    columns = {n: python_values_to_proto_values(values, d.to_value_type()) for n, d, values in EVERY_TYPE}
    rows = [{name: values[row] for name, values in columns.items()} for row in range(4)]
    rows += [{name: Value() for name in columns}, {}]
    rows += [{name: Value() if name == left_out else columns[name][1] for name in columns} for left_out in columns]
    told: list[int] = []
    packed.online_write_batch(
        config, view, [(a_key(id=key), row, NOW, NOW) for key, row in enumerate(rows)], told.append
    )
    found = packed.online_read(config, view, [a_key(id=key) for key in (*range(len(rows)), 99, 0)])
    assert sum(told) == len(rows)
    for (time, values), row in zip(found, rows, strict=False):
        assert time == NOW
        assert values == {name: row.get(name, Value()) for name in columns}
    assert found[-2] == (None, None)
    assert found[-1] == found[0]
    some = packed.online_read(config, view, [a_key(id=0)], ["text", "named"])
    assert some == [(NOW, {name: rows[0][name] for name in ("text", "named")})]


def test_lists_take_the_least_bytes_that_hold_them(packed: PackedOnlineStore, config: RepoConfig) -> None:
    layout = Layout(7, [("values", "int64_list_val")])
    edges = [edge for bits in (7, 15, 31, 63) for edge in (2**bits - 1, -(2**bits), 2**bits, -(2**bits) - 1)]
    lists = [[], [0], *([edge] for edge in edges if -(2**63) <= edge < 2**63), [1, -200, 3], list(range(1000))]
    rng = random.Random(3)
    lists += [
        [rng.randrange(-(2**63), 2**63) >> rng.randrange(64) for _ in range(rng.randrange(9))] for _ in range(300)
    ]
    rows = layout.pack([Ragged.of(lists)], np.zeros((len(lists), 1), bool))
    for values, row in zip(lists, rows, strict=True):
        assert layout.unpack(row)[0].tolist() == values
        width = next(w for w in (1, 2, 4, 8) if all(-(1 << (8 * w - 1)) <= v < 1 << (8 * w - 1) for v in values))
        assert len(row) == len(rows[0]) + -(-len(values) * width // 8) * 8
    assert layout.pack([Ragged.of([])], np.zeros((0, 1), bool)) == []


def test_keys_of_any_kind(packed: PackedOnlineStore, config: RepoConfig) -> None:
    text = a_view("by_text", {"whole": Int64}, {"name": ValueType.STRING})
    both = a_view("by_both", {"whole": Int64}, {"name": ValueType.STRING, "id": ValueType.INT64})
    nobody = a_view("by_nothing", {"whole": Int64}, {})
    cases = [
        (text, [a_key(name="a"), a_key(name=""), a_key(name="ü")], a_key(name="b")),
        (both, [a_key(name="a", id=1), a_key(name="a", id=-2)], a_key(name="b", id=1)),
        (nobody, [a_key(__dummy_id="")], a_key(__dummy_id="x")),
    ]
    for view, keys, other in cases:
        packed.online_write_batch(config, view, [(key, whole(n), NOW, NOW) for n, key in enumerate(keys)], None)
        found = packed.online_read(config, view, [*keys, other])
        assert [values for _, values in found] == [*(whole(n) for n in range(len(keys))), None]
    with pytest.raises(ValueError, match="the key id of plain must be an integer and is null"):
        packed.online_read(
            config, a_view("plain", {"whole": Int64}), [EntityKey(join_keys=["id"], entity_values=[Value()])]
        )


def test_the_last_write_stands(packed: PackedOnlineStore, config: RepoConfig) -> None:
    view = a_view("plain", {"whole": Int64})
    write(packed, config, view, {1: whole(1), 2: whole(2)})
    earlier = [
        (a_key(id=2), whole(3), NOW - timedelta(days=1), None),
        (a_key(id=2), whole(4), datetime(1969, 1, 1), None),
    ]
    packed.online_write_batch(config, view, earlier, None)
    packed.online_write_batch(config, view, [], None)
    assert packed.online_read(config, view, [a_key(id=2)]) == [(datetime(1969, 1, 1, tzinfo=UTC), whole(4))]
    assert read(packed, config, view, 1, 2, 3) == [whole(1), whole(4), None]
    assert packed.read_rows(config, view, [3, 1]) == [{}, {"whole": 1}]


def test_features_that_come_and_go(packed: PackedOnlineStore, config: RepoConfig) -> None:
    """Rows of a former definition are read by the present one, until they are written again."""
    old = a_view("view", {"whole": Int64, "gone": String})
    new = a_view("view", {"added": Array(Int64), "whole": Int64})
    write(packed, config, old, {1: whole(1) | {"gone": Value(string_val="g")}, 2: whole(2)})
    assert read(packed, config, new, 1) == [whole(1)]
    added = python_values_to_proto_values([[5, 6]], ValueType.INT64_LIST)[0]
    write(packed, config, new, {1: whole(7) | {"added": added}})
    assert read(packed, config, new, 1, 2) == [whole(7) | {"added": added}, whole(2)]
    assert read(packed, config, old, 1, 2) == [whole(7), whole(2) | {"gone": Value()}]
    retyped = a_view("view", {"whole": Int64}, {"id": ValueType.STRING})
    packed.online_write_batch(config, retyped, [(a_key(id="1"), whole(9), NOW, None)], None)
    assert [values for _, values in packed.online_read(config, retyped, [a_key(id="1"), a_key(id="2")])] == [
        whole(9),
        None,
    ]


def test_a_value_of_another_type_is_refused(packed: PackedOnlineStore, config: RepoConfig) -> None:
    view = a_view("plain", {"whole": Int64})
    with pytest.raises(ValueError, match="whole is declared as int64_val and given as int32_val"):
        write(packed, config, view, {1: {"whole": Value(int32_val=1)}})


def test_a_materialisation_is_what_feast_writes(home: Path, tmp_path: Path) -> None:
    """All at once and by Feast's own call: the same bytes."""
    shutil.copytree(home / "features", tmp_path / "features")
    apply(tmp_path)
    at = EPOCH + timedelta(microseconds=read_materialised(home).cutoff_us)
    with quiet():
        open_store(tmp_path).materialize(EPOCH, at)
    tables = {}
    for name, path in (("ours", home / "feast" / "packed.db"), ("theirs", tmp_path / "feast" / "packed.db")):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            layouts = dict(connection.execute("SELECT number, features FROM layouts"))
            tables[name] = {
                view.name: [
                    (key, layouts[int.from_bytes(row[:4], "little")], row[4:], *us)
                    for key, row, *us in connection.execute(f"SELECT * FROM penstock_{view.name} ORDER BY key")
                ]
                for view in VIEWS
            }
    assert tables["ours"] == tables["theirs"]
    assert all(tables["ours"].values())


def a_table(view: FeatureView, rows: dict[int, Any]) -> pl.DataFrame:
    """Rows with the one feature of a view."""
    (feature,) = view.features
    return pl.DataFrame({"id": list(rows), feature.name: list(rows.values()), "event": NOW, "created": NOW})


def test_nulls_and_all_types_at_once(packed: PackedOnlineStore, config: RepoConfig) -> None:
    for number, (name, dtype, values) in enumerate(EVERY_TYPE[:-1]):  # Polars has no maps
        view = a_view(f"view_{number}", {name: dtype})
        given = [*values, None]
        packed.replace(config, [(view, a_table(view, dict(enumerate(given))))])
        expected = [*python_values_to_proto_values(values, dtype.to_value_type()), Value()]
        assert packed.online_read(config, view, [a_key(id=key) for key in range(5)]) == [
            (NOW, {name: value}) for value in expected
        ]


def test_all_views_are_replaced_in_one_step(packed: PackedOnlineStore, config: RepoConfig) -> None:
    """Others read the former rows of all views until they read the new ones of all."""
    views = [a_view(name, {"whole": Int64}) for name in ("a", "b")]

    def fill(value: int, rows: int) -> None:
        packed.replace(config, [(view, a_table(view, dict.fromkeys(range(rows), value))) for view in views])

    fill(0, 30)
    ended = threading.Event()

    def watch() -> list[tuple[int, ...]]:
        other, seen = PackedOnlineStore(), []
        while not ended.is_set():
            answers = [[row.get("whole", -1) for row in other.read_rows(config, view, range(30))] for view in views]
            seen.append(tuple(min(answer) for answer in answers))
            assert {tuple(sorted(set(answer))) for answer in answers} <= {(0,), (-1, 1), (2,), (-1, 3), (4,)}
        return seen

    with ThreadPoolExecutor(3) as pool:
        watching = [pool.submit(watch) for _ in range(3)]
        try:
            for value in range(1, 5):
                fill(value, 20 if value % 2 else 30)
        finally:
            ended.set()
        assert all(watched.result() for watched in watching)

    broken = a_table(views[1], {1: 9}).drop("created")
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        packed.replace(config, [(views[0], a_table(views[0], {1: 9})), (views[1], broken)])
    assert [packed.read_rows(config, view, [1, 29]) for view in views] == [[{"whole": 4}, {"whole": 4}]] * 2


def test_many_threads_write_and_read(packed: PackedOnlineStore, config: RepoConfig) -> None:
    view = a_view("plain", {"whole": Int64})
    write(packed, config, view, dict.fromkeys(range(50), whole(0)))

    def work(thread: int) -> None:
        for number in range(1, 20):
            write(packed, config, view, {key: whole(number) for key in range(thread * 5, thread * 5 + 5)})
            assert read(packed, config, view, *range(thread * 5, thread * 5 + 5)) == [whole(number)] * 5

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8
    assert read(packed, config, view, *range(50)) == [whole(19)] * 40 + [whole(0)] * 10


def test_feast_works_with_any_view(config: RepoConfig, tmp_path: Path) -> None:
    """Definitions that are not ours, by Feast's own calls, those for asyncio too."""
    path = tmp_path / "view.parquet"
    pl.DataFrame({"id": [1, 2], "whole": [3, 4], "event": NOW, "created": NOW}).write_parquet(path)
    entity = Entity(name="thing", join_keys=["id"], value_type=ValueType.INT64)
    source = FileSource(name="rows", path=str(path), timestamp_field="event", created_timestamp_column="created")
    view = FeatureView(
        name="things",
        entities=[entity],
        schema=[Field(name="id", dtype=Int64), Field(name="whole", dtype=Int64)],
        source=PushSource(name="pushed", batch_source=source),
    )
    store = FeatureStore(config=config)

    def ask() -> list[int | None]:
        found = store.get_online_features(["things:whole"], [{"id": key} for key in (1, 2, 3)])
        answer: list[int | None] = found.to_dict()["whole"]
        return answer

    with quiet():
        store.apply([entity, view])
        assert ask() == [None, None, None]
        store.materialize(EPOCH, NOW + timedelta(days=1))
    assert ask() == [3, 4, None]
    frame = pd.DataFrame({"id": [2, 3], "whole": [5, 6], "event": NOW, "created": NOW})
    store.push("pushed", frame)
    assert ask() == [3, 5, 6]

    async def at_once() -> list[int]:
        await store.push_async("pushed", frame.assign(whole=[7, 8]))
        found = await store.get_online_features_async(["things:whole"], [{"id": key} for key in (1, 2, 3)])
        answer: list[int] = found.to_dict()["whole"]
        return answer

    assert asyncio.run(at_once()) == [3, 7, 8]
    with quiet():
        store.apply([entity], objects_to_delete=[view], partial=False)
        store.apply([entity, view])
        assert ask() == [None, None, None]
        store.teardown()
    assert not list(Path(config.online_store.path).parent.iterdir())


def test_a_database_that_was_made_anew_is_read(packed: PackedOnlineStore, config: RepoConfig) -> None:
    """By a reader with a connection to the former one, whose layouts had other numbers."""
    first, second = a_view("first", {"whole": Int64}), a_view("second", {"text": String})
    write(packed, config, first, {1: whole(1)})
    write(packed, config, second, {1: {"text": Value(string_val="a")}})
    other = PackedOnlineStore()
    assert read(other, config, first, 1) == [whole(1)]
    packed.teardown(config, [], [])
    for attempt in (lambda: read(other, config, first, 1), lambda: write(other, config, first, {1: whole(1)})):
        with pytest.raises(StoreError, match=r"packed.db is missing or cannot be read: fill it by a run"):
            attempt()
    applied(packed, config)
    write(packed, config, second, {1: {"text": Value(string_val="b")}})
    write(packed, config, first, {1: whole(2)})
    assert read(other, config, first, 1) == [whole(2)]
    assert read(other, config, second, 1) == [{"text": Value(string_val="b")}]


def test_what_is_wrong_with_a_database_is_one_line(
    packed: PackedOnlineStore, config: RepoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, path = a_view("plain", {"whole": Int64}), Path(config.online_store.path)

    def refused(said: str) -> None:
        for attempt in (
            lambda: PackedOnlineStore().online_read(config, view, [a_key(id=1)]),
            lambda: PackedOnlineStore().read_rows(config, view, [1]),
            lambda: write(PackedOnlineStore(), config, view, {1: whole(1)}),
        ):
            with pytest.raises(StoreError, match=said) as raised:
                attempt()
            assert "\n" not in str(raised.value)

    write(packed, config, view, {1: whole(1)})
    monkeypatch.setattr(online_store, "PATIENCE_SECONDS", 0.1)
    with contextlib.closing(sqlite3.connect(path)) as rival:
        rival.execute("BEGIN EXCLUSIVE")
        assert read(PackedOnlineStore(), config, view, 1) == [whole(1)]  # readers do not wait for who writes
        with pytest.raises(StoreError, match="has been locked by another process for 0 s: see what writes it"):
            write(PackedOnlineStore(), config, view, {1: whole(2)})
        rival.rollback()
        rival.execute("PRAGMA user_version = 2")
    refused(r"is no online store of format 1 \(application and format are \(\d+, 2\)\): remove it and fill it")
    packed.teardown(config, [], [])
    with contextlib.closing(sqlite3.connect(path)) as foreign:
        foreign.execute("CREATE TABLE something (of_else)")
    refused("is no online store of format 1")
    with pytest.raises(StoreError, match="is a database of something else: give the online store another path"):
        applied(PackedOnlineStore(), config)
    packed.teardown(config, [], [])
    path.write_bytes(b"no database" * 1000)
    refused(r"is damaged \(file is not a database\): remove it and fill it by a run of the prepare DAG")
    path.write_bytes(b"")
    refused("is no online store of format 1")
    write(applied(packed, config), config, view, {1: whole(1)})
    assert read(packed, config, view, 1) == [whole(1)]
