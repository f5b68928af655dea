"""Stages on a cluster: compiled, submitted to Kubeflow Pipelines, followed, cancelled.

A run's name is made of the stage, its directory and its key, so a submission whose answer was lost, or whose process
was killed, is found again instead of made twice. Inputs that an earlier run left in the cluster's store are imported
from there; others are brought from the home by a first step. The last step writes OUT in the home (`components.keep`),
which all pods mount at one path: who waits needs no store and no log, only the state of a run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import kfp
import kfp_server_api
import urllib3
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

from components import containers, keep
from components import stage as stages
from components.resources import Config
from components.stage import StageError

T = TypeVar("T")

EXPERIMENT = "penstock"
ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
POLL_SECONDS = 10.0
TIMEOUT_SECONDS = (5.0, 30.0)
"""For a connection and for an answer."""
PATIENCE_SECONDS = 600.0
"""How long the cluster may be away before whoever waits gives up."""
CANCEL_SECONDS = 25.0
"""The same for a cancellation: Airflow gives a task that is killed half a minute."""
KEPT_SECONDS = 60.0
"""How long a shared file system may take to show what another machine has written."""
FAULTS = (kfp_server_api.ApiException, urllib3.exceptions.HTTPError)
# what another try may mend: no answer, a token that is being renewed, an experiment that somebody else has just made,
# too many requests, a server in trouble
_PASSING = frozenset({0, 401, 408, 409, 429, *range(500, 600)})


@dataclass(frozen=True)
class Cluster:
    """Where stages run, as the environment says it."""

    host: str
    namespace: str = ""
    service_account: str = ""
    token: str = ""
    claim: str = "home"
    secrets: tuple[tuple[str, str, str], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> Cluster:
        """KF_PIPELINES_ENDPOINT and KF_PIPELINES_SA_TOKEN_PATH are KFP's own; docs/kubernetes.md lists the others.

        Raises:
            StageError: the address or the home is not set, or a secret is not NAME=SECRET/KEY.
        """
        host = environment.get("KF_PIPELINES_ENDPOINT", "")
        if not host:
            raise StageError("PENSTOCK_RUNNER=kubeflow needs KF_PIPELINES_ENDPOINT, the address of Kubeflow Pipelines")
        if not environment.get("PENSTOCK_HOME"):
            raise StageError("PENSTOCK_RUNNER=kubeflow needs PENSTOCK_HOME, where all pods mount the home")
        secrets = []
        for said in environment.get("PENSTOCK_KUBEFLOW_SECRETS", "").split():
            name, _, place = said.partition("=")
            secret, _, key = place.partition("/")
            if not (name and secret and key):
                raise StageError(f"PENSTOCK_KUBEFLOW_SECRETS: {said!r} is not NAME=SECRET/KEY")
            secrets.append((name, secret, key))
        token = environment.get("KF_PIPELINES_SA_TOKEN_PATH", kfp.client.KF_PIPELINES_SA_TOKEN_PATH)
        return Cluster(
            host=host,
            namespace=environment.get("PENSTOCK_KUBEFLOW_NAMESPACE", ""),
            service_account=environment.get("PENSTOCK_KUBEFLOW_SERVICE_ACCOUNT", ""),
            token=token if Path(token).exists() else "",
            claim=environment.get("PENSTOCK_HOME_CLAIM") or "home",
            secrets=tuple(secrets),
            environment=dict(environment),
        )


def compiled(
    pipeline: Any, arguments: Mapping[str, Any], wanted: Mapping[str, Config], cluster: Cluster
) -> dict[str, Any]:
    """The pipeline and the platform spec of a stage as it is submitted; the result is a plain document."""
    spec = copy.deepcopy(stages.spec(pipeline))
    _bring_inputs(spec, arguments)
    _keep_outputs(spec)
    platform = {}
    tasks = spec["root"]["dag"]["tasks"]
    passed = containers.variables(cluster.environment)
    variables = [{"name": name, "value": passed[name]} for name in sorted(passed)]
    for component, container in containers.executors(spec).items():
        wants = wanted.get(component, Config())
        container["image"] = containers.image(wants, cluster.environment)
        container["env"] = variables
        if limits := _limits(wants):
            container["resources"] = limits
        label = f"exec-{component.replace('_', '-')}"
        platform[label] = _pod(wants, cluster)
        for task in tasks.values():
            if spec["components"][task["componentRef"]["name"]]["executorLabel"] == label:
                # what a component does beside its outputs, in feature stores or MLflow, no cache repeats
                task["cachingOptions"] = {"enableCache": True} if wants.cache else {}
                if wants.retries:
                    task["retryPolicy"] = {
                        "maxRetryCount": wants.retries,
                        "backoffDuration": "30s",
                        "backoffFactor": 2.0,
                        "backoffMaxDuration": "3600s",
                    }
    return {
        "pipeline_spec": spec,
        "platform_spec": {"platforms": {"kubernetes": {"deploymentSpec": {"executors": platform}}}},
    }


def _bring_inputs(spec: dict[str, Any], arguments: Mapping[str, Any]) -> None:
    """An importer reads object stores only: where an argument is a path of the home, a step takes its place."""
    executors = spec["deploymentSpec"]["executors"]
    for task in spec["root"]["dag"]["tasks"].values():
        label = spec["components"][task["componentRef"]["name"]]["executorLabel"]
        if "importer" not in executors[label]:
            continue
        given = task["inputs"]["parameters"]["uri"]["componentInputParameter"]
        if not stages.stored(arguments[given]):
            artifact = "{{$.outputs.artifacts['artifact'].path}}"
            command = ["python3", "-m", "components.bring", "{{$.inputs.parameters['uri']}}", artifact]
            executors[label] = {"container": {"command": command}}


def _keep_outputs(spec: dict[str, Any]) -> None:
    """Adds the step that takes all outputs of the pipeline home."""
    root = spec["root"]
    results = root["outputDefinitions"]
    artifacts, parameters = results.get("artifacts", {}), results.get("parameters", {})
    given = root.setdefault("inputDefinitions", {}).setdefault("parameters", {})
    inputs: dict[str, Any] = {"parameters": {}}
    for name in (keep.OUT, keep.KEY):
        given[name] = {"parameterType": "STRING"}
        inputs["parameters"][name] = {"componentInputParameter": name}
    sources = root["dag"]["outputs"]
    after = set()
    for name in parameters:
        made = sources["parameters"][name]["valueFromParameter"]
        after.add(made["producerSubtask"])
        inputs["parameters"][name] = {
            "taskOutputParameter": {
                "producerTask": made["producerSubtask"],
                "outputParameterKey": made["outputParameterKey"],
            }
        }
    for name in artifacts:
        (made,) = sources["artifacts"][name]["artifactSelectors"]
        after.add(made["producerSubtask"])
        inputs.setdefault("artifacts", {})[name] = {
            "taskOutputArtifact": {
                "producerTask": made["producerSubtask"],
                "outputArtifactKey": made["outputArtifactKey"],
            }
        }
    definitions: dict[str, Any] = {"parameters": {name: given[name] for name in (keep.OUT, keep.KEY)} | parameters}
    if artifacts:
        definitions["artifacts"] = artifacts
    spec["components"]["comp-keep"] = {"executorLabel": "exec-keep", "inputDefinitions": definitions}
    command = ["python3", "-m", "components.keep", "{{$}}"]
    spec["deploymentSpec"]["executors"]["exec-keep"] = {"container": {"command": command}}
    root["dag"]["tasks"]["keep"] = {
        "taskInfo": {"name": "keep"},
        "componentRef": {"name": "comp-keep"},
        "dependentTasks": sorted(after),
        "inputs": inputs,
    }


def _limits(wants: Config) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if wants.cpu:
        limits["resourceCpuLimit"] = wants.cpu
    if wants.memory:
        limits["resourceMemoryLimit"] = wants.memory
    if wants.gpus:
        limits["accelerator"] = {"resourceType": wants.gpu_type, "resourceCount": str(wants.gpus)}
    return limits


def _pod(wants: Config, cluster: Cluster) -> dict[str, Any]:
    """What only Kubernetes knows, in the form of KFP's KubernetesExecutorConfig."""

    def constant(value: str) -> dict[str, Any]:
        return {"runtimeValue": {"constant": value}}

    home = cluster.environment["PENSTOCK_HOME"]
    pod: dict[str, Any] = {"pvcMount": [{"pvcNameParameter": constant(cluster.claim), "mountPath": home}]}
    if cluster.secrets:
        pod["secretAsEnv"] = [
            {"secretNameParameter": constant(secret), "keyToEnv": [{"secretKey": key, "envVar": name}]}
            for name, secret, key in cluster.secrets
        ]
    if wants.node_selector:
        pod["nodeSelector"] = {"labels": dict(wants.node_selector)}
    return pod


