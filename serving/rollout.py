"""The acts that change what is live: every one loads first, tries what it loaded, and only then replaces the document.

    python -m serving.rollout --home HOME promote 3 --by ana --reason "better by 0.01"

What fails leaves the routing document as it was; an act that was killed is repeated by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from penstock import release, routing
from penstock.release import MODELS, ReleaseError, base_path
from penstock.release_store import ReleaseStore
from penstock.routing import Routing, RoutingError
from serving import probe
from serving.model_client import ModelClient, ModelError
from serving.settings import SettingsError, from_environment

LOCAL = "127.0.0.1"
"""An act listens nowhere, and needs no token."""

KEEP = 10
"""So many of the newest releases are kept, beside those in use."""


class RolloutError(RuntimeError):
    """A release that must not go live, or a model server that cannot load it; what was live is live on."""


@dataclass(frozen=True)
class Servers:
    """What an act talks to.

    Args:
        model_server: host:port of the gRPC API.
        releases: the URL of the release store; empty: the releases of the home are all there are.
        keep: how many of the newest releases outlive the next promotion.
    """

    model_server: str
    releases: str = ""
    keep: int = KEEP


def servers(environment: Mapping[str, str]) -> Servers:
    """By PENSTOCK_MODEL_SERVER, PENSTOCK_RELEASES and PENSTOCK_KEEP_RELEASES.

    Raises:
        SettingsError: one of them makes no sense.
    """
    settings = from_environment(environment, LOCAL)
    keep = environment.get("PENSTOCK_KEEP_RELEASES") or str(KEEP)
    if not keep.isdecimal() or int(keep) < 1:
        raise SettingsError(f"PENSTOCK_KEEP_RELEASES is how many releases are kept, 1 or more, not {keep!r}")
    return Servers(settings.model_server, settings.releases, int(keep))


def promote(home: Path, number: int, *, by: str, reason: str, at: Servers | None = None) -> Routing:
    """Release `number` answers everybody.

    Args:
        at: what is talked to; none: what the environment says.

    Raises:
        RolloutError: the release is not what was released, or does not load and answer as it is known to.
    """
    return _change(home, lambda before: routing.promote(before, number), by, reason, at, prune=True)


def canary(
    home: Path, number: int, share: float, *, by: str, reason: str = "canary", at: Servers | None = None
) -> Routing:
    """Release `number` answers `share` of the users beside the champion. Raises as `promote`."""
    return _change(home, lambda before: routing.canary(before, number, share), by, reason, at)


def rollback(home: Path, *, by: str, reason: str, leaving: int | None = None, at: Servers | None = None) -> Routing:
    """The former champion answers everybody again. Raises as `promote`, and if there is no former champion.

    Args:
        leaving: the release that is to answer nobody; where it does not answer any more, nothing is changed, so that
            a repeated rollback does not go back twice.
    """
    return _change(home, lambda before: routing.rollback(before, leaving), by, reason, at)


def withdraw(home: Path, *, by: str, reason: str, at: Servers | None = None) -> Routing:
    """The champion alone answers. Nothing is loaded for it, so it works whatever state the model server is in."""
    path = _document(home)
    try:
        with routing.changing(path) as before:
            after = routing.withdraw(before)
            if after != before:
                after = routing.stamp(after, by, reason)
                routing.write(path, after)
                with _afterwards(), _client(_servers(at)) as client:
                    loaded = {int(path.name) for path in base_path(home, MODELS[0]).glob("[0-9]*")}
                    client.load(_base_paths(home), sorted(loaded), labels=labels(after, loaded))
            return after
    except (RoutingError, OSError) as error:
        raise RolloutError(f"nothing was changed: {error}") from error


def load(home: Path, number: int, *, at: Servers | None = None) -> None:
    """Loads release `number` beside what is live and tries it; it answers nobody yet. Raises as `promote`."""
    servers = _servers(at)
    try:
        with routing.changing(_document(home)) as before, _client(servers) as client:
            _load(home, client, servers, before, Routing(champion=number))
    except (RoutingError, ReleaseError, ModelError, OSError) as error:
        raise RolloutError(f"release {number} is not loaded: {error}") from error


def reload(home: Path, *, at: Servers | None = None) -> Routing:
    """Loads again what the routing document names, and writes the document and the store's releases where they lack.

    Raises as `promote`.
    """
    path, servers = _document(home), _servers(at)
    try:
        with routing.changing(path) as live, _client(servers) as client:
            if live.champion is None:
                raise RoutingError("no release is live: there is nothing to load")
            if servers.releases:
                _agree(home, ReleaseStore(servers.releases), live.answering)
            loaded = _load(home, client, servers, live, live)
            if path.exists() and not routing.is_whole(path):
                routing.write(path, live)
            client.load(_base_paths(home), loaded, labels=labels(live, loaded))
            release.unlink_all_but(home, loaded)
            return live
    except (RoutingError, ReleaseError, ModelError, OSError) as error:
        raise RolloutError(f"what is live is not loaded again: {error}") from error


def _agree(home: Path, store: ReleaseStore, numbers: Iterable[int]) -> None:
    """Publishes what the store lacks, and drops what is damaged here, for it to be fetched."""
    stored = store.numbers()
    for number in numbers:
        if number not in stored:
            release.verify(home, number)
            store.publish(release.directory(home, number), number)
        elif number in release.releases(home) and not _is_whole(home, number):
            release.discard(home, number)


def _change(
    home: Path,
    act: Callable[[Routing], Routing],
    by: str,
    reason: str,
    at: Servers | None,
    *,
    prune: bool = False,  # a rollback must not wait for a store that is away
) -> Routing:
    path, servers = _document(home), _servers(at)
    try:
        with routing.changing(path) as before, _client(servers) as client:
            after = act(before)
            loaded = _load(home, client, servers, before, after)
            if after != before:
                after = routing.stamp(after, by, reason)
                routing.write(path, after)
            with _afterwards():
                client.load(_base_paths(home), loaded, labels=labels(after, loaded))
                release.unlink_all_but(home, loaded)
            with _afterwards():
                if prune:
                    after = _prune(home, servers, after)
            return after
    except (RoutingError, ReleaseError, ModelError, OSError) as error:
        raise RolloutError(f"nothing was changed: {error}") from error


def _prune(home: Path, servers: Servers, live: Routing) -> Routing:
    """Deletes old releases; the document without the former champions that are gone."""
    store = ReleaseStore(servers.releases) if servers.releases else None
    left = routing.without(live, release.prune(home, live, servers.keep, store))
    if left != live:
        routing.write(_document(home), left)
    return left


@contextmanager
def _afterwards() -> Iterator[None]:
    """What fails here fails after the document was replaced: it is told, and the next act or a reconcile mends it."""
    try:
        yield
    except (ReleaseError, ModelError, RoutingError, SettingsError, OSError) as error:
        print(f"rollout: it is done, but: {error}; `python -m local reconcile --mend` mends it", file=sys.stderr)


def _document(home: Path) -> Path:
    return home / "routing.json"


def _servers(at: Servers | None) -> Servers:
    return servers(os.environ) if at is None else at


def _client(servers: Servers) -> ModelClient:
    return ModelClient(servers.model_server)


def _load(home: Path, client: ModelClient, servers: Servers, before: Routing, after: Routing) -> list[int]:
    """Loads who answers after beside what was live (gateways read the document a moment later), and tries each of them.

    What the next rollback returns to is loaded too, if it is there and whole.

    Returns:
        Everything that is loaded now.
    """
    if servers.releases:
        for number in after.answering:
            ReleaseStore(servers.releases).fetch(home, number)
    there = set(release.releases(home))
    kept = {number for number in before.releases if number in there}
    spare = {number for number in after.previous[-1:] if number in there - kept and _is_whole(home, number)}
    manifests = {number: release.verify(home, number) for number in after.answering}
    loaded = sorted(kept | spare | manifests.keys())
    for number in loaded:
        release.link(home, number)
    client.load(_base_paths(home), loaded, labels=labels(before, kept))
    for number, manifest in manifests.items():
        probe.check(client, number, manifest["heads"], release.probe_answers(home, number))
        release.verify(home, number)  # so that what was loaded is what was verified
    return loaded


def _is_whole(home: Path, number: int) -> bool:
    try:
        release.verify(home, number)
    except ReleaseError:
        return False
    return True


def labels(live: Routing, loaded: Collection[int]) -> dict[str, int]:
    """The labels of the model server: `stable` is the champion, `canary` the challenger."""
    named = {"stable": live.champion, "canary": live.challenger}
    return {label: number for label, number in named.items() if number is not None and number in loaded}


def _base_paths(home: Path) -> dict[str, Path]:
    return {model: base_path(home.resolve(), model) for model in MODELS}


ACTS: dict[str, Callable[..., Routing]] = {
    "promote": promote,
    "canary": canary,
    "withdraw": withdraw,
    "rollback": rollback,
    "reload": reload,
}


def main() -> None:
    """One act from the command line; prints the document that serving obeys from then on."""
    parser = argparse.ArgumentParser(prog="python -m serving.rollout", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--home", type=Path, help="default: PENSTOCK_HOME")
    acts = parser.add_subparsers(dest="act", required=True)
    acts.add_parser("show", help="what is live")
    for name, text in (
        ("load", "load a release without routing to it"),
        ("promote", "a release answers everybody"),
        ("canary", "a release answers a share of the users"),
        ("withdraw", "the canary ends"),
        ("rollback", "the former release answers everybody"),
        ("reload", "load again what is live: a model server that was replaced, a label that was moved"),
    ):
        act = acts.add_parser(name, help=text)
        if name in ("load", "promote", "canary"):
            act.add_argument("number", type=int)
        if name == "rollback":
            act.add_argument("--leaving", type=int, help="the release to leave; nothing is done if it is left already")
        if name == "canary":
            act.add_argument("--share", type=float, required=True)
        if name not in ("load", "reload"):
            act.add_argument("--by", required=True, help="who decides it")
            act.add_argument("--reason", required=True)
    arguments = parser.parse_args()
    try:
        home = arguments.home.resolve() if arguments.home else from_environment(os.environ, LOCAL).home
        words = {
            key: value
            for key, value in vars(arguments).items()
            if key in ("number", "share", "by", "reason", "leaving")
        }
        if arguments.act == "show":
            result = routing.read(_document(home))
        elif arguments.act == "load":
            load(home, arguments.number)
            result = routing.read(_document(home))
        else:
            result = ACTS[arguments.act](home, **words)
    except (RolloutError, RoutingError, SettingsError) as error:
        sys.exit(f"rollout: {error}")
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
