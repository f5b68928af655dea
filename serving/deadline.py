"""How long a stage may take, and when not to ask a dependency that does not answer."""

from __future__ import annotations

import threading
import time

ENDS = {"features": 0.25, "recall": 0.6, "rank": 0.95}
"""Stage → the share of a request's time after which it must have ended: what an earlier one leaves is the later's."""


class Deadline:
    """The time of one request, of `seconds` from `began` (of time.perf_counter) on."""

    def __init__(self, seconds: float, began: float | None = None) -> None:
        self._seconds = seconds
        self._began = time.perf_counter() if began is None else began

    def left(self, stage: str) -> float:
        """Seconds that a stage has, 0 when its time is over."""
        return max(self._began + ENDS[stage] * self._seconds - time.perf_counter(), 0.0)


class Breaker:
    """Keeps requests from waiting for a dependency that has not answered several in a row.

    Then it is asked by one request in `seconds`; the first answer lets all of them ask again.
    """

    def __init__(self, failures: int = 5, seconds: float = 1.0) -> None:
        self._limit = failures
        self._seconds = seconds
        self._failures = 0
        self._next = 0.0
        self._lock = threading.Lock()

    def allows(self) -> bool:
        """Whether this request may ask."""
        if self._failures < self._limit:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return False
            self._next = now + self._seconds
            return True

    def answered(self) -> None:
        """The dependency answered, whatever it said."""
        self._failures = 0

    def failed(self) -> None:
        """It did not answer in time, or could not be reached."""
        with self._lock:
            self._failures += 1
            if self._failures == self._limit:
                self._next = time.monotonic() + self._seconds
