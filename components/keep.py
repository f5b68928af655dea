"""The last step of a stage on a cluster: its outputs go to OUT in the home, as every runner leaves them.

    python -m components.keep EXECUTOR_INPUT

The input is KFP's own: artifacts and parameters are the stage's outputs; the parameters `penstock_out` and
`penstock_key` say where they go, and by which key a retry knows them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from components import stage as stages

OUT, KEY = "penstock_out", "penstock_key"


def keep(executor_input: dict[str, Any]) -> None:
    """Copies the artifacts to OUT and tells where in the cluster's store they lie.

    Raises:
        StageError: a component declared an artifact but wrote nothing to it.
    """
    from kfp import dsl

    inputs = executor_input["inputs"]
    parameters = dict(inputs.get("parameterValues", {}))
    out, key = Path(parameters.pop(OUT)), parameters.pop(KEY)
    # a home that is not the one Airflow has would be filled for nobody
    if not out.parent.is_dir():
        raise stages.StageError(f"{out.parent} is not there: the claim of the home is not the home that Airflow has")
    work = stages.work(out)
    shutil.rmtree(work, ignore_errors=True)
    (work / "outputs").mkdir(parents=True)
    artifacts = {}
    for name, found in inputs.get("artifacts", {}).items():
        (artifact,) = found["artifacts"]
        made = Path(dsl.Artifact(uri=artifact["uri"]).path)
        if not made.exists():
            raise stages.StageError(f"the component declared {name} but wrote nothing to it")
        file = stages.file_name(name, artifact["type"]["schemaTitle"], made)
        if made.is_dir():
            shutil.copytree(made, work / "outputs" / file)
        else:
            shutil.copyfile(made, work / "outputs" / file)
        metadata = artifact.get("metadata", {})
        artifacts[name] = {"uri": str(out / file), "metadata": metadata, "stored": artifact["uri"]}
    stages.keep(out, key, {"parameters": parameters, "artifacts": artifacts})


if __name__ == "__main__":
    keep(json.loads(sys.argv[1]))
