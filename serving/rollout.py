"""The acts that change what is live: every one loads first, tries what it loaded, and only then replaces the document.

    python -m serving.rollout --home HOME promote 3 --by ana --reason "better by 0.01"

What fails leaves the routing document as it was; an act that was killed is repeated by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from penstock import release, routing
from penstock.release import MODELS, ReleaseError, base_path
from penstock.routing import Routing, RoutingError
from serving.model_client import Input, ModelClient, ModelError
from serving.settings import SettingsError, from_environment

PROBE_ITEMS = 10


class RolloutError(RuntimeError):
    """A release that must not go live, or a model server that cannot load it; what was live is live on."""


def promote(home: Path, number: int, *, by: str, reason: str, model_server: str | None = None) -> Routing:
    """Release `number` answers everybody.

    Args:
        model_server: host:port; none: as the environment says.

    Raises:
        RolloutError: the release is not what was released, or does not load and answer.
    """
    return _change(home, lambda before: routing.promote(before, number), by, reason, model_server)


def canary(
    home: Path, number: int, share: float, *, by: str, reason: str = "canary", model_server: str | None = None
) -> Routing:
    """Release `number` answers `share` of the users beside the champion. Raises as `promote`."""
    return _change(home, lambda before: routing.canary(before, number, share), by, reason, model_server)


def rollback(home: Path, *, by: str, reason: str, model_server: str | None = None) -> Routing:
    """The former champion answers everybody again. Raises as `promote`, and if there is no former champion."""
    return _change(home, routing.rollback, by, reason, model_server)


def withdraw(home: Path, *, by: str, reason: str) -> Routing:
    """The champion alone answers: nothing is loaded for it, so it works whatever state the model server is in."""
    path = _document(home)
    try:
        with routing.changing(path) as before:
            after = routing.withdraw(before)
            if after != before:
                after = routing.stamp(after, by, reason)
                routing.write(path, after)
            return after
    except (RoutingError, OSError) as error:
        raise RolloutError(str(error)) from error


def load(home: Path, number: int, *, model_server: str | None = None) -> None:
    """Loads release `number` beside what is live and tries it; it answers nobody yet. Raises as `promote`."""
    try:
        with routing.changing(_document(home)) as before, ModelClient(_address(model_server)) as client:
            _load(home, client, before, (number,))
    except (RoutingError, ReleaseError, ModelError, OSError) as error:
        raise RolloutError(f"release {number} is not loaded: {error}") from error


def _change(home: Path, act: Callable[[Routing], Routing], by: str, reason: str, model_server: str | None) -> Routing:
    path = _document(home)
    try:
        with routing.changing(path) as before, ModelClient(_address(model_server)) as client:
            after = act(before)
            loaded = _load(home, client, before, after.answering)
            after = routing.stamp(after, by, reason)
            routing.write(path, after)
            release.unlink_all_but(home, loaded)
            return after
    except (RoutingError, ReleaseError, ModelError, OSError) as error:
        raise RolloutError(f"nothing was changed: {error}") from error


def _document(home: Path) -> Path:
    return home / "routing.json"


def _address(model_server: str | None) -> str:
    return model_server or from_environment(os.environ).model_server


def _load(home: Path, client: ModelClient, before: Routing, answering: tuple[int, ...]) -> tuple[int, ...]:
    """Loads `answering` beside what was live (gateways read the document a moment later) and tries each of them.

    Returns:
        Everything that is loaded now.
    """
    there = set(release.releases(home))
    kept = {number for number in before.releases if number in there}
    manifests = {number: release.verify(home, number) for number in answering}
    loaded = tuple(sorted(kept | set(answering)))
    for number in loaded:
        release.link(home, number)
    client.load({model: base_path(home.resolve(), model) for model in MODELS}, loaded)
    for number, manifest in manifests.items():
        probe(client, number, manifest["heads"])
    return loaded


def probe(client: ModelClient, number: int, heads: list[str]) -> None:
    """One request of a user of whom nothing is known, through recall and rank of release `number`.

    Raises:
        ReleaseError: recall gives no item, a head is missing, or a score is not finite.
        ModelError: a call failed.
    """
    inputs = {name: _blank(spec, 1) for name, spec in client.signature("recall", number).inputs.items()}
    inputs |= {"k": np.array(PROBE_ITEMS, np.int32)}
    found = client.predict("recall", number, inputs)
    there = found["ids"][0] >= 0
    if not there.any() or not np.isfinite(found["scores"][0][there]).all():
        raise ReleaseError(f"recall of release {number} gives no items with finite scores; do not use it")
    ids = found["ids"][0][there]
    inputs = {name: _blank(spec, len(ids)) for name, spec in client.signature("rank", number).inputs.items()}
    if "item_id" in inputs:
        inputs["item_id"] = ids
    scores = client.predict("rank", number, inputs)
    for head in heads:
        if head not in scores or not np.isfinite(scores[head]).all():
            raise ReleaseError(f"rank of release {number} gives no finite {head}; do not use it")


def _blank(spec: Input, rows: int) -> np.ndarray:
    """An input that says nothing: zeros, or lists of nothing but padding."""
    if spec.rank == 2:
        return np.full((rows, 1), -1, spec.dtype)
    return np.full(rows if spec.rank else (), b"" if spec.dtype.kind == "O" else 0, spec.dtype)


ACTS: dict[str, Callable[..., Routing]] = {
    "promote": promote,
    "canary": canary,
    "withdraw": withdraw,
    "rollback": rollback,
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
    ):
        act = acts.add_parser(name, help=text)
        if name in ("load", "promote", "canary"):
            act.add_argument("number", type=int)
        if name == "canary":
            act.add_argument("--share", type=float, required=True)
        if name != "load":
            act.add_argument("--by", required=True, help="who decides it")
            act.add_argument("--reason", required=True)
    arguments = parser.parse_args()
    try:
        home = arguments.home.resolve() if arguments.home else from_environment(os.environ).home
        words = {key: value for key, value in vars(arguments).items() if key in ("number", "share", "by", "reason")}
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
