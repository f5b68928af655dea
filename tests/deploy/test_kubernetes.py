"""The manifests: valid for every Kubernetes we name, as strict as they claim, and of one piece."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest

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

OVERLAYS = [KUBERNETES / "overlays" / "local"]
SERVICES = {"gateway", "tf-serving", "redis", "features"}
KUSTOMIZATION: Resource = documents(BASE / "kustomization.yaml")[0]
RESOURCES = resources(BASE)
WORKLOADS = [one for one in RESOURCES if one["kind"] in ("Deployment", "StatefulSet")]

each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=named)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("resource", RESOURCES, ids=named)
def test_every_manifest_is_valid(resource: Resource, version: str) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


def test_a_wrong_key_is_found() -> None:
    wrong = {**of_kind("PersistentVolumeClaim", RESOURCES)["home"], "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="specs"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_a_kustomization_names_every_file_there_is_and_no_other() -> None:
    for folder in (BASE, *OVERLAYS):
        (found,) = documents(folder / "kustomization.yaml")
        there = sorted(path.name for path in folder.iterdir() if path.name != "kustomization.yaml")
        assert sorted(files_named(folder)) == there
        assert all((folder / name).exists() for name in found["resources"])


def test_the_four_services_are_there_with_all_that_belongs_to_them() -> None:
    assert {one["metadata"]["name"] for one in WORKLOADS} == SERVICES
    for kind in ("Service", "ServiceAccount", "PodDisruptionBudget"):
        assert set(of_kind(kind, RESOURCES)) == SERVICES, kind
    assert set(of_kind("NetworkPolicy", RESOURCES)) >= SERVICES


@each_workload
def test_a_workload_can_do_nothing_but_its_work(workload: Resource) -> None:
    spec = pod(workload)
    name = workload["metadata"]["name"]
    assert spec["serviceAccountName"] == name
    assert spec["automountServiceAccountToken"] is False
    assert of_kind("ServiceAccount", RESOURCES)[name]["automountServiceAccountToken"] is False
    assert_restricted(workload)
    assert (
        of_kind("Namespace", RESOURCES)["penstock"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )


@each_workload
def test_a_workload_is_probed_and_bounded(workload: Resource) -> None:
    for container in containers(workload):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        assert "memory" in resources["limits"]
    for container in pod(workload)["containers"]:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            told = container[probe]
            if "httpGet" in told:
                assert told["httpGet"]["port"] in ports
            elif "grpc" in told:
                assert told["grpc"]["port"] in ports.values()
            else:
                assert "redis-cli ping" in told["exec"]["command"][-1]
        # a slow start is no reason to kill it
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 120


def test_the_gateway_is_probed_where_it_answers_without_a_token() -> None:
    from serving.front import is_open

    (container,) = pod(of_kind("Deployment", RESOURCES)["gateway"])["containers"]
    paths = {
        probe: container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "startupProbe", "readinessProbe")
    }
    assert paths == {"livenessProbe": "/health", "startupProbe": "/health", "readinessProbe": "/ready"}
    assert all(is_open(path) for path in paths.values())


@each_workload
def test_what_a_workload_names_is_there(workload: Resource) -> None:
    maps = {made["name"] for made in KUSTOMIZATION["configMapGenerator"]}
    claims = set(of_kind("PersistentVolumeClaim", RESOURCES))
    volumes = {volume["name"] for volume in pod(workload)["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    for volume in pod(workload)["volumes"]:
        if "configMap" in volume:
            assert volume["configMap"]["name"] in maps
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in claims
    for container in containers(workload):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert all(source["configMapRef"]["name"] in maps for source in container.get("envFrom", []))
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    name = workload["metadata"]["name"]
    service = of_kind("Service", RESOURCES)[name]
    assert service["spec"]["selector"].items() <= labels.items()
    ports = {port["name"] for container in containers(workload) for port in container.get("ports", [])}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    budget = of_kind("PodDisruptionBudget", RESOURCES)[name]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_secrets_are_named_and_never_made() -> None:
    assert set(secrets(WORKLOADS)) == {("penstock-gateway", "token"), ("penstock-redis", "password")}
    for folder in (BASE, *OVERLAYS):
        assert "secretGenerator" not in documents(folder / "kustomization.yaml")[0]
        for path in folder.glob("*.yaml"):
            assert not [one for one in documents(path) if isinstance(one, dict) and one.get("kind") == "Secret"]
    docs = (ROOT / "docs" / "kubernetes.md").read_text()
    for name, key in secrets(WORKLOADS):
        assert f"create secret generic {name} --from-literal={key}=" in docs


def test_the_gateway_accepts_its_settings() -> None:
    """What the manifests put into its environment is what it reads."""
    (container,) = pod(of_kind("Deployment", RESOURCES)["gateway"])["containers"]
    environment = settings(BASE, "serving-settings")
    environment |= {variable["name"]: "0123456789abcdef" for variable in container["env"] if "valueFrom" in variable}
    found = from_environment(environment)
    assert (found.host, found.token) == ("0.0.0.0", "0123456789abcdef")
    assert found.gateway_port == container["ports"][0]["containerPort"]
    ports = {port["name"]: port["port"] for port in of_kind("Service", RESOURCES)["tf-serving"]["spec"]["ports"]}
    assert found.model_server == f"tf-serving:{ports['grpc']}"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["home"] == environment["PENSTOCK_HOME"]
    store = (ROOT / environment["PENSTOCK_FEATURE_STORE"]).read_text()
    given = {variable["name"] for variable in container["env"]} | set(environment)
    assert set(re.findall(r"\$\{(\w+)\}", store)) <= given
    address = next(variable["value"] for variable in container["env"] if variable["name"] == "REDIS_ADDRESS")
    redis = of_kind("Service", RESOURCES)["redis"]["spec"]["ports"][0]["port"]
    assert address == f"redis:{redis},password=$(REDIS_PASSWORD)"


def test_all_mount_the_home_at_one_path_and_only_who_writes_may() -> None:
    """The model server is told paths of the home by whoever promotes: they must be the same everywhere."""
    for workload in WORKLOADS:
        for container in containers(workload):
            for mount in container["volumeMounts"]:
                if mount["name"] == "home":
                    assert mount["mountPath"] == "/var/lib/penstock"
                    assert mount.get("readOnly", False) == (workload["metadata"]["name"] == "tf-serving")


def test_images_are_pinned_and_ours_are_what_the_dockerfile_makes() -> None:
    pinned = {image["name"]: image for image in KUSTOMIZATION["images"]}
    used = {container["image"] for workload in WORKLOADS for container in containers(workload)}
    assert used == set(pinned)  # a manifest names no version of its own
    assert all("digest" in image or image["newTag"] != "latest" for image in pinned.values())
    stages = re.findall(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name in used:
        if name.startswith("penstock/"):
            assert name.removeprefix("penstock/") in stages
    uid = re.search(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert uid
    assert pod(of_kind("Deployment", RESOURCES)["gateway"])["securityContext"]["runAsUser"] == int(uid[1])


def test_one_gateway_writes_the_feedback_log() -> None:
    gateway = of_kind("Deployment", RESOURCES)["gateway"]["spec"]
    assert (gateway["replicas"], gateway["strategy"]["type"]) == (1, "Recreate")
    assert not of_kind("HorizontalPodAutoscaler", RESOURCES)


def test_nothing_is_reached_that_is_not_named() -> None:
    policies = of_kind("NetworkPolicy", RESOURCES)
    everything = policies["nothing-else"]["spec"]
    assert (everything["podSelector"], everything["policyTypes"]) == ({}, ["Ingress", "Egress"])
    assert not {"ingress", "egress"} & set(everything)
    for name in SERVICES:
        policy = policies[name]["spec"]
        assert policy["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": name}}
        # only the gateway, which has a token, is reached by anybody
        assert all("from" in rule for rule in policy["ingress"]) == (name != "gateway")
    reached = {
        (name, rule["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"], rule["ports"][0]["port"])
        for name in SERVICES
        for rule in policies[name]["spec"].get("egress", [])
    }
    assert reached == {("gateway", "tf-serving", 8500), ("gateway", "redis", 6379), ("features", "redis", 6379)}
    for name, to, port in reached:
        sources = [source["podSelector"]["matchLabels"] for source in policies[to]["spec"]["ingress"][0]["from"]]
        assert {"app.kubernetes.io/name": name} in sources
        assert port in [one["port"] for one in of_kind("Service", RESOURCES)[to]["spec"]["ports"]]


def test_tf_serving_starts_with_what_was_loaded_and_without_anything(tmp_path: Path) -> None:
    """A model without a version would keep it from answering, and so from being told to load one."""
    from google.protobuf import text_format
    from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

    def made() -> ModelServerConfig:
        out = tmp_path / "models.config"
        environment = {"PENSTOCK_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
        subprocess.run(["sh", BASE / "models.sh", out], check=True, env=environment, capture_output=True)
        return text_format.Parse(out.read_text(), ModelServerConfig())

    empty = made()
    assert empty.WhichOneof("config") == "model_config_list"
    assert not empty.model_config_list.config
    for name in ("rank/7", "rank/12", "rank/13.part", "rank/.13", "recall"):
        (tmp_path / "home" / "models" / name).mkdir(parents=True)
    (found,) = made().model_config_list.config
    assert (found.name, found.base_path) == ("rank", str(tmp_path / "home" / "models" / "rank"))
    assert sorted(found.model_version_policy.specific.versions) == [7, 12]


@needs_kubectl
@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_a_rendered_kustomization_is_valid(folder: Path) -> None:
    found = rendered(folder)
    maps = len(KUSTOMIZATION["configMapGenerator"])
    assert len(found) == len(RESOURCES) + maps
    names = {one["metadata"]["name"] for one in found}
    for one in found:
        kubernetes_validate.validate(one, VERSIONS[-1], strict=True)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "penstock"
        if one["kind"] in ("Deployment", "StatefulSet"):
            for container in containers(one):
                assert re.search(r":[\w.-]+$|@sha256:", container["image"])
            for volume in pod(one)["volumes"]:
                if "configMap" in volume:
                    assert volume["configMap"]["name"] in names  # with its hash
