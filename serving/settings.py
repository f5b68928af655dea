"""What serving is told by its environment."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class SettingsError(ValueError):
    """An environment variable that makes no sense; the message names it."""


@dataclass(frozen=True)
class Settings:
    """Where the home and the model server are, and how the gateway answers.

    Args:
        model_server: host:port of the gRPC API of TF Serving, or of the embedded server.
        model_server_rest: host:port of its REST API, which is asked when gRPC does not answer; empty: nothing is.
        releases: the URL of the release store, from which releases that are not in the home are fetched; empty: none.
        token: what a request must bring as its bearer token; empty: nothing, on this machine's own address alone.
        candidates: how many items recall gives to be ranked.
        deadline_seconds: within which a request is answered, by what there is then.
        concurrency: requests that are worked on at once; further ones wait.
        queue: so many may wait; further ones are refused.
        body_bytes: the largest body of a request.
        trade_off: λ of maximal marginal relevance (`penstock.diversity`); 1: none.
        author_cap: items of one author in a slate at most, while there are others; 0: any number.
        look_alike: how many items at most the look-alike table adds to those that are ranked; 0: none.
        exploration_share: the part of a slate's places that is kept for items which look-alike alone has found.
        served_share: the part of the requests whose feature vectors are kept for the replay.
    """

    home: Path
    model_server: str
    model_server_rest: str = ""
    releases: str = ""
    host: str = "127.0.0.1"
    gateway_port: int = 8000
    token: str = ""
    candidates: int = 200
    deadline_seconds: float = 2.0
    concurrency: int = 16
    queue: int = 64
    body_bytes: int = 1 << 18
    trade_off: float = 1.0
    author_cap: int = 0
    look_alike: int = 50
    exploration_share: float = 0.0
    served_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.token and not is_loopback(self.host):
            raise SettingsError(
                f"on {self.host} others can reach the gateway: set PENSTOCK_GATEWAY_TOKEN to what they must bring as"
                " their bearer token, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def from_environment(environment: Mapping[str, str], host: str | None = None) -> Settings:
    """Settings by the variables PENSTOCK_* that docs/gateway.md lists.

    Without PENSTOCK_MODEL_SERVER it is the embedded server, at PENSTOCK_GRPC_PORT of this machine.

    Args:
        host: the address to listen on, instead of PENSTOCK_GATEWAY_HOST.

    Raises:
        SettingsError: a port is no port, an address no host:port, a number is not in its range, or others can reach
            the gateway and there is no token.
    """
    address = environment.get("PENSTOCK_MODEL_SERVER") or f"127.0.0.1:{_port(environment, 'PENSTOCK_GRPC_PORT', 8500)}"
    rest = environment.get("PENSTOCK_MODEL_SERVER_REST") or ""
    for variable, text, api in (
        ("PENSTOCK_MODEL_SERVER", address, "gRPC"),
        ("PENSTOCK_MODEL_SERVER_REST", rest, "REST"),
    ):
        name, _, port = text.rpartition(":")
        if text and (not name or not port.isdecimal()):
            raise SettingsError(f"{variable} is host:port of a {api} API, not {text!r}")
    of = Settings
    return Settings(
        home=Path(environment.get("PENSTOCK_HOME") or ROOT / "var" / "current").resolve(),
        model_server=address,
        model_server_rest=rest,
        releases=environment.get("PENSTOCK_RELEASES") or "",
        host=host or environment.get("PENSTOCK_GATEWAY_HOST") or of.host,
        gateway_port=_port(environment, "PENSTOCK_GATEWAY_PORT", of.gateway_port),
        token=_token(environment, "PENSTOCK_GATEWAY_TOKEN"),
        candidates=int(_number(environment, "PENSTOCK_CANDIDATES", of.candidates, 1, 10_000, whole=True)),
        deadline_seconds=_number(environment, "PENSTOCK_DEADLINE_MS", of.deadline_seconds * 1000, 10, 600_000) / 1000,
        concurrency=int(_number(environment, "PENSTOCK_CONCURRENCY", of.concurrency, 1, 1000, whole=True)),
        queue=int(_number(environment, "PENSTOCK_QUEUE", of.queue, 0, 100_000, whole=True)),
        body_bytes=int(_number(environment, "PENSTOCK_BODY_BYTES", of.body_bytes, 1024, 1 << 30, whole=True)),
        trade_off=_number(environment, "PENSTOCK_MMR_LAMBDA", of.trade_off, 0, 1),
        author_cap=int(_number(environment, "PENSTOCK_AUTHOR_CAP", of.author_cap, 0, 1000, whole=True)),
        look_alike=int(_number(environment, "PENSTOCK_LOOK_ALIKE", of.look_alike, 0, 1000, whole=True)),
        exploration_share=_number(environment, "PENSTOCK_EXPLORATION_SHARE", of.exploration_share, 0, 1),
        served_share=_number(environment, "PENSTOCK_SERVED_SHARE", of.served_share, 0, 1),
    )


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise SettingsError(f"{name} is a port, 1 to 65535, not {text!r}")
    return int(text)


def _number(
    environment: Mapping[str, str], name: str, default: float, least: float, most: float, *, whole: bool = False
) -> float:
    text = environment.get(name) or str(default)
    try:
        number = float(int(text)) if whole else float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number) or not least <= number <= most:
        kind = "a whole number" if whole else "a number"
        raise SettingsError(f"{name} is {kind} from {least:g} to {most:g}, not {text!r}")
    return number


def _token(environment: Mapping[str, str], name: str) -> str:
    token = environment.get(name) or ""
    if token and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise SettingsError(f"{name} is 16 or more printable ASCII characters without a space")
    return token
