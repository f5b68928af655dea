"""The manifests of deploy/kubernetes as documents."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
BASE = KUBERNETES / "base"
VERSIONS = ("1.29", "1.33", kubernetes_validate.latest_version())
Resource = dict[str, Any]

needs_kubectl = pytest.mark.skipif(
    not shutil.which("kubectl"), reason="kubectl renders kustomizations, and is not here"
)


def documents(path: Path) -> list[Resource]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def resources(folder: Path) -> list[Resource]:
    """What the files of a kustomization say, before it changes anything; folders that it names are left out."""
    (found,) = documents(folder / "kustomization.yaml")
    return [one for name in found["resources"] if name.endswith(".yaml") for one in documents(folder / name)]


def settings(folder: Path, name: str) -> dict[str, str]:
    """The literals of a configuration that a kustomization makes."""
    (found,) = documents(folder / "kustomization.yaml")
    (made,) = [one for one in found["configMapGenerator"] if one["name"] == name]
    return dict(literal.split("=", 1) for literal in made["literals"])


def of_kind(kind: str, among: Iterable[Resource]) -> dict[str, Resource]:
    """Those of a kind, by name."""
    return {one["metadata"]["name"]: one for one in among if one["kind"] == kind}


def rendered(folder: Path) -> list[Resource]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def named(one: Resource) -> str:
    return f"{one['kind']}/{one['metadata'].get('name') or one['metadata']['generateName']}"


def pod(workload: Resource) -> Resource:
    spec: Resource = workload["spec"] if workload["kind"] == "Pod" else workload["spec"]["template"]["spec"]
    return spec


def containers(workload: Resource) -> list[Resource]:
    return [*pod(workload)["containers"], *pod(workload).get("initContainers", [])]


def secrets(workloads: Iterable[Resource]) -> Iterator[tuple[str, str]]:
    """The keys of secrets that pods cannot start without."""
    for workload in workloads:
        for volume in pod(workload).get("volumes", []):
            if "secret" in volume:
                assert "optional" not in volume["secret"]
                for item in volume["secret"]["items"]:
                    yield volume["secret"]["secretName"], item["key"]
        for container in containers(workload):
            for variable in container.get("env", []):
                found = variable.get("valueFrom", {}).get("secretKeyRef")
                if found:
                    assert "optional" not in found  # without it the pod does not start
                    yield found["name"], found["key"]
                elif re.search("TOKEN|PASSWORD|AUTH$|SECRET|FERNET", variable["name"]):
                    assert "value" not in variable  # what looks like a secret has its value from one


def files_named(folder: Path) -> list[str]:
    """The files that a kustomization names."""
    (found,) = documents(folder / "kustomization.yaml")
    files = [name for made in found.get("configMapGenerator", []) for name in made.get("files", [])]
    patches = [patch["path"] for patch in found.get("patches", [])]
    return [*(name for name in found["resources"] if not (folder / name).is_dir()), *files, *patches]


def assert_restricted(workload: Resource) -> None:
    """As little as a pod may, but for a token of the cluster."""
    spec = pod(workload)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostAliases"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in containers(workload):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not {"privileged", "runAsUser"} & set(context)
