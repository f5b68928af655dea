"""A training component on a node of a TrainJob (deploy/kubernetes/training): the same function, without a pipeline.

    python -m components.train_job COMPONENT ARGUMENTS [--nodes N]

ARGUMENTS is a JSON object with all arguments of the component by name; artifacts are paths of the home. Every node gets
the same ones. Of several nodes each is told by TF_CONFIG who they are and which it is, as TensorFlow's strategies for
several workers read it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components import stage as stages

PORT = 2222
"""Where the workers of a training meet."""


def worker(environment: Mapping[str, str], nodes: int) -> dict[str, Any]:
    """TF_CONFIG of this node: pod i of the one job of a JobSet is HOSTNAME's stem and i, in the JobSet's own domain."""
    domain, index = environment["JOBSET_NAME"], int(environment["JOB_COMPLETION_INDEX"])
    stem = environment["HOSTNAME"].removesuffix(f"-{index}")
    hosts = [f"{stem}-{node}.{domain}:{PORT}" for node in range(nodes)]
    return {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}


def run(name: str, arguments: Mapping[str, Any]) -> None:
    """Calls the function of `components/<name>.py`.

    Raises:
        StageError: an argument that it has not, or has and was not given.
    """
    from kfp import dsl

    component = getattr(importlib.import_module(f"components.{name}"), name)
    root = stages.spec(component)["root"]
    given, made = root["inputDefinitions"], root["outputDefinitions"]
    artifacts = {**given.get("artifacts", {}), **made.get("artifacts", {})}
    known = artifacts.keys() | given.get("parameters", {}).keys()
    if wrong := known ^ arguments.keys():
        raise stages.StageError(f"{name} takes {', '.join(sorted(known))}; not so: {', '.join(sorted(wrong))}")
    for path in made.get("artifacts", {}):
        Path(arguments[path]).parent.mkdir(parents=True, exist_ok=True)
    component.python_func(
        **{one: dsl.Artifact(uri=value) if one in artifacts else value for one, value in arguments.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m components.train_job")
    parser.add_argument("component")
    parser.add_argument("arguments", type=json.loads)
    parser.add_argument("--nodes", type=int, default=1)
    asked = parser.parse_args()
    if asked.nodes > 1:
        # before TensorFlow is imported, which the component does
        os.environ["TF_CONFIG"] = json.dumps(worker(os.environ, asked.nodes))
    run(asked.component, asked.arguments)


if __name__ == "__main__":
    main()
