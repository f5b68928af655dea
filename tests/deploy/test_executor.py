"""Airflow as on a cluster: a scheduler of another environment, a pod for each task, PostgreSQL, logs in the home.

Pods are processes, and Kubernetes is a server of ours; settings and the pod's template are those of the manifests.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import kubernetes_validate
import pytest
import yaml

from local import supervisor
from tests.deploy.manifests import KUBERNETES, ROOT, VERSIONS, documents, settings
from tests.deploy.pods_server import PodsServer
from tests.servers import HOST, free_port, postgres_server

SCHEDULER = os.environ.get("PENSTOCK_CHECK_SCHEDULER", "")
pytestmark = pytest.mark.skipif(not SCHEDULER, reason="make scheduler-check installs its environment and names it")
PIPELINE = KUBERNETES / "pipeline"
SECONDS = 120


@contextmanager
def running(folder: Path, commands: dict[str, tuple[list[str], dict[str, str]]]) -> Iterator[None]:
    children = []
    try:
        for name, (command, environment) in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                children.append(
                    subprocess.Popen(
                        command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
                    )
                )
        yield
    finally:
        supervisor.stop(children)


def wait(what: str, there: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            if there():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no {what} within {SECONDS} s")


def test_a_task_runs_in_a_pod_of_the_template(tmp_path: Path) -> None:
    port, health = free_port(), free_port()
    home, passwords = tmp_path / "home", tmp_path / "passwords.json"
    home.mkdir()
    passwords.write_text(json.dumps({"admin": "ana's", "viewer": "vic's"}))
    # what is an address or a place of a cluster is one of this machine
    common = settings(PIPELINE, "pipeline-settings") | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://{HOST}:{port}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "airflow" / "logs"),
        "AIRFLOW__LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY": str(tmp_path / "dag-processor"),
        "PENSTOCK_HOME": str(home),
    }
    with postgres_server() as server, PodsServer(sys.executable, common, tmp_path) as pods:
        database = f"postgresql+psycopg://penstock:any@{HOST}:{server.port}/penstock"
        process = common | {
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": database,
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(48),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(48),
        }
        cluster = tmp_path / "cluster.yaml"
        named = {"clusters": {"cluster": {"server": pods.url}}, "users": {"user": {}}}
        named |= {"contexts": {"context": {"cluster": "it", "user": "it"}}}
        parts = {part: [{"name": "it", **content}] for part, content in named.items()}
        cluster.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "it", **parts}))
        # it has neither the DAGs nor our code, and nowhere to write logs of tasks
        scheduler = {
            name: value for name, value in process.items() if name not in ("PYTHONPATH", "AIRFLOW__CORE__DAGS_FOLDER")
        }
        scheduler |= {
            "PATH": f"{SCHEDULER}/bin:/usr/bin:/bin",
            "AIRFLOW_HOME": str(tmp_path / "scheduler"),
            "AIRFLOW__CORE__EXECUTOR": "KubernetesExecutor",
            "AIRFLOW__KUBERNETES_EXECUTOR__NAMESPACE": "penstock",
            "AIRFLOW__KUBERNETES_EXECUTOR__POD_TEMPLATE_FILE": str(PIPELINE / "worker.yaml"),
            "AIRFLOW__KUBERNETES_EXECUTOR__IN_CLUSTER": "False",
            "AIRFLOW__KUBERNETES_EXECUTOR__CONFIG_FILE": str(cluster),
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": "/proc/none",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_SERVER_PORT": str(health),
        }
        airflow = str(Path(sys.executable).with_name("airflow"))
        subprocess.run([airflow, "db", "migrate"], env=process, cwd=tmp_path, check=True, capture_output=True)
        commands = {
            "api": ([airflow, "api-server"], process),
            "dag-processor": ([airflow, "dag-processor"], process),
            "scheduler": ([f"{SCHEDULER}/bin/airflow", "scheduler", "--skip-serve-logs"], scheduler),
        }
        with running(tmp_path, commands):
            address = f"http://{HOST}:{port}"
            wait("API", lambda: httpx.get(f"{address}/api/v2/version").status_code == 200)
            wait("scheduler", lambda: httpx.get(f"http://{HOST}:{health}/health").status_code == 200)
            told = httpx.post(
                f"{address}/auth/token", json={"username": "admin", "password": "ana's"}, timeout=60
            ).json()
            headers = {"Authorization": f"Bearer {told['access_token']}"}
            dag = "/dags/look_alike"
            with httpx.Client(base_url=f"{address}/api/v2", headers=headers, timeout=60) as client:
                wait("DAG", lambda: client.get(dag).status_code == 200)
                client.post(f"{dag}/dagRuns", json={"dag_run_id": "first", "logical_date": None}).raise_for_status()
                wait(
                    "end of the run",
                    lambda: client.get(f"{dag}/dagRuns/first").json()["state"] in ("success", "failed"),
                )
                tasks = client.get(f"{dag}/dagRuns/first/taskInstances").json()["task_instances"]
                log = client.get(
                    f"{dag}/dagRuns/first/taskInstances/follow/logs/1", headers={"Accept": "application/json"}
                ).text
                # nothing is live in an empty home, and the first task says so
                assert {one["task_id"]: one["state"] for one in tasks} == dict.fromkeys(
                    ("follow", "train", "refresh"), "skipped"
                )
                assert "no release is live" in log
            (asked,) = pods.made
            wait("end of the pod", lambda: asked["metadata"]["name"] in pods.deleted)
    (template,) = documents(PIPELINE / "worker.yaml")
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod"} | asked, VERSIONS[-1], strict=True)
    assert template["metadata"]["labels"].items() <= asked["metadata"]["labels"].items()
    for part in ("serviceAccountName", "securityContext", "restartPolicy", "volumes"):
        assert asked["spec"][part] == template["spec"][part]
    (container,), (wanted,) = asked["spec"]["containers"], template["spec"]["containers"]
    assert {part: container[part] for part in wanted if part != "env"} == {
        part: wanted[part] for part in wanted if part != "env"
    }
    assert all(variable in container["env"] for variable in wanted["env"])