@dataclass(frozen=True)
class Run:
    """A run as the cluster tells it."""

    id: str
    state: str
    failure: str = ""


class Kubeflow:
    """Kubeflow Pipelines, over its API v2beta1."""

    def __init__(self, cluster: Cluster, patience: float = PATIENCE_SECONDS, pause: float = 1.0) -> None:
        self._cluster = cluster
        self._patience, self._pause = patience, pause
        # read anew for each request: the kubelet renews it
        credentials = ServiceAccountTokenVolumeCredentials(cluster.token) if cluster.token else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # its default would have it ask the server for one, without a time-out; the calls here name their own
            namespace = cluster.namespace or "default"
            self._client = kfp.Client(host=cluster.host, namespace=namespace, credentials=credentials)

    def url(self, run_id: str) -> str:
        """The page of a run."""
        address = self._cluster.environment.get("KF_PIPELINES_UI_ENDPOINT") or self._cluster.host
        return f"{address.rstrip('/')}/#/runs/details/{run_id}"

    def submit(self, name: str, document: dict[str, Any], arguments: Mapping[str, Any]) -> Run:
        """The run of that name which goes on, begun if there is none.

        Raises:
            StageError: the cluster refuses, or has been away for too long.
        """
        experiment = self._experiment()

        def begin() -> Run:
            # before each try: the answer of the one before it may be all that was lost
            if found := self._find(name, experiment):
                return found
            body = kfp_server_api.V2beta1Run(
                experiment_id=experiment,
                display_name=name,
                pipeline_spec=document,
                runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(arguments)),
                service_account=self._cluster.service_account or None,
            )
            try:
                return _run(self._client.runs.run_service_create_run(run=body, _request_timeout=TIMEOUT_SECONDS))
            except urllib3.exceptions.HTTPError:
                # it may still be at work on it
                end = time.monotonic() + TIMEOUT_SECONDS[1]
                while time.monotonic() < end:
                    time.sleep(self._pause)
                    if found := self._find(name, experiment):
                        return found
                raise

        return self._ask("submit", begin)

    def look(self, run_id: str) -> Run:
        """A run as it is now.

        Raises:
            StageError: there is no such run, the cluster refuses, or has been away for too long.
        """
        return self._ask("follow", lambda: self._get(run_id))

    def glance(self, run_id: str, patience: Patience) -> Run | None:
        """A run as it is now, asked once; None if the cluster gives no good answer and `patience` goes on.

        Raises:
            StageError: it does not.
        """
        try:
            found = self._get(run_id)
        except FAULTS as error:
            patience.lose(error)
            return None
        patience.regain()
        return found

    def _get(self, run_id: str) -> Run:
        return _run(self._client.runs.run_service_get_run(run_id=run_id, _request_timeout=TIMEOUT_SECONDS))

    def cancel(self, run_id: str) -> None:
        """Ends a run; one that has ended stays as it is.

        Raises:
            StageError: the cluster refuses, or has been away for too long.
        """

        def end() -> None:
            if self._get(run_id).state not in (*ENDED, "CANCELING"):
                self._client.runs.run_service_terminate_run(run_id=run_id, _request_timeout=TIMEOUT_SECONDS)

        self._ask("cancel", end)

    def _experiment(self) -> str:
        where = {"namespace": self._cluster.namespace} if self._cluster.namespace else {}
        calls = self._client.experiments

        def find() -> str:
            asked = {"filter": _equals("display_name", EXPERIMENT), "_request_timeout": TIMEOUT_SECONDS} | where
            if found := calls.experiment_service_list_experiments(**asked).experiments:
                return found[0].experiment_id
            body = kfp_server_api.V2beta1Experiment(display_name=EXPERIMENT, **where)
            made = calls.experiment_service_create_experiment(experiment=body, _request_timeout=TIMEOUT_SECONDS)
            return made.experiment_id

        return self._ask("experiment", find)

    def _find(self, name: str, experiment: str) -> Run | None:
        answer = self._client.runs.run_service_list_runs(
            experiment_id=experiment,
            filter=_equals("display_name", name),
            sort_by="created_at desc",
            page_size=10,
            _request_timeout=TIMEOUT_SECONDS,
        )
        found = [_run(one) for one in answer.runs or []]
        return next((one for one in found if one.state not in (*ENDED, "CANCELING")), None)

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        patience = Patience(what, self._cluster.host, self._patience)
        while True:
            try:
                return call()
            except FAULTS as error:
                patience.lose(error)
            time.sleep(self._pause)


