from __future__ import annotations

import multiprocessing
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from benchmarks.faults import TORN_BYTES, Fault, Steps, Wire
from penstock.durable import replace_file

CONTENT = b"what was there before" * 10
NEW = b"what is to be there" * 10


def _replace(path: Path, fault: Fault, parent: Connection) -> None:
    steps = Steps(fault, parent, path.parent)
    said = "done"
    try:
        replace_file(path, NEW)
    except OSError as error:
        said = error.strerror or "?"
    steps.end()
    parent.send((steps.taken, said))


def run(path: Path, fault: Fault) -> tuple[int, str]:
    """The steps that were taken and what was said; "killed" if nothing was."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_replace, args=(path, fault, there))
    process.start()
    there.close()
    try:
        said = here.recv()
        while said == "step":
            path.with_name("signal").touch()
            here.send("go on")
            said = here.recv()
        return said
    except EOFError:
        return 0, "killed"
    finally:
        process.join()
        here.close()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What replacing a file takes: its directory, the new file, the rename."""
    taken, said = run(tmp_path_factory.mktemp("whole") / "file", Fault("none"))
    assert said == "done"
    assert 3 <= taken <= 6
    return taken


@pytest.mark.parametrize(
    ("kind", "said"), [("kill", "killed"), ("torn", "killed"), ("full", "No space left on device")]
)
def test_a_fault_at_any_step_leaves_the_old_file_or_the_new(tmp_path: Path, steps: int, kind: str, said: str) -> None:
    seen = set()
    for step in range(1, steps + 1):
        path = tmp_path / str(step) / "file"
        path.parent.mkdir()
        path.write_bytes(CONTENT)
        found = run(path, Fault(kind, step))  # type: ignore[arg-type]
        seen.add(found[1])
        assert path.read_bytes() in (CONTENT, NEW)
        if found[1] == "done":
            assert path.read_bytes() == NEW
        left = [other for other in path.parent.iterdir() if other != path]
        if kind == "torn" and left:
            assert left[0].stat().st_size in (0, TORN_BYTES)
    assert said in seen


def test_a_signal_waits_for_its_answer(tmp_path: Path) -> None:
    assert run(tmp_path / "file", Fault("signal", 2))[1] == "done"
    assert (tmp_path / "signal").exists()
    assert (tmp_path / "file").read_bytes() == NEW


def test_a_wire_passes_everything_on_until_it_is_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            for _ in range(2):
                end, _ = listener.accept()
                with end:
                    while data := end.recv(4096):
                        end.sendall(data)

        threading.Thread(target=echo, daemon=True).start()
        wire = Wire(listener.getsockname()[1])
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", wire.port), timeout=10) as near:
                near.sendall(b"hello")
                assert near.recv(4096) == b"hello"
                wire.cut()
                assert near.recv(4096) == b""
            with socket.create_connection(("127.0.0.1", wire.port), timeout=10) as refused:
                assert refused.recv(4096) == b""
            wire.mend()
        wire.close()
