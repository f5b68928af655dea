"""The manifests of all of Penstock on a cluster: valid, of one piece, and what the code and the page say."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import boto3
import kubernetes_validate
import psycopg
import pytest
import yaml
from moto.server import ThreadedMotoServer

from components import containers as images
from components.kubeflow import Cluster
from components.stage import spec
from serving.settings import from_environment
from tests.deploy.manifests import (
    BASE,
    KUBERNETES,
    ROOT,
    VERSIONS,
    Resource,
    assert_restricted,
    containers,
    documents,
    files_named,
    named,
    needs_kubectl,
    of_kind,
    pod,
    rendered,
    resources,
    secrets,
    settings,
)
from tests.servers import HOST, postgres_server

PIPELINE, MINIO, TRAINING = (KUBERNETES / name for name in ("pipeline", "minio", "training"))
KIND, S3 = (KUBERNETES / "overlays" / name for name in ("kind", "s3"))
RESOURCES = [*resources(PIPELINE), *resources(MINIO)]
ALL = [*resources(BASE), *RESOURCES]
(WORKER,) = documents(PIPELINE / "worker.yaml")
WORKLOADS = [one for one in RESOURCES if one["kind"] in ("Deployment", "StatefulSet", "Job")]
(RUNTIME,), (TRAIN_JOB,) = documents(TRAINING / "runtime.yaml"), documents(TRAINING / "job.yaml")
(NODE,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
NODE_JOB: Resource = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}} | {
    "spec": NODE["template"]["spec"]
}
PODS = [*WORKLOADS, WORKER, NODE_JOB]
SETTINGS, SERVING = settings(PIPELINE, "pipeline-settings"), settings(PIPELINE, "serving-settings")
DOCS = (ROOT / "docs" / "cluster.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

each_pod = pytest.mark.parametrize("workload", PODS, ids=named)


def environment(workload: Resource) -> Iterator[tuple[str, str]]:
    """The variables of a pod's containers and their values; empty where a secret or the pod says it."""
    for container in containers(workload):
        for variable in container.get("env", []):
            yield variable["name"], variable.get("value", "")
        if "envFrom" in container:
            yield from SETTINGS.items()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("resource", [*RESOURCES, *documents(KIND / "volumes.yaml"), WORKER, NODE_JOB], ids=named)
def test_every_manifest_is_valid(resource: Resource, version: str) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("folder", [PIPELINE, MINIO, TRAINING, KIND, S3], ids=lambda folder: folder.name)
def test_a_kustomization_names_every_file_there_is(folder: Path) -> None:
    outside = {"kustomization.yaml", "job.yaml"}  # a training is begun by hand
    assert sorted(files_named(folder)) == sorted(path.name for path in folder.iterdir() if path.name not in outside)


@needs_kubectl
@pytest.mark.parametrize("folder", [KIND, S3, TRAINING], ids=lambda folder: folder.name)
def test_a_rendered_kustomization_is_valid_and_of_one_piece(folder: Path) -> None:
    found = rendered(folder)
    maps = of_kind("ConfigMap", found)
    if folder != TRAINING:
        made = [*resources(BASE), *resources(PIPELINE), *(resources(MINIO) if folder == KIND else [])]
        assert {named(one) for one in made} <= {named(one) for one in found}
    for one in found:
        if one["kind"] not in ("Namespace", "PersistentVolume", "TrainingRuntime"):
            assert one["metadata"]["namespace"] in ("penstock", "kubeflow")
            assert one["metadata"]["namespace"] == "penstock" or named(one) == "PersistentVolumeClaim/home"
            kubernetes_validate.validate(one, VERSIONS[-1], strict=True)
        if one["kind"] in ("Deployment", "StatefulSet", "Job"):
            for container in containers(one):
                assert re.search(r":[\w.-]+$|@sha256:", container["image"])
                for source in container.get("envFrom", []):
                    assert source["configMapRef"]["name"] in maps
            for volume in pod(one)["volumes"]:
                if "configMap" in volume:
                    assert volume["configMap"]["name"] in maps
    if folder == TRAINING:
        (runtime,) = [one for one in found if one["kind"] == "TrainingRuntime"]
        assert f"penstock/gpu-step:{PROJECT['version']}" in json.dumps(runtime)
        return
    # what the gateway is told holds for all of it
    gateway = of_kind("Deployment", found)["gateway"]
    (source,) = pod(gateway)["containers"][0]["envFrom"]
    told = maps[source["configMapRef"]["name"]]["data"]
    given = set(told) | {variable["name"] for variable in pod(gateway)["containers"][0]["env"]}
    assert set(re.findall(r"\$\{(\w+)\}", (ROOT / told["PENSTOCK_FEATURE_STORE"]).read_text())) <= given
    assert told["AWS_ENDPOINT_URL"] == maps["pipeline-settings"]["data"]["AWS_ENDPOINT_URL"]
    assert told["AWS_ENDPOINT_URL"].startswith("https://") == (folder == S3)


