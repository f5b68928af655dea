from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components import bring, keep, kubeflow
from components import stage as stages
from components.kubeflow import Cluster, Kubeflow
from components.resources import Config
from components.runner import run_stage
from components.stage import StageError
from tests.components.pipelines_server import PipelinesServer

STAGE = "tests.components.tiny:doubling"
GOLDEN = Path(__file__).with_name("rank-on-a-cluster.yaml")
RANK = {"examples_uri": "/var/lib/penstock/e", "model": "mmoe", "config": "{}", "seed": 1, "checkpoint": "/c"}
ENVIRONMENT = {
    "KF_PIPELINES_ENDPOINT": "http://pipelines.example",
    "PENSTOCK_HOME": "/var/lib/penstock",
    "PENSTOCK_KUBEFLOW_SECRETS": "REDIS_ADDRESS=penstock-redis/address",
    "PENSTOCK_FEATURE_STORE": "feature_repo/stores/redis.yaml",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelinesServer]:
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
    monkeypatch.setattr(kubeflow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(kubeflow, "TIMEOUT_SECONDS", (1.0, 0.3))
    with PipelinesServer(tmp_path / "store") as found:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", found.url)
        yield found


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "numbers").write_text("1\n2\n3\n")
    return {"numbers_uri": str(tmp_path / "numbers"), "trace": str(tmp_path / "trace"), "fail": ""}


def client(server: PipelinesServer, patience: float = 20, token: str = "") -> Kubeflow:
    return Kubeflow(Cluster(host=server.url, token=token, environment={}), patience=patience, pause=0.02)


def compiled(wanted: dict[str, Config], arguments: dict[str, Any] = RANK) -> dict[str, Any]:
    return kubeflow.compiled(stages.pipeline("rank", arguments), arguments, wanted, Cluster.of(ENVIRONMENT))


def without_sources(document: dict[str, Any]) -> dict[str, Any]:
    """The text of a component, and what KFP puts around it, are not what this golden file is of."""
    document["pipeline_spec"].pop("sdkVersion")
    for executor in document["pipeline_spec"]["deploymentSpec"]["executors"].values():
        command = executor.get("container", {}).get("command", [])
        if command[:1] == ["sh"]:
            command[2:] = ["…"]
    return document


