"""Releases in an object store, for more than one machine: s3://bucket/releases, gs://…, or a directory that all mount.

ROOT/N/…                a file of release N an object
ROOT/N/manifest.json    the last to come and the first to go: a release is there when its manifest is
ROOT/N/.claim           who took the number, and so that nobody takes it twice

A machine serves from its own copy in HOME/releases, which `fetch` makes and holds to the manifest.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from penstock.durable import sync_directory
from penstock.release import MANIFEST, ReleaseError, check_files, directory, exclusively, freeze

CLAIM = ".claim"


class ReleaseStore:
    """The releases at a URL that fsspec knows; every act may be repeated, and repeating finishes what was interrupted.

    Args:
        url: credentials and endpoint are those of the environment, as the store's own tools read them.

    Raises:
        ReleaseError: no such kind of store, or what it needs is not installed. Of every act: it does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            self._files, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise ReleaseError(f"release store {url}: {error}") from error
        if isinstance(self._files, LocalFileSystem):
            self._files.auto_mkdir = True

    def numbers(self) -> list[int]:
        """The numbers of the releases there are, in order."""
        with self._reaching():
            found = self._files.glob(f"{self._root}/*/{MANIFEST}")
        names = [path.split("/")[-2] for path in found]
        return sorted(int(name) for name in names if name.isdecimal())

    def claim(self, least: int) -> int:
        """A number that nobody has or gets again, `least` or above."""
        with self._reaching():
            try:
                names = [path.rstrip("/").split("/")[-1] for path in self._files.ls(self._root, detail=False)]
            except FileNotFoundError:
                names = []
            number = max([least, *(int(name) + 1 for name in names if name.isdecimal())])
            while True:
                try:
                    self._create(f"{self._root}/{number}/{CLAIM}")
                except FileExistsError:
                    number += 1
                else:
                    return number

    def _create(self, path: str) -> None:
        """Makes an empty object; of several who try at once, one does not get FileExistsError."""
        if isinstance(self._files, LocalFileSystem):  # whose own way looks first and then writes
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch(exist_ok=False)
        else:
            self._files.pipe_file(path, b"", mode="create")

    def publish(self, release: Path, number: int) -> None:
        """Puts the directory of release `number` into the store, its manifest last.

        Raises:
            ReleaseError: there is another release of that number.
        """
        manifest = (release / MANIFEST).read_bytes()
        with self._reaching():
            place = f"{self._root}/{number}"
            if self._files.exists(f"{place}/{MANIFEST}"):
                if self._files.cat_file(f"{place}/{MANIFEST}") != manifest:
                    raise ReleaseError(f"release store {self.url} has another release {number}: build it anew")
                return
            for file in sorted(release.rglob("*")):
                if file.is_file() and file.name != MANIFEST:
                    self._files.put_file(str(file), f"{place}/{file.relative_to(release).as_posix()}")
            self._files.pipe_file(f"{place}/{MANIFEST}", manifest)

    def manifest(self, number: int) -> dict[str, Any]:
        """The manifest of release `number`.

        Raises:
            ReleaseError: there is no such release, or its manifest is not readable.
        """
        with self._reaching():
            try:
                content = self._files.cat_file(f"{self._root}/{number}/{MANIFEST}")
            except FileNotFoundError:
                there = ", ".join(map(str, self.numbers())) or "none"
                raise ReleaseError(f"release store {self.url} has no release {number}; it has: {there}") from None
        try:
            found = json.loads(content)
        except ValueError as error:
            raise ReleaseError(f"release store {self.url}: the manifest of {number} is not JSON: {error}") from error
        return dict(found)

    def fetch(self, home: Path, number: int) -> None:
        """Makes HOME/releases/`number` of what is in the store, unless it is there: entirely or not at all.

        Raises:
            ReleaseError: the store has no such release, or not what its manifest says; or the disk does not take it.
        """
        target = directory(home, number)
        if target.is_dir():
            return
        with exclusively(home):
            if target.is_dir():
                return
            found = self.manifest(number)
            temporary = Path(tempfile.mkdtemp(prefix=f".fetching-{number}-", dir=target.parent))
            try:
                temporary.chmod(0o755)
                self._download(number, temporary)
                check_files(temporary, found)
                freeze(temporary)
                temporary.rename(target)
                sync_directory(target.parent)
            except OSError as error:
                raise ReleaseError(f"{target}: not fetched: {error}; make room or mend it, and run it again") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _download(self, number: int, into: Path) -> None:
        place = f"{self._root}/{number}"
        with self._reaching():
            for path in self._files.find(place):
                name = path[path.index(f"{place}/") + len(place) + 1 :]
                if name != CLAIM:
                    (into / name).parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(path, str(into / name))

    def delete(self, number: int) -> None:
        """Takes release `number` out of the store; its number stays taken."""
        with self._reaching():
            place = f"{self._root}/{number}"
            if self._files.exists(f"{place}/{MANIFEST}"):
                self._files.rm_file(f"{place}/{MANIFEST}")
            for path in self._files.find(place):
                if not path.endswith(f"/{CLAIM}"):
                    self._files.rm_file(path)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns what a store raises into the one line that says so."""
        try:
            yield
        except ReleaseError:
            raise
        except Exception as error:  # every kind of store raises its own
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise ReleaseError(
                f"release store {self.url} does not answer: {reason}; nothing is lost, run it again"
            ) from error
