from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from components import stages

NAMES = [
    "ingest",
    "validate",
    "features",
    "examples",
    "recall",
    "rank",
    "weights",
    "gate",
    "report",
    "release",
    "replay",
    "look_alike",
]


def spec(name: str) -> dict[str, Any]:
    return json_format.MessageToDict(getattr(stages, name).pipeline_spec)


def test_the_stages_are_those_the_dags_run() -> None:
    assert [name for name, value in vars(stages).items() if hasattr(value, "pipeline_func")] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_takes_uris_and_names_its_outputs(name: str) -> None:
    found = spec(name)
    assert "artifacts" not in found["root"].get("inputDefinitions", {})
    assert "Output" not in found["root"]["outputDefinitions"].get("parameters", {})
    imported = {task for task in found["root"]["dag"]["tasks"] if task.startswith("importer")}
    uris = [key for key in found["root"]["inputDefinitions"]["parameters"] if key.endswith("_uri")]
    assert len(imported) == len([uri for uri in uris if uri != "tracking_uri"])


@pytest.mark.parametrize("name", NAMES)
def test_components_bring_their_image_and_install_nothing(name: str) -> None:
    executors = spec(name)["deploymentSpec"]["executors"]
    containers = [executor["container"] for executor in executors.values() if "container" in executor]
    assert 1 <= len(containers) <= 4
    for container in containers:
        # kfp's subprocess runner warns of an image without this word in its name
        assert "python" in container["image"]
        assert not any("pip install" in part for part in container["command"])
