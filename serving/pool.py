"""Threads that requests run on, with a queue of bounded length."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BoundedPool(ThreadPoolExecutor):
    """A thread pool that knows how many calls wait; whoever submits asks `full` first.

    Args:
        threads: calls that run at once.
        queue: calls that may wait for them.
    """

    def __init__(self, threads: int, queue: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.threads = threads
        self.queue = queue
        self._count = threading.Lock()
        self._unfinished = 0
        self._idle = threading.Condition(self._count)

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return max(self._unfinished - self.threads, 0)

    @property
    def running(self) -> int:
        """Calls that have begun and not ended."""
        return min(self._unfinished, self.threads)

    @property
    def full(self) -> bool:
        """Whether a further call is one too many."""
        return self._unfinished >= self.threads + self.queue

    def submit(self, act: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `ThreadPoolExecutor.submit`."""
        with self._count:
            self._unfinished += 1
        try:
            future = super().submit(act, *args, **kwargs)
        except BaseException:
            self._end()
            raise
        future.add_done_callback(lambda _: self._end())  # of one that was cancelled too
        return future

    def drain(self, seconds: float) -> bool:
        """Waits until nothing runs or waits; whether that was so in time."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, seconds)

    def _end(self) -> None:
        with self._idle:
            self._unfinished -= 1
            self._idle.notify_all()
