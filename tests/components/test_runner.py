from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.runner import ROOT, StageError, _Log, run_stage

STAGE = "tests.components.tiny:doubling"


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "numbers").write_text("1\n2\n3\n")
    return {"numbers_uri": str(tmp_path / "numbers"), "trace": str(tmp_path / "trace")}


def runs(arguments: dict[str, Any]) -> list[str]:
    trace = Path(arguments["trace"])
    return trace.read_text().split() if trace.exists() else []


def test_outputs_are_parameters_and_artifacts_under_the_stages_directory(
    tmp_path: Path, arguments: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run" / "doubling"

    outputs = run_stage(STAGE, arguments, out, "subprocess")

    assert outputs["parameters"] == {"rows": 3}
    assert outputs["artifacts"]["doubled"] == {"uri": str(out / "doubled"), "metadata": {"rows": 3}}
    assert (out / "doubled" / "numbers.txt").read_text() == "2\n4\n6"
    assert json.loads((out / "_SUCCESS.json").read_text())["outputs"] == outputs
    assert [path.name for path in out.parent.iterdir()] == ["doubling"]
    # what the component said, and nothing of kfp's framing
    assert capfd.readouterr().out.split("\n") == ["labels 3", ""]


def test_a_retry_takes_what_finished_and_other_arguments_do_not(tmp_path: Path, arguments: dict[str, Any]) -> None:
    out = tmp_path / "doubling"
    first = run_stage(STAGE, arguments, out)

    assert run_stage(STAGE, arguments, out) == first
    assert len(runs(arguments)) == 1

    (tmp_path / "others").write_text("5\n")
    again = run_stage(STAGE, arguments | {"numbers_uri": str(tmp_path / "others")}, out)
    assert again["parameters"] == {"rows": 1}
    assert (out / "doubled" / "numbers.txt").read_text() == "10"
    assert len(runs(arguments)) == 2


def test_a_components_own_error_is_the_stages_error(tmp_path: Path, arguments: dict[str, Any]) -> None:
    out = tmp_path / "doubling"
    with pytest.raises(StageError) as caught:
        run_stage(STAGE, arguments | {"fail": "raise"}, out)

    column = f"{arguments['numbers_uri']}: column x is missing;\nsee the list of columns"
    assert str(caught.value) == f"stage {STAGE}: double: ValueError: {column}"
    assert not out.exists()
    # what failed is in no one's way
    assert run_stage(STAGE, arguments, out)["parameters"] == {"rows": 3}


def test_what_a_failed_try_had_made_is_kept_and_told(tmp_path: Path, arguments: dict[str, Any]) -> None:
    out = tmp_path / "run" / "doubling"
    for number in (1, 2):
        left = out.with_name(f"doubling.failed-{number}")
        with pytest.raises(StageError, match=f"ValueError: only half is done; what it made lies in {left}$"):
            run_stage(STAGE, arguments | {"fail": "late"}, out)
        assert [path.name for path in (left / "doubled").iterdir()] == ["half"]
        assert not out.with_name(".doubling.part").exists()
    assert run_stage(STAGE, arguments, out)["parameters"] == {"rows": 3}
    assert sorted(path.name for path in out.parent.iterdir()) == ["doubling", "doubling.failed-1", "doubling.failed-2"]


def test_a_stage_runs_again_when_its_input_was_made_again(tmp_path: Path, arguments: dict[str, Any]) -> None:
    before = tmp_path / "before"
    before.mkdir()
    arguments |= {"numbers_uri": str(before / "numbers")}
    for key, numbers, rows, count in (("a", "1\n", 1, 1), ("a", "1\n", 1, 1), ("b", "1\n2\n", 2, 2)):
        (before / "numbers").write_text(numbers)
        (before / "_SUCCESS.json").write_text(json.dumps({"key": key, "outputs": {}}))
        assert run_stage(STAGE, arguments, tmp_path / "doubling")["parameters"] == {"rows": rows}
        assert len(runs(arguments)) == count


def test_a_killed_component_fails_and_its_last_line_is_told(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(StageError, match=r"double: ended without saying why .*its last line was: Killed"):
        run_stage(STAGE, arguments | {"fail": "kill"}, tmp_path / "doubling")
    # neither the component's nor kfp's
    assert list(scratch.iterdir()) == []


def test_a_declared_output_that_was_not_written_fails(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(StageError, match="declared doubled but wrote nothing"):
        run_stage(STAGE, arguments | {"fail": "silent"}, tmp_path / "doubling")
    assert not (tmp_path / "doubling").exists()


def test_an_interrupted_stage_leaves_no_component_behind(tmp_path: Path, arguments: dict[str, Any]) -> None:
    script = (
        "import json, sys; from pathlib import Path; from components.runner import run_stage;"
        f"run_stage({STAGE!r}, json.loads(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, json.dumps(arguments | {"fail": "sleep"}), str(tmp_path / "doubling")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as task:
        while not runs(arguments):
            assert task.poll() is None
            time.sleep(0.1)
        task.send_signal(signal.SIGINT)
        task.wait(20)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(runs(arguments)[0])).wait(5)
    assert not psutil.pid_exists(int(runs(arguments)[0]))


@pytest.mark.parametrize(
    ("stage", "runner", "message"),
    [
        (STAGE, "kubeflow", "PENSTOCK_RUNNER=kubeflow needs KF_PIPELINES_ENDPOINT"),
        (STAGE, "slurm", "PENSTOCK_RUNNER=slurm is not known; choose one of docker, kubeflow, subprocess"),
        ("tests.components.tiny:halving", None, "no stage 'halving' in tests.components.tiny; there are doubling"),
    ],
)
def test_what_cannot_run_says_so(
    tmp_path: Path, arguments: dict[str, Any], stage: str, runner: str | None, message: str
) -> None:
    with pytest.raises(StageError, match=message):
        run_stage(stage, arguments, tmp_path / "out", runner)


def test_an_unknown_argument_names_the_known_ones(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(StageError, match=r"no parameter speed; it takes .*numbers_uri"):
        run_stage(STAGE, arguments | {"speed": 1}, tmp_path / "out")


def test_what_tensorflow_says_of_itself_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    log = _Log()
    for line in (
        "10:00:00 - INFO - Streamed logs:",
        "    WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        "    I0000 00:00:1795388085.335768   19143 port.cc:153] oneDNN custom operations are on.",
        "    E0000 00:00:1795388085.335768   19143 some.cc:1] this matters",
        "    I trained",
    ):
        log.add(line)
    said = capsys.readouterr().out
    assert "this matters" in said
    assert "I trained" in said
    assert "oneDNN" not in said
    assert "absl" not in said
