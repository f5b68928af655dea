from __future__ import annotations

from pathlib import Path

import pytest

from serving.rollout import Servers, servers
from serving.settings import ROOT, SettingsError, from_environment


def test_without_an_environment_everything_is_local() -> None:
    settings = from_environment({})
    assert (settings.home, settings.model_server) == ((ROOT / "var" / "current").resolve(), "127.0.0.1:8500")
    assert (settings.host, settings.gateway_port) == ("127.0.0.1", 8000)


def test_the_environment_decides() -> None:
    settings = from_environment({"PENSTOCK_HOME": "/a/b", "PENSTOCK_GRPC_PORT": "1", "PENSTOCK_GATEWAY_PORT": "2"})
    assert (settings.home, settings.model_server, settings.gateway_port) == (Path("/a/b"), "127.0.0.1:1", 2)
    assert from_environment({"PENSTOCK_MODEL_SERVER": "serving:8500"}).model_server == "serving:8500"
    assert [from_environment({"PENSTOCK_SERVED_SHARE": share}).served_share for share in ("", "0", "1", "0.25")] == [
        0.1,
        0.0,
        1.0,
        0.25,
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PENSTOCK_GATEWAY_PORT", "x"),
        ("PENSTOCK_GRPC_PORT", "70000"),
        ("PENSTOCK_MODEL_SERVER", "serving"),
        ("PENSTOCK_SERVED_SHARE", "ten"),
        ("PENSTOCK_SERVED_SHARE", "1.1"),
        ("PENSTOCK_SERVED_SHARE", "nan"),
        ("PENSTOCK_MODEL_SERVER_REST", "8501"),
        ("PENSTOCK_CANDIDATES", "0"),
        ("PENSTOCK_CANDIDATES", "1.5"),
        ("PENSTOCK_DEADLINE_MS", "0"),
        ("PENSTOCK_DEADLINE_MS", "inf"),
        ("PENSTOCK_CONCURRENCY", "0"),
        ("PENSTOCK_QUEUE", "-1"),
        ("PENSTOCK_BODY_BYTES", "many"),
        ("PENSTOCK_MMR_LAMBDA", "1.01"),
        ("PENSTOCK_AUTHOR_CAP", "-1"),
        ("PENSTOCK_GATEWAY_TOKEN", "short"),
        ("PENSTOCK_GATEWAY_TOKEN", "a token with spaces in it"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        from_environment({name: value})


def test_how_it_answers_is_set() -> None:
    names = {
        "PENSTOCK_MODEL_SERVER_REST": "serving:8501",
        "PENSTOCK_CANDIDATES": "300",
        "PENSTOCK_DEADLINE_MS": "250",
        "PENSTOCK_CONCURRENCY": "4",
        "PENSTOCK_QUEUE": "0",
        "PENSTOCK_BODY_BYTES": "2048",
        "PENSTOCK_MMR_LAMBDA": "0.7",
        "PENSTOCK_AUTHOR_CAP": "2",
    }
    found = from_environment(names)
    assert (found.candidates, found.deadline_seconds, found.concurrency, found.queue) == (300, 0.25, 4, 0)
    assert found.model_server_rest == "serving:8501"
    assert (found.body_bytes, found.trade_off, found.author_cap) == (2048, 0.7, 2)


TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example"])
def test_others_reach_it_with_a_token_only(host: str) -> None:
    with pytest.raises(SettingsError, match="PENSTOCK_GATEWAY_TOKEN"):
        from_environment({"PENSTOCK_GATEWAY_HOST": host})
    with pytest.raises(SettingsError, match="PENSTOCK_GATEWAY_TOKEN"):
        from_environment({}, host)
    found = from_environment({"PENSTOCK_GATEWAY_HOST": host, "PENSTOCK_GATEWAY_TOKEN": TOKEN})
    assert (found.host, found.token) == (host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert from_environment({"PENSTOCK_GATEWAY_HOST": host}).token == ""


def test_an_act_needs_no_token() -> None:
    with pytest.raises(SettingsError, match="PENSTOCK_KEEP_RELEASES"):
        servers({"PENSTOCK_KEEP_RELEASES": "0"})
    names = {"PENSTOCK_GATEWAY_HOST": "0.0.0.0", "PENSTOCK_MODEL_SERVER": "tf:8500", "PENSTOCK_KEEP_RELEASES": "3"}
    assert servers(names) == Servers("tf:8500", "", 3)
    assert servers({"PENSTOCK_RELEASES": "s3://bucket/releases"}).releases == "s3://bucket/releases"
