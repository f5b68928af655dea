"""Starts, watches and stops the services of one machine: Airflow, MLflow, model server, gateway and feature server.

`serve` runs in a process of its own (its log is HOME/logs/supervisor.log) and holds HOME/supervisor.lock as long as it
lives. What it does is told by HOME/services.json:

    {"pid", "state": "starting" | "ready" | "stopping" | "stopped" | "failed", "error",
     "services": {name: {"pid", "created", "log"}}}
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from local.place import HOST, ROOT, USERS, LocalError, Place, write_private

DAGS = ("prepare", "train", "release", "rollback", "look_alike")
START_SECONDS = 240
STOP_SECONDS = 30


class Supervisor:
    """The services as children, each in a session of its own."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._home = place.home
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._status: dict[str, Any] = {"pid": os.getpid(), "state": "starting", "error": "", "services": {}}
        self._stopping = threading.Event()
        self._began = time.monotonic()

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT (returns 0), or until a service fails (returns 1)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())
        state = "stopped"
        try:
            self._start()
            self._set("ready")
            self._say("everything is up")
            while True:
                self._pause(1)
                self._watch()
        except KeyboardInterrupt:
            pass
        except LocalError as error:
            self._say(str(error))
            self._status["error"] = str(error)
            state = "failed"
        self._set("stopping")
        stop(list(self._children.values()))
        self._status["services"] = {}
        self._set(state)
        self._say("everything is stopped")
        return int(state == "failed")

    def _start(self) -> None:
        place = self._place
        self._set("starting")
        stop_leftovers(self._home, self._say)
        place.check_ports()
        place.make_current()
        self._prepare()
        mlflow = self._home / "mlflow"
        stores = {"backend-store-uri": f"sqlite:///{mlflow}/mlflow.db", "artifacts-destination": f"{mlflow}/artifacts"}
        address = {"host": HOST, "port": str(place.ports["mlflow"]), "workers": "1"}
        options = (f"--{name}={value}" for name, value in (address | stores).items())
        self._spawn("mlflow", "mlflow", "server", *options)
        if not place.model_server:
            grpc, rest = (str(place.ports[f"model server ({kind})"]) for kind in ("gRPC", "REST"))
            where = ["--home", str(self._home), "--grpc-port", grpc, "--rest-port", rest]
            self._spawn("model-server", "serving.model_server", *where)
        self._migrate()
        self._spawn("airflow-api-server", "airflow", "api-server")
        # the scheduler would offer the tasks' logs on a port of its own; here they are read as files
        self._spawn("airflow-scheduler", "airflow", "scheduler", "--skip-serve-logs")
        self._spawn("airflow-dag-processor", "airflow", "dag-processor")
        if os.environ.get("PENSTOCK_RUNNER") == "kubeflow":
            # tasks that wait for a cluster wait there
            self._spawn("airflow-triggerer", "airflow", "triggerer", "--skip-serve-logs")
        self._spawn("gateway", "serving.gateway")
        port = str(place.ports["features"])
        self._spawn("features", "feature_repo.serve", "--home", str(self._home), "--host", HOST, "--port", port)
        self._await()

    def _prepare(self) -> None:
        for folder in ("airflow", "logs", "mlflow"):
            (self._home / folder).mkdir(parents=True, exist_ok=True)
        for secret in ("jwt_secret", "secret_key"):
            self._place.secret(secret)
        path = self._place.passwords
        known = json.loads(path.read_text()) if path.exists() else {}
        if USERS.keys() - known.keys():
            write_private(path, json.dumps({user: known.get(user) or secrets.token_urlsafe(12) for user in USERS}))
        self._place.write_shell()

    def _migrate(self) -> None:
        # the migration costs ten seconds of imports, so it is done once a version
        done, version = self._home / "airflow" / "migrated", importlib.metadata.version("apache-airflow")
        if done.exists() and done.read_text() == version and (self._home / "airflow" / "airflow.db").exists():
            return
        self._say("airflow prepares its database")
        child = self._spawn("airflow-migrate", "airflow", "db", "migrate")
        while child.poll() is None:
            self._pause(0.2)
        self._watch(finished="airflow-migrate")
        del self._children["airflow-migrate"], self._status["services"]["airflow-migrate"]
        done.write_text(version)

    def _spawn(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = self._home / "logs" / f"{name}.log"
        with log.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self._home,
                env={**os.environ, **self._place.environment()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[name] = child
        created = psutil.Process(child.pid).create_time()
        self._status["services"][name] = {"pid": child.pid, "created": created, "log": str(log)}
        self._set(self._status["state"])
        return child

    def _await(self) -> None:
        place = self._place
        checks: dict[str, Callable[[], bool]] = {
            "mlflow": lambda: _ok(f"{place.url('mlflow')}/health"),
            "gateway": lambda: _ok(f"{place.url('gateway')}/health"),
            "features": lambda: _ok(f"{place.url('features')}/health"),
            "airflow": lambda: _airflow_is_healthy(place),
        }
        if not place.model_server:
            ports = [place.ports[f"model server ({kind})"] for kind in ("gRPC", "REST")]
            checks["model server"] = lambda: all(_listens(port) for port in ports)
        began = time.monotonic()
        while checks:
            self._watch()
            for name in [name for name, healthy in checks.items() if healthy()]:
                del checks[name]
                self._say(f"{name} is up")
            if time.monotonic() - began > START_SECONDS:
                raise LocalError(
                    f"{', '.join(checks)} did not come up within {START_SECONDS} s; see {self._home / 'logs'}"
                )
            self._pause(0.5)

    def _watch(self, finished: str = "") -> None:
        """Raises LocalError with the end of its log if a service ended; `finished` may have, with success."""
        for name, child in self._children.items():
            code = child.poll()
            if code is None or (name == finished and code == 0):
                continue
            log = self._home / "logs" / f"{name}.log"
            last = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-15:])
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise LocalError(f"{name} ended with {how}. The end of {log}:\n{last}")

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise KeyboardInterrupt

    def _set(self, state: str) -> None:
        self._status["state"] = state
        path = self._home / "services.json"
        path.with_suffix(".part").write_text(json.dumps(self._status, indent=1))
        path.with_suffix(".part").replace(path)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.1f} s  {text}", flush=True)


