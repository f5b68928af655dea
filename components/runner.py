"""Runs a stage: one switch between a subprocess here, a container, and a cluster.

What a try that failed had made lies in OUT.failed-1, -2, …: nothing overwrites it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from components import stage as stages
from components.resources import Config, by_component
from components.stage import StageError

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}


def run_stage(
    stage: str,
    arguments: dict[str, Any],
    out: Path,
    runner: str | None = None,
    resources: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Runs `stage` with `arguments` into `out` and returns its outputs.

    Args:
        stage: a pipeline of `components.stages`, or "module:pipeline" for one that lives elsewhere.
        arguments: the pipeline's parameters; input artifacts are given by URI (a local path).
        out: an absolute directory of this stage's own.
        runner: "subprocess" (default), "docker" or "kubeflow".
        resources: settings of `components.resources`, by component; a subprocess has those of its machine.

    Returns:
        {"parameters": {name: value}, "artifacts": {name: {"uri", "metadata"}}}.

    Raises:
        StageError: unknown runner or stage, resources that cannot be, or a component failed.
    """
    name = runner or "subprocess"
    if name not in RUNNERS:
        raise StageError(f"PENSTOCK_RUNNER={name} is not known; choose one of {', '.join(sorted(RUNNERS))}")
    try:
        wanted = by_component(resources or {})
    except ValueError as error:
        raise StageError(f"resources: {error}") from None
    return RUNNERS[name](stage, arguments, out, wanted)


def _run_subprocess(stage: str, arguments: dict[str, Any], out: Path, wanted: dict[str, Config]) -> dict[str, Any]:
    return _run_child(stage, {"arguments": arguments}, out)


def _run_docker(stage: str, arguments: dict[str, Any], out: Path, wanted: dict[str, Config]) -> dict[str, Any]:
    from components import docker

    described = docker.prepare(stage, arguments, out, wanted)
    try:
        return _run_child(stage, {"arguments": arguments, "containers": described}, out)
    except BaseException:
        # who would have removed them may have been killed
        with contextlib.closing(docker.engine()) as client:
            docker.reap(client, out)
        raise


def _run_kubeflow(stage: str, arguments: dict[str, Any], out: Path, wanted: dict[str, Config]) -> dict[str, Any]:
    from components import kubeflow

    return kubeflow.run(stage, arguments, out, wanted)


RUNNERS: dict[str, Callable[[str, dict[str, Any], Path, dict[str, Config]], dict[str, Any]]] = {
    "subprocess": _run_subprocess,
    "docker": _run_docker,
    "kubeflow": _run_kubeflow,
}