class Patience:
    """How long an API may give no good answer: faults that pass are waited for, others are not."""

    def __init__(self, what: str, host: str, seconds: float = PATIENCE_SECONDS) -> None:
        self._what, self._host, self._seconds = what, host, seconds
        self._since: float | None = None

    def regain(self) -> None:
        """There was a good answer."""
        self._since = None

    def lose(self, error: Exception) -> None:
        """There was none.

        Raises:
            StageError: it is a refusal, or there has been no good answer for too long.
        """
        status = error.status if isinstance(error, kfp_server_api.ApiException) else 0
        now = time.monotonic()
        self._since = self._since if self._since is not None else now
        if status in _PASSING and now - self._since < self._seconds:
            return
        why = "refuses the token" if status == 401 else f"answers {status}" if status else "does not answer"
        detail = getattr(error, "body", None) or getattr(error, "reason", None) or error
        raise StageError(f"Kubeflow Pipelines at {self._host} {why} ({self._what}): {_line(detail)}") from error


def _line(detail: Any) -> str:
    """An answer's own message, if it has one, in a line."""
    with contextlib.suppress(TypeError, ValueError, KeyError):
        detail = json.loads(detail)["message"]
    return " ".join(str(detail).split())[:500]


def _equals(key: str, value: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})


def _run(answer: Any) -> Run:
    tasks = (answer.run_details.task_details if answer.run_details else None) or []
    failures = [
        f"{task.display_name}: {task.error.message}"
        for task in tasks
        if task.state == "FAILED" and task.error and task.error.message
    ]
    if not failures and answer.error and answer.error.message:
        failures = [answer.error.message]
    return Run(answer.run_id, answer.state or "RUNTIME_STATE_UNSPECIFIED", "; ".join(failures))


