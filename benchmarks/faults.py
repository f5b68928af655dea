"""Faults for a process: at its n-th step it is killed, the disk is full, a write is torn, the clock jumps, …

A step is whatever Python itself reports to an audit hook of files, names and connections (PEP 578): nothing of the
process's own code is replaced. The disk is full by the kernel's limit of a file's size and by ENOSPC for new names, a
write is torn by the same limit with its signal left deadly, and the clock is libfaketime's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Kind = Literal["none", "kill", "torn", "full", "clock", "signal"]

STEPS = frozenset(
    {
        "open",
        "os.chmod",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "fcntl.flock",
        "socket.connect",
    }
)
TORN_BYTES = 7
"""So much of a file is written before its writer ends."""

FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
CLOCK_FILE = "FAKETIME_TIMESTAMP_FILE"
JUMP = "-400d"


@dataclass(frozen=True)
class Fault:
    """What happens at step `step` (1, 2, …) of the process that has it.

    `signal` tells the other end of a pipe and waits for its answer: what it breaks there is its own.
    """

    kind: Kind
    step: int = 0


class Steps:
    """Counts the steps of this process from now on, and has the fault happen at its step."""

    def __init__(self, fault: Fault, parent: Connection, below: Path) -> None:
        self.taken = 0
        self._fault = fault
        self._parent = parent
        self._below = str(below)
        self._full = False
        self._busy = False
        sys.addaudithook(self._see)

    def end(self) -> None:
        """Nothing happens any more."""
        self._fault, self._full = Fault("none"), False

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS or self._busy or (event != "socket.connect" and not self._ours(event, arguments)):
            return
        self.taken += 1
        if self.taken == self._fault.step:
            self._busy = True
            try:
                self._happen()
            finally:
                self._busy = False
        if self._full and event != "fcntl.flock" and _makes_something(event, arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _ours(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Files and names below the directory that is watched, and locks: the rest is the interpreter's own."""
        return event == "fcntl.flock" or any(
            isinstance(part, str | os.PathLike) and os.fspath(part).startswith(self._below) for part in arguments
        )

    def _happen(self) -> None:
        kind = self._fault.kind
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "torn":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (TORN_BYTES, TORN_BYTES))
        elif kind == "full":
            self._full = True
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif kind == "clock":
            Path(os.environ[CLOCK_FILE]).write_text(JUMP)
        elif kind == "signal":
            self._parent.send("step")
            self._parent.recv()


def _makes_something(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((arguments[2] or 0) & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
    return event in ("os.mkdir", "os.rename", "os.symlink")


class Wire:
    """A TCP address that leads to another, until it is cut; every connection of it ends then, and none is taken."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._whole = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """From now on nobody gets through."""
        with self._lock:
            self._whole = False
            for end in self._open:
                _close(end)
            self._open.clear()

    def mend(self) -> None:
        """From now on everybody does."""
        with self._lock:
            self._whole = True

    def close(self) -> None:
        """Ends it."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                try:
                    if not self._whole:
                        raise ConnectionRefusedError
                    far = socket.create_connection(self._target)
                except OSError:
                    _close(near)
                    continue
                self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        with self._lock:
            self._open -= {one, other}
        _close(one)
        _close(other)


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
