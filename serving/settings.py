"""What serving is told by its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class SettingsError(ValueError):
    """An environment variable that makes no sense; the message names it."""


@dataclass(frozen=True)
class Settings:
    """Where the home and the model server are, and how the gateway answers.

    Args:
        model_server: host:port of the gRPC API of TF Serving, or of the embedded server.
        releases: the URL of the release store, from which releases that are not in the home are fetched; empty: none.
        candidates: how many items recall gives to be ranked.
        timeout_seconds: deadline of one call of a model.
        served_share: the part of the requests whose feature vectors are kept for the replay.
    """

    home: Path
    model_server: str
    releases: str = ""
    host: str = "127.0.0.1"
    gateway_port: int = 8000
    candidates: int = 200
    timeout_seconds: float = 5.0
    served_share: float = 0.1


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Settings by PENSTOCK_HOME, _MODEL_SERVER, _RELEASES, _GRPC_PORT, _GATEWAY_PORT and _SERVED_SHARE.

    Without PENSTOCK_MODEL_SERVER it is the embedded server, at PENSTOCK_GRPC_PORT of this machine.

    Raises:
        SettingsError: a port is no port, an address no host:port, or a share no share.
    """
    address = environment.get("PENSTOCK_MODEL_SERVER") or f"127.0.0.1:{_port(environment, 'PENSTOCK_GRPC_PORT', 8500)}"
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"PENSTOCK_MODEL_SERVER is host:port of a gRPC API, not {address!r}")
    return Settings(
        home=Path(environment.get("PENSTOCK_HOME") or ROOT / "var" / "current").resolve(),
        model_server=address,
        releases=environment.get("PENSTOCK_RELEASES") or "",
        gateway_port=_port(environment, "PENSTOCK_GATEWAY_PORT", 8000),
        served_share=_share(environment, "PENSTOCK_SERVED_SHARE", Settings.served_share),
    )


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise SettingsError(f"{name} is a port, 1 to 65535, not {text!r}")
    return int(text)


def _share(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name) or str(default)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SettingsError(f"{name} is a part of all requests, 0 to 1, not {text!r}")
    return share
