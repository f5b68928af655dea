"""The components from predictions to the page, as plain functions and as compiled pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kfp import compiler, dsl
from mlflow import MlflowClient

from components.gate import gate
from components.report import report
from components.search_weights import search_weights
from tests.penstock.candidates import Artifacts, write_candidate, write_release


@pytest.fixture
def candidate(tmp_path: Path) -> Artifacts:
    return write_candidate(tmp_path / "candidate")


def artifact(kind: type[dsl.Artifact], path: Path) -> dsl.Artifact:
    return kind(uri=str(path))


def test_search_weights_writes_the_weights_and_says_them(candidate: Artifacts, tmp_path: Path) -> None:
    weights = artifact(dsl.Artifact, tmp_path / "out" / "weights")
    search_weights.python_func(rank=artifact(dsl.Model, candidate.rank), search="{}", champion="", weights=weights)
    found = json.loads((tmp_path / "out" / "weights" / "weights.json").read_text())
    assert found == json.loads((candidate.weights / "weights.json").read_text())
    assert weights.metadata == {**found["weights"], "objective": found["validation"]}


def test_search_weights_is_told_what_to_search_and_whose_weights_are_live(candidate: Artifacts, tmp_path: Path) -> None:
    live = {"fusion": "weighted_product", "weights": {"click": 1.0, "long_view": 0.5, "like": 0.0}}
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "weights.json").write_text(json.dumps(live))
    weights = artifact(dsl.Artifact, tmp_path / "out" / "weights")
    search = {"fusion": "weighted_logits", "grid": "simplex", "steps": 4, "constraints": {"auc_like": 0.002}}
    rank = artifact(dsl.Model, candidate.rank)
    search_weights.python_func(rank=rank, search=json.dumps(search), champion=str(tmp_path / "7"), weights=weights)
    found = json.loads((tmp_path / "out" / "weights" / "weights.json").read_text())
    assert {name: found["search"][name] for name in search} == search
    assert {name: found["reference"][name] for name in live} == live
    assert found["measures"]["auc_like"] >= found["reference"]["measures"]["auc_like"] - 0.002
    with pytest.raises(ValueError, match=r"unknown parameter step of penstock\.fusion: there are fusion, grid, steps"):
        search_weights.python_func(rank=rank, search='{"step": 3}', champion="", weights=weights)


def test_gate_and_report_follow_each_other(candidate: Artifacts, tmp_path: Path) -> None:
    champion = write_release(tmp_path / "releases" / "7", 7)
    inputs = {
        "examples": artifact(dsl.Dataset, candidate.examples),
        "recall": artifact(dsl.Model, candidate.recall),
        "rank": artifact(dsl.Model, candidate.rank),
        "weights": artifact(dsl.Artifact, candidate.weights),
    }
    verdict = artifact(dsl.Artifact, tmp_path / "out" / "verdict")
    rehearsal = artifact(dsl.Artifact, candidate.rehearsal)
    approved, sentence = gate.python_func(
        **inputs, rehearsal=rehearsal, champion=str(champion), policy='{"replicates": 100}', verdict=verdict
    )
    assert approved is True
    assert sentence.startswith("Approved: ")
    assert verdict.metadata == {"approved": True, "sentence": sentence}

    page = artifact(dsl.HTML, tmp_path / "page" / "report")
    tracking = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    run_id = report.python_func(
        **inputs, verdict=verdict, tracking_uri=tracking, run_name="trial", validation="docs", report=page
    )
    html = (tmp_path / "page" / "report").read_text()
    assert sentence.split("'")[0] in html
    run = MlflowClient(tracking).get_run(run_id)
    assert run.data.params["rank.model"] == "mmoe"
    assert run.data.tags["validation"] == "docs"
    assert run.data.metrics["approved"] == 1
    names = {found.path for found in MlflowClient(tracking).list_artifacts(run_id)}
    assert names == {"report.html", "figures", "verdict.json", "weights.json"}


def test_a_rejection_is_an_answer_and_not_a_failure(candidate: Artifacts, tmp_path: Path) -> None:
    (candidate.weights / "weights.json").unlink()
    approved, sentence = gate.python_func(
        examples=artifact(dsl.Dataset, candidate.examples),
        recall=artifact(dsl.Model, candidate.recall),
        rank=artifact(dsl.Model, candidate.rank),
        weights=artifact(dsl.Artifact, candidate.weights),
        rehearsal=artifact(dsl.Artifact, candidate.rehearsal),
        champion="",
        policy="{}",
        verdict=artifact(dsl.Artifact, tmp_path / "verdict"),
    )
    assert approved is False
    assert "weights.json" in sentence
    assert json.loads((tmp_path / "verdict" / "verdict.json").read_text())["approved"] is False


@pytest.mark.parametrize(
    ("component", "outputs"),
    [
        (search_weights, {"weights"}),
        (gate, {"verdict", "approved", "sentence"}),
        (report, {"report", "Output"}),
    ],
)
def test_components_compile_with_the_outputs_that_stages_name(component, outputs: set[str], tmp_path: Path) -> None:
    compiler.Compiler().compile(component, str(tmp_path / "component.yaml"))
    assert set(component.component_spec.outputs) == outputs
    assert component.component_spec.implementation.container.image == "penstock/python-step:latest"