@dataclass(frozen=True)
class Submitted:
    """A stage that runs on the cluster."""

    stage: str
    out: str
    key: str
    run_id: str
    url: str


def submit(
    stage: str, arguments: dict[str, Any], out: Path, wanted: Mapping[str, Config]
) -> dict[str, Any] | Submitted:
    """The outputs of `stage` if it has finished before with these arguments, else its run.

    Raises:
        StageError: an unknown stage, or the cluster is not set, refuses, or has been away for too long.
    """
    pipeline = stages.pipeline(stage, arguments)
    key = stages.key(stages.spec(pipeline), arguments)
    if outputs := stages.finished(out, key):
        return outputs
    cluster = Cluster.of()
    kubeflow = Kubeflow(cluster)
    out.parent.mkdir(parents=True, exist_ok=True)
    document = compiled(pipeline, arguments, wanted, cluster)
    given = {name: (isinstance(value, str) and stages.stored(value)) or value for name, value in arguments.items()}
    name = f"{stage.rpartition(':')[2]}-{hashlib.sha256(f'{out} {key}'.encode()).hexdigest()[:20]}"
    found = kubeflow.submit(name, document, given | {keep.OUT: str(out), keep.KEY: key})
    return Submitted(stage, str(out), key, found.id, kubeflow.url(found.id))


def result(submitted: Submitted, run: Run, patience: float = KEPT_SECONDS) -> dict[str, Any]:
    """The outputs of a run that has ended.

    Raises:
        StageError: it did not succeed; or it left nothing here, since the pods have another home.
    """
    stage, out = submitted.stage, Path(submitted.out)
    if run.state != "SUCCEEDED":
        said = "was cancelled" if run.state == "CANCELED" else f"ended as {run.state}"
        why = f": {run.failure}" if run.failure else ""
        raise StageError(f"stage {stage}: the run {said}{why}; see {submitted.url}")
    end = time.monotonic() + patience
    while (found := stages.finished(out, submitted.key)) is None:
        if time.monotonic() > end:
            raise StageError(
                f"stage {stage}: the run succeeded but left nothing in {out}: "
                "the claim that the pods mount is not the home that is here"
            )
        time.sleep(0.5)
    return found


def run(stage: str, arguments: dict[str, Any], out: Path, wanted: Mapping[str, Config]) -> dict[str, Any]:
    """Submits a stage and waits for it; whatever ends the waiting cancels the run.

    Raises:
        StageError: it failed or was cancelled, or the cluster refuses or has been away for too long.
    """
    begun = submit(stage, arguments, out, wanted)
    if not isinstance(begun, Submitted):
        return begun
    print(f"stage {stage}: {begun.url}", flush=True)
    kubeflow = Kubeflow(Cluster.of())
    try:
        while (found := kubeflow.look(begun.run_id)).state not in ENDED:
            time.sleep(POLL_SECONDS)
    except BaseException:
        Kubeflow(Cluster.of(), CANCEL_SECONDS).cancel(begun.run_id)
        raise
    return result(begun, found)
