from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import polars as pl
import pytest

from feature_repo.online import Online, Request
from penstock import popular, release, routing
from penstock.features import Ragged
from penstock.feedback import FeedbackError, read_feedback
from penstock.routing import Routing
from penstock.served import FEATURES, read_served
from serving import rollout
from serving.gateway import create_app, main
from serving.settings import ROOT
from tests.servers import free_port
from tests.serving.conftest import (
    CATALOGUE,
    END_MS,
    HISTORY,
    ITEMS,
    KNOWN_USER,
    UPLOADED_MS,
    System,
    click_rate,
    lines,
    serving,
    until,
)

HOUR_MS = 3_600_000


def ask(gateway: httpx.Client, user: int = KNOWN_USER, **body: Any) -> dict[str, Any]:
    response = gateway.post("/recommend", json={"user_id": user, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_slate_is_ranked_by_the_features_of_its_items(gateway: httpx.Client) -> None:
    context = {"scenario": 1, "device": 2, "time_ms": UPLOADED_MS + 36 * HOUR_MS}
    answer = ask(gateway, k=5, context=context, preview=True)
    candidates = {CATALOGUE + place for place in range(ITEMS)} - set(HISTORY)
    best = sorted(candidates, key=click_rate, reverse=True)[:5]
    assert [item["item_id"] for item in answer["items"]] == best
    assert [item["position"] for item in answer["items"]] == [0, 1, 2, 3, 4]
    first = answer["items"][0]
    assert first["heads"] == pytest.approx({"click": 1.0, "long_view": click_rate(best[0]), "like": 1.5})
    assert first["score"] == pytest.approx(1 + 0.5 * click_rate(best[0]))
    assert (answer["release"], answer["variant"], answer["cold_start"], answer["user_id"]) == (1, "champion", False, 7)


def test_all_that_is_left_is_what_a_large_k_gets(gateway: httpx.Client) -> None:
    assert len(ask(gateway, k=100, preview=True)["items"]) == ITEMS - 2


def test_an_unknown_user_gets_a_cold_start(gateway: httpx.Client) -> None:
    answer = ask(gateway, user=2**62, k=100, preview=True)
    assert answer["cold_start"]
    assert len(answer["items"]) == ITEMS


def tell(gateway: httpx.Client, answer: dict[str, Any], place: int, **labels: int) -> int:
    """Says what was done with an item of a slate; which item it is."""
    item = answer["items"][place]["item_id"]
    body = {"request_id": answer["request_id"], "events": [{"item_id": item, **labels}]}
    assert gateway.post("/feedback", json=body).json() == {"accepted": 1}
    return item


def test_impressions_and_feedback_become_rows_of_the_log(system: System, gateway: httpx.Client) -> None:
    time_ms = END_MS + HOUR_MS
    answer = ask(gateway, k=3, context={"scenario": 4, "device": 5, "time_ms": time_ms})
    tell(gateway, answer, 1, click=1, watch_time_ms=900)
    rows = read_feedback(system.home / "feedback").filter(request_id=answer["request_id"])
    assert rows["item_id"].to_list() == [item["item_id"] for item in answer["items"]]
    assert rows["position"].to_list() == [0, 1, 2]
    assert rows["click"].to_list() == [0, 1, 0]
    assert rows["watch_time_ms"].to_list() == [0, 900, 0]
    assert rows["event_time"].dt.epoch("ms").to_list() == [time_ms] * 3
    assert rows["features_time"].dt.epoch("ms").to_list() == [END_MS] * 3
    assert [time is not None for time in rows["outcome_time"]] == [False, True, False]
    assert rows.select("user_id", "scenario", "device", "release", "variant").row(0) == (7, 4, 5, 1, "champion")


def test_feedback_changes_the_next_answer(system: System, gateway: httpx.Client) -> None:
    user = 2**53 - 5
    context = {"scenario": 3, "time_ms": END_MS + HOUR_MS}
    first = ask(gateway, user=user, k=5, context=context)
    assert first["cold_start"]
    seen = [tell(gateway, first, 0, click=1, long_view=1), tell(gateway, first, 3, long_view=1)]
    tell(gateway, first, 0, click=1, like=1)  # what was told before counts once
    second = ask(gateway, user=user, k=100, context={**context, "time_ms": END_MS + HOUR_MS + 1})
    assert not second["cold_start"]
    assert {item["item_id"] for item in second["items"]} == {CATALOGUE + n for n in range(ITEMS)} - set(seen)

    requests, items = read_served(system.home / "feedback" / "served")
    row = requests.row(by_predicate=pl.col("request_id") == second["request_id"], named=True)
    assert sorted(row["history_items"]) == sorted(seen)
    assert row["user_scenario_impressions_1h"] == row["user_impressions_7d"] == 5
    assert [row[f"user_{name}_1h"] for name in ("clicks", "long_views", "likes")] == [1, 2, 1]
    assert (row["scenario"], row["release"], row["service"]) == (3, 1, "rank_v3")
    of_slate = items.filter(request_id=second["request_id"])
    assert of_slate["item_id"].to_list() == [item["item_id"] for item in second["items"]]
    assert of_slate["item_click_rate_7d"].to_list() == [item["heads"]["long_view"] for item in second["items"]]


def test_what_was_served_is_what_the_store_gave(system: System, gateway: httpx.Client) -> None:
    time_ms = END_MS + 5 * HOUR_MS
    request = Request(time_ms, 0, 2)
    before = Online(system.home).user(KNOWN_USER, "rank_v3", request)
    answer = ask(gateway, k=7, context={"device": 2, "time_ms": time_ms})
    requests, items = (
        part.filter(request_id=answer["request_id"]) for part in read_served(system.home / "feedback" / "served")
    )
    ids = [item["item_id"] for item in answer["items"]]
    given = Online(system.home).items(ids, "rank_v3", before, request)
    for frame, columns in ((requests, before), (items, given)):
        assert set(columns) <= set(frame.columns)
        for name, column in columns.items():
            values = [row.tolist() for row in column.lists()] if isinstance(column, Ragged) else column.tolist()
            assert frame[name].to_list() == values, name
    assert set(before) | set(given) == set(FEATURES)


def test_vectors_are_kept_of_the_share_that_is_asked_for(system: System) -> None:
    for share, kept in ((0.0, 0), (1.0, 1)):
        with serving(create_app(replace(system.settings, served_share=share))) as gateway:
            answer = ask(gateway, k=2)
        assert (
            read_served(system.home / "feedback" / "served")[0].filter(request_id=answer["request_id"]).height == kept
        )


def test_a_preview_is_no_impression(system: System, gateway: httpx.Client) -> None:
    before = lines(system.home), read_served(system.home / "feedback" / "served")[0].height
    ask(gateway, preview=True)
    assert (lines(system.home), read_served(system.home / "feedback" / "served")[0].height) == before


def test_a_request_of_an_earlier_time_is_answered(gateway: httpx.Client) -> None:
    """What is known of hours ahead of it is not counted."""
    user = 2**53 - 6
    for hours in (9, 0):
        answer = ask(gateway, user=user, k=2, context={"time_ms": END_MS + hours * HOUR_MS})
        tell(gateway, answer, 0, click=1)
    assert len(ask(gateway, user=user, k=3, context={"time_ms": 0}, preview=True)["items"]) == 3


def test_while_the_store_is_away_feedback_is_kept(system: System, gateway: httpx.Client) -> None:
    user = 2**53 - 7
    first = ask(gateway, user=user, k=2)
    database = system.home / "feast" / "packed.db"
    database.rename(database.with_name("elsewhere"))
    try:
        seen = tell(gateway, first, 0, long_view=1)
        until(lambda: gateway.get("/status").json()["reason"] is not None)
        told = gateway.get("/status").json()
        assert told["waiting"] >= 1
        assert told["away_since_ms"] > END_MS
        during = ask(gateway, user=user, k=3, preview=True, explain=True)
        assert during["degraded"] == ["features"]  # as if he were new
        assert during["cold_start"]
        assert "packed.db" in during["explanation"]["why"]
        assert gateway.get("/ready").json()["degraded"] == {"features": "away"}
    finally:
        database.with_name("elsewhere").rename(database)
    until(lambda: gateway.get("/status").json()["waiting"] == 0)
    assert gateway.get("/status").json()["reason"] is None
    answer = ask(gateway, user=user, k=100, preview=True)
    assert seen not in {item["item_id"] for item in answer["items"]}
    assert not answer["cold_start"]


def is_up(gateway: httpx.Client) -> bool:
    with suppress(httpx.ConnectError):
        return gateway.get("/health").is_success
    return False


def test_a_killed_gateway_loses_nothing_that_it_answered(system: System) -> None:
    user = 2**53 - 8
    database = system.home / "feast" / "packed.db"
    command = [sys.executable, "-m", "serving.gateway", "--home", str(system.home), "--port", str(free_port())]
    process = subprocess.Popen([*command, "--model-server", system.address], cwd=ROOT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{command[-1]}", timeout=60) as gateway:
            until(lambda: process.poll() is not None or is_up(gateway))
            answer = ask(gateway, user=user, k=3)
            database.rename(database.with_name("elsewhere"))
            seen = [tell(gateway, answer, place, long_view=1) for place in (0, 2)]
    finally:
        process.kill()
        process.wait()
        if not database.exists():
            database.with_name("elsewhere").rename(database)
    assert Online(system.home).activity([user])[user].history == []
    with serving(create_app(system.settings)) as gateway:
        until(lambda: gateway.get("/status").json()["waiting"] == 0)
        shown = {item["item_id"] for item in ask(gateway, user=user, k=100, preview=True)["items"]}
    assert not shown & set(seen)


def test_users_are_split_as_the_document_says(system: System, gateway: httpx.Client) -> None:
    document = routing.canary(Routing(champion=1), 2, 0.5)
    system.put(document)
    for user in range(30):
        answer = ask(gateway, user=user, k=2, preview=True)
        assert answer["variant"] == routing.variant(document, user)
        assert answer["release"] == document.release(answer["variant"])
        assert {item["item_id"] // CATALOGUE for item in answer["items"]} == {answer["release"]}
        assert {item["heads"]["click"] for item in answer["items"]} == {1.0}  # rank knows the items of its release
        for item in answer["items"]:
            click, long_view = item["heads"]["click"], item["heads"]["long_view"]
            expected = {1: click + 0.5 * long_view, 2: math.log(click * long_view**0.5)}  # each by its own fusion
            assert item["score"] == pytest.approx(expected[answer["release"]])
    assert gateway.get("/ready").json() == {"champion": 1, "challenger": 2, "share": 0.5, "degraded": {}}


def test_releases_swap_under_requests_without_a_failure_or_a_mixed_answer(
    system: System, gateway: httpx.Client
) -> None:
    swapping = threading.Event()
    swapping.set()
    answers: list[tuple[int, set[int], set[float]]] = []
    failures: list[str] = []

    def keep_asking() -> None:
        while swapping.is_set():
            response = gateway.post("/recommend", json={"user_id": 7, "k": 5, "preview": True})
            if response.status_code != 200:
                failures.append(response.text)
                return
            items = response.json()["items"]
            answers.append(
                (
                    response.json()["release"],
                    {item["item_id"] // CATALOGUE for item in items},
                    {item["heads"]["click"] for item in items},
                )
            )

    clients = [threading.Thread(target=keep_asking) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for turn in range(12):
            rollout.promote(system.home, 2 - turn % 2, by="test", reason="swap")
    finally:
        swapping.clear()
        for client in clients:
            client.join()
    assert failures == []
    assert {number for number, _, _ in answers} == {1, 2}
    # rank says click = 1 only of items of its own release
    assert all(catalogues == {number} and clicks == {1.0} for number, catalogues, clicks in answers)


class Unloading(grpc.GenericRpcHandler):
    """A model server that unloads release 1 under the first Predict, just as release 2 was promoted."""

    def __init__(self, system: System, channel: grpc.Channel) -> None:
        self.system = system
        self.channel = channel
        self.predicted = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            if details.method.endswith("/Predict"):
                self.predicted += 1
                if self.predicted == 1:
                    self.system.put(Routing(champion=2))
                    context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found for request: Specific(recall, 1)")
            return self.channel.unary_unary(details.method)(request)

        return grpc.unary_unary_rpc_method_handler(call)


def test_a_release_unloaded_under_a_request_is_left_for_the_next(system: System) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    with grpc.insecure_channel(system.address) as channel:
        handler = Unloading(system, channel)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with serving(create_app(replace(system.settings, model_server=f"127.0.0.1:{port}"))) as gateway:
                answer = ask(gateway, k=3, preview=True)
        finally:
            server.stop(None).wait()
    assert handler.predicted == 3
    assert answer["release"] == 2
    assert {item["item_id"] // CATALOGUE for item in answer["items"]} == {2}


@pytest.mark.parametrize("body", [b"{", b'{"user_id": 1,}', b"\x00", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_malformed_json_is_a_400(gateway: httpx.Client, body: bytes) -> None:
    for path in ("/recommend", "/feedback"):
        response = gateway.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]


def test_a_path_that_is_none_gets_the_same_kind_of_answer(gateway: httpx.Client) -> None:
    assert gateway.get("/nothing").json() == {"error": "Not Found"}
    assert gateway.get("/recommend").json() == {"error": "Method Not Allowed"}
    assert gateway.post("/recommend").status_code == 400
    assert gateway.post("/recommend", content="{}", headers={"content-type": "text/plain"}).status_code == 415


@pytest.mark.parametrize(
    ("body", "field", "bound"),
    [
        ({"user_id": 1, "k": 0}, "k", {"ge": 1}),
        ({"user_id": 1, "k": 101}, "k", {"le": 100}),
        ({"user_id": 1, "k": "ten"}, "k", None),
        ({"user_id": 1, "k": True}, "k", None),
        ({"user_id": -1}, "user_id", {"ge": 0}),
        ({"user_id": 2**63}, "user_id", {"le": 2**63 - 1}),
        ({"user_id": 1, "context": {"scenario": 1001}}, "context.scenario", {"le": 1000}),
        ({"user_id": 1, "context": {"time_ms": -1}}, "context.time_ms", {"ge": 0}),
        ({"user_id": 1, "K": 3}, "K", None),
        ({}, "user_id", None),
        ([], "body", None),
    ],
)
def test_a_value_out_of_range_is_named(gateway: httpx.Client, body: Any, field: str, bound: Any) -> None:
    response = gateway.post("/recommend", json=body)
    assert response.status_code == 422
    failure = response.json()
    assert failure["field"] == field
    assert failure.get("bound") == bound
    assert failure["error"].startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"request_id": 2**53, "events": []}, "request_id"),
        ({"request_id": 1, "events": [{"item_id": 1, "click": 2}]}, "events.0.click"),
        ({"request_id": 1, "events": [{"item_id": 1, "watch_time_ms": -5}]}, "events.0.watch_time_ms"),
        ({"request_id": 1, "events": [{"click": 1}]}, "events.0.item_id"),
        ({"request_id": 1, "events": [{"item_id": 1}] * 1001}, "events"),
    ],
)
def test_feedback_out_of_range_is_refused(gateway: httpx.Client, body: Any, field: str) -> None:
    response = gateway.post("/feedback", json=body)
    assert (response.status_code, response.json()["field"]) == (422, field)


def failed(gateway: httpx.Client) -> dict[str, str]:
    """The body of a 503 that both a request and the readiness probe get."""
    response = gateway.post("/recommend", json={"user_id": 7})
    assert response.status_code == 503, response.text
    assert gateway.get("/ready").status_code == 503
    assert gateway.get("/health").status_code == 200
    return response.json()


def test_without_a_release_it_says_so(system: System, gateway: httpx.Client) -> None:
    (system.home / "routing.json").unlink()
    failure = failed(gateway)
    assert failure == {"error": "no release is live", "remedy": "train a candidate and approve its release"}


def test_a_release_that_is_not_loaded_is_named(system: System, gateway: httpx.Client) -> None:
    routing.write(system.home / "routing.json", Routing(champion=2))
    answer = ask(gateway, k=3, explain=True, preview=True)
    assert answer["explanation"]["degraded"] == {"recall": "not_loaded", "rank": "not_loaded"}
    assert "Servable not found for request: Specific(recall, 2)" in answer["explanation"]["why"]
    assert {item["item_id"] // CATALOGUE for item in answer["items"]} == {2}
    assert gateway.get("/ready").json()["degraded"] == {"recall": "not_loaded", "rank": "not_loaded"}


def test_a_release_that_is_not_there_is_named(system: System, gateway: httpx.Client) -> None:
    routing.write(system.home / "routing.json", Routing(champion=9))
    assert failed(gateway)["error"] == "there is no release 9; there are: 1, 2, 3"


def test_a_release_of_features_that_there_are_no_more_says_what_to_do(system: System, tmp_path: Path) -> None:
    shutil.copytree(release.directory(system.home, 1), release.directory(tmp_path, 1))
    path = release.directory(tmp_path, 1) / release.MANIFEST
    path.write_text(path.read_text().replace("recall_v3", "recall_v1"))
    (release.directory(tmp_path, 1) / popular.FILE).unlink()
    routing.write(tmp_path / "routing.json", Routing(champion=1))
    with serving(create_app(replace(system.settings, home=tmp_path))) as gateway:
        assert failed(gateway) == {
            "error": "recall of release 1 reads the feature service recall_v1, which there is no more: there are"
            " recall_v3, rank_v3",
            "remedy": "train a candidate and approve its release",
        }


def test_scores_that_are_not_finite_are_not_answered(system: System, gateway: httpx.Client) -> None:
    system.put(Routing(champion=3))
    answer = ask(gateway, k=3, explain=True, preview=True)
    assert answer["degraded"] == ["rank"]
    assert answer["explanation"]["degraded"] == {"rank": "not_finite"}
    assert answer["explanation"]["why"] == "rank of release 3 gives scores that are not finite"
    assert [item["item_id"] for item in answer["items"]] == [3000, 3001, 3002]


def test_a_damaged_document_leaves_the_last_good_one(system: System, gateway: httpx.Client) -> None:
    ask(gateway, preview=True)
    (system.home / "routing.json").write_text("{")
    assert ask(gateway, preview=True)["release"] == 1
    with serving(create_app(replace(system.settings, home=system.home / "elsewhere"))) as other:
        (system.home / "elsewhere" / "routing.json").write_text("{")
        assert "not readable as a routing document" in failed(other)["error"]


def test_feedback_of_two_gateways_does_not_mix(system: System, gateway: httpx.Client) -> None:
    with pytest.raises(FeedbackError, match="another gateway writes feedback here"):
        create_app(system.settings)


def test_the_api_describes_itself(gateway: httpx.Client) -> None:
    document = gateway.get("/openapi.json").json()
    assert {"/recommend", "/feedback", "/health", "/ready", "/status", "/metrics"} == document["paths"].keys()
    for path in ("/recommend", "/feedback"):
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "413", "415", "422", "503"} == operation["responses"].keys()
        assert operation["description"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert document["components"]["schemas"][body]["examples"]
    assert "securitySchemes" not in document["components"]
    assert gateway.get("/docs").status_code == 200


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What the gateway's command says when it does not start."""
    monkeypatch.setattr("sys.argv", ["gateway", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return str(ended.value)


def test_the_command_says_why_it_does_not_start(
    system: System, gateway: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(system.home)
    port = str(gateway.base_url.port)
    assert run_command(monkeypatch, "--home", home, "--port", port).startswith(f"gateway: port {port} of 127.0.0.1: ")
    assert "another gateway writes feedback here" in run_command(monkeypatch, "--home", home, "--port", "0")
    monkeypatch.setenv("PENSTOCK_MODEL_SERVER", "nowhere")
    assert "PENSTOCK_MODEL_SERVER is host:port" in run_command(monkeypatch, "--home", home)


def test_the_page_of_the_api_loads_from_this_machine_alone(gateway: httpx.Client) -> None:
    page = gateway.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sources
    for source in sources:
        assert source.startswith("/"), source
        assert gateway.get(source).status_code == 200


def test_where_grpc_is_away_rest_answers(system: System) -> None:
    asked = replace(system.settings, model_server="127.0.0.1:1", model_server_rest=system.rest.removeprefix("http://"))
    with serving(create_app(asked)) as gateway:
        assert gateway.get("/ready").json()["degraded"] == {}
        slate = gateway.post("/recommend", json={"user_id": KNOWN_USER, "k": 5, "preview": True}).json()
    assert (slate["release"], slate["degraded"], len(slate["items"])) == (1, [], 5)
