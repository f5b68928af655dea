"""Stages in containers: kfp's local runner goes through the pipeline, and each component is a container of its own.

kfp has a runner for Docker too, but takes a container that is gone before it was looked at for a success. So its
subprocess runner is given, for each component, a process of ours that runs the container, passes on what it says, and
ends with its exit status:

    PENSTOCK_CONTAINER=<JSON of Container> python -m components.docker kfp.dsl.executor_main ARGUMENT...

A container is removed when its process ends, or when the task that it works for is gone; what a killed machine or a
killed process left is reaped when the next stage starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import docker
import psutil

from components import containers
from components import stage as stages
from components.resources import Config
from components.stage import StageError

OWNER, STAGE = "penstock.owner", "penstock.out"
"""Labels of a container: the process that it works for, and the directory of its stage."""
SPECIFICATION = "PENSTOCK_CONTAINER"
# what kfp's subprocess runner knows a Python component by
_EXECUTOR = "kfp.dsl.executor_main"


@dataclass(frozen=True)
class Container:
    """What a component runs in; plain values, as it goes through the environment."""

    image: str
    command: list[str]
    labels: dict[str, str]
    environment: dict[str, str]
    volumes: dict[str, str]
    """Directories and files that lie in the container where they lie here: "rw" or "ro"."""
    user: str
    memory_bytes: int = 0
    cpus: float = 0.0
    gpus: int = 0


def engine() -> docker.DockerClient:
    """The engine that DOCKER_HOST names, or this machine's.

    Raises:
        StageError: it does not answer.
    """
    try:
        client = docker.from_env()
        client.ping()
        return client
    except docker.errors.DockerException as error:
        refused = str(error)
    # not from within: it would keep, with its context, the socket that found nobody
    raise StageError(f"PENSTOCK_RUNNER=docker needs a Docker engine: {refused}")


def prepare(stage: str, arguments: Mapping[str, Any], out: Path, wanted: Mapping[str, Config]) -> dict[str, Any]:
    """The containers of a stage's components as plain values, by component; what earlier stages left is reaped.

    Raises:
        StageError: an unknown stage, no engine, or it has no such image.
    """
    found = containers.executors(stages.spec(stages.pipeline(stage, arguments)))
    out.parent.mkdir(parents=True, exist_ok=True)
    # where stages meet: what a component is told beside its artifacts are paths of the home
    volumes = {str(out.parent): "rw"}
    if home := os.environ.get("PENSTOCK_HOME"):
        Path(home).mkdir(parents=True, exist_ok=True)
        volumes[home] = "rw"
    for path in _paths(dict(arguments)):
        if not any(path.is_relative_to(mounted) for mounted in volumes):
            volumes[str(path)] = "ro"
    with contextlib.closing(engine()) as client:
        reap(client, out)
        described = {}
        for component, executor in found.items():
            wants = wanted.get(component, Config())
            image = containers.image(wants)
            try:
                client.images.get(image)
            except docker.errors.ImageNotFound:
                raise StageError(f"the Docker engine has no image {image}: make image") from None
            described[component] = asdict(
                Container(
                    image=image,
                    command=list(executor["command"]),
                    labels={OWNER: _owner(os.getpid()), STAGE: str(out)},
                    # whoever runs it may have no home there
                    environment={"HOME": "/tmp"} | containers.variables(),
                    volumes=volumes,
                    user=f"{os.getuid()}:{os.getgid()}",
                    memory_bytes=wants.memory_bytes(),
                    cpus=wants.cpus(),
                    gpus=wants.gpus,
                )
            )
        return described


def _paths(value: Any) -> Iterator[Path]:
    """The paths of this machine among arguments, of which some are JSON."""
    if isinstance(value, str) and value.startswith("/"):
        if Path(value).exists():
            yield Path(value)
    elif isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            yield from _paths(json.loads(value))
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _paths(part)


def contained(pipeline: Any, described: Mapping[str, Any]) -> Any:
    """The pipeline whose components run in these containers, for kfp's subprocess runner."""
    import yaml
    from kfp import components

    spec = stages.spec(pipeline)
    # a pipeline that is called as one of its components is loaded as that component, without what stands around it
    spec["pipelineInfo"]["name"] += "-in-containers"
    for component, executor in containers.executors(spec).items():
        executor["command"] = ["python3", "-m", "components.docker", _EXECUTOR]
        executor["env"] = [{"name": SPECIFICATION, "value": json.dumps(described[component])}]
    return components.load_component_from_text(yaml.safe_dump(spec))


