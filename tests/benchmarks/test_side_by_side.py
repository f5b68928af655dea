"""Figures come back in the order of their calls, and a failure ends all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.side_by_side import each


def test_what_each_call_gives_comes_back_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert each(divmod, [(7, 2), (9, 4), (5, 5)], ["a", "b", "c"]) == [(3, 1), (2, 1), (1, 0)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1 of 3", "2 of 3", "3 of 3"]
    assert sorted(line.split(": ")[1] for line in lines) == ["a", "b", "c"]

    with pytest.raises(ZeroDivisionError):
        each(divmod, [(1, 1), (1, 0)], ["good", "bad"])


def wait(name: str) -> None:
    Path(name).write_text(str(os.getpid()))
    time.sleep(300)


def test_who_trains_ends_with_the_one_who_asked(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    call = f"from tests.benchmarks.test_side_by_side import each, wait; each(wait, [({str(said)!r},)], ['it'])"
    with subprocess.Popen(
        [sys.executable, "-c", call], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ) as asked:
        while not (said.exists() and said.read_text()):
            assert asked.poll() is None
            time.sleep(0.05)
        trains = psutil.Process(int(said.read_text()))
        asked.kill()
    trains.wait(30)
