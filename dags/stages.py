"""Running a stage from a task: where its results go, and which runner."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import get_current_context
from airflow.sdk.bases.decorator import DecoratedOperator, task_decorator_factory
from airflow.sdk.exceptions import TaskDeferred


def home() -> Path:
    """PENSTOCK_HOME, by default `var/current` in the repository."""
    return Path(os.environ.get("PENSTOCK_HOME") or Path(__file__).resolve().parents[1] / "var" / "current").resolve()


def tracking_uri() -> str:
    """MLflow's address, by default the database in the home directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home()}/mlflow/mlflow.db"


def folder(name: str) -> Path:
    """Where the current DAG run keeps what is called `name`."""
    dag_run = get_current_context()["dag_run"]
    return home() / "runs" / dag_run.dag_id / re.sub(r"[^\w.-]", "_", dag_run.run_id) / name


RESOURCES: dict[str, Any] = {
    "default": {},
    "type": "object",
    "description": "processors, memory and GPUs by component: Config of components/resources.py",
}
"""The param of a DAG that runs stages."""
_RESUMED: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("resumed", default=None)
"""What the runs left on whose end the current task was resumed, by their directories."""


class _StageOperator(DecoratedOperator, PythonOperator):
    """A Python task that waits for a stage on a cluster without a worker.

    When the run has ended the function is called again: `run` then returns what the run left, instead of waiting.
    """

    template_fields = ("templates_dict", "op_args", "op_kwargs")
    template_fields_renderers: ClassVar[dict[str, str]] = {
        "templates_dict": "json",
        "op_args": "py",
        "op_kwargs": "py",
    }
    custom_operator_name = "@stage"

    def __init__(self, *, python_callable: Any, op_args: Any, op_kwargs: Any, **kwargs: Any) -> None:
        given = {"python_callable": python_callable, "op_args": op_args, "op_kwargs": op_kwargs}
        super().__init__(kwargs_to_upstream=given, **given, **kwargs)

    def resume(self, context: Any, event: dict[str, Any]) -> Any:
        """Goes on after the event of `dags.following`."""
        from components import kubeflow

        if event["error"]:
            raise kubeflow.StageError(event["error"])
        submitted = kubeflow.Submitted(**event["submitted"])
        left = kubeflow.result(submitted, kubeflow.Run(**event["run"]))
        token = _RESUMED.set({submitted.out: left})
        try:
            return self.execute(context)
        finally:
            _RESUMED.reset(token)


def stage(**settings: Any) -> Any:
    """The decorator of a task that calls `run`; `settings` are those of `task`."""
    return task_decorator_factory(decorated_operator_class=_StageOperator, **settings)


def run(stage: str, *, key: str = "", resumes: bool = False, **arguments: Any) -> dict[str, Any]:
    """Runs `stage` for the current task, with the resources that the DAG's params name.

    Args:
        key: tells apart the instances of a mapped task.
        resumes: the stage takes a `checkpoint`, a directory of its own that a retry finds again.

    Returns:
        {"parameters": {name: value}, "artifacts": {name: {"uri", "metadata"}}}.
    """
    from components.runner import run_stage

    out = folder(f"{stage}-{key}" if key else stage)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if resumes:
        arguments["checkpoint"] = str(checkpoint)
    runner = os.environ.get("PENSTOCK_RUNNER")
    resources = get_current_context()["params"].get("resources") or {}
    if runner == "kubeflow":
        outputs = _wait(stage, arguments, out, resources)
    else:
        outputs = run_stage(stage, arguments, out, runner, resources)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return outputs


def _wait(stage: str, arguments: dict[str, Any], out: Path, resources: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a stage on a cluster; gives the worker back until there are some."""
    from components import kubeflow
    from components.resources import by_component
    from dags.following import RunTrigger

    if found := (_RESUMED.get() or {}).get(str(out)):
        return found
    begun = kubeflow.submit(stage, arguments, out, by_component(resources))
    if not isinstance(begun, kubeflow.Submitted):
        return begun
    print(f"stage {stage}: {begun.url}", flush=True)
    limit = get_current_context()["ti"].task.execution_timeout
    ends_at = time.time() + limit.total_seconds() if limit else None
    raise TaskDeferred(trigger=RunTrigger(submitted=asdict(begun), ends_at=ends_at), method_name="resume")


def uri(outputs: dict[str, Any], name: str) -> str:
    """Where artifact `name` of a stage's outputs lies."""
    return outputs["artifacts"][name]["uri"]


def git_revision() -> str:
    """The commit of this repository, or "unknown" outside one."""
    import subprocess

    ask = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> str:
    """The sha256 of the lock file that the environment was made of."""
    from hashlib import sha256

    return sha256((Path(__file__).resolve().parents[1] / "requirements.lock").read_bytes()).hexdigest()


def champion() -> str:
    """The directory of the release that is live, or nothing."""
    from penstock import release, routing

    live = routing.read(home() / "routing.json").champion
    return "" if live is None else str(release.directory(home(), live))


def follow_routing() -> None:
    """Sets MLflow's aliases to what the routing document says."""
    from components import tracking
    from penstock import routing

    live = routing.read(home() / "routing.json")
    tracking.set_aliases(tracking_uri(), champion=live.champion, challenger=live.challenger)