@each_pod
def test_a_pod_can_do_nothing_but_its_work(workload: Resource) -> None:
    assert_restricted(workload)
    name = pod(workload)["serviceAccountName"]
    account = of_kind("ServiceAccount", [*ALL, *resources(TRAINING)])[name]
    assert account["automountServiceAccountToken"] is False
    assert pod(workload)["automountServiceAccountToken"] is (name == "airflow-scheduler")


def test_the_scheduler_may_start_and_end_pods_of_its_namespace_and_nothing_else() -> None:
    assert not of_kind("ClusterRole", ALL)
    assert not of_kind("ClusterRoleBinding", ALL)
    (role,), (binding,) = of_kind("Role", ALL).values(), of_kind("RoleBinding", ALL).values()
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {"pods", "pods/log"}
    assert "*" not in json.dumps(role)
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [one["name"] for one in binding["subjects"]] == ["airflow-scheduler"]


@pytest.mark.parametrize("workload", [one for one in WORKLOADS if one["kind"] != "Job"], ids=named)
def test_a_service_is_probed(workload: Resource) -> None:
    (container,) = pod(workload)["containers"]
    ports = {port["name"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "livenessProbe", *(["readinessProbe"] if ports else [])):
        told = container[probe]
        assert told["httpGet"]["port"] in ports if "httpGet" in told else told["exec"]["command"]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120


@pytest.mark.parametrize("workload", [*WORKLOADS, WORKER], ids=named)
def test_a_pod_is_bounded(workload: Resource) -> None:
    for container in containers(workload):
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]


