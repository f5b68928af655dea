"""Which release answers whom: the one small document that serving obeys, and the acts that change it.

Acts are pure functions from one `Routing` to the next; `change` applies one to the file under a lock, and the file is
replaced atomically, so that a reader sees either the old document or the new one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from penstock.durable import replace_file

Variant = Literal["champion", "challenger"]


class RoutingError(ValueError):
    """A routing document that cannot be read, or an act that does not fit it; the message says what to do."""


@dataclass(frozen=True)
class Routing:
    """Champion and challenger are release numbers; `share` of the users, chosen by `salt`, get the challenger.

    `previous` holds the former champions, newest last: what a rollback returns to.
    """

    champion: int | None = None
    challenger: int | None = None
    share: float = 0.0
    salt: str = ""
    previous: tuple[int, ...] = ()
    updated_at: str = ""
    by: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise RoutingError(f"share is a part of the users, 0 to 1, not {self.share}")
        if self.challenger is not None and self.challenger == self.champion:
            raise RoutingError(f"release {self.champion} cannot be both champion and challenger")

    def release(self, variant: Variant) -> int | None:
        """The release that answers for `variant`."""
        return self.challenger if variant == "challenger" else self.champion

    @property
    def answering(self) -> tuple[int, ...]:
        """Champion and challenger, those there are."""
        return tuple(number for number in (self.champion, self.challenger) if number is not None)

    @property
    def releases(self) -> tuple[int, ...]:
        """What must stay loaded: who answers, and the newest former champion, so that a rollback is at once."""
        return tuple(dict.fromkeys((*self.answering, *self.previous[-1:])))


def unit(user: int, salt: str) -> float:
    """A number in [0, 1) for `user`, uniform over users and independent between salts: blake2b, 53 bits of it."""
    digest = blake2b(f"{salt}:{user}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def variant(routing: Routing, user: int) -> Variant:
    """Who answers `user`. A larger share only adds users to the challenger's: nobody changes back within a pair."""
    if routing.challenger is not None and unit(user, routing.salt) < routing.share:
        return "challenger"
    return "champion"


def canary(routing: Routing, number: int, share: float) -> Routing:
    """`number` answers `share` of the users beside the champion, in place of a challenger there may be.

    The salt is the pair, so a user's variant holds as long as the pair does, and a new pair draws anew.

    Raises:
        RoutingError: there is no champion, `number` is the champion, or the share is not in (0, 1].
    """
    if routing.champion is None:
        raise RoutingError(f"no release is live for {number} to be held against; promote it instead")
    if not 0.0 < share <= 1.0:
        raise RoutingError(f"a canary's share is above 0 and at most 1, not {share}")
    return replace(routing, challenger=number, share=share, salt=f"{routing.champion}:{number}")


def promote(routing: Routing, number: int) -> Routing:
    """`number` answers everybody; the champion before it becomes what a rollback returns to, and a canary ends.

    Promoting the champion again changes nothing but ends a canary, so that a repeated act does no harm.
    """
    previous = routing.previous
    if routing.champion is not None and routing.champion != number:
        previous = (*(former for former in previous if former != number), routing.champion)
    return replace(routing, champion=number, challenger=None, share=0.0, salt="", previous=previous)


def withdraw(routing: Routing) -> Routing:
    """The champion answers everybody; the challenger, if there is one, answers nobody."""
    return replace(routing, challenger=None, share=0.0, salt="")


def rollback(routing: Routing, leaving: int | None = None) -> Routing:
    """The former champion answers everybody, and a canary ends.

    Args:
        leaving: the champion that is to be left; if it is not the champion, nothing changes. None: whoever it is.

    Raises:
        RoutingError: there is no former release.
    """
    if leaving is not None and routing.champion != leaving:
        return routing
    if not routing.previous:
        live = "no release is live" if routing.champion is None else f"release {routing.champion} is the first"
        raise RoutingError(f"there is no former release to roll back to: {live}")
    return replace(withdraw(routing), champion=routing.previous[-1], previous=routing.previous[:-1])


def is_whole(path: Path) -> bool:
    """Whether the document at `path` can be read without the journal."""
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def without(routing: Routing, gone: Container[int]) -> Routing:
    """`routing` less the former champions that there are no more to go back to."""
    return replace(routing, previous=tuple(number for number in routing.previous if number not in gone))


def read(path: Path) -> Routing:
    """The routing document at `path`; without one, that nothing is live.

    One that something has damaged is taken from the journal beside it, whose last whole line says the same.

    Raises:
        RoutingError: it is not a routing document, and there is no journal either.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return Routing()
    except (OSError, ValueError) as error:
        document = next(reversed(history(path)), None)
        if document is None:
            raise RoutingError(
                f"{path}: not readable as a routing document ({error}); restore it, or remove it and promote again"
            ) from error
    if not isinstance(document, dict):
        raise RoutingError(f"{path}: a routing document is a JSON object; restore it or promote again")
    unknown = sorted(set(document) - {field.name for field in fields(Routing)})
    if unknown:
        raise RoutingError(f"{path}: unknown key {', '.join(unknown)}; restore the document or promote again")
    try:
        return Routing(**document | {"previous": tuple(document.get("previous", ()))})
    except TypeError as error:
        raise RoutingError(f"{path}: {error}; restore the document or promote again") from error


def write(path: Path, routing: Routing) -> None:
    """Notes the document in the journal, then replaces that at `path`: both durably, the document atomically."""
    document = asdict(routing)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(_journal(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # the line break comes first: it ends a line that was torn
        os.write(descriptor, b"\n" + json.dumps(document).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    replace_file(path, (json.dumps(document, indent=2) + "\n").encode())


def history(path: Path) -> list[dict[str, Any]]:
    """Every document that was written to `path`, oldest first: what was live when, by whom and why.

    A writer that was killed or met a full disk at the last step leaves one that was never obeyed.
    """
    try:
        lines = _journal(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in filter(None, lines):
        try:
            found.append(json.loads(line))
        except ValueError:  # its writer was killed in the middle
            continue
    return found


def _journal(path: Path) -> Path:
    return path.with_suffix(".jsonl")


def stamp(routing: Routing, by: str, reason: str) -> Routing:
    """`routing` with who changed it, why, and now as the time."""
    return replace(routing, by=by, reason=reason, updated_at=datetime.now(UTC).isoformat(timespec="milliseconds"))


@contextmanager
def changing(path: Path) -> Iterator[Routing]:
    """The document at `path`, with every other change waiting until this one is done (a lock file beside it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield read(path)
    finally:
        os.close(descriptor)
