"""Real servers for the tests: Debian's Redis and PostgreSQL, on free ports and in directories of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import redis

HOST = "127.0.0.1"
STARTS_WITHIN = 30.0
"""Seconds."""


class Server:
    """A process that listens on `port`, and may be stopped and started again on the same data.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message ends with what it wrote.
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, answers: Callable[[], bool], user: str | None):
        self.port = port
        self._command, self._log, self._answers, self._user = command, log, answers, user
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, cwd=self._log.parent, **as_user(self._user)
            )
        deadline = time.monotonic() + STARTS_WITHIN
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{self._command[0]} did not start: {self._log.read_text()[-800:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends it at once, with what it was told written down."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(STARTS_WITHIN)
            self._process = None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """It is stopped within the block, and there again afterwards."""
        self.stop()
        try:
            yield
        finally:
            self.start()


@contextlib.contextmanager
def redis_server() -> Iterator[Server]:
    """An empty Redis that keeps what it is told, also when it is stopped."""
    binary = find("redis-server", "redis-server")
    with directory(None) as folder:
        port = free_port()
        command = [binary, "--bind", HOST, "--port", str(port), "--dir", str(folder), "--appendonly", "yes"]

        def answers() -> bool:
            with contextlib.suppress(redis.ConnectionError), redis.Redis(HOST, port) as client:
                return bool(client.ping())
            return False

        with running(Server(command, port, folder / "log", answers, None)) as server:
            yield server


@contextlib.contextmanager
def postgres_server() -> Iterator[Server]:
    """An empty PostgreSQL: database `penstock` of the user `penstock`, any password, no waiting for the disk."""
    binary = find("postgres", "postgresql", *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    with directory(user) as folder:
        port = free_port()
        created = subprocess.run(
            [str(Path(binary).resolve().with_name("initdb")), "-D", "data", "-U", "penstock", "-A", "trust", "-N"],
            cwd=folder,
            capture_output=True,
            text=True,
            **as_user(user),
        )
        if created.returncode:
            raise RuntimeError(f"initdb failed: {created.stderr[-800:]}")
        settings = {"listen_addresses": HOST, "port": port, "unix_socket_directories": folder, "fsync": "off"}
        command = [
            binary,
            "-D",
            "data",
            *(word for pair in settings.items() for word in ("-c", f"{pair[0]}={pair[1]}")),
        ]

        def connect(database: str) -> psycopg.Connection:
            return psycopg.connect(host=HOST, port=port, user="penstock", dbname=database, autocommit=True)

        def answers() -> bool:
            with contextlib.suppress(psycopg.OperationalError), connect("postgres"):
                return True
            return False

        with running(Server(command, port, folder / "log", answers, user)) as server:
            with connect("postgres") as connection:
                connection.execute("CREATE DATABASE penstock")
            yield server


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def directory(user: str | None) -> Iterator[Path]:
    """A temporary directory that belongs to `user`: one of pytest's would be closed to it."""
    with tempfile.TemporaryDirectory(prefix="penstock-") as name:
        if user:
            shutil.chown(name, user)
        yield Path(name)


def as_user(user: str | None) -> dict[str, object]:
    return {"user": user, "group": user, "extra_groups": []} if user else {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def find(program: str, package: str, *folders: Path) -> str:
    """The program's path.

    Raises:
        RuntimeError: it is not installed; the message says what to install.
    """
    for folder in folders:
        if (folder / program).exists():
            return str(folder / program)
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(f"{program} is missing: apt-get install {package}, or as root: make servers")
    return found
