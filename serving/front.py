"""Before a request is read: who asks, how much he sends, and how many are at work already."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics

OPEN = ("/health", "/ready", "/openapi.json", "/docs")
"""What is answered without a token: probes, which bring none, and the page of the API with its files, which is no
secret."""
FILES = "/static-offline-docs"

Found = TypeVar("Found")

BEGAN = "penstock.began"
"""The key of a request's scope under which stands when it came, of time.perf_counter."""
VARIANT = "penstock.variant"
"""And who answered it, for the metrics."""


def is_open(path: str) -> bool:
    """Whether a path is answered without a token."""
    return path in OPEN or path.startswith(("/docs/", f"{FILES}/"))


class BusyError(RuntimeError):
    """More requests than may wait."""


class Turns:
    """Runs blocking work in `threads` threads; up to `queue` further requests wait, and all beyond are refused."""

    def __init__(self, name: str, threads: int, queue: int) -> None:
        self._threads = threads
        self._most = threads + queue
        self._pool = ThreadPoolExecutor(threads, name)
        self._taken = 0

    @property
    def running(self) -> int:
        """How many are worked on."""
        return min(self._taken, self._threads)

    @property
    def waiting(self) -> int:
        """How many are not yet."""
        return max(self._taken - self._threads, 0)

    async def run(self, work: Callable[..., Found], *arguments: Any) -> Found:
        """What `work` returns, once it has had its turn.

        Raises:
            BusyError: too many wait.
        """
        if self._taken >= self._most:
            raise BusyError(f"{self._most} requests are at work or wait already")
        self._taken += 1
        work_done = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        # not when the client goes away: the thread works on
        work_done.add_done_callback(self._done)
        return await work_done

    def close(self) -> None:
        """Waits for what is running."""
        self._pool.shutdown(cancel_futures=True)

    def _done(self, _: Any) -> None:
        self._taken -= 1


class Front:
    """ASGI middleware: times and counts requests, refuses those without the token, and bodies that are too large.

    Args:
        token: what they must bring; empty: nothing.
        body_bytes: the largest body; the rest of a larger one is not read.
        routes: paths that are counted by their name; all others are `other`.
    """

    def __init__(self, app: ASGIApp, *, token: str, body_bytes: int, routes: frozenset[str], metrics: Metrics) -> None:
        self._app = app
        self._token = token.encode()
        self._body_bytes = body_bytes
        self._routes = routes
        self._metrics = metrics
        self._observers: dict[tuple[str, int, str], Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = scope[BEGAN] = time.perf_counter()
        status = 500  # of an answer that never began

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        finally:
            path = scope["path"]
            key = (path if path in self._routes else "other", status, scope.get(VARIANT, ""))
            observer = self._observers.get(key)
            if observer is None:
                observer = self._observers[key] = self._metrics.requests.labels(key[0], str(status), key[2])
            observer.observe(time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._token and not is_open(scope["path"]) and not self._known(Headers(scope=scope)):
            failure = {"error": "no or another token", "remedy": "send the header Authorization: Bearer TOKEN"}
            await JSONResponse(failure, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), None)
        if length is not None and (not length.isdigit() or int(length) > self._body_bytes):
            failure = {"error": self._too_large, "remedy": "send less, in several requests"}
            await JSONResponse(failure, 413, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, receive if length is not None else self._counted(receive), send)

    def _known(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token)

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self._body_bytes:,} bytes"

    def _counted(self, receive: Receive) -> Receive:
        """`receive` of a body whose length is not told ahead."""
        received = 0

        async def receiving() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise HTTPException(413, self._too_large, {"Connection": "close"})
            return message

        return receiving
