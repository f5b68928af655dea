from __future__ import annotations

from pathlib import Path

import pytest

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
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        from_environment({name: value})