def run(client: docker.DockerClient, container: Container, arguments: list[str]) -> int:
    """Runs a container to its end, passes on what it says, and returns its exit status; it is removed in any case.

    Raises:
        StageError: the engine cannot run it, or was lost.
    """
    gpus = [docker.types.DeviceRequest(count=container.gpus, capabilities=[["gpu"]])] if container.gpus else []
    made = None
    try:
        with _held(signal.SIGTERM):  # what is being made would be left behind
            made = client.containers.create(
                container.image,
                [*container.command, *arguments],
                labels=container.labels,
                environment=container.environment,
                volumes={path: {"bind": path, "mode": mode} for path, mode in container.volumes.items()},
                user=container.user,
                network_mode="host",  # the services of this machine listen on 127.0.0.1
                security_opt=["no-new-privileges"],
                mem_limit=container.memory_bytes or None,
                memswap_limit=container.memory_bytes or None,
                nano_cpus=int(container.cpus * 1e9) or None,
                device_requests=gpus,
            )
        made.start()
        # from its first line, however soon it ended: it is not removed before it was waited for
        for chunk in made.logs(stream=True, follow=True):
            sys.stdout.write(chunk.decode(errors="replace"))
            sys.stdout.flush()
        status = int(made.wait()["StatusCode"])
        made.reload()
        if made.attrs["State"]["OOMKilled"]:
            print(f"it used more than the {container.memory_bytes} bytes of memory that it may", flush=True)
        return status
    except (docker.errors.DockerException, OSError) as error:
        raise StageError(f"Docker: {error}") from error
    finally:
        if made is not None:
            _remove(made)


@contextlib.contextmanager
def _held(number: signal.Signals) -> Iterator[None]:
    """A signal that comes meanwhile is answered at the end; a thread beside the main one gets none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = threading.Event()
    former = signal.signal(number, lambda *_: came.set())
    try:
        yield
    finally:
        signal.signal(number, former)
        if came.is_set():
            signal.raise_signal(number)


def _remove(container: Any) -> None:
    # somebody else is removing it, or the engine is gone: then it is reaped
    with contextlib.suppress(docker.errors.DockerException, OSError):
        container.remove(force=True, v=True)


def reap(client: docker.DockerClient, out: Path | None = None) -> int:
    """Removes containers whose task is gone, and those of `out`; returns how many."""
    gone = 0
    for container in client.containers.list(all=True, filters={"label": OWNER}, ignore_removed=True):
        if container.labels.get(STAGE) == str(out) or not _lives(container.labels[OWNER]):
            _remove(container)
            gone += 1
    return gone


def _owner(pid: int) -> str:
    """A process as no other will be."""
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time()}"


def _lives(owner: str) -> bool:
    host, pid, created = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return True  # another machine's, which shares the engine
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 1
    except psutil.NoSuchProcess:
        return False


def main() -> int:
    container = Container(**json.loads(os.environ[SPECIFICATION]))
    with contextlib.closing(engine()) as client:
        ended = threading.Event()

        def watch() -> None:
            # a task that was killed outright can tell nobody
            while not ended.wait(1):
                if not _lives(container.labels[OWNER]):
                    reap(client, Path(container.labels[STAGE]))
                    return

        threading.Thread(target=watch, daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return run(client, container, sys.argv[2:])
        finally:
            ended.set()


if __name__ == "__main__":
    sys.exit(main())
