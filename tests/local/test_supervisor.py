from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from local import supervisor
from local.place import ROOT, LocalError, Place
from tests.local.ports import free_ports

HOLD = (
    "import sys, time; from pathlib import Path; from local.supervisor import locked\n"
    "with locked(Path(sys.argv[1]), 'supervisor.lock') as free:\n"
    "    print(free, flush=True); time.sleep(60)"
)
STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
    "print(child.pid, flush=True); time.sleep(60)"
)


def spawn(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE)


def said(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().decode().strip()


def test_a_lock_is_one_processes_and_ends_with_it_however_it_ends(tmp_path: Path) -> None:
    with spawn(HOLD, str(tmp_path)) as holder:
        assert said(holder) == "True"
        assert supervisor.running(tmp_path) == holder.pid
        with supervisor.locked(tmp_path, "supervisor.lock") as free:
            assert not free
        holder.kill()
        holder.wait()
    # the file is still there, and says nothing any more
    assert (tmp_path / "supervisor.lock").exists()
    assert supervisor.running(tmp_path) is None


def test_a_second_start_says_who_runs(tmp_path: Path) -> None:
    with spawn(HOLD, str(tmp_path)) as holder:
        assert said(holder) == "True"
        place = Place(tmp_path, {})
        with pytest.raises(LocalError, match=rf"run already \(process {holder.pid}\): `make down` stops them"):
            supervisor.start(place, print)
        assert supervisor.down(place)
        assert not psutil.pid_exists(holder.pid)
        assert not supervisor.down(place)


def test_stopping_ends_the_stubborn_and_all_they_started() -> None:
    with spawn(STUBBORN) as child:
        grandchild = psutil.Process(int(said(child)))
        supervisor.stop([child], patience=0.5)
        assert child.returncode == -signal.SIGKILL
        grandchild.wait(5)
        assert not grandchild.is_running()


def test_what_a_killed_supervisor_left_is_ended_and_nothing_else(tmp_path: Path) -> None:
    with spawn(STUBBORN) as left, spawn(STUBBORN) as other:
        left_child, other_child = psutil.Process(int(said(left))), psutil.Process(int(said(other)))
        services = {
            "mlflow": {"pid": left.pid, "created": psutil.Process(left.pid).create_time()},
            # the number is in use again by another process
            "gateway": {"pid": other.pid, "created": psutil.Process(other.pid).create_time() - 100},
        }
        (tmp_path / "services.json").write_text(json.dumps({"services": services}))
        told: list[str] = []

        supervisor.stop_leftovers(tmp_path, told.append)

        assert not psutil.pid_exists(left.pid)
        left_child.wait(5)
        assert other.poll() is None
        assert told == ["mlflow was left running by an interrupted start: stopped"]
        supervisor.stop([other], patience=0.1)
        other_child.wait(5)


def test_a_port_in_use_stops_the_start_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        place = Place(tmp_path / "home", free_ports() | {"gateway": port})
        told: list[str] = []
        with pytest.raises(LocalError, match="did not start"):
            supervisor.start(place, told.append)
    assert f"port {port} (gateway) is in use" in told[0]
    assert supervisor.read_status(place.home)["state"] == "failed"
    assert supervisor.running(place.home) is None


def test_nothing_runs_and_status_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "local", "status"],
        cwd=ROOT,
        env={"PENSTOCK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "nothing runs on" in done.stdout
