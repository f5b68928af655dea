"""MLflow: runs, metrics and figures of candidates, and the registry of releases."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "penstock"
MODEL = "penstock"
DATA_DOCS = "data_docs.html"
"""The page of a validation among the artifacts of its run."""


class TrackingError(RuntimeError):
    """MLflow is away or refuses; the message says where it was looked for."""


@contextlib.contextmanager
def _client(tracking_uri: str) -> Iterator[MlflowClient]:
    """A client that says nothing of its own and fails with one line."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # an absent server shows in seconds, not after minutes of retries
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if tracking_uri.startswith("sqlite:///"):
        Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield MlflowClient(tracking_uri, registry_uri=tracking_uri)
    except MlflowException as error:
        raise TrackingError(f"MLflow at {tracking_uri}: {str(error).splitlines()[0]}") from error


def _experiment(client: MlflowClient, tracking_uri: str) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    # without a server the artifacts lie beside the database
    beside = Path(tracking_uri.removeprefix("sqlite:///")).parent / "artifacts"
    location = beside.as_uri() if tracking_uri.startswith("sqlite:///") else None
    return client.create_experiment(EXPERIMENT, artifact_location=location)


def log_run(
    tracking_uri: str,
    run_name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    files: Iterable[Path],
    *,
    tags: Mapping[str, str] | None = None,
    failed: bool = False,
) -> str:
    """Records a candidate or a validation as one run that has ended, and returns the run's id.

    Metric names keep letters, digits and ``_-./ :``; "@" becomes "_at_". Files and directories go to the artifacts
    under their own names.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    with _client(tracking_uri) as client:
        run = client.create_run(_experiment(client, tracking_uri), run_name=run_name, tags=dict(tags or {}))
        run_id = run.info.run_id
        try:
            _keep(client, run_id, params, metrics, files)
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED")
        return run_id


def add_to_run(tracking_uri: str, run_id: str, metrics: Mapping[str, float], files: Iterable[Path]) -> None:
    """Adds figures and files to a run that has ended, by the rules of `log_run`.

    Raises:
        TrackingError: MLflow is away or refuses, or there is no such run.
    """
    with _client(tracking_uri) as client:
        _keep(client, run_id, {}, metrics, files)


def _keep(
    client: MlflowClient,
    run_id: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    files: Iterable[Path],
) -> None:
    from mlflow.entities import Metric, Param
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    client.log_batch(
        run_id,
        metrics=[Metric(name.replace("@", "_at_"), float(value), now, 0) for name, value in metrics.items()],
        params=[
            Param(name, value if isinstance(value, str) else json.dumps(value, default=str))
            for name, value in params.items()
        ],
    )
    for path in files:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            client.log_artifact(run_id, str(path))


def register_release(tracking_uri: str, release_dir: Path, manifest: Mapping[str, Any]) -> str:
    """Registers a release as a version of the model "penstock" and returns the version.

    The version's tags say which release it is and where it lies, and who forced it and why if the gate had rejected
    it; its files are the run's artifact `release/`, with the
    manifest. A release that is registered already is left as it is.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    from mlflow.exceptions import MlflowException

    number, run_id = str(manifest["release"]), str(manifest["run_id"])
    with _client(tracking_uri) as client:
        version = _version_of(client, number)
        if version is not None:
            return version
        with contextlib.suppress(MlflowException):  # it exists
            client.create_registered_model(
                MODEL, description="Releases of the recommender: recall, index, rank, weights."
            )
        client.log_artifact(run_id, str(release_dir / "manifest.json"), "release")
        source = f"{client.get_run(run_id).info.artifact_uri}/release"
        tags = {
            "release": number,
            "directory": str(release_dir),
            "approved_by": str(manifest["approved_by"]),
            "parent": str(manifest["parent"]),
            "git_revision": str(manifest["git_revision"]),
        }
        if forced := manifest.get("forced"):
            tags |= {"forced_by": str(forced["by"]), "force_reason": str(forced["reason"])}
        made = client.create_model_version(MODEL, source, run_id, tags=tags, description=str(manifest["verdict"]))
        return str(made.version)


def set_aliases(tracking_uri: str, *, champion: int | None, challenger: int | None) -> None:
    """Points the aliases champion and challenger at these releases; None takes an alias away.

    Raises:
        TrackingError: MLflow is away, or a release is not registered.
    """
    from mlflow.exceptions import MlflowException

    with _client(tracking_uri) as client:
        for alias, number in (("champion", champion), ("challenger", challenger)):
            if number is None:
                with contextlib.suppress(MlflowException):  # there was none
                    client.delete_registered_model_alias(MODEL, alias)
                continue
            version = _version_of(client, str(number))
            if version is None:
                raise TrackingError(f"MLflow at {tracking_uri}: release {number} is not registered as a model version")
            client.set_registered_model_alias(MODEL, alias, version)


def aliases(tracking_uri: str) -> dict[str, int | None]:
    """The releases that the aliases champion and challenger point at; None where there is no such alias.

    Raises:
        TrackingError: MLflow is away or refuses.
    """
    from mlflow.exceptions import MlflowException

    found: dict[str, int | None] = dict.fromkeys(("champion", "challenger"))
    with _client(tracking_uri) as client:
        for alias in found:
            with contextlib.suppress(MlflowException):  # there is none
                found[alias] = int(client.get_model_version_by_alias(MODEL, alias).tags["release"])
    return found


def run_url(tracking_uri: str, run_id: str) -> str:
    """The page of a run in MLflow's interface; empty if there is no server to ask."""
    found = _ask(tracking_uri, f"runs/get?run_id={run_id}")
    return _page(tracking_uri, found["run"]) if "run" in found else ""


def find_run_url(tracking_uri: str, run_name: str) -> str:
    """The page of the newest run of that name; empty if there is none, or no server to ask."""
    experiment = _ask(tracking_uri, f"experiments/get-by-name?experiment_name={EXPERIMENT}").get("experiment")
    if experiment is None:
        return ""
    query = {
        "experiment_ids": [experiment["experiment_id"]],
        "filter": f"attributes.run_name = '{run_name}'",
        "order_by": ["attributes.start_time DESC"],
        "max_results": 1,
    }
    runs = _ask(tracking_uri, "runs/search", query).get("runs")
    return _page(tracking_uri, runs[0]) if runs else ""


def _page(tracking_uri: str, run: Mapping[str, Any]) -> str:
    return f"{tracking_uri}/#/experiments/{run['info']['experiment_id']}/runs/{run['info']['run_id']}"


def _ask(tracking_uri: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What MLflow's server answers, without the weight of its client; nothing if there is none or it refuses."""
    if not tracking_uri.startswith("http"):
        return {}
    request = urllib.request.Request(
        f"{tracking_uri}/api/2.0/mlflow/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return dict(json.load(answer))
    except (urllib.error.URLError, ValueError):
        return {}


def _version_of(client: MlflowClient, number: str) -> str | None:
    found = client.search_model_versions(f"name = '{MODEL}' and tags.release = '{number}'")
    return str(found[0].version) if found else None