def _run_child(stage: str, task: dict[str, Any], out: Path) -> dict[str, Any]:
    # kfp.local patches print and the root log handlers of its process, so it gets one of its own
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = _Log()
    with (
        # kfp leaves a directory behind for each component, and a component that is killed what it was at
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        subprocess.Popen(
            [sys.executable, "-m", "components.runner", stage, str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            env={**os.environ, **QUIET, "PYTHONPATH": path, "TMPDIR": scratch},
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(task))
                child.stdin.close()
            for line in child.stdout:
                log.add(line.rstrip("\n"))
            code = child.wait()
        except BaseException:
            # a time-out or a stop leaves no component working behind it
            for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            raise
    if code != 0:
        left = _keep_failed(out)
        raise StageError(f"stage {stage}: {log.error()}" + (f"; what it made lies in {left}" if left else ""))
    outputs = stages.finished(out)
    assert outputs is not None
    return outputs


class _Log:
    """Passes on what the components say, without kfp's framing, and knows what went wrong.

    kfp indents a component's lines by four and puts them between "Streamed logs:" and "finished with status".
    """

    _COLOUR = re.compile(r"\x1b\[\d+m")
    # what TensorFlow says of itself before it knows how much it is to say
    _NOISE = re.compile(r"WARNING: All log messages before absl::|I\d{4} \d\d:\d\d:\S+ +\d+ \S+\] ")
    _STARTED = re.compile(r" - INFO - Executing task '([\w-]+)'$")

    def __init__(self) -> None:
        self._component = ""
        self._inside = False
        self._skipping = False
        self._frames = False
        self._failure: list[str] = []
        self._last = ""

    def add(self, line: str) -> None:
        line = self._COLOUR.sub("", line)
        if started := self._STARTED.search(line):
            self._component, self._last = started.group(1), ""
        elif line.endswith(" - INFO - Streamed logs:"):
            self._inside = True
        elif " finished with status " in line and not line.startswith("    "):
            self._inside = False
        elif self._inside:
            self._said(line.removeprefix("    "))
        else:
            self._watch(line)

    def _said(self, text: str) -> None:
        if text.startswith("[KFP Executor "):
            self._skipping = "Got executor_input" in text
        elif self._skipping:
            self._skipping = text != "}"
        elif text.strip() and not self._NOISE.match(text):
            print(text, flush=True)
            self._last = text.strip()
            self._watch(text)

    def _watch(self, text: str) -> None:
        if text.startswith("Traceback (most recent call last)"):
            self._frames = True
        elif self._frames and text and not text.startswith(" "):
            # the first line that is not a frame is the error; a longer message runs on
            self._failure, self._frames = [text], False
        elif self._failure and self._inside:
            self._failure.append(text)

    def error(self) -> str:
        place = f"{self._component}: " if self._component else ""
        if self._failure:
            return place + "\n".join(self._failure)
        said = f"; its last line was: {self._last}" if self._last else ""
        return f"{place}ended without saying why (killed, or out of memory?){said}"


def _keep_failed(out: Path) -> Path | None:
    """Puts the artifacts of a try that failed where the next one does not clear them away; None if there are none."""
    left = None
    if made := list(stages.work(out).glob("kfp/*/*/*")):
        tries = (out.with_name(f"{out.name}.failed-{number}") for number in itertools.count(1))
        left = next(folder for folder in tries if not folder.exists())
        left.mkdir()
        for path in made:
            path.rename(left / path.name)
    shutil.rmtree(stages.work(out), ignore_errors=True)
    return left


def _execute(stage: str, out: Path, arguments: dict[str, Any], containers: dict[str, Any] | None = None) -> None:
    """The child's work: the stage under kfp.local, its artifacts gathered in `out`."""
    from kfp import dsl, local

    pipeline = stages.pipeline(stage, arguments)
    key = stages.key(stages.spec(pipeline), arguments)
    if stages.finished(out, key):
        print(f"{out}: finished before, taken as it is")
        return

    work = stages.work(out)
    shutil.rmtree(work, ignore_errors=True)
    (work / "outputs").mkdir(parents=True)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(work / "kfp"), workspace_root=str(work / "ws"))
    if containers is not None:
        from components import docker

        pipeline = docker.contained(pipeline, containers)
    results = pipeline(**arguments).outputs
    outputs: dict[str, dict[str, Any]] = {"parameters": {}, "artifacts": {}}
    for name, value in results.items():
        if not isinstance(value, dsl.Artifact):
            outputs["parameters"][name] = value
            continue
        if not Path(value.path).exists():
            raise StageError(f"the component declared {name} but wrote nothing to it")
        file = stages.file_name(name, value.schema_title, Path(value.path))
        Path(value.path).rename(work / "outputs" / file)
        outputs["artifacts"][name] = {"uri": str(out / file), "metadata": dict(value.metadata)}
    stages.keep(out, key, outputs)


def main() -> int:
    stage, out = sys.argv[1:]
    try:
        _execute(stage, Path(out), **json.load(sys.stdin))
    except RuntimeError as error:
        if isinstance(error, StageError):
            print(f"Traceback (most recent call last):\n{error}", flush=True)  # the form `_Log` looks for
        # otherwise the component has already printed its own error; kfp adds only that it failed
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