def test_the_compiled_stage_is_the_one_that_was_read() -> None:
    """Made by `yaml.safe_dump` of the same document, and read through: a change shows as the lines that change."""
    gpu = Config(cpu="8", memory="32Gi", gpus=2, node_selector={"gpu": "h100"}, retries=2, cache=True)
    document = compiled({"train_rank": gpu})
    # each field is one that KFP knows
    json_format.ParseDict(document["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(document["platform_spec"], pipeline_spec_pb2.PlatformSpec())
    assert yaml.safe_dump(without_sources(document), sort_keys=True, allow_unicode=True) == GOLDEN.read_text()


def test_what_is_asked_for_one_component_is_given_to_it_alone() -> None:
    document = compiled({"train_rank": Config(gpus=1, retries=1)})["pipeline_spec"]
    train, predict = (
        document["deploymentSpec"]["executors"][f"exec-{name}"] for name in ("train-rank", "predict-rank")
    )
    assert train["container"]["resources"] == {"accelerator": {"resourceType": "nvidia.com/gpu", "resourceCount": "1"}}
    assert "resources" not in predict["container"]
    assert (train["container"]["image"], predict["container"]["image"]) == (
        "penstock/gpu-step:0.1.0",
        "penstock/step:0.1.0",
    )
    tasks = document["root"]["dag"]["tasks"]
    assert [name for name, task in tasks.items() if "retryPolicy" in task] == ["train-rank"]
    assert not any(task["cachingOptions"] for task in tasks.values() if "cachingOptions" in task)


def test_an_input_that_the_clusters_store_has_is_imported_and_another_is_brought(tmp_path: Path) -> None:
    outputs = {"parameters": {}, "artifacts": {"examples": {"uri": str(tmp_path / "examples"), "stored": "s3://b/e"}}}
    (tmp_path / "_SUCCESS.json").write_text(json.dumps({"key": "k", "outputs": outputs}))
    assert stages.stored(str(tmp_path / "examples")) == "s3://b/e"
    for path, kind in ((tmp_path / "examples", "importer"), (tmp_path / "others", "container")):
        executors = compiled({}, RANK | {"examples_uri": str(path)})["pipeline_spec"]["deploymentSpec"]["executors"]
        assert list(executors["exec-importer"]) == [kind]


def test_a_stage_runs_on_the_cluster_and_leaves_what_every_runner_leaves(
    server: PipelinesServer, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    out = tmp_path / "run" / "doubling"
    outputs = run_stage(STAGE, arguments, out, "kubeflow")

    stored = str(tmp_path / "store" / "run-1" / "double" / "doubled")
    assert outputs["parameters"] == {"rows": 3}
    assert outputs["artifacts"]["doubled"] == {"uri": str(out / "doubled"), "metadata": {"rows": 3.0}, "stored": stored}
    assert (out / "doubled" / "numbers.txt").read_text() == "2\n4\n6"
    assert [path.name for path in out.parent.iterdir()] == ["doubling"]
    # a retry asks the cluster for nothing; the next stage imports what lies in its store
    calls = len(server.calls)
    assert run_stage(STAGE, arguments, out, "kubeflow") == outputs
    assert len(server.calls) == calls
    run_stage(STAGE, arguments | {"numbers_uri": str(out / "doubled")}, tmp_path / "run" / "again", "kubeflow")
    assert server.runs["run-2"].runtime_config.parameters["numbers_uri"] == stored
    # other arguments are another run
    run_stage(STAGE, arguments | {"trace": "elsewhere"}, out, "kubeflow")
    assert len(server.runs) == 3


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        *((call, 500) for call in ("list_experiments", "create_experiment", "list_runs", "create_run", "get_run")),
        *((call, fault) for call in ("create_run", "get_run") for fault in (429, "slow", "lost")),
    ],
)
def test_a_fault_that_passes_is_waited_for_and_nothing_runs_twice(
    server: PipelinesServer, call: str, fault: int | str
) -> None:
    server.keeps = False
    server.faults[call] = deque([fault] * 2)
    cluster = client(server)
    run = cluster.submit("doubling-1", {"pipeline_spec": {}}, {})
    assert cluster.look(run.id).state in ("PENDING", "RUNNING", "SUCCEEDED")
    time.sleep(0.5 if fault == "slow" else 0)  # what was given up may be done yet
    assert len(server.runs) == 1
    assert len(server.faults[call]) < 2


def test_a_submission_whose_process_was_killed_is_found_again(server: PipelinesServer) -> None:
    first = client(server).submit("doubling-1", {"pipeline_spec": {}}, {})
    assert client(server).submit("doubling-1", {"pipeline_spec": {}}, {}).id == first.id
    client(server).cancel(first.id)
    # one that ended badly is no reason not to run
    assert client(server).submit("doubling-1", {"pipeline_spec": {}}, {}).id != first.id


def test_a_token_is_read_again_when_it_expires(server: PipelinesServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    server.token = "first"
    cluster = client(server, token=str(token))
    run = cluster.submit("doubling-1", {"pipeline_spec": {}}, {})
    server.token = "second"
    threading.Timer(0.2, token.write_text, ["second"]).start()
    assert cluster.look(run.id).state
    server.token = "third"
    with pytest.raises(StageError, match=r"refuses the token \(follow\): the token has expired"):
        client(server, patience=0.1, token=str(token)).look(run.id)


def test_a_refusal_is_told_at_once_and_an_absence_in_the_end(server: PipelinesServer) -> None:
    with pytest.raises(StageError, match=r"answers 404 \(follow\): Run 'none' not found"):
        client(server).look("none")
    server.faults["create_run"] = deque([400])
    with pytest.raises(StageError, match=r"answers 400 \(submit\): in trouble"):
        client(server).submit("doubling-1", {"pipeline_spec": {}}, {})
    away = Kubeflow(Cluster(host="http://127.0.0.1:9", environment={}), patience=0.1, pause=0.02)
    with pytest.raises(StageError, match=r"127.0.0.1:9 does not answer \(follow\)"):
        away.look("any")


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (["RUNNING", "FAILED"], "ended as FAILED: double: exit code 1; see "),
        (["RUNNING", "CANCELING", "CANCELED"], "was cancelled; see "),
        (["PAUSED", "SKIPPED"], "ended as SKIPPED; see "),
    ],
)
def test_how_a_run_ended_is_told(
    server: PipelinesServer, tmp_path: Path, arguments: dict[str, Any], states: list[str], says: str
) -> None:
    server.states, server.failure = states, "exit code 1"
    with pytest.raises(StageError, match=f"^stage {STAGE}: the run {says}{server.url}/#/runs/details/run-1$"):
        run_stage(STAGE, arguments, tmp_path / "doubling", "kubeflow")
    assert not (tmp_path / "doubling").exists()


