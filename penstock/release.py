"""A release: recall model, item vectors, rank model and output weights as one numbered, immutable directory.

HOME/releases/N/manifest.json      what it is and where it comes from, and the sha256 of every file
HOME/releases/N/{recall,rank}/     the two SavedModels
HOME/releases/N/{items.parquet, popular.parquet, weights.json, verdict.json, probe.json, report.html}
HOME/models/{recall,rank}/N        links to the SavedModels: base paths for TF Serving

`probe.json` is what the two models answer to a request that says nothing: a server that answers otherwise has loaded
something else. With a release store (`penstock.release_store`) HOME/releases is this machine's copy of what is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock import popular, routing
from penstock.durable import replace_link, sync_directory, sync_file
from penstock.events import LABELS

if TYPE_CHECKING:
    from penstock.release_store import ReleaseStore

MANIFEST = "manifest.json"
PROBE = "probe.json"
MODELS = ("recall", "rank")
NOBODY = "nobody"
"""Who has answered an approval that nobody answered."""
FEATURE_SERVICES = {"recall": "recall_v3", "rank": "rank_v3"}


class ReleaseError(ValueError):
    """A candidate that cannot become a release, or a release that is not what its manifest says."""


@dataclass(frozen=True)
class Candidate:
    """What a release is made of: the outputs of the stages that trained and judged it."""

    recall: Path
    rank: Path
    weights: Path
    verdict: Path
    rehearsal: Path
    report: Path


def directory(home: Path, number: int) -> Path:
    """Where release `number` lies."""
    return home / "releases" / str(number)


def releases(home: Path) -> list[int]:
    """The numbers of the releases there are, in order."""
    folder = home / "releases"
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def build(
    home: Path,
    candidate: Candidate,
    *,
    approved_by: str,
    run_id: str,
    git_revision: str,
    environment: str,
    force_reason: str = "",
    store: ReleaseStore | None = None,
) -> int:
    """Makes a release of `candidate` and returns its number.

    It is built under a temporary name, made durable and renamed: it is there entirely or not at all. The same run's
    same files are not released twice, so that a repeated step does no harm and finishes what was interrupted.

    Args:
        environment: the sha256 of the lock file that the environment was made of.
        force_reason: why a candidate that the gate has rejected is released all the same; the manifest names who
            approved it, the reason and the verdict as `forced` (null for an approved one).
        store: where it is published, and where its number is claimed.

    Raises:
        ReleaseError: a part of the candidate is missing; the gate did not approve it, and it is not forced by a named
            person with a reason; the gate approved it, and it is forced; or the disk or the store does not take it.
    """
    parts = _parts(candidate)
    verdict = _json(candidate.verdict / "verdict.json")
    forced = _forced(verdict, approved_by, force_reason)
    said = _manifest(candidate, verdict) | {
        "approved_by": approved_by,
        "forced": forced,
        "run_id": run_id,
        "git_revision": git_revision,
        "environment": environment,
    }
    folder = home / "releases"
    try:
        with exclusively(home):
            number = _build(home, parts, said, store)
    except OSError as error:
        raise ReleaseError(f"{folder}: no release was made: {error}; make room or mend it, and run it again") from error
    if store is not None:
        store.publish(directory(home, number), number)
    return number


def _build(home: Path, parts: dict[str, Path], said: dict[str, Any], store: ReleaseStore | None) -> int:
    folder = home / "releases"
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        temporary.chmod(0o755)
        for name, source in parts.items():
            if source.is_dir():
                shutil.copytree(source, temporary / name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(source, temporary / name)
        files = hashes(temporary)
        number = _released(home, said["run_id"], files)
        if number is not None:
            return number
        number = _next(home)
        if store is not None:
            number = store.claim(number)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        document = said | {"release": number, "created_at": when, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        freeze(temporary)
        temporary.rename(folder / str(number))
        sync_directory(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return number


def manifest(home: Path, number: int) -> dict[str, Any]:
    """The manifest of release `number`.

    Raises:
        ReleaseError: there is no such release, or its manifest is not readable.
    """
    path = directory(home, number)
    if not path.is_dir():
        there = ", ".join(map(str, releases(home))) or "none"
        raise ReleaseError(f"there is no release {number}; there are: {there}")
    return _json(path / MANIFEST)


def verify(home: Path, number: int) -> dict[str, Any]:
    """The manifest of release `number`, after every file was found to be what the manifest says.

    Raises:
        ReleaseError: a file is changed, missing or not in the manifest, or the manifest is of another release.
    """
    path = directory(home, number)
    found = manifest(home, number)
    if found.get("release") != number:
        raise ReleaseError(f"{path}: its manifest is of release {found.get('release')}; do not use it")
    check_files(path, found)
    if found.get("weights") != _json(path / "weights.json").get("weights"):
        raise ReleaseError(
            f"{path} is not what was released: the manifest's weights are not those of weights.json. "
            "Restore it or build a new release"
        )
    return found


def check_files(path: Path, found: dict[str, Any]) -> None:
    """Holds every file of a release's directory against its manifest.

    Raises:
        ReleaseError: a file is changed, missing or not in the manifest.
    """
    expected = found.get("files")
    if not isinstance(expected, dict):
        raise ReleaseError(f"{path}: its manifest lists no files; do not use it")
    actual = hashes(path)
    problems = [
        *(f"{name} is missing" for name in sorted(expected.keys() - actual.keys())),
        *(f"{name} is not in the manifest" for name in sorted(actual.keys() - expected.keys())),
        *(f"{name} was changed" for name in sorted(expected.keys() & actual.keys()) if expected[name] != actual[name]),
    ]
    if problems:
        raise ReleaseError(f"{path} is not what was released: {'; '.join(problems)}. Restore it or build a new release")


def probe_answers(home: Path, number: int) -> dict[str, dict[str, list[Any]]]:
    """What the models of release `number` answer to a request that says nothing: model → output → values.

    Raises:
        ReleaseError: the release does not say.
    """
    return _json(directory(home, number) / PROBE)


def protected(home: Path, document: routing.Routing, store: ReleaseStore | None = None) -> set[int]:
    """The releases that are never deleted: those who answer, what a rollback returns to, and the parents of these.

    Raises:
        ReleaseError: the manifest of one of them cannot be read, so that its parent is not known.
    """
    kept = set(document.releases)
    for number in document.releases:
        if store is not None and not directory(home, number).is_dir():
            parent = store.manifest(number).get("parent")
        else:
            parent = manifest(home, number).get("parent")
        if isinstance(parent, int):
            kept.add(parent)
    return kept


def prune(home: Path, document: routing.Routing, keep: int, store: ReleaseStore | None = None) -> list[int]:
    """Deletes all but the newest `keep` releases and the `protected`, here and in the store; which were deleted.

    To be called while nobody else can change the routing document.

    Raises:
        ReleaseError: `keep` is less than one, or the disk or the store refuses.
    """
    if keep < 1:
        raise ReleaseError(f"at least one release is kept, not {keep}")
    here = releases(home)
    there = store.numbers() if store is not None else []
    kept = protected(home, document, store)
    doomed = [number for number in sorted({*here, *there})[:-keep] if number not in kept]
    folder = home / "releases"
    try:
        with exclusively(home):
            for number in doomed:
                if number in there:
                    assert store is not None
                    store.delete(number)
                if number in here:
                    _delete(home, number)
    except OSError as error:
        raise ReleaseError(f"{folder}: old releases are not deleted: {error}; run it again") from error
    return doomed


def discard(home: Path, number: int) -> None:
    """Deletes this machine's copy of release `number`, for it to be fetched again."""
    with exclusively(home):
        _delete(home, number)


