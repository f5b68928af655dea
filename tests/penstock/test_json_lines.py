from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from penstock.json_lines import DailyLines, LineReader, day_files

DAY_MS = 24 * 3_600_000


def records(directory: Path) -> dict[str, list[int]]:
    return {path.stem: [record["n"] for record in LineReader(path).read()] for path in day_files(directory)}


def test_each_day_has_its_file_and_a_day_never_goes_back(tmp_path: Path) -> None:
    lines = DailyLines(tmp_path)
    for number, at_ms in enumerate([0, DAY_MS - 1, DAY_MS, DAY_MS - 1, 3 * DAY_MS]):
        lines.append({"n": number}, at_ms)
    lines.close()
    assert records(tmp_path) == {"1970-01-01": [0, 1], "1970-01-02": [2, 3], "1970-01-04": [4]}


def test_what_a_killed_process_left_of_a_line_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "1970-01-01.jsonl"
    for left in (b'{"n":1}\n{"n":', b'{"n":1}\n' + b"x" * 100_000, b'{"n":', b""):
        path.write_bytes(left)
        lines = DailyLines(tmp_path)
        lines.append({"n": 2}, 0)
        lines.close()
        assert records(tmp_path) == {"1970-01-01": [*([1] if b"\n" in left else []), 2]}


def test_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    lines = DailyLines(tmp_path)
    writers = [
        threading.Thread(target=lambda: [lines.append({"n": number}, number * DAY_MS) for number in range(20)])
        for _ in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines.close()
    found = sorted(number for numbers in records(tmp_path).values() for number in numbers)
    assert found == sorted(8 * list(range(20)))


def test_a_disk_that_is_full_is_told_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = DailyLines(tmp_path)
    lines.append({"n": 1}, 0)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[: len(line) // 2]))
    with pytest.raises(OSError, match="is the disk full"):
        lines.append({"n": 2}, 0)
    monkeypatch.undo()
    lines.append({"n": 3}, 0)
    lines.close()
    assert records(tmp_path) == {"1970-01-01": [1, 3]}
