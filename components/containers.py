"""What the containers of components have in common, on this machine and on a cluster: images and variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.resources import Config

STEP = "penstock/step:0.1.0"
GPU_STEP = "penstock/gpu-step:0.1.0"
PASSED = ("PENSTOCK_HOME", "PENSTOCK_FEATURE_STORE", "PENSTOCK_RELEASES")
_REPOSITORY = Path(__file__).resolve().parents[1]


def image(wants: Config, environment: Mapping[str, str] = os.environ) -> str:
    """The image of a component: PENSTOCK_STEP_IMAGE, or PENSTOCK_GPU_STEP_IMAGE for one that asks for a GPU."""
    if wants.gpus:
        return environment.get("PENSTOCK_GPU_STEP_IMAGE") or GPU_STEP
    return environment.get("PENSTOCK_STEP_IMAGE") or STEP


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a container gets of the environment: where things are, and what PENSTOCK_STEP_VARIABLES names besides."""
    names = [*PASSED, *environment.get("PENSTOCK_STEP_VARIABLES", "").split()]
    found = {name: environment[name] for name in names if environment.get(name)}
    store = Path(found.get("PENSTOCK_FEATURE_STORE", ""))
    if store.is_relative_to(_REPOSITORY):
        # the repository lies elsewhere in an image
        found["PENSTOCK_FEATURE_STORE"] = str(store.relative_to(_REPOSITORY))
    return found


def executors(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The containers of a compiled pipeline, by the names of their components."""
    found = spec["deploymentSpec"]["executors"]
    return {
        label.removeprefix("exec-").replace("-", "_"): executor["container"]
        for label, executor in found.items()
        if "container" in executor
    }