def _delete(home: Path, number: int) -> None:
    """Out of sight in one step, so that a killed deletion leaves no half release."""
    gone = home / "releases" / f".deleting-{number}"
    directory(home, number).rename(gone)
    shutil.rmtree(gone)


def base_path(home: Path, model: str) -> Path:
    """The base path of `model` (recall or rank) for TF Serving: a directory of versions, one a release."""
    return home / "models" / model


def link(home: Path, number: int) -> None:
    """Offers release `number` to the model server: links recall/N and rank/N in the base paths, each in one step."""
    for model in MODELS:
        replace_link(base_path(home, model) / str(number), f"../../releases/{number}/{model}")


def unlink_all_but(home: Path, kept: Collection[int]) -> None:
    """Takes all releases but `kept` away from the base paths, so that a restarted model server loads no more."""
    names = {str(number) for number in kept}
    for model in MODELS:
        for path in base_path(home, model).glob("[0-9]*"):
            if path.is_symlink() and path.name not in names:
                path.unlink()


def _parts(candidate: Candidate) -> dict[str, Path]:
    """Name in the release → where it comes from."""
    parts = {
        "recall": candidate.recall / "saved_model",
        "rank": candidate.rank / "saved_model",
        "items.parquet": candidate.recall / "items.parquet",
        popular.FILE: candidate.recall / popular.FILE,
        "weights.json": candidate.weights / "weights.json",
        "verdict.json": candidate.verdict / "verdict.json",
        PROBE: candidate.rehearsal / PROBE,
        "report.html": candidate.report,
    }
    for name, source in parts.items():
        if not source.exists():
            raise ReleaseError(
                f"{source}: missing, so there is no {name} to release; run the stage that makes it again"
            )
    for model in MODELS:
        if not (parts[model] / "saved_model.pb").is_file():
            raise ReleaseError(f"{parts[model]}: not a SavedModel (no saved_model.pb in it)")
    return parts


