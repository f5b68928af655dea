"""The servers of a home as `make up` starts them, and clients that ask the gateway: closed loops and an open one."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 240
K = 10


@dataclass(frozen=True)
class Servers:
    """Model server and gateway, in processes of their own, and the ports of the gateway and of the other's gRPC."""

    port: int
    grpc_port: int
    processes: Mapping[str, subprocess.Popen[bytes]]

    def get(self, path: str) -> str:
        """The body of an answer of the gateway."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def counters(self) -> dict[str, float]:
        """What the gateway has counted so far: name and labels → value."""
        found = {}
        for line in self.get("/metrics").splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found


@contextmanager
def serve(home: Path, logs: Path, settings: Mapping[str, str] | None = None) -> Iterator[Servers]:
    """The servers of a home until the block ends; `settings` are environment variables of the gateway."""
    grpc, rest, port = (_free_port() for _ in range(3))
    commands = {
        "model server": ["serving.model_server", "--home", home, "--grpc-port", grpc, "--rest-port", rest],
        "gateway": ["serving.gateway", "--home", home, "--port", port, "--model-server", f"127.0.0.1:{grpc}"],
    }
    logs.mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (logs / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", *map(str, command)],
                    cwd=ROOT,
                    env={**os.environ, **(settings or {})},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        servers = Servers(port, grpc, processes)
        _await(servers, logs)
        yield servers
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


def _await(servers: Servers, logs: Path) -> None:
    print("servers: starting …", flush=True)
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS:
        for name, process in servers.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"the {name} ended; see {logs / f'{name}.log'}")
        try:
            if json.loads(servers.get("/ready"))["degraded"] == {}:
                print(f"servers: ready after {time.monotonic() - began:.0f} s", flush=True)
                return
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the servers were not ready after {START_SECONDS} s; see {logs}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Measured:
    """What clients saw.

    Attributes:
        seconds: of each request; of an open loop from when it was due.
        failed: answers other than 200.
        took: seconds from the first to the last.
        degraded: answers that something was left out of.
    """

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    took: float = 0.0
    degraded: int = 0

    def add(self, seconds: float, answer: bytes) -> None:
        """Takes in what came after so long."""
        self.seconds.append(seconds)
        ok = answer.startswith(b"HTTP/1.1 200")
        self.failed += not ok
        self.degraded += ok and b'"degraded":[],' not in answer

    def ms(self, percent: float) -> float:
        """A percentile of the latency."""
        return float(np.percentile(self.seconds, percent)) * 1e3

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.seconds) / self.took

    def __iadd__(self, other: Measured) -> Measured:
        self.seconds += other.seconds
        self.failed += other.failed
        self.took += other.took
        self.degraded += other.degraded
        return self


def _request(user: int, scenario: int) -> bytes:
    body = b'{"user_id":%d,"k":%d,"context":{"scenario":%d}}' % (user, K, scenario)
    head = b"POST /recommend HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def _is_whole(answer: bytes) -> bool:
    """Whether an answer is there to its end."""
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    at = head.lower().index(b"content-length:") + len(b"content-length:")
    return len(body) >= int(head[at:].split(b"\r\n", 1)[0])


def closed_loop(port: int, clients: int, seconds: float, users: int, seed: int = 0) -> Measured:
    """Clients that ask again as soon as they are answered, each with a connection of its own."""
    parts = [Measured() for _ in range(clients)]
    end = time.perf_counter() + seconds

    def ask(number: int) -> None:
        random = np.random.default_rng([seed, number])
        of = parts[number]
        with closing(socket.create_connection(("127.0.0.1", port))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while time.perf_counter() < end:
                request = _request(int(random.integers(users)), int(random.integers(3)))
                began = time.perf_counter()
                connection.sendall(request)
                answer = b""
                while not _is_whole(answer):
                    part = connection.recv(1 << 16)
                    if not part:
                        raise RuntimeError("the gateway has closed a connection")
                    answer += part
                of.add(time.perf_counter() - began, answer)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Measured()
    for part in parts:
        found += part
    found.took = time.perf_counter() - began
    return found


def open_loop(port: int, rate: float, seconds: float, users: int, seed: int = 0) -> Measured:
    """Requests at random times, `rate` a second, whether or not those before are answered (a Poisson process).

    A request that must wait for a free connection has waited since it was due.
    """
    return asyncio.run(_open_loop(port, rate, seconds, users, seed))


async def _open_loop(port: int, rate: float, seconds: float, users: int, seed: int) -> Measured:
    random = np.random.default_rng([seed, 1])
    due = np.cumsum(random.exponential(1 / rate, max(int(rate * seconds), 1)))
    found = Measured()
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    every: list[asyncio.StreamWriter] = []

    async def ask(at: float, request: bytes) -> None:
        answer = b""
        while not _is_whole(answer):
            if not answer:  # also when the gateway has ended a connection that was idle for long
                reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
                if writer not in every:
                    every.append(writer)
                writer.write(request)
            part = await reader.read(1 << 16)
            if answer and not part:
                raise RuntimeError("the gateway has closed a connection")
            answer += part
        found.add(time.perf_counter() - at, answer)
        idle.append((reader, writer))

    asked: set[asyncio.Task[None]] = set()

    def finished(task: asyncio.Task[None]) -> None:
        asked.discard(task)
        task.result()

    began = time.perf_counter()
    for after in due.tolist():
        request = _request(int(random.integers(users)), int(random.integers(3)))
        wait = began + after - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(ask(began + after, request))
        asked.add(task)
        task.add_done_callback(finished)
    await asyncio.gather(*asked)
    found.took = time.perf_counter() - began
    for writer in every:
        writer.close()
    return found
