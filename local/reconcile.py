"""What is live against what serving and MLflow have, and the two brought together again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from components import tracking
from components.tracking import TrackingError
from local import supervisor
from local.place import LocalError, Place
from penstock import release, routing
from penstock.release import ReleaseError
from penstock.routing import RoutingError
from serving import reconcile
from serving.reconcile import Difference
from serving.rollout import RolloutError, Servers, servers
from serving.settings import SettingsError


def run(place: Place, environment: dict[str, str], *, mend: bool) -> int:
    """Prints each difference, mends them if asked to, and returns 0 if there is none (any more).

    Raises:
        LocalError: there is no telling what should be, or a setting makes no sense.
    """
    try:
        at = replace(servers(environment), model_server=place.model_server or _own_server(place))
        found = _differences(place, at)
        if not found:
            print("all is as the routing document says")
            return 0
        _tell(found)
        if not mend:
            print("`python -m local reconcile --mend` (make reconcile MEND=1) brings them together")
            return 1
        _mend(place, at, found)
        left = _differences(place, at)
    except (RoutingError, SettingsError) as error:
        raise LocalError(str(error)) from error
    if left:
        print("\nleft:")
        _tell(left)
    else:
        print("\nmended: all is as the routing document says")
    return int(bool(left))


def _own_server(place: Place) -> str:
    return f"127.0.0.1:{place.ports['model server (gRPC)']}"


def _tracking_uri(place: Place) -> str:
    return place.url("mlflow") if supervisor.running(place.home) else f"sqlite:///{place.home}/mlflow/mlflow.db"


def _differences(place: Place, at: Servers) -> list[Difference]:
    return [*reconcile.differences(place.home, at), *_aliases(place)]


def _aliases(place: Place) -> list[Difference]:
    live = routing.read(place.home / "routing.json")
    try:
        there = tracking.aliases(_tracking_uri(place))
    except TrackingError as error:
        return [Difference("MLflow", str(error), "it answers")]
    wanted = {"champion": live.champion, "challenger": live.challenger}
    return [
        Difference(f"MLflow, alias {alias}", _named(there[alias]), _named(wanted[alias]))
        for alias in wanted
        if there[alias] != wanted[alias]
    ]


def _named(number: int | None) -> str:
    return "none" if number is None else f"release {number}"


def _mend(place: Place, at: Servers, found: list[Difference]) -> None:
    mlflow = [one for one in found if one.what.startswith("MLflow")]
    if len(mlflow) < len(found):
        try:
            reconcile.mend(place.home, at)
        except RolloutError as error:
            print(f"\n{error}")
    if mlflow:
        try:
            _follow(place.home, _tracking_uri(place))
        except (TrackingError, ReleaseError) as error:
            print(f"\n{error}")


def _follow(home: Path, tracking_uri: str) -> None:
    live = routing.read(home / "routing.json")
    for number in live.answering:
        tracking.register_release(tracking_uri, release.directory(home, number), release.manifest(home, number))
    tracking.set_aliases(tracking_uri, champion=live.champion, challenger=live.challenger)


def _tell(found: list[Difference]) -> None:
    for one in found:
        print(f"  {one.what}: {one.found}; should be: {one.expected}")
