"""Tasks that wait for a cluster, on a server that answers as Kubeflow Pipelines does, without a scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.components.pipelines_server import PipelinesServer

# Airflow's own providers import from where Airflow no longer wants it
pytestmark = pytest.mark.filterwarnings("ignore:The .airflow:FutureWarning")

STAGE = "tests.components.tiny:doubling"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelinesServer]:
    from components import kubeflow

    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
    monkeypatch.setenv("PENSTOCK_RUNNER", "kubeflow")
    monkeypatch.setattr(kubeflow, "POLL_SECONDS", 0.01)
    with PipelinesServer(tmp_path / "store") as found:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", found.url)
        yield found


class Task:
    """A task of a DAG that runs the stage, executed as Airflow's worker and triggerer do."""

    def __init__(self, calls: list[str], resources: dict[str, Any] | None = None) -> None:
        from airflow.sdk import DAG

        from dags import stages

        with DAG("a_dag", schedule=None):

            @stages.stage(execution_timeout=timedelta(hours=1))
            def double(numbers: str) -> int:
                calls.append("called")
                outputs = stages.run(STAGE, key="1", numbers_uri=numbers, trace="", fail="")
                return outputs["parameters"]["rows"]

            self.operator: Any = double("numbers").operator
        self.task = self.operator
        self.dag_run = type("Run", (), {"dag_id": "a_dag", "run_id": "a run"})
        self.context: Any = {"ti": self, "dag_run": self.dag_run, "params": {"resources": resources or {}}}

    def get_relevant_upstream_map_indexes(self, **_: Any) -> None:
        return None

    def do(self, method: str, **arguments: Any) -> Any:
        from airflow.sdk.definitions._internal.contextmanager import _CURRENT_CONTEXT

        _CURRENT_CONTEXT.append(self.context)
        try:
            return getattr(self.operator, method)(context=self.context, **arguments)
        finally:
            _CURRENT_CONTEXT.pop()

    def deferred(self) -> Any:
        from airflow.sdk.exceptions import TaskDeferred

        with pytest.raises(TaskDeferred) as caught:
            self.do("execute")
        return caught.value


def again(trigger: Any) -> Any:
    """The trigger as the triggerer makes it of what the database keeps."""
    from airflow.serialization.serialized_objects import BaseSerialization

    path, settings = trigger.serialize()
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(
        **BaseSerialization.deserialize(BaseSerialization.serialize(settings))
    )


def fired(trigger: Any) -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        async for event in trigger.run():
            return event.payload
        raise AssertionError("no event")

    return asyncio.run(first())


def test_a_task_gives_its_worker_back_and_goes_on_with_what_the_run_left(server: PipelinesServer) -> None:
    calls: list[str] = []
    task = Task(calls)
    deferral = task.deferred()
    assert len(server.runs) == 1
    event = fired(again(deferral.trigger))
    assert event["run"]["state"] == "SUCCEEDED"
    assert task.do("resume_execution", next_method=deferral.method_name, next_kwargs={"event": event}) == 3
    assert calls == ["called"] * 2
    # a retry takes what is there
    assert task.do("execute") == 3
    assert len(server.runs) == 1


def test_a_run_that_fails_fails_the_task_with_its_words(server: PipelinesServer) -> None:
    server.states, server.failure = ["RUNNING", "FAILED"], "exit code 1"
    task = Task([])
    deferral = task.deferred()
    event = fired(again(deferral.trigger))
    with pytest.raises(RuntimeError, match="the run ended as FAILED: double: exit code 1; see "):
        task.do("resume_execution", next_method="resume", next_kwargs={"event": event})


def test_a_trigger_waits_for_a_cluster_that_is_away_and_a_task_for_a_run_that_is_there(server: PipelinesServer) -> None:
    task = Task([])
    deferral = task.deferred()
    server.faults["get_run"] = deque([500, 401, "lost"])
    # the worker was killed before Airflow knew of the deferral
    assert task.deferred().trigger.submitted == deferral.trigger.submitted
    assert fired(again(deferral.trigger))["run"]["state"] == "SUCCEEDED"


def test_a_task_that_is_killed_or_late_takes_its_run_with_it(server: PipelinesServer) -> None:
    server.states = ["RUNNING"]
    trigger = again(Task([]).deferred().trigger)
    asyncio.run(trigger.on_kill())
    assert server.runs["run-1"].state == "CANCELING"
    assert fired(trigger)["run"]["state"] == "CANCELED"

    late = again(Task([]).deferred().trigger)
    assert late.ends_at > time.time()
    late.ends_at = time.time()
    assert fired(late)["error"].endswith("the task may not take longer; its run is cancelled")
    assert server.runs["run-2"].state == "CANCELING"


def test_a_triggerer_that_stops_leaves_the_run(server: PipelinesServer) -> None:
    server.states = ["RUNNING"]
    trigger = again(Task([]).deferred().trigger)

    async def stopped() -> None:
        task = asyncio.ensure_future(anext(trigger.run()))
        await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await trigger.cleanup()

    asyncio.run(stopped())
    assert server.runs["run-1"].state == "RUNNING"
