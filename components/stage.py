"""What a stage is to whoever runs it: its pipeline, the key of a run, and what a run leaves behind.

A *stage* is a KFP pipeline of `components.stages`. Its results lie in one directory, keyed by DAG run and stage:

    OUT/<artifact>        each output artifact
    OUT/_SUCCESS.json     {"key": hash of the stage's spec and arguments, "outputs": {"parameters", "artifacts"}}

They are written under a temporary name and renamed at the end, so OUT is whole or absent, and a retry with the same
spec and arguments takes what is there, if its inputs are still those of then.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUCCESS = "_SUCCESS.json"


class StageError(RuntimeError):
    """A stage that cannot run or that failed; the message is the failing component's own."""


def pipeline(stage: str, arguments: Mapping[str, Any]) -> Any:
    """The KFP pipeline of a stage, which must take these arguments.

    Args:
        stage: a pipeline of `components.stages`, or "module:pipeline" for one that lives elsewhere.

    Raises:
        StageError: there is no such stage, or it has no parameter of that name.
    """
    module, _, name = stage.rpartition(":")
    stages = importlib.import_module(module or "components.stages")
    found: Any = getattr(stages, name, None)
    if not hasattr(found, "pipeline_func"):
        known = sorted(key for key, value in vars(stages).items() if hasattr(value, "pipeline_func"))
        raise StageError(f"no stage {name!r} in {stages.__name__}; there are {', '.join(known)}")
    known = found.component_spec.inputs
    unknown = sorted(arguments.keys() - known.keys())
    if unknown:
        raise StageError(f"no parameter {', '.join(unknown)}; it takes {', '.join(known)}")
    return found


def spec(pipeline: Any) -> dict[str, Any]:
    """A pipeline as KFP compiles it."""
    from google.protobuf import json_format

    return json_format.MessageToDict(pipeline.pipeline_spec)


def key(spec: dict[str, Any], arguments: Mapping[str, Any]) -> str:
    """What tells runs of a stage apart: the spec, the arguments, and which runs made the inputs among them."""
    inputs = {name: made for name, value in arguments.items() if (made := _made_by(value))}
    return hashlib.sha256(json.dumps([spec, dict(arguments), inputs], sort_keys=True).encode()).hexdigest()


def _made_by(value: Any) -> str | None:
    """The key of the stage that made an input, if one did: the same place may hold something new."""
    found = _left(Path(value).parent) if isinstance(value, str) else None
    return str(found["key"]) if found else None


def _left(out: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out / SUCCESS).read_text())
        if isinstance(found, dict) and {"key", "outputs"} <= found.keys():
            return found
    return None


def finished(out: Path, key: str | None = None) -> dict[str, Any] | None:
    """The outputs that lie in `out`; None if there are none, or they are of a run with another key."""
    found = _left(out)
    return found["outputs"] if found and key in (None, found["key"]) else None


def stored(uri: str) -> str:
    """Where an artifact of a stage that ran on a cluster lies in the cluster's own store; empty if nowhere."""
    outputs = finished(Path(uri).parent) or {"artifacts": {}}
    return next((made.get("stored", "") for made in outputs["artifacts"].values() if made["uri"] == uri), "")


def work(out: Path) -> Path:
    """Where the results of a run lie until they are whole."""
    return out.with_name(f".{out.name}.part")


def file_name(name: str, schema_title: str, made: Path) -> str:
    """What an artifact is called in OUT: a page keeps its suffix, or no browser opens it as one."""
    return f"{name}.html" if schema_title == "system.HTML" and made.is_file() else name


def keep(out: Path, key: str, outputs: dict[str, Any]) -> None:
    """Makes the artifacts that lie in `work(out)/outputs` those of `out`, at once."""
    made = work(out) / "outputs"
    (made / SUCCESS).write_text(json.dumps({"key": key, "outputs": outputs}, indent=1))
    # the code or the arguments changed since: the former result gives way to the new one
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)
    shutil.rmtree(work(out))
