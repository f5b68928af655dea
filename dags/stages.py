"""Running a stage from a task: where its results go, and which runner."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from airflow.sdk import get_current_context


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


def run(stage: str, *, key: str = "", resumes: bool = False, **arguments: Any) -> dict[str, Any]:
    """Runs `stage` for the current task.

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
    outputs = run_stage(stage, arguments, out, os.environ.get("PENSTOCK_RUNNER"))
    shutil.rmtree(checkpoint, ignore_errors=True)
    return outputs


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
