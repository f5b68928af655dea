"""What the gateway answers while something that it asks is away, hangs, or is not what it should be."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import polars as pl
import pytest

from feature_repo.online import Request
from penstock import popular, release, routing
from penstock.feedback import FeedbackReader
from penstock.routing import Routing
from serving.deadline import Breaker, Deadline
from serving.gateway import create_app
from serving.held import ItemVectors, Releases
from serving.messages import predict_messages
from serving.recommender import Recommender, UnavailableError
from serving.settings import Settings
from tests.serving.conftest import CATALOGUE, HISTORY, KNOWN_USER, System, serving, until

POPULAR = {"": [1005, 1000, 1007, 1001], "scenario=3": [1009], "scenario=3/new": [1011], "scenario=3/returning": [1003]}
"""By segment; 1000 and 1003 are in the history of the known user."""

SCENARIO = {"scenario": 3}


@pytest.fixture
def home(system: System, tmp_path: Path) -> Path:
    """A home with release 1 that knows what is popular by segment, and the features of the system."""
    shutil.copytree(release.directory(system.home, 1), release.directory(tmp_path, 1))
    rows = [(segment, rank, item) for segment, items in POPULAR.items() for rank, item in enumerate(items)]
    path = release.directory(tmp_path, 1) / popular.FILE
    path.unlink()
    pl.DataFrame(rows, schema=popular.SCHEMA, orient="row").write_parquet(path)
    for name in ("features", "feast"):
        (tmp_path / name).symlink_to(system.home / name)
    routing.write(tmp_path / "routing.json", Routing(champion=1))
    return tmp_path


@pytest.fixture
def settings(system: System, home: Path) -> Settings:
    return replace(system.settings, home=home)


def ask(gateway: httpx.Client, **body: Any) -> dict[str, Any]:
    response = gateway.post("/recommend", json={"user_id": KNOWN_USER, "k": 3, **body})
    assert response.status_code == 200, response.text
    return response.json()


def items(answer: dict[str, Any]) -> list[int]:
    assert {item["item_id"] // CATALOGUE for item in answer["items"]} <= {answer["release"]}
    return [item["item_id"] for item in answer["items"]]


class Between(grpc.GenericRpcHandler):
    """Stands between gateway and model server, and holds Predict of a model until it is let go."""

    def __init__(self, channel: grpc.Channel, held: str) -> None:
        self._channel = channel
        self._held = held
        self.asked = 0
        self.let_go = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            if details.method.endswith("/Predict"):
                named = predict_messages.PredictRequest.FromString(request).model_spec.name
                if named == self._held:
                    self.asked += 1
                    self.let_go.wait()
            return self._channel.unary_unary(details.method)(request)

        return grpc.unary_unary_rpc_method_handler(call)


@contextmanager
def between(system: System, held: str) -> Iterator[tuple[str, Between]]:
    server = grpc.server(ThreadPoolExecutor(20))
    with grpc.insecure_channel(system.address) as channel:
        handler = Between(channel, held)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}", handler
        finally:
            handler.let_go.set()
            server.stop(None).wait()


def test_without_the_model_server_what_is_popular_is_answered(settings: Settings) -> None:
    with serving(create_app(replace(settings, model_server="127.0.0.1:1"))) as gateway:
        known, new = ask(gateway, context=SCENARIO, k=5, explain=True), ask(gateway, user_id=2**40, context=SCENARIO)
        elsewhere = ask(gateway, k=9)
        assert gateway.get("/ready").json()["degraded"] == {"recall": "away", "rank": "away"}
        page = gateway.get("/metrics").text
    assert items(known) == [1009, 1005, 1007, 1001]  # of his segment first, nothing that he has seen
    assert items(new) == [1011, 1009, 1005]
    assert items(elsewhere) == [1005, 1007, 1001]
    assert known["degraded"] == ["recall", "rank"]
    assert known["explanation"]["degraded"] == {"recall": "away", "rank": "away"}
    assert "recall version 1 at 127.0.0.1:1" in known["explanation"]["why"]
    assert [item["recall_score"] for item in known["explanation"]["items"]] == [None] * 4
    assert [item["score"] for item in elsewhere["items"]] == [1, 1 / 2, 1 / 3]
    assert [item["heads"] for item in elsewhere["items"]] == [{}, {}, {}]
    assert not known["cold_start"]
    assert new["cold_start"]
    assert 'penstock_degraded_total{reason="away",stage="recall"} 3.0' in page


def test_without_rank_recall_s_order_stands(system: System, settings: Settings) -> None:
    (release.directory(settings.home, 1) / popular.FILE).unlink()
    with (
        between(system, "rank") as (address, handler),
        serving(create_app(replace(settings, model_server=address, deadline_seconds=1.0))) as gateway,
    ):
        answer = ask(gateway, explain=True)
        assert handler.asked == 1
        handler.let_go.set()
        after = ask(gateway)
    assert items(answer) == [1001, 1002, 1004]  # 1000 and 1003 are in the history
    assert answer["degraded"] == ["rank"]
    assert answer["explanation"]["degraded"] == {"rank": "deadline"}
    assert [item["score"] for item in answer["items"]] == [39, 38, 36]
    assert [item["recall_rank"] for item in answer["explanation"]["items"]] == [0, 1, 2]
    assert answer["explanation"]["items"][0]["features"]["tags"]
    assert after["degraded"] == []


def test_what_was_left_out_is_logged_and_its_vectors_are_not_kept(settings: Settings) -> None:
    with serving(create_app(replace(settings, model_server="127.0.0.1:1"))) as gateway:
        answer = ask(gateway)
    (record,) = (
        record
        for record in FeedbackReader(settings.home / "feedback").read()
        if record.get("request_id") == answer["request_id"]
    )
    assert record["degraded"] == ["recall", "rank"]
    assert record["items"] == items(answer)
    assert (record["release"], record["variant"]) == (1, "champion")
    assert not list((settings.home / "feedback" / "served").glob("*.jsonl"))


def test_a_model_server_that_hangs_is_not_waited_for_by_every_request(system: System, settings: Settings) -> None:
    with (
        between(system, "recall") as (address, handler),
        serving(create_app(replace(settings, model_server=address, deadline_seconds=0.5))) as gateway,
    ):
        reasons = [ask(gateway, explain=True, preview=True)["explanation"]["degraded"]["recall"] for _ in range(12)]
        asked = handler.asked
        assert reasons[:5] == ["deadline"] * 5
        assert "not_asked" in reasons[5:7]
        assert asked <= 8  # five until it is known, then one a second
        handler.let_go.set()
        until(lambda: ask(gateway, preview=True)["degraded"] == [])


def test_without_any_features_what_is_popular_is_answered(settings: Settings) -> None:
    for name in ("features", "feast"):
        (settings.home / name).unlink()
    with serving(create_app(settings)) as gateway:
        answer = ask(gateway, context=SCENARIO, explain=True)
        assert gateway.get("/ready").json()["degraded"] == {"features": "away"}
        page = gateway.get("/metrics").text
    assert items(answer) == [1009, 1005, 1000]  # whether he is new is not known, nor what he has seen
    assert answer["degraded"] == ["features", "recall", "rank"]
    assert answer["cold_start"]
    assert "the feature store does not answer" in answer["explanation"]["why"]
    assert answer["explanation"]["feature_service"] is None
    assert 'penstock_degraded_total{reason="away",stage="features"} 1.0' in page


def test_an_online_store_that_hangs_makes_the_user_a_new_one(settings: Settings) -> None:
    """An exclusive lock keeps SQLite's readers waiting for a minute."""
    source = (settings.home / "feast").resolve()
    (settings.home / "feast").unlink()
    shutil.copytree(source, settings.home / "feast")
    locking = sqlite3.connect(settings.home / "feast" / "packed.db", isolation_level=None)
    locking.execute("PRAGMA locking_mode = EXCLUSIVE")
    locking.execute("BEGIN IMMEDIATE")
    recommender = Recommender(replace(settings, deadline_seconds=2.0))
    try:
        recommender.online()
        slate = recommender.recommend(KNOWN_USER, 40, Request(10**12, 3, 0))
        assert slate.degraded == {"features": "deadline"}
        assert set(HISTORY[:2]) < set(slate.items)  # it is not known that he has seen them
        assert not slate.cold_start  # his profile lies in memory
        assert slate.vectors is not None
        assert slate.vectors.user["history_items"].lengths.tolist() == [0]
    finally:
        locking.execute("ROLLBACK")
        locking.close()
        recommender.close()


