"""What the gateway counts and times, for Prometheus."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest, values

SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
SAY_SECONDS = 60.0
"""How often at most it is said that a stage is left out."""


class Metrics:
    """Counters of one gateway; their names and labels are the table of docs/gateway.md."""

    def __init__(self) -> None:
        # Feast, if it is imported first, has all counters of all processes lie in files, and mapped
        values.ValueClass = values.MutexValue
        self._registry = CollectorRegistry()
        self.requests = Histogram(
            "penstock_request_seconds",
            "Requests and how long each took, from its first byte to its answer",
            ("route", "status", "variant"),
            registry=self._registry,
            buckets=SECONDS,
        )
        self._stages = Histogram(
            "penstock_stage_seconds",
            "How long each stage of a recommendation took",
            ("stage",),
            registry=self._registry,
            buckets=(0.0001, 0.00025, 0.0005, *SECONDS),
        )
        self._degraded = Counter(
            "penstock_degraded",
            "Recommendations that a stage was left out of, and why",
            ("stage", "reason"),
            registry=self._registry,
        )
        self.running = Gauge(
            "penstock_running_requests", "Requests that are worked on", ("route",), registry=self._registry
        )
        self.waiting = Gauge(
            "penstock_waiting_requests", "Requests that wait for their turn", ("route",), registry=self._registry
        )
        self.feedback = Gauge(
            "penstock_feedback_waiting_records",
            "Feedback records that the online store does not have yet",
            registry=self._registry,
        )
        self.release = Gauge(
            "penstock_release", "The release that answers, by variant; 0: none", ("variant",), registry=self._registry
        )
        ProcessCollector(registry=self._registry)
        self._observers: dict[str, Histogram] = {}
        self._said: dict[str, float] = {}
        self._saying = threading.Lock()

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Counts the stages of one recommendation."""
        for stage, took in seconds.items():
            if stage not in self._observers:
                self._observers[stage] = self._stages.labels(stage)
            self._observers[stage].observe(took)

    def degraded(self, stages: Mapping[str, str], why: str) -> None:
        """Counts what was left out of one recommendation, and says why now and then."""
        for stage, reason in stages.items():
            self._degraded.labels(stage, reason).inc()
        if not stages:
            return
        key, now = ", ".join(f"{stage} ({reason})" for stage, reason in stages.items()), time.monotonic()
        with self._saying:
            if now - self._said.get(key, -SAY_SECONDS) < SAY_SECONDS:
                return
            self._said[key] = now
        print(f"gateway: answers without {key}: {why}", file=sys.stderr, flush=True)
