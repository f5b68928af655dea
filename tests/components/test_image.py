"""The image of steps as `make image-check` has built it: what is in it, and a stage of the project that runs in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from components import docker
from components.docker import Container
from components.runner import run_stage

IMAGE = os.environ.get("PENSTOCK_CHECK_IMAGE", "")
pytestmark = [
    pytest.mark.skipif(not IMAGE, reason="make image-check builds the image and names it"),
    # docker's client leaves the socket of a log to whoever collects it
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """What a shell in the image, as its own user, answers."""

    def ask(command: str) -> str:
        client = docker.engine()
        labels = {docker.OWNER: docker._owner(os.getpid()), docker.STAGE: "/nowhere"}
        capsys.readouterr()
        status = docker.run(client, Container(IMAGE, ["sh", "-c", command], labels, {}, {}, user=""), [])
        said = capsys.readouterr().out.strip()
        assert status == 0, said
        client.close()
        return said

    return ask


def test_nobody_is_root_and_nothing_is_built_in_it(says: Callable[[str], str]) -> None:
    assert says("id -u") == "10001"
    assert says("for tool in pip uv gcc cc make git; do command -v $tool; done; true") == ""
    assert says("touch /opt/penstock/here 2>/dev/null && echo written; true") == ""


def test_it_is_the_locked_environment_compiled(says: Callable[[str], str]) -> None:
    locked = [line for line in Path("requirements.lock").read_text().splitlines() if line.startswith("tensorflow==")]
    asked = "python -c 'import importlib.metadata as m; print(m.version(\"tensorflow\"))'"
    assert f"tensorflow=={says(asked)}" in locked[0]
    sources = "find /opt/penstock/penstock /opt/penstock/components -name '*.py' -size +0 | wc -l"
    compiled = "find /opt/penstock/penstock /opt/penstock/components -name '*.pyc' -size +0 | wc -l"
    assert int(says(compiled)) >= int(says(sources)) > 50
    client = docker.engine()
    image = client.images.get(IMAGE)
    client.close()
    assert image.labels["org.opencontainers.image.title"] == "Penstock"
    assert image.attrs["Config"]["Healthcheck"] == {"Test": ["NONE"]}


def test_a_stage_of_the_project_runs_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
    monkeypatch.setenv("PENSTOCK_STEP_IMAGE", IMAGE)
    out = tmp_path / "runs" / "ingest"
    options = json.dumps({"users": 50, "items": 100, "days": 6})
    arguments = {"source": "simulator", "options": options, "feedback": "", "mended": "[]"}
    outputs = run_stage("ingest", arguments, out, "docker")
    assert list((Path(outputs["artifacts"]["log"]["uri"]) / "events").glob("dt=*/*.parquet"))