@each_pod
def test_what_a_pod_names_is_there(workload: Resource) -> None:
    (found,) = documents(PIPELINE / "kustomization.yaml")
    maps = {made["name"] for made in found["configMapGenerator"]}
    volumes = {volume["name"] for volume in pod(workload)["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    for volume in pod(workload)["volumes"]:
        if "configMap" in volume:
            assert volume["configMap"]["name"] in maps
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in of_kind("PersistentVolumeClaim", ALL)
    for container in containers(workload):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert all(source["configMapRef"]["name"] in maps for source in container.get("envFrom", []))
        for mount in container["volumeMounts"]:
            if mount["name"] == "home":
                assert mount["mountPath"] == SETTINGS["PENSTOCK_HOME"]


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget"])
def test_what_selects_pods_selects_some(kind: str) -> None:
    for name, one in of_kind(kind, RESOURCES).items():
        chosen = one["spec"]["selector"]
        chosen = chosen.get("matchLabels", chosen)
        (workload,) = [each for each in WORKLOADS if each["metadata"]["name"] == name]
        assert chosen.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        if kind == "Service":
            ports = {port["name"] for container in pod(workload)["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in one["spec"]["ports"]} == ports
    # whatever has a second replica, or a disk, is not drained at once
    kept = {
        one["metadata"]["name"]
        for one in WORKLOADS
        if one["spec"].get("replicas", 1) > 1 or one["kind"] == "StatefulSet"
    }
    assert set(of_kind("PodDisruptionBudget", RESOURCES)) == kept


def created() -> set[tuple[str, str, str]]:
    """The secrets that the page has its reader create: namespace, name and key."""
    made = re.findall(r"^kubectl -n (\S+) create secret generic (\S+) (.*)$", DOCS.replace("\\\n", ""), re.MULTILINE)
    return {
        (namespace, name, key)
        for namespace, name, rest in made
        for key in re.findall(r"--from-literal=([\w.-]+)=", rest)
    }


def test_every_secret_is_one_that_the_page_creates() -> None:
    needed = {
        ("penstock", *one)
        for one in secrets(
            [*WORKLOADS, WORKER, *of_kind("Deployment", ALL).values(), *of_kind("StatefulSet", ALL).values()]
        )
    }
    for path in ("registry.yaml", "releases.yaml"):
        for patch in documents(PIPELINE / path)[0]:
            key = patch["value"]["valueFrom"]["secretKeyRef"]
            needed.add(("penstock", key["name"], key["key"]))
    needed |= {("kubeflow", secret, key) for _, secret, key in Cluster.of(SETTINGS).secrets}
    assert needed == created()
    for path in KUBERNETES.rglob("*.yaml"):
        text = path.read_text()
        assert "secretGenerator" not in text
        assert "kind: Secret" not in text


def test_every_address_is_a_service_that_is_there() -> None:
    services = {(name, port["port"]) for name, one in of_kind("Service", ALL).items() for port in one["spec"]["ports"]}
    text = "\n".join(value for workload in PODS for _, value in environment(workload))
    text += "\n".join(SERVING.values())
    found = set(re.findall(r"(?:\b|@)([a-z][a-z-]*)(?:\.([a-z]+))?:(\d{4,5})\b", text))
    assert {("postgres", "", "5432"), ("ml-pipeline", "kubeflow", "8888"), ("minio", "penstock", "9000")} <= found
    for host, namespace, port in found:
        if namespace == "kubeflow":
            assert (host, port) == ("ml-pipeline", "8888")  # KFP's own
        elif host != "localhost":
            assert namespace in ("", "penstock")
            assert (host, int(port)) in services
    told = SETTINGS
    assert (told["POSTGRES_HOST"], int(told["POSTGRES_PORT"])) == ("postgres.penstock", 5432)


def admits(policy: Resource, name: str) -> bool:
    """Whether the rules of a policy let in the pods that are called so."""
    for rule in policy["spec"].get("ingress", []):
        if "from" not in rule:
            return True
        for source in rule["from"]:
            chosen = source.get("podSelector", {})
            if name == "kubeflow":
                if (
                    source.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
                    == name
                ):
                    return True
            elif name in selected(chosen) or (
                name == "airflow-worker"
                and chosen.get("matchLabels", {}).items() <= WORKER["metadata"]["labels"].items()
                and chosen
            ):
                return True
    return False


def selected(chosen: Resource) -> set[str]:
    names = {chosen["matchLabels"].get("app.kubernetes.io/name")} if "matchLabels" in chosen else set()
    return names | {name for one in chosen.get("matchExpressions", []) for name in one["values"]}


def test_who_may_go_out_to_a_pod_is_let_in_there() -> None:
    policies = of_kind("NetworkPolicy", ALL)
    reached = set()
    for policy in policies.values():
        for rule in policy["spec"].get("egress", []):
            for target in rule.get("to", []):
                if "namespaceSelector" in target:
                    continue
                for name in selected(policy["spec"]["podSelector"]):
                    reached |= {
                        (name, to, port["port"]) for to in selected(target["podSelector"]) for port in rule["ports"]
                    }
    for name, to, port in reached:
        into = [one for one in policies.values() if to in selected(one["spec"]["podSelector"]) and admits(one, name)]
        assert into, (name, to)
        assert port in [one["port"] for one in of_kind("Service", ALL)[to]["spec"]["ports"]]
    worker = {to for name, to, _ in reached if name == "airflow-worker"}
    assert worker == {"airflow-api", "mlflow", "postgres", "redis", "tf-serving", "minio"}
    # components run in another namespace, and may ask what they are told the address of
    for to in ("mlflow", "postgres", "redis", "minio"):
        assert any(admits(one, "kubeflow") for one in policies.values() if to in selected(one["spec"]["podSelector"]))
    # every pod has a policy, beside the one that refuses everything
    governed = {name for one in policies.values() for name in selected(one["spec"]["podSelector"])}
    assert {one["metadata"]["name"] for one in WORKLOADS} | {"airflow-worker"} <= governed


def test_images_are_pinned_and_ours_are_what_the_dockerfile_makes() -> None:
    stages = re.findall(r"^FROM .* AS ([\w-]+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    version = PROJECT["version"]
    pinned = {
        image["name"]: image["newTag"]
        for folder in (PIPELINE, MINIO, TRAINING)
        for image in documents(folder / "kustomization.yaml")[0]["images"]
    }
    used = {container["image"] for workload in [*WORKLOADS, NODE_JOB] for container in containers(workload)}
    assert used == set(pinned)
    assert "latest" not in pinned.values()
    for name in used:
        if name.startswith("penstock/"):
            assert name.removeprefix("penstock/") in stages
            assert pinned[name] == version
    told = SETTINGS
    executor = "AIRFLOW__KUBERNETES_EXECUTOR__WORKER_CONTAINER"
    (base,) = pod(WORKER)["containers"]
    assert (
        base["image"] == f"{told[f'{executor}_REPOSITORY']}:{told[f'{executor}_TAG']}" == f"penstock/airflow:{version}"
    )
    assert (told["PENSTOCK_STEP_IMAGE"], told["PENSTOCK_GPU_STEP_IMAGE"]) == (images.STEP, images.GPU_STEP)


def test_the_pod_of_a_task_is_one_that_the_executor_takes() -> None:
    scheduler = of_kind("Deployment", ALL)["airflow-scheduler"]
    told = dict(environment(scheduler))
    (base,) = pod(WORKER)["containers"]
    assert base["name"] == "base"
    assert not {"command", "args"} & set(base)  # the executor's
    assert "ENTRYPOINT" not in (ROOT / "Dockerfile").read_text()  # they are the whole command
    assert pod(WORKER)["restartPolicy"] == "Never"
    (mounted,) = [volume for volume in pod(scheduler)["volumes"] if "configMap" in volume]
    (found,) = documents(PIPELINE / "kustomization.yaml")
    (made,) = [one for one in found["configMapGenerator"] if one["name"] == mounted["configMap"]["name"]]
    (container,) = pod(scheduler)["containers"]
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == mounted["name"]]
    assert made["files"] == ["worker.yaml"]
    assert told["AIRFLOW__KUBERNETES_EXECUTOR__POD_TEMPLATE_FILE"] == f"{mount['mountPath']}/worker.yaml"
    # a hash would be in the name of the configuration, but not in the template
    (source,) = base["envFrom"]
    (shared,) = [one for one in found["configMapGenerator"] if one["name"] == source["configMapRef"]["name"]]
    assert shared["options"] == {"disableNameSuffixHash": True}


def test_every_variable_is_one_that_is_read() -> None:
    names = {name for workload in PODS for name, _ in environment(workload)} | set(SERVING)
    airflow = importlib.util.find_spec("airflow")
    assert airflow is not None
    assert airflow.submodule_search_locations
    options = yaml.safe_load(
        (Path(airflow.submodule_search_locations[0]) / "config_templates" / "config.yml").read_text()
    )
    rooms = ("penstock", "feature_repo", "components", "serving", "dags")
    code = "\n".join(path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py"))
    store = (ROOT / SETTINGS["PENSTOCK_FEATURE_STORE"]).read_text()
    # the executor's own section comes with the package that the scheduler alone has
    executor = {"NAMESPACE", "POD_TEMPLATE_FILE", "WORKER_CONTAINER_REPOSITORY", "WORKER_CONTAINER_TAG"}
    executor |= {"DELETE_WORKER_PODS", "DELETE_WORKER_PODS_ON_FAILURE"}
    for name in names:
        if name.startswith("AIRFLOW__"):
            section, option = name.removeprefix("AIRFLOW__").split("__")
            assert (
                option in executor
                if section == "KUBERNETES_EXECUTOR"
                else option.lower() in options[section.lower()]["options"]
            )
        elif name.startswith(("PENSTOCK_", "KF_", "MLFLOW_TRACKING_URI", "JOBSET_")):
            assert f'"{name}"' in code, name
        elif name.startswith(("POSTGRES_", "REDIS_ADDRESS")) and name != "POSTGRES_PASSWORD":
            assert f"${{{name}}}" in store


def test_components_are_told_where_the_stores_are() -> None:
    told = SETTINGS
    cluster = Cluster.of(told)
    assert cluster.claim in of_kind("PersistentVolumeClaim", documents(KIND / "volumes.yaml"))
    given = set(images.variables(told)) | {name for name, _, _ in cluster.secrets}
    store = (ROOT / told["PENSTOCK_FEATURE_STORE"]).read_text()
    assert set(re.findall(r"\$\{(\w+)\}", store)) <= given
    worker = dict(environment(WORKER))
    assert set(re.findall(r"\$\{(\w+)\}", store)) <= set(worker)
    assert from_environment(told).model_server == told["PENSTOCK_MODEL_SERVER"]
    # what goes to another namespace says from which it comes
    for name in (*told["PENSTOCK_STEP_VARIABLES"].split(), "MLFLOW_TRACKING_URI"):
        if re.search("HOST|URL|URI", name):
            assert ".penstock" in told[name]
    serving = SERVING
    for name in (
        "PENSTOCK_FEATURE_STORE",
        "PENSTOCK_RELEASES",
        "POSTGRES_DATABASE",
        "POSTGRES_USER",
        "AWS_ENDPOINT_URL",
    ):
        assert serving[name] == told[name]


def test_the_stores_of_a_cluster_are_sections_of_the_other_files() -> None:
    files = {
        name: yaml.safe_load((ROOT / "feature_repo" / "stores" / f"{name}.yaml").read_text())
        for name in ("redis", "postgres", "cluster")
    }
    assert files["cluster"] == files["redis"] | {"registry": files["postgres"]["registry"]}


def test_each_has_a_database_of_its_own(tmp_path: Path) -> None:
    passwords = {"AIRFLOW_PASSWORD": "a'b", "MLFLOW_PASSWORD": "m", "FEAST_PASSWORD": "f"}
    with postgres_server() as server:
        port = str(server.port)
        path = {"PATH": "/usr/bin:/bin", "PGHOST": HOST, "PGPORT": port, "POSTGRES_USER": "penstock"}
        command = ["bash", "-euo", "pipefail", "-c", '. "$0"', PIPELINE / "databases.sh"]
        subprocess.run(command, check=True, env=path | passwords, capture_output=True)
        for name in ("airflow", "mlflow", "feast"):
            with psycopg.connect(host=HOST, port=port, user=name, dbname=name) as connection:
                connection.execute("CREATE TABLE one (id int)")
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            psycopg.connect(host=HOST, port=port, user="mlflow", dbname="airflow")


def test_the_buckets_are_made_once_and_are_those_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = [one for one in resources(MINIO) if one["kind"] == "Job"]
    (container,) = pod(job)["containers"]
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        told = {
            "AWS_ENDPOINT_URL": url,
            "AWS_DEFAULT_REGION": SETTINGS["AWS_DEFAULT_REGION"],
        }
        for name, value in (told | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
            monkeypatch.setenv(name, value)
        for _ in range(2):
            exec(container["command"][2], {})
        made = {bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]}
    finally:
        server.stop()
    mlflow = " ".join(pod(of_kind("Deployment", ALL)["mlflow"])["containers"][0]["command"])
    releases = SETTINGS["PENSTOCK_RELEASES"]
    assert made == set(re.findall(r"s3://(\w+)", f"{mlflow} {releases}"))


def test_what_others_make_is_named_by_the_version_that_fits_ours() -> None:
    locked = (ROOT / "requirements.lock").read_text()
    (kfp,) = re.findall(r"^kfp==([\d.]+)", locked, re.MULTILINE)
    named = {
        path.parent.name: documents(path)[0]["resources"]
        for path in (KUBERNETES / "upstream").glob("*/kustomization.yaml")
    }
    assert set(named) == {"kubeflow-pipelines-cluster", "kubeflow-pipelines", "kubeflow-trainer"}
    for name, (address,) in named.items():
        assert address.endswith(f"?ref={kfp}" if "pipelines" in name else "?ref=v2.3.0")
    # a scheduler of another version than the rest would not read what they write
    scheduler = (ROOT / "requirements-scheduler.lock").read_text()
    for package in ("apache-airflow", "apache-airflow-core", "apache-airflow-task-sdk", "sqlalchemy", "psycopg"):
        (version,) = re.findall(rf"^{package}==(\S+)", locked, re.MULTILINE)
        assert re.search(rf"^{package}=={re.escape(version)} ", scheduler, re.MULTILINE)


def test_a_train_job_runs_a_component_that_there_is() -> None:
    trainer = TRAIN_JOB["spec"]["trainer"]
    name, told, nodes = trainer["args"]
    arguments = json.loads(told)
    root = spec(getattr(__import__(f"components.{name}", fromlist=[name]), name))["root"]
    inputs = root["inputDefinitions"]
    assert arguments.keys() == {*inputs["artifacts"], *inputs["parameters"], *root["outputDefinitions"]["artifacts"]}
    assert (ROOT / "penstock" / "rank" / f"{arguments['model']}.py").exists()
    assert nodes == f"--nodes={trainer['numNodes']}"
    assert TRAIN_JOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    assert TRAIN_JOB["spec"]["runtimeRef"]["kind"] == RUNTIME["kind"]
    for part in ("requests", "limits"):
        assert trainer["resourcesPerNode"][part]["nvidia.com/gpu"] >= 1
    # what Trainer looks for
    assert NODE["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = pod(NODE_JOB)["containers"]
    assert (NODE["name"], container["name"], container["image"]) == ("node", "node", "penstock/gpu-step")
    assert container["command"] == ["python", "-m", "components.train_job"]
    paths = [value for value in arguments.values() if isinstance(value, str) and value.startswith("/")]
    assert all(path.startswith("/var/lib/penstock/") for path in paths)
    assert len(paths) == 3