def test_a_request_that_waited_too_long_asks_nobody(settings: Settings) -> None:
    recommender = Recommender(settings)
    try:
        recommender.online()
        slate = recommender.recommend(KNOWN_USER, 2, Request(10**12, 9, 0), began=-1e6)
    finally:
        recommender.close()
    assert slate.degraded == {"features": "late", "recall": "late", "rank": "late"}
    assert slate.items == [1005, 1000]


def test_a_release_without_popular_items_says_why_nothing_can_be_answered(settings: Settings) -> None:
    (release.directory(settings.home, 1) / popular.FILE).unlink()
    with serving(create_app(replace(settings, model_server="127.0.0.1:1"))) as gateway:
        for response in (gateway.post("/recommend", json={"user_id": 1}), gateway.get("/ready")):
            assert response.status_code == 503
            assert "recall version 1 at 127.0.0.1:1: the model server does not answer" in response.json()["error"]
            assert "start the model server at 127.0.0.1:1" in response.json()["remedy"]
        assert gateway.get("/health").is_success
    for name in ("features", "feast"):
        (settings.home / name).unlink()
    with serving(create_app(settings)) as gateway:
        for response in (gateway.post("/recommend", json={"user_id": 1}), gateway.get("/ready")):
            assert response.status_code == 503
            assert response.json()["error"].startswith("the feature store does not answer")
            assert "prepare" in response.json()["remedy"]


