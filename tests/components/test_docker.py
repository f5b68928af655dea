"""Containers on a Docker engine of this test's own, or on the one that answers."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker as docker_py
import pytest

from components import containers, docker, stages
from components.docker import Container
from components.resources import Config
from components.runner import ROOT, StageError, _run_child, run_stage
from components.stage import spec

# docker's client leaves the socket of a log to whoever collects it
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

STAGE = "tests.components.tiny:doubling"
IMAGE = "penstock-test/exits-3:1"
EXIT = "/exits-3"
# exit(3), as the two kinds of machine say it
CODE = {
    "x86_64": (62, b"\xbf\x03\x00\x00\x00\xb8\x3c\x00\x00\x00\x0f\x05"),
    "aarch64": (183, b"\x60\x00\x80\xd2\xa8\x0b\x80\xd2\x01\x00\x00\xd4"),
}


def program() -> bytes:
    """An ELF file of one segment that does nothing but exit with status 3."""
    machine, code = CODE[platform.machine()]
    base, headers = 0x400000, 64 + 56
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = headers + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + code


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def engine() -> Iterator[docker_py.DockerClient]:
    """A client of an engine that has the image."""
    if platform.machine() not in CODE:
        pytest.skip(f"no program that exits with 3 for {platform.machine()}")
    daemon = None
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        if shutil.which("dockerd") and os.getuid() == 0:
            # a socket's path must be short, and the engine leaves a mount behind that pytest could not clear away
            folder = Path(tempfile.mkdtemp())
            after.callback(shutil.rmtree, folder, ignore_errors=True)
            after.callback(subprocess.run, ["umount", folder / "exec/netns/default"], stderr=subprocess.DEVNULL)
            patch.setenv("DOCKER_HOST", f"unix://{folder}/s")
            options = {"host": f"unix://{folder}/s", "data-root": folder / "data", "exec-root": folder / "exec"}
            options |= {"pidfile": folder / "pid", "bridge": "none", "iptables": "false"}
            with (folder / "log").open("w") as log:
                command = ["dockerd", *(f"--{name}={value}" for name, value in options.items())]
                daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            after.callback(daemon.wait, 30)
            after.callback(daemon.terminate)
        end = time.monotonic() + (60 if daemon else 0)
        while True:
            try:
                client = docker.engine()
                break
            except StageError as error:
                refused = str(error)
            if time.monotonic() > end or (daemon and daemon.poll() is not None):
                gc.collect()  # sockets that found nobody, while the filter above holds for them
                pytest.skip(f"no Docker engine answers, and none can be started (root, docker.io): {refused}")
            time.sleep(0.1)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, content in ((EXIT, program()), ("tmp/.keep", b"")):
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.size, entry.mode = len(content), 0o755
                tar.addfile(entry, io.BytesIO(content))
        repository, _, tag = IMAGE.partition(":")
        client.api.import_image_from_data(archive.getvalue(), repository=repository, tag=tag)
        yield client
        client.images.remove(IMAGE, force=True)
        client.close()


def container(*command: str, **settings: Any) -> Container:
    given: dict[str, Any] = {
        "image": IMAGE,
        "command": list(command or (EXIT,)),
        "labels": {docker.OWNER: docker._owner(os.getpid()), docker.STAGE: "/nowhere"},
        "environment": {},
        "volumes": {},
        "user": f"{os.getuid()}:{os.getgid()}",
    }
    return Container(**given | settings)


def left(engine: docker_py.DockerClient) -> list[str]:
    return [one.name for one in engine.containers.list(all=True, filters={"label": docker.OWNER}, ignore_removed=True)]


def emptied(engine: docker_py.DockerClient) -> bool:
    """Whether nothing is left; an engine still lists what it is about to remove."""
    end = time.monotonic() + 10
    while left(engine) and time.monotonic() < end:
        time.sleep(0.1)
    return not left(engine)


def machine() -> dict[str, Any]:
    """What makes a container of the empty image one that has this machine's Python and this project."""
    folders = {"/usr", "/lib", "/lib64", "/bin", "/etc", sys.base_prefix, str(ROOT)}
    folders |= {os.path.realpath(sys.prefix), os.path.dirname(os.path.realpath(sys.executable))}
    there = [Path(folder) for folder in folders if os.path.isdir(folder)]
    volumes = {
        str(one): "ro" for one in there if not any(one != other and one.is_relative_to(other) for other in there)
    }
    path = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    return {"volumes": volumes, "environment": environment}


def test_a_container_that_fails_at_once_is_never_a_success(engine: docker_py.DockerClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: docker.run(engine, container(), []), range(100)))
    assert statuses == [3] * 100
    assert left(engine) == []


def test_what_a_container_says_is_passed_on_however_short_it_lived(
    engine: docker_py.DockerClient, capsys: pytest.CaptureFixture[str]
) -> None:
    box = container("sh", "-c", "echo first; echo last >&2; exit 7", **machine())
    assert docker.run(engine, box, []) == 7
    assert sorted(capsys.readouterr().out.split()) == ["first", "last"]


