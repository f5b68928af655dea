"""What serving obeys against what there is: where the two differ, and how they are brought together again.

The routing document decides. A release that it names must be whole, in the home and in the store; the model server must
have it, under the right label and with the right answers; the base paths must lead to it and to nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock import release, routing
from penstock.release import MODELS, ReleaseError, base_path
from penstock.release_store import ReleaseStore
from penstock.routing import Routing
from serving import probe, rollout
from serving.model_client import LABELS, ModelClient, ModelError
from serving.rollout import Servers


@dataclass(frozen=True)
class Difference:
    """Something that is not as the routing document says: what, how it is, and how it should be."""

    what: str
    found: str
    expected: str


def differences(home: Path, at: Servers) -> list[Difference]:
    """All that is not as the routing document says; nothing if all is well.

    Raises:
        RoutingError: there is no telling what should be: document and journal are damaged.
    """
    live = routing.read(home / "routing.json")
    found = [*_document(home, live), *_releases(home, at, live), *_links(home, live)]
    with ModelClient(at.model_server) as client:
        try:
            found += _served(home, client, live)
        except ModelError as error:
            found.append(Difference("model server", str(error), "it answers"))
    return found


def mend(home: Path, at: Servers) -> None:
    """Fetches, publishes, loads and labels what the routing document names, and writes the document anew if damaged.

    Raises:
        RolloutError: what is wrong cannot be mended from here: a damaged release without a store, a server away.
    """
    rollout.reload(home, at=at)


def _document(home: Path, live: Routing) -> Iterator[Difference]:
    path = home / "routing.json"
    if path.exists() and not routing.is_whole(path):
        yield Difference("routing.json", "damaged", f"champion {live.champion}, by the journal")


def _releases(home: Path, at: Servers, live: Routing) -> Iterator[Difference]:
    try:
        store = ReleaseStore(at.releases) if at.releases else None
        stored = set(store.numbers()) if store else set()
    except ReleaseError as error:
        yield Difference("release store", str(error), "it answers")
        store, stored = None, set()
    for number in live.answering:
        try:
            release.verify(home, number)
        except ReleaseError as error:
            yield Difference(f"release {number}", str(error), "what was released")
        if store is not None and number not in stored:
            yield Difference(f"release {number}", f"not in {store.url}", "in the store")


def _links(home: Path, live: Routing) -> Iterator[Difference]:
    wanted = {str(number) for number in live.releases}
    for model in MODELS:
        there = {path.name for path in base_path(home, model).glob("[0-9]*")}
        if missing := {str(number) for number in live.answering} - there:
            yield Difference(f"models/{model}", f"without {_listed(missing)}", f"versions {_listed(wanted)}")
        if spare := there - wanted:
            yield Difference(f"models/{model}", f"with {_listed(spare)} too", f"versions {_listed(wanted)}")


def _served(home: Path, client: ModelClient, live: Routing) -> Iterator[Difference]:
    for number in live.answering:
        if not all(client.ready(model, number) for model in MODELS):
            yield Difference(f"model server, release {number}", "not loaded", "loaded")
            continue
        try:
            heads = release.manifest(home, number)["heads"]
            probe.check(client, number, heads, release.probe_answers(home, number))
        except ReleaseError as error:
            yield Difference(f"model server, release {number}", str(error), "the answers of the release")
    wanted = rollout.labels(live, live.answering)
    for model in MODELS:
        there = client.labels(model, LABELS)
        for label in LABELS:
            if there.get(label) != wanted.get(label):
                yield Difference(f"model server, label {label} of {model}", *_versions(there, wanted, label))


def _versions(there: dict[str, int], wanted: dict[str, int], label: str) -> tuple[str, str]:
    found, expected = (str(labels.get(label, "none")) for labels in (there, wanted))
    return found, expected


def _listed(numbers: set[str]) -> str:
    return ", ".join(sorted(numbers, key=int)) or "none"