def _forced(verdict: dict[str, Any], by: str, reason: str) -> dict[str, str] | None:
    """Who releases a rejected candidate and why; None for an approved one, which nobody need force."""
    sentence = verdict.get("sentence", "no verdict")
    if verdict.get("approved") is True:
        if reason:
            raise ReleaseError(f"the gate approved this candidate, there is nothing to force: {sentence}")
        return None
    if not reason:
        raise ReleaseError(f"the gate did not approve this candidate: {sentence}")
    if not reason.strip():
        raise ReleaseError("a candidate that the gate did not approve is forced with a reason, and this one is blank")
    if by.strip().lower() in ("", NOBODY):
        raise ReleaseError("a candidate that the gate did not approve is forced by a named person, and nobody is named")
    return {"by": by, "reason": reason, "verdict": sentence}


def _manifest(candidate: Candidate, verdict: dict[str, Any]) -> dict[str, Any]:
    """What the candidate's own files say of it."""
    weights = _json(candidate.weights / "weights.json")
    recall, rank = _json(candidate.recall / "metrics.json"), _json(candidate.rank / "metrics.json")
    try:
        return {
            "parent": verdict["champion"],
            "weights": weights["weights"],
            "fusion": weights["fusion"],
            "heads": list(LABELS),
            "feature_services": FEATURE_SERVICES,
            "recall": _json(candidate.recall / "config.json"),
            "rank": _json(candidate.rank / "config.json"),
            "inputs": {"recall": recall["inputs"], "rank": rank["inputs"]},
            "metrics": {"recall": recall["test"], "rank": rank["test"], "gate": verdict["heads"]},
            "verdict": verdict["sentence"],
            "data_window": verdict["data_window"],
        }
    except KeyError as error:
        raise ReleaseError(
            f"the candidate's files do not say its {error}; run the stage that makes it again"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ReleaseError(f"{path}: not a JSON object")
    return document


def hashes(path: Path) -> dict[str, str]:
    """Relative path → sha256 of every file below `path` but the manifest."""
    found = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            found[name] = "a link"  # nothing in a release is one
            continue
        if name == MANIFEST or file.is_dir():
            continue
        with file.open("rb") as content:
            found[name] = file_digest(content, "sha256").hexdigest()
    return found


def _released(home: Path, run_id: str, files: dict[str, str]) -> int | None:
    """The release that was already made of these files by this run, if there is one."""
    for number in reversed(releases(home)):
        try:
            found = manifest(home, number)
        except ReleaseError:  # a damaged release is no reason to make no other
            continue
        if found.get("run_id") == run_id and found.get("files") == files:
            return number
    return None


def _next(home: Path) -> int:
    """A number that no release has, nor had as far as can be seen: a number is never given twice."""
    routed = routing.read(home / "routing.json")
    used = [*releases(home), *routed.releases, *routed.previous]
    used += [int(path.name) for model in MODELS for path in base_path(home, model).glob("[0-9]*")]
    return max(used, default=0) + 1


def freeze(path: Path) -> None:
    """Makes every file below `path` durable and read-only."""
    for file in path.rglob("*"):
        if file.is_dir():
            sync_directory(file)
        else:
            file.chmod(0o444)
            sync_file(file)
    sync_directory(path)


@contextmanager
def exclusively(home: Path) -> Iterator[None]:
    """One process at a time makes or deletes releases of this home; what a killed one left behind is cleared away."""
    folder = home / "releases"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for stale in folder.glob(".*-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)
