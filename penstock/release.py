"""A release: recall model, item vectors, rank model and output weights as one numbered, immutable directory.

HOME/releases/N/manifest.json      what it is and where it comes from, and the sha256 of every file
HOME/releases/N/{recall,rank}/     the two SavedModels
HOME/releases/N/{items.parquet, weights.json, verdict.json, report.html}
HOME/models/{recall,rank}/N        links to the SavedModels: base paths for TF Serving
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from typing import Any

from penstock import routing
from penstock.durable import replace_link, sync_directory, sync_file
from penstock.events import LABELS

MANIFEST = "manifest.json"
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
    home: Path, candidate: Candidate, *, approved_by: str, run_id: str, git_revision: str, force_reason: str = ""
) -> int:
    """Makes a release of `candidate` and returns its number.

    It is built under a temporary name, made durable and renamed: it is there entirely or not at all. The same run's
    same files are not released twice, so that a repeated step does no harm.

    Args:
        force_reason: why a candidate that the gate has rejected is released all the same; the manifest names who
            approved it, the reason and the verdict as `forced` (null for an approved one).

    Raises:
        ReleaseError: a part of the candidate is missing; the gate did not approve it, and it is not forced by a named
            person with a reason; or the gate approved it, and it is forced.
    """
    parts = _parts(candidate)
    verdict = _json(candidate.verdict / "verdict.json")
    forced = _forced(verdict, approved_by, force_reason)
    folder = home / "releases"
    folder.mkdir(parents=True, exist_ok=True)
    with _building(folder):
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
        try:
            temporary.chmod(0o755)
            for name, source in parts.items():
                if source.is_dir():
                    shutil.copytree(source, temporary / name, copy_function=shutil.copyfile)
                else:
                    shutil.copyfile(source, temporary / name)
            hashes = _hashes(temporary)
            number = _released(home, run_id, hashes)
            if number is not None:
                return number
            number = _next(home)
            manifest = _manifest(candidate, verdict) | {
                "release": number,
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "approved_by": approved_by,
                "forced": forced,
                "run_id": run_id,
                "git_revision": git_revision,
                "files": hashes,
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
            _freeze(temporary)
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
    expected = found.get("files")
    if not isinstance(expected, dict):
        raise ReleaseError(f"{path}: its manifest lists no files; do not use it")
    actual = _hashes(path)
    problems = [
        *(f"{name} is missing" for name in sorted(expected.keys() - actual.keys())),
        *(f"{name} is not in the manifest" for name in sorted(actual.keys() - expected.keys())),
        *(f"{name} was changed" for name in sorted(expected.keys() & actual.keys()) if expected[name] != actual[name]),
    ]
    if not problems and found.get("weights") != _json(path / "weights.json").get("weights"):
        problems = ["the manifest's weights are not those of weights.json"]
    if problems:
        raise ReleaseError(f"{path} is not what was released: {'; '.join(problems)}. Restore it or build a new release")
    return found


def base_path(home: Path, model: str) -> Path:
    """The base path of `model` (recall or rank) for TF Serving: a directory of versions, one a release."""
    return home / "models" / model


def link(home: Path, number: int) -> None:
    """Offers release `number` to the model server: links recall/N and rank/N in the base paths, each in one step."""
    for model in MODELS:
        replace_link(base_path(home, model) / str(number), f"../../releases/{number}/{model}")


def unlink_all_but(home: Path, kept: tuple[int, ...]) -> None:
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
        "weights.json": candidate.weights / "weights.json",
        "verdict.json": candidate.verdict / "verdict.json",
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


def _hashes(path: Path) -> dict[str, str]:
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


def _released(home: Path, run_id: str, hashes: dict[str, str]) -> int | None:
    """The release that was already made of these files by this run, if there is one."""
    for number in reversed(releases(home)):
        found = manifest(home, number)
        if found.get("run_id") == run_id and found.get("files") == hashes:
            return number
    return None


def _next(home: Path) -> int:
    """A number that no release has, nor had as far as can be seen: a number is never given twice."""
    routed = routing.read(home / "routing.json")
    used = [*releases(home), *routed.releases, *routed.previous]
    used += [int(path.name) for model in MODELS for path in base_path(home, model).glob("[0-9]*")]
    return max(used, default=0) + 1


def _freeze(path: Path) -> None:
    """Makes every file below `path` durable and read-only."""
    for file in path.rglob("*"):
        if file.is_dir():
            sync_directory(file)
        else:
            file.chmod(0o444)
            sync_file(file)
    sync_directory(path)


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """One builder at a time; what a killed builder left behind is cleared away."""
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for stale in folder.glob(".building-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)
