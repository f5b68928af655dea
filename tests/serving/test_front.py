"""Who may ask, how much may be sent, what is counted, and that nothing that is sent makes the gateway fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from serving.gateway import create_app
from tests.serving.conftest import System, serving

TOKEN = "a-token-of-this-test"


@pytest.fixture
def guarded(system: System) -> Iterator[httpx.Client]:
    with serving(create_app(replace(system.settings, host="0.0.0.0", token=TOKEN, body_bytes=4096))) as client:
        yield client


def test_without_the_token_nothing_is_told(guarded: httpx.Client) -> None:
    body = {"user_id": 1, "preview": True}
    for headers in (
        {},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": "Bearer \u00e9".encode("latin-1")},
    ):
        for method, path in (("POST", "/recommend"), ("POST", "/feedback"), ("GET", "/metrics"), ("GET", "/status")):
            answer = guarded.request(method, path, json=body, headers=headers)
            assert answer.status_code == 401, (path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["remedy"]
    for path in ("/health", "/ready", "/openapi.json", "/docs"):
        assert guarded.get(path).status_code == 200
    for headers in ({"authorization": f"Bearer {TOKEN}"}, {"authorization": f"bearer  {TOKEN}"}):
        assert guarded.post("/recommend", json=body, headers=headers).status_code == 200
        assert guarded.get("/metrics", headers=headers).status_code == 200


def test_the_page_says_which_paths_want_the_token(guarded: httpx.Client) -> None:
    document = guarded.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    wanting = {path for path, of in document["paths"].items() for one in of.values() if one.get("security")}
    assert wanting == {"/recommend", "/feedback", "/status", "/metrics"}


def test_a_body_that_is_too_large_is_not_read(guarded: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    sent = 0

    def without_end() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 26:
            sent += 1 << 12
            yield b" " * (1 << 12)

    assert guarded.post("/recommend", content=b" " * 4097, headers=headers).status_code == 413
    assert guarded.post("/recommend", content=b" " * 4096, headers=headers).status_code == 400
    try:
        answer = guarded.post("/feedback", content=without_end(), headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"] == "the body is larger than 4,096 bytes"
    except httpx.TransportError:  # the rest is not read: the connection may end while the client still writes
        assert sent < 1 << 26
    assert guarded.post("/feedback", content=iter([b'{"request_id":1,', b'"events":[]}']), headers=headers).is_success


def test_requests_and_stages_are_counted(system: System) -> None:
    with serving(create_app(system.settings)) as gateway:
        for _ in range(2):
            assert gateway.post("/recommend", json={"user_id": 1, "preview": True}).is_success
        gateway.post("/recommend", json={"user_id": -1})
        gateway.get("/what/is/this")
        page = gateway.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert 'penstock_request_seconds_count{route="/recommend",status="200",variant="champion"} 2.0' in page.text
    assert 'penstock_request_seconds_count{route="/recommend",status="422",variant=""} 1.0' in page.text
    assert 'penstock_request_seconds_count{route="other",status="404",variant=""} 1.0' in page.text
    for stage in ("features", "recall", "items", "rank", "fuse", "diversity"):
        assert f'penstock_stage_seconds_count{{stage="{stage}"}} 2.0' in page.text
    assert 'penstock_release{variant="champion"} 1.0' in page.text
    assert 'penstock_release{variant="challenger"} 0.0' in page.text
    for name in ("penstock_running_requests", "penstock_waiting_requests", "penstock_feedback_waiting_records"):
        assert name in page.text
    assert "process_resident_memory_bytes" in page.text


FUZZED = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
)


def test_whatever_is_sent_the_answer_is_as_documented(system: System) -> None:
    """Bodies and headers drawn from the page of the API, and from near it: no crash, and no status that is not told."""
    tried: dict[str, int] = {}
    with serving(create_app(system.settings)) as gateway:
        schema = schemathesis.openapi.from_url(f"{gateway.base_url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in GenerationMode:

                @hypothesis_settings(
                    max_examples=40 if operation.method == "post" else 5,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def fuzz(case: Any) -> None:
                    tried[case.path] = tried.get(case.path, 0) + 1
                    case.call_and_validate(checks=list(FUZZED))

                with suppress(Unsatisfiable):  # a path without a body has no wrong one
                    fuzz()
        assert gateway.get("/health").is_success
    assert tried.keys() == {"/recommend", "/feedback", "/ready", "/metrics", "/status", "/health"}
    assert min(tried["/recommend"], tried["/feedback"]) >= 60