def test_a_damaged_file_of_popular_items_is_none(settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    (release.directory(settings.home, 1) / popular.FILE).chmod(0o644)
    (release.directory(settings.home, 1) / popular.FILE).write_bytes(b"PAR1")
    assert Releases(settings.home, with_vectors=False).get(1).popular is None
    assert "what is popular of release 1 cannot be read" in capfd.readouterr().err


def test_what_is_left_out_is_said_once_a_minute(settings: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(create_app(replace(settings, model_server="127.0.0.1:1"))) as gateway:
        for _ in range(3):
            ask(gateway, preview=True)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("gateway: answers without")]
    assert len(said) == 1
    assert said[0].startswith("gateway: answers without recall (away), rank (away): recall version 1 at 127.0.0.1:1")


def write_vectors(home: Path) -> None:
    """Item vectors by which two items are alike if both are of the first half, or of the second."""
    ids = np.arange(CATALOGUE, CATALOGUE + 40)[::-1]
    vectors = [[1.0, 0.0] if item % CATALOGUE < 20 else [0.0, 1.0] for item in ids.tolist()]
    path = release.directory(home, 1) / "items.parquet"
    path.chmod(0o644)
    pl.DataFrame({"item_id": ids, "vector": pl.Series(vectors, dtype=pl.List(pl.Float32))}).write_parquet(path)


def test_a_slate_is_diversified_as_the_settings_say(settings: Settings, home: Path) -> None:
    write_vectors(home)
    with serving(create_app(settings)) as gateway:
        by_score = ask(gateway, k=40, explain=True, preview=True)
    places = {item["item_id"]: place for place, item in enumerate(by_score["items"])}
    with serving(create_app(replace(settings, trade_off=0.5))) as gateway:
        until(lambda: ask(gateway, preview=True)["degraded"] == [])
        answer = ask(gateway, k=6, explain=True, preview=True)
        assert "diversity" in answer["explanation"]["stages_ms"]
    chosen = items(answer)
    assert len({item % CATALOGUE < 20 for item in chosen[:2]}) == 2
    assert chosen != items(by_score)[:6]
    assert [item["rank"] for item in answer["explanation"]["items"]] == [places[item] for item in chosen]
    scores = {item["item_id"]: item["score"] for item in by_score["items"]}
    assert [item["score"] for item in answer["items"]] == [scores[item] for item in chosen]


def test_at_most_so_many_of_an_author(settings: Settings) -> None:
    with serving(create_app(replace(settings, author_cap=1))) as gateway:
        answer = ask(gateway, k=10, explain=True, preview=True)
    authors = [item["features"]["author_id"] for item in answer["explanation"]["items"]]
    first = authors[: len(set(authors))]
    assert len(set(first)) == len(first)  # then all there are have had their turn


def test_without_vectors_yet_the_order_of_the_scores_stands(settings: Settings, home: Path) -> None:
    (release.directory(home, 1) / "items.parquet").chmod(0o644)
    (release.directory(home, 1) / "items.parquet").write_bytes(b"none")
    with serving(create_app(settings)) as gateway:
        plain = ask(gateway, preview=True)
    with serving(create_app(replace(settings, trade_off=0.5))) as gateway:
        answer = ask(gateway, preview=True)
    assert answer["degraded"] == ["diversity"]
    assert items(answer) == items(plain)


def test_vectors_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    vectors = pl.Series([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=pl.List(pl.Float32))
    pl.DataFrame({"item_id": [9, 2, 5], "vector": vectors}).write_parquet(path)
    taken = ItemVectors(path).take(np.array([5, 9, 7, 2, 99]))
    assert taken.tolist() == [[5, 6], [1, 2], [0, 0], [3, 4], [0, 0]]
    pl.DataFrame(
        {"item_id": [], "vector": []}, schema={"item_id": pl.Int64, "vector": pl.List(pl.Float32)}
    ).write_parquet(path)
    assert not ItemVectors(path).take(np.array([1])).any()


def test_what_is_not_routed_any_more_is_let_go(system: System) -> None:
    held = Releases(system.home, with_vectors=False)
    first = Routing(champion=1, challenger=2)
    held.follow(first)
    one, two = held.get(1), held.get(2)
    held.follow(first)
    assert held.get(1) is one
    held.follow(Routing(champion=2, previous=(1,)))  # a rollback is at once
    assert held.get(1) is one
    held.follow(Routing(champion=2))
    assert held.get(2) is two
    assert held.get(1) is not one


def test_the_explanation_is_what_the_models_were_given(system: System, settings: Settings) -> None:
    time_ms = 1_772_400_000_000
    with serving(create_app(settings)) as gateway:
        answer = ask(gateway, k=4, context={"time_ms": time_ms, **SCENARIO}, explain=True)
        assert "explanation" not in ask(gateway, preview=True)
    explanation = answer["explanation"]
    assert (explanation["release"], explanation["variant"]) == (1, "champion")
    assert explanation["feature_service"] == "rank_v3"
    assert {"features", "recall", "look_alike", "items", "rank", "fuse", "diversity", "log"} == explanation[
        "stages_ms"
    ].keys()
    recommender = Recommender(settings)
    online = recommender.online()
    user = online.user(KNOWN_USER, "rank_v3", Request(time_ms, 3, 0))
    assert explanation["user"]["history_items"] == user["history_items"].lists()[0].tolist()
    assert explanation["user"].keys() == user.keys()
    given = online.items([item["item_id"] for item in answer["items"]], "rank_v3", user, Request(time_ms, 3, 0))
    recommender.close()
    for place, item in enumerate(explanation["items"]):
        assert item["rank"] == place
        assert item["recall_score"] == 40 - (item["item_id"] - CATALOGUE)
        assert item["features"].keys() == given.keys()
        assert item["features"]["item_click_rate_7d"] == given["item_click_rate_7d"][place]
    json.dumps(explanation, allow_nan=False)


def test_no_more_are_worked_on_than_the_settings_say(system: System, settings: Settings) -> None:
    with between(system, "rank") as (address, handler):
        few = replace(settings, model_server=address, concurrency=1, queue=1)
        with serving(create_app(few)) as gateway, ThreadPoolExecutor(2) as clients:
            first = clients.submit(ask, gateway, preview=True)
            until(lambda: handler.asked == 1)
            second = clients.submit(ask, gateway, preview=True)
            until(lambda: 'penstock_waiting_requests{route="/recommend"} 1.0' in gateway.get("/metrics").text)
            refused = gateway.post("/recommend", json={"user_id": 1})
            assert gateway.get("/health").is_success
            assert gateway.post("/feedback", json={"request_id": 1, "events": []}).is_success
            handler.let_go.set()
            assert first.result()["degraded"] == second.result()["degraded"] == []
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["remedy"] == "ask again later"


def test_a_breaker_lets_one_of_many_ask() -> None:
    breaker = Breaker(failures=2, seconds=1e6)
    breaker.failed()
    breaker.answered()
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert not breaker.allows()
    breaker.answered()
    assert breaker.allows()
    impatient = Breaker(failures=1, seconds=0.0)
    impatient.failed()
    assert impatient.allows()


def test_a_stage_has_what_those_before_it_leave() -> None:
    deadline = Deadline(1000.0)
    assert 249 < deadline.left("features") <= 250
    assert 599 < deadline.left("recall") <= 600
    assert 949 < deadline.left("rank") <= 950
    assert Deadline(1.0, began=-1e9).left("rank") == 0


def test_nothing_is_answered_of_a_release_that_is_not_there(settings: Settings) -> None:
    routing.write(settings.home / "routing.json", Routing(champion=9))
    recommender = Recommender(settings)
    with pytest.raises(UnavailableError, match="there is no release 9"):
        recommender.recommend(1, 1, Request(0, 0, 0))
    recommender.close()
