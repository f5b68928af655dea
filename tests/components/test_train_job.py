"""A component on a node of a TrainJob: its own function, and who the workers are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components import train_job
from components.stage import StageError
from tests.small_log import START, an_event, write_log


def test_a_component_gets_its_arguments_and_its_artifacts_as_paths(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [an_event(0, 1, 2, START)])
    out = tmp_path / "out" / "log"
    options = json.dumps({"path": str(tmp_path / "log")})
    arguments = {"source": "canonical", "options": options, "feedback": "", "mended": "[]", "log": str(out)}
    train_job.run("ingest", arguments)
    assert list((out / "events").rglob("*.parquet"))
    with pytest.raises(StageError, match=r"ingest takes .*; not so: feedback, model"):
        train_job.run(
            "ingest", {**{name: arguments[name] for name in arguments if name != "feedback"}, "model": "mmoe"}
        )


def test_the_workers_agree_on_who_they_are() -> None:
    """The hosts are those that JobSet gives to the pods: job, index, and its own name as their domain."""
    told = [
        train_job.worker(
            {
                "JOBSET_NAME": "train-rank-x7",
                "HOSTNAME": f"train-rank-x7-node-0-{index}",
                "JOB_COMPLETION_INDEX": str(index),
            },
            3,
        )
        for index in range(3)
    ]
    hosts = [f"train-rank-x7-node-0-{index}.train-rank-x7:2222" for index in range(3)]
    assert [one["cluster"] for one in told] == [{"worker": hosts}] * 3
    assert [one["task"] for one in told] == [{"type": "worker", "index": index} for index in range(3)]