def stop(children: list[subprocess.Popen[bytes]], patience: float = STOP_SECONDS) -> None:
    """TERM to each child; after `patience` seconds, KILL to what is left of them and of all they started."""
    family: list[psutil.Process] = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            family += [process, *process.children(recursive=True)]
            child.terminate()
    end = time.monotonic() + patience
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, end - time.monotonic()))
    _kill(family)
    for child in children:
        child.wait()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        # psutil checks that the number still is the process it was
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def stop_leftovers(home: Path, say: Callable[[str], None]) -> None:
    """Ends services that a killed supervisor of this home left running."""
    status = read_status(home)
    for name, service in status.get("services", {}).items():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(service["pid"])
            if abs(process.create_time() - service["created"]) < 1:
                say(f"{name} was left running by an interrupted start: stopped")
                _kill([process, *process.children(recursive=True)])
                process.wait(10)


def _ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((HOST, port)) == 0


def _airflow_is_healthy(place: Place) -> bool:
    from local.airflow import Airflow, AirflowError

    try:
        health = httpx.get(f"{place.url('airflow')}/api/v2/monitor/health", timeout=5).json()
        parts = ("metadatabase", "scheduler", "dag_processor")
        if not all(health[part]["status"] == "healthy" for part in parts):
            return False
        with Airflow.log_in(place, "admin") as airflow:
            return all(airflow.has_dag(dag) for dag in DAGS)
    except (httpx.HTTPError, AirflowError, KeyError, ValueError):
        return False


def read_status(home: Path) -> dict[str, Any]:
    """What HOME/services.json says; nothing if there is none."""
    try:
        return json.loads((home / "services.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


@contextlib.contextmanager
def locked(home: Path, name: str) -> Iterator[bool]:
    """Holds HOME/`name` while inside; yields whether it was free. The lock ends with its process, whatever ends it."""
    home.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home / name, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield True
    finally:
        os.close(descriptor)


def running(home: Path) -> int | None:
    """The process that holds HOME/supervisor.lock, if one does."""
    with locked(home, "supervisor.lock") as free:
        if free:
            return None
        return int((home / "supervisor.lock").read_text().strip() or 0)


def serve(place: Place) -> int:
    """The supervisor itself, in this process."""
    with locked(place.home, "supervisor.lock") as free:
        if not free:
            print(f"another supervisor serves {place.home} already", flush=True)
            return 1
        return Supervisor(place).run()


def start(place: Place, say: Callable[[str], None]) -> subprocess.Popen[bytes]:
    """Starts a supervisor in the background, tells its progress, and returns it once everything is up.

    Raises:
        LocalError: one runs already, or a service did not come up; everything is stopped then.
    """
    if pid := running(place.home):
        raise LocalError(f"the services of {place.home} run already (process {pid}): `make down` stops them")
    log = place.home / "logs" / "supervisor.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "local", "serve"],
            cwd=ROOT,
            env={**os.environ, **place.environment()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with log.open() as told:
        try:
            while True:
                ended = child.poll() is not None
                for line in told:
                    say(line.rstrip("\n"))
                status = read_status(place.home)
                if ended:
                    raise LocalError("the services did not start: see above")
                if status.get("pid") == child.pid and status["state"] == "ready":
                    return child
                time.sleep(0.2)
        except KeyboardInterrupt:
            child.terminate()
            child.wait(STOP_SECONDS + 30)
            raise


def down(place: Place) -> bool:
    """Stops the services of this home; False if none ran."""
    pid = running(place.home)
    if not pid:
        stop_leftovers(place.home, print)
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        process.wait(STOP_SECONDS + 30)
    return True