def test_a_home_that_is_not_the_pods_home_is_told(
    server: PipelinesServer, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    server.keeps = False
    begun = kubeflow.submit(STAGE, arguments, tmp_path / "doubling", {})
    assert isinstance(begun, kubeflow.Submitted)
    with pytest.raises(StageError, match="the claim that the pods mount is not the home that is here"):
        kubeflow.result(begun, kubeflow.Run("run-1", "SUCCEEDED"), patience=0)


def test_whatever_ends_the_waiting_cancels_the_run(
    server: PipelinesServer, tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.states = ["RUNNING"]

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, arguments, tmp_path / "doubling", "kubeflow")
    assert [run.state for run in server.runs.values()] == ["CANCELING"]
    client(server).cancel("run-1")
    assert server.calls.count("terminate") == 1  # once is enough


def test_a_file_and_a_directory_are_brought_and_kept(tmp_path: Path) -> None:
    (tmp_path / "home" / "d").mkdir(parents=True)
    (tmp_path / "home" / "d" / "f").write_text("in")
    for path in (tmp_path / "home" / "d", tmp_path / "home" / "d" / "f"):
        bring.bring(path, tmp_path / "store" / path.name)
    kinds = {"d": "system.Dataset", "f": "system.HTML"}
    artifacts = {
        name: {"artifacts": [{"uri": str(tmp_path / "store" / name), "type": {"schemaTitle": kind}}]}
        for name, kind in kinds.items()
    }
    out = tmp_path / "home" / "out"
    given = {"parameterValues": {keep.OUT: str(out), keep.KEY: "k", "rows": 3}, "artifacts": artifacts}
    keep.keep({"inputs": given})
    assert sorted(path.name for path in out.iterdir()) == ["_SUCCESS.json", "d", "f.html"]
    assert (out / "d" / "f").read_text() == (out / "f.html").read_text() == "in"
    assert (stages.finished(out, "k") or {})["parameters"] == {"rows": 3}
    with pytest.raises(StageError, match="is not the home that Airflow has"):
        keep.keep({"inputs": given | {"parameterValues": {keep.OUT: "/nowhere/out", keep.KEY: "k"}}})
    artifacts["d"]["artifacts"][0]["uri"] = str(tmp_path / "nothing")
    with pytest.raises(StageError, match="declared d but wrote nothing"):
        keep.keep({"inputs": given})
    assert out.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"KF_PIPELINES_ENDPOINT": ""}, "needs KF_PIPELINES_ENDPOINT"),
        ({"PENSTOCK_HOME": ""}, "needs PENSTOCK_HOME"),
        ({"PENSTOCK_KUBEFLOW_SECRETS": "REDIS_ADDRESS"}, "'REDIS_ADDRESS' is not NAME=SECRET/KEY"),
    ],
)
def test_a_cluster_that_is_not_set_up_says_what_is_missing(change: dict[str, str], says: str) -> None:
    with pytest.raises(StageError, match=says):
        Cluster.of(ENVIRONMENT | change)
