"""Records kept as they come: JSON lines, a file a UTC day, in DIRECTORY/<day>.jsonl.

A line is with the operating system before `append` returns: what was appended survives a killed process. Within
`SYNC_SECONDS` it is on the disk as well: so much may a machine lose that loses its power.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from penstock.durable import sync_directory

SYNC_SECONDS = 1.0


def day_files(directory: Path) -> list[Path]:
    """The files of a directory, oldest first."""
    return sorted(directory.glob("????-??-??.jsonl"))


class DailyLines:
    """The one writer of a directory; safe for many threads.

    The name of a day never goes back: of a clock that does, the records go on in the newest file, so that the order of
    files and lines is the order in which they came.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._day = max((path.stem for path in day_files(directory)), default="")
        self._file: int | None = None
        self._writing = threading.Lock()
        self._unsynced = False
        self._sync_failed: OSError | None = None
        self._closing = threading.Event()
        self._syncing = threading.Thread(target=self._keep_syncing, name=f"sync {directory}", daemon=True)
        self._syncing.start()

    def append(self, record: Mapping[str, Any], at_ms: int) -> None:
        """Adds a line to the file of a time, ms since 1970.

        Raises:
            OSError: it could not be written, and is not there; or what was appended before did not reach the disk.
        """
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._writing:
            if self._sync_failed is not None:
                failed, self._sync_failed = self._sync_failed, None
                raise failed
            day = max(self._day, datetime.fromtimestamp(at_ms / 1000, UTC).date().isoformat())
            if self._file is None or day != self._day:
                self._open(day)
            assert self._file is not None
            start = os.lseek(self._file, 0, os.SEEK_END)
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(
                        f"{self._directory}: only {written} of {len(line)} bytes were written; is the disk full?"
                    )
            except OSError:
                os.ftruncate(self._file, start)  # half a line would spoil the next one
                raise
            self._unsynced = True

    def close(self) -> None:
        """Puts everything on the disk."""
        self._closing.set()
        self._syncing.join()
        with self._writing:
            if self._file is not None:
                os.fsync(self._file)
                os.close(self._file)
                self._file = None

    def _open(self, day: str) -> None:
        path = self._directory / f"{day}.jsonl"
        new = not path.exists()
        file = _open_for_append(path)
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
        self._file, self._day = file, day
        if new:
            sync_directory(self._directory)

    def _keep_syncing(self) -> None:
        while not self._closing.wait(SYNC_SECONDS):
            with self._writing:
                if not self._unsynced or self._file is None:
                    continue
                self._unsynced = False
                copy = os.dup(self._file)
            try:
                os.fsync(copy)  # outside the lock: appending goes on meanwhile
            except OSError as error:
                self._sync_failed = error
            finally:
                os.close(copy)


def _open_for_append(path: Path) -> int:
    """Opens `path` at the end of its last whole line: what a killed process left of a line was never answered."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
    end = os.lseek(descriptor, 0, os.SEEK_END)
    whole = end
    while whole > 0:
        start = max(0, whole - 65536)
        newline = os.pread(descriptor, whole - start, start).rfind(b"\n")
        if newline >= 0:
            whole = start + newline + 1
            break
        whole = start
    if whole < end:
        os.ftruncate(descriptor, whole)
    return descriptor


class LineError(ValueError):
    """A line that is no record; the message names file and line, and says what to do."""


class LineReader:
    """Reads the records of a file in order, and those that are appended later; a torn last line is none yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._lines = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that were not read before.

        Raises:
            LineError: a line that is none.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._lines += 1
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise LineError(f"{self.path}, line {self._lines}: not a record; move the file away") from error
                yield record
