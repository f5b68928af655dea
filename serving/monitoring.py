"""The model server's counts and latencies, by TF Serving's metric names and in its text format.

Written here, as prometheus-client ends the name of each counter with `_total`, and TF Serving does not.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

PATH = "/monitoring/prometheus/metrics"

BOUNDS = tuple(10.0 * 1.8**power for power in range(33))
"""Upper ends of the buckets of TF Serving's latencies, in microseconds: 10 µs to 25 minutes."""


class Counter:
    """A count by labels that only grows."""

    kind = "counter"

    def __init__(self, name: str, labels: Sequence[str]) -> None:
        self.name = name
        self._labels = tuple(labels)
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], int] = {}

    def add(self, *values: str, by: int = 1) -> None:
        """Counts `by` more for these values of the labels."""
        with self._lock:
            self._values[values] = self._values.get(values, 0) + by

    def lines(self) -> list[str]:
        """What is told of it."""
        with self._lock:
            found = dict(self._values)
        return [f"{self.name}{_of(self._labels, values)} {value}" for values, value in found.items()]


class Histogram:
    """Latencies in microseconds by labels, in `BOUNDS`."""

    kind = "histogram"

    def __init__(self, name: str, labels: Sequence[str]) -> None:
        self.name = name
        self._labels = tuple(labels)
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, *values: str, microseconds: float) -> None:
        """Counts one latency for these values of the labels."""
        place = bisect_left(BOUNDS, microseconds)
        with self._lock:
            self._buckets.setdefault(values, [0] * (len(BOUNDS) + 1))[place] += 1
            self._sums[values] = self._sums.get(values, 0.0) + microseconds

    def lines(self) -> list[str]:
        """What is told of it."""
        with self._lock:
            found = {values: (list(buckets), self._sums[values]) for values, buckets in self._buckets.items()}
        lines = []
        for values, (buckets, total) in found.items():
            count = 0
            for bound, inside in zip([*(f"{bound:g}" for bound in BOUNDS), "+Inf"], buckets, strict=True):
                count += inside
                lines.append(f"{self.name}_bucket{_of((*self._labels, 'le'), (*values, bound))} {count}")
            lines.append(f"{self.name}_sum{_of(self._labels, values)} {total:g}")
            lines.append(f"{self.name}_count{_of(self._labels, values)} {count}")
        return lines


class Gauge:
    """A number that is read when it is asked for."""

    kind = "gauge"

    def __init__(self, name: str, read: Callable[[], int]) -> None:
        self.name = name
        self._read = read

    def lines(self) -> list[str]:
        """What is told of it."""
        return [f"{self.name}{{}} {self._read()}"]


class Metrics:
    """All metrics of one model server."""

    def __init__(self) -> None:
        self.requests = Counter(":tensorflow:serving:request_count", ("model_name", "status"))
        self.request_latency = Histogram(":tensorflow:serving:request_latency", ("model_name", "API", "entrypoint"))
        self.runtime_latency = Histogram(":tensorflow:serving:runtime_latency", ("model_name", "API", "runtime"))
        self.warmup_latency = Histogram(":tensorflow:serving:model_warmup_latency", ("model_path", "status"))
        self.load_attempts = Counter(":tensorflow:cc:saved_model:load_attempt_count", ("model_path", "status"))
        self.load_latency = Counter(":tensorflow:cc:saved_model:load_latency", ("model_path",))
        self._gauges: list[Gauge] = []

    def gauge(self, name: str, read: Callable[[], int]) -> None:
        """Adds a number that `read` gives."""
        self._gauges.append(Gauge(name, read))

    def page(self) -> str:
        """The text that Prometheus reads."""
        metrics: list[Counter | Histogram | Gauge] = [
            self.requests,
            self.request_latency,
            self.runtime_latency,
            self.load_attempts,
            self.load_latency,
            self.warmup_latency,
            *self._gauges,
        ]
        lines = []
        for metric in metrics:
            found = metric.lines()
            if found:
                lines += [f"# TYPE {metric.name} {metric.kind}", *found]
        return "\n".join(lines) + "\n"


def _of(labels: Sequence[str], values: Sequence[str]) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{label}="{quoted(value)}"' for label, value in zip(labels, values, strict=True)) + "}"