def test_limits_and_gpus_reach_the_engine(engine: docker_py.DockerClient, capsys: pytest.CaptureFixture[str]) -> None:
    hungry = container("python3", "-c", "b'1' * 10**9", memory_bytes=64 * 2**20, cpus=0.5, **machine())
    assert docker.run(engine, hungry, []) == 137
    assert "it used more than the 67108864 bytes" in capsys.readouterr().out
    # an engine that has no GPUs refuses the request for one
    with pytest.raises(StageError, match=r"could not select device driver .* \[\[gpu\]\]"):
        docker.run(engine, container(gpus=1), [])
    with pytest.raises(StageError, match="no-such-program"):
        docker.run(engine, container("/no-such-program"), [])
    assert left(engine) == []


def test_a_stage_runs_in_containers_and_a_missing_output_fails_it(
    engine: docker_py.DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
    monkeypatch.setenv("PENSTOCK_STEP_IMAGE", IMAGE)
    (tmp_path / "numbers").write_text("1\n2\n3\n")
    arguments = {"numbers_uri": str(tmp_path / "numbers"), "trace": str(tmp_path / "trace"), "fail": ""}
    out = tmp_path / "run" / "doubling"

    def go(fail: str) -> dict[str, Any]:
        given = arguments | {"fail": fail}
        described = docker.prepare(STAGE, given, out, {"double": Config(memory="2Gi")})
        assert described["double"]["memory_bytes"] == 2 * 2**30
        for kind, more in machine().items():
            described["double"][kind] |= more
        return _run_child(STAGE, {"arguments": given, "containers": described}, out)

    with pytest.raises(StageError, match="declared doubled but wrote nothing"):
        go("silent")
    assert go("")["parameters"] == {"rows": 3}
    assert (out / "doubled" / "numbers.txt").read_text() == "2\n4\n6"
    assert "labels 3" in capfd.readouterr().out
    # the component's process was the container's first one
    assert (tmp_path / "trace").read_text().split()[-1] != str(os.getpid())
    assert left(engine) == []


def test_containers_end_with_their_task_however_it_ends(engine: docker_py.DockerClient) -> None:
    task = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    labels = {docker.OWNER: docker._owner(task.pid), docker.STAGE: "/a/stage"}
    box = container("sleep", "60", labels=labels, **machine())
    environment = os.environ | {docker.SPECIFICATION: json.dumps(vars(box)), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "components.docker", "kfp.dsl.executor_main"]

    def started() -> subprocess.Popen[bytes]:
        follower = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not left(engine):
            assert follower.poll() is None
        return follower

    # asked to stop, be it while the engine has just made it
    for pause in (0.0, 0.01, 0.03, 0.5):
        follower = started()
        time.sleep(pause)
        follower.terminate()
        follower.wait(20)
        assert emptied(engine)
    # killed: what it left is reaped when the task's next try, or another stage, starts
    follower = started()
    follower.kill()
    follower.wait(20)
    assert docker.reap(engine, Path("/another/stage")) == 0
    assert docker.reap(engine, Path("/a/stage")) == 1
    # the task is killed, and with it nobody who could tell
    follower = started()
    task.send_signal(signal.SIGKILL)
    task.wait()
    follower.wait(20)
    assert emptied(engine)
    # both at once: the machine that comes up again finds it
    engine.containers.create(IMAGE, EXIT, labels=labels)
    assert docker.reap(engine) == 1


def test_what_cannot_run_in_docker_says_so(
    engine: docker_py.DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"numbers_uri": str(tmp_path), "trace": "", "fail": ""}
    with pytest.raises(StageError, match=r"no image penstock/step:0\.1\.0: make image"):
        run_stage(STAGE, arguments, tmp_path / "out", "docker")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing")
    with pytest.raises(StageError, match="PENSTOCK_RUNNER=docker needs a Docker engine"):
        run_stage(STAGE, arguments, tmp_path / "out", "docker")


@pytest.mark.parametrize("stage", [name for name, one in vars(stages).items() if hasattr(one, "pipeline_func")])
def test_a_stage_stays_a_pipeline_in_containers(stage: str) -> None:
    pipeline = getattr(stages, stage)
    described = {key: {"image": IMAGE} for key in containers.executors(spec(pipeline))}
    contained = docker.contained(pipeline, described)
    assert contained.component_spec.implementation.graph is not None
    found = spec(contained)
    assert found["root"] == spec(pipeline)["root"]
    executors = containers.executors(found)
    assert executors.keys() == described.keys()
    for executor in executors.values():
        assert executor["env"] == [{"name": docker.SPECIFICATION, "value": json.dumps({"image": IMAGE})}]


def test_paths_among_the_arguments_are_seen_by_the_container(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    arguments = {"options": json.dumps({"path": f"{tmp_path}/data", "n": 1}), "home": str(tmp_path), "log": "/nothing"}
    assert list(docker._paths(arguments)) == [tmp_path / "data", tmp_path]
