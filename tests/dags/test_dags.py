from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]

# Airflow's own providers import from where Airflow no longer wants it
pytestmark = pytest.mark.filterwarnings("ignore:The .airflow:FutureWarning")

PARSE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
print(json.dumps({
    "errors": {str(path): error for path, error in bag.import_errors.items()},
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "files": sorted({dag.fileloc.rsplit("/", 1)[1] for dag in bag.dags.values()}),
    "dags": {name: {
        "schedule": type(dag.timetable).__name__,
        "max_active_runs": dag.max_active_runs,
        "triggers": [asset.name for asset in getattr(getattr(dag.timetable, "asset_condition", None), "objects", [])],
        "params": {name: dag.params.get_param(name).schema for name in dag.params},
        "doc": bool(dag.doc_md),
        "tasks": {task.task_id: {
            "upstream": sorted(task.upstream_task_ids),
            "rule": task.trigger_rule.value,
            "retries": task.retries,
            "limited": bool(task.execution_timeout or getattr(task, "response_timeout", None)),
            "doc": bool(task.doc_md),
            "defaults": getattr(task, "defaults", None),
            "inlets": [asset.name for asset in task.inlets],
            "outlets": [asset.name for asset in task.outlets],
            "links": [link.name for link in task.operator_extra_links],
        } for task in dag.tasks},
    } for name, dag in bag.dags.items()},
}))
"""


@pytest.fixture(scope="session")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The DAG folder as Airflow parses it, in a process of its own."""
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(ROOT / "dags")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_dag_parses(parsed: dict[str, Any]) -> None:
    assert parsed["errors"] == {}
    assert sorted(parsed["dags"]) == ["look_alike", "prepare", "release", "rollback", "train"]
    assert parsed["files"] == ["look_alike.py", "prepare.py", "release.py", "rollback.py", "train.py"]


def test_parsing_imports_nothing_heavy(parsed: dict[str, Any]) -> None:
    heavy = {"tensorflow", "keras", "kfp", "feast", "mlflow", "great_expectations", "polars", "components", "serving"}
    assert heavy.isdisjoint(parsed["modules"])


def test_every_dag_and_task_says_what_it_is_and_ends(parsed: dict[str, Any]) -> None:
    for name, dag in parsed["dags"].items():
        assert dag["doc"], name
        assert dag["max_active_runs"] == 1, name
        for task_id, task in dag["tasks"].items():
            assert task["doc"], f"{name}.{task_id}"
            assert task["limited"], f"{name}.{task_id}"
            assert task["retries"] <= 1, f"{name}.{task_id}"


def test_the_data_docs_are_a_button_of_validate(parsed: dict[str, Any]) -> None:
    links = {name: task["links"] for name, task in parsed["dags"]["prepare"]["tasks"].items()}
    assert links == {"ingest": [], "validate": ["Data Docs"], "features": [], "examples": []}


def test_assets_and_hands_trigger(parsed: dict[str, Any]) -> None:
    schedules = {name: dag["schedule"] for name, dag in parsed["dags"].items()}
    assert schedules == {
        "look_alike": "NullTimetable",
        "prepare": "NullTimetable",
        "train": "AssetTriggeredTimetable",
        "release": "AssetTriggeredTimetable",
        "rollback": "NullTimetable",
    }


def test_train_goes_through_gate_and_report_before_it_publishes(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["train"]["tasks"]
    assert tasks["recall"]["upstream"] == ["plan", "recall_models"]
    assert tasks["rank"]["upstream"] == ["plan", "rank_models"]
    assert tasks["choose"]["upstream"] == ["plan", "rank", "recall"]
    assert tasks["weights"]["upstream"] == tasks["rehearse"]["upstream"] == ["choose"]
    assert tasks["gate"]["upstream"] == ["rehearse", "weights"]
    assert tasks["report"]["upstream"] == ["gate"]
    assert tasks["publish"]["upstream"] == tasks["set_aside"]["upstream"] == ["report"]
    assert (tasks["publish"]["outlets"], tasks["set_aside"]["outlets"]) == (["candidate"], ["turned_down"])


@pytest.mark.usefixtures("airflow_home")
def test_a_policy_by_which_nothing_can_be_judged_fails_before_any_work() -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags.train import check_policy

    check_policy({})
    check_policy({"primary": "gauc_click", "margin": 0.001, "guardrails": {"ndcg@10_like": 0.01}})
    for policy, says in (
        ({"margins": 1}, "gate_policy: unknown parameter margins"),
        ({"margin": None}, "parameter margin of penstock.policy is a float, not None"),
        ({"margin": -1, "slices": ["all"]}, "margin is -1.0, below 0; slices has 'all'"),
    ):
        with pytest.raises(AirflowFailException, match=says):
            check_policy(policy)


def test_silence_is_a_rejection(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["release"]["tasks"]
    assert tasks["approve"]["defaults"] == tasks["approve_promotion"]["defaults"] == ["Reject"]


def outcome(tasks: dict[str, Any], states: dict[str, str]) -> dict[str, str]:
    """What Airflow's rules make of a run in which some tasks end so; a rejection skips what hangs on it directly."""
    states = dict(states)
    while pending := [
        name for name, task in tasks.items() if name not in states and all(up in states for up in task["upstream"])
    ]:
        for name in pending:
            ups = [states[up] for up in tasks[name]["upstream"]]
            failed = {"failed", "upstream_failed"} & set(ups)
            if tasks[name]["rule"] == "all_done":
                states[name] = "success"
            elif failed:
                states[name] = "upstream_failed"
            elif tasks[name]["rule"] == "none_failed_min_one_success":
                states[name] = "success" if "success" in ups else "skipped"
            else:
                states[name] = "success" if all(up == "success" for up in ups) else "skipped"
    return states


def test_nothing_reaches_promote_past_a_rejection(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["release"]["tasks"]

    # withdraw finds no canary, and skips itself
    rejected = outcome(tasks, {"candidate": "success", "approve": "success", "build": "skipped", "withdraw": "skipped"})
    assert {name for name, state in rejected.items() if state == "success"} == {"candidate", "approve"}

    first = outcome(tasks, {"canary": "skipped", "road": "success"})
    assert (first["replay"], first["promote"]) == ("success", "success")
    assert {first[name] for name in ("evidence", "guard", "approve_promotion")} == {"skipped"}

    withdrawn = outcome(tasks, {"promote": "skipped"})
    assert (withdrawn["withdraw"], withdrawn["aliases"]) == ("success", "success")


def test_a_release_that_fails_its_replay_is_not_promoted_and_its_canary_ends(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["release"]["tasks"]
    for first in (True, False):
        failed = outcome(tasks, {"replay": "failed", "canary": "skipped" if first else "success"})
        assert (failed["promote"], failed["approve_promotion"]) == ("upstream_failed", "upstream_failed")
        assert failed["withdraw"] == "success"
        assert failed["aliases"] == "upstream_failed"  # the run's last task: the run is a failure


def test_a_withdrawn_canary_asks_nobody_and_broken_evidence_fails_the_run(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["release"]["tasks"]
    # a guardrail: replay skips itself
    harmful = outcome(tasks, {"evidence": "success", "replay": "skipped"})
    assert (harmful["approve_promotion"], harmful["promote"]) == ("skipped", "skipped")
    assert (harmful["withdraw"], harmful["aliases"], harmful["guard"]) == ("success", "success", "success")

    broken = outcome(tasks, {"evidence": "failed"})
    assert {broken[name] for name in ("replay", "approve_promotion", "promote", "guard")} == {"upstream_failed"}
    assert (broken["withdraw"], broken["aliases"]) == ("success", "upstream_failed")


def test_a_canary_is_watched_while_a_person_is_asked(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["release"]["tasks"]
    assert tasks["guard"]["upstream"] == ["canary", "evidence"]
    # it ends when the canary does, so nothing that ends a canary may wait for it
    assert not [name for name, task in tasks.items() if "guard" in task["upstream"]]


def test_a_promotion_is_asked_for_with_the_evidence_and_the_replay(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"]["release"]["tasks"]
    assert tasks["replay"]["upstream"] == ["evidence", "road"]
    assert tasks["approve_promotion"]["upstream"] == ["evidence", "replay"]
    assert tasks["promote"]["upstream"] == ["approve_promotion", "replay"]


@pytest.fixture
def airflow_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))


@pytest.mark.usefixtures("airflow_home")
def test_an_unknown_model_or_setting_fails_before_any_work() -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags.train import check_models

    with pytest.raises(AirflowFailException, match=r"unknown recall 'transformer': there are .*youtube_dnn"):
        check_models("recall", ["youtube_dnn", "transformer"], {})
    check_models("recall", ["youtube_dnn"], {})


@pytest.mark.usefixtures("airflow_home")
def test_a_search_of_the_weights_that_cannot_be_fails_before_any_work() -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags.train import check_search

    check_search({})
    check_search({"fusion": "weighted_logits", "objective": {"auc_like": 2, "mean_gauc": 1}, "method": "bayesian"})
    with pytest.raises(AirflowFailException, match=r"weights_search: unknown parameter goal of .*: there are fusion"):
        check_search({"goal": "auc_like"})
    with pytest.raises(AirflowFailException, match="'auc_share' is not known"):
        check_search({"objective": "auc_share"})


@pytest.mark.usefixtures("airflow_home")
def test_the_best_model_is_chosen_by_the_validation_slice(tmp_path: Path) -> None:
    from dags.train import best

    candidates = []
    for name, validation, test in (("a", 0.1, 0.9), ("b", 0.3, 0.1), ("c", 0.3, 0.2)):
        (tmp_path / name).mkdir()
        metrics = {"validation": {"recall@50": validation}, "test": {"recall@50": test}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
        candidates.append({"artifacts": {"recall": {"uri": str(tmp_path / name)}}})

    assert best(candidates, "recall", ["recall@50"]) is candidates[1]


@pytest.mark.usefixtures("airflow_home")
def test_the_tables_a_person_decides_by() -> None:
    from dags.release import primary_line, verdict_table

    policy = {"confidence": 0.95}
    head = {"auc": 0.7, "low": 0.69, "high": 0.71, "champion": 0.68, "popularity": 0.6}
    first = verdict_table({"champion": None, "heads": {"click": head}, "policy": policy})
    later = verdict_table({"champion": 3, "heads": {"click": head}, "policy": policy})
    assert first.splitlines()[0] == "| head | AUC | 95 % interval | popularity | difference |"
    assert first.splitlines()[2] == "| click | 0.7000 | 0.6900 to 0.7100 | 0.6000 | +0.1000 |"
    assert later.splitlines()[2] == "| click | 0.7000 | 0.6900 to 0.7100 | 0.6800 | +0.0200 |"

    difference = {"value": 0.02, "low": 0.011, "high": 0.029}
    primary = {"measure": "mean_auc", "candidate": 0.7, "opponent": "champion", "opponent_value": 0.68}
    primary |= {"difference": difference, "p_value": 0.00123}
    assert primary_line({"champion": 3, "primary": primary, "policy": policy}) == (
        "**mean AUC** of the fused score: **0.7000**, release 3 0.6800: +0.0200 "
        "(95% interval +0.0110 to +0.0290, p = 0.0012)"
    )
    by_draws = primary | {"measure": "gauc_click", "opponent": "single head", "p_value": None}
    assert primary_line({"champion": None, "primary": by_draws, "policy": policy}) == (
        "**GAUC of click** of the fused score: **0.7000**, single head 0.6800: +0.0200 "
        "(95% interval +0.0110 to +0.0290)"
    )
    assert primary_line({"primary": {}}) == verdict_table({"heads": {}}) == ""


@pytest.mark.usefixtures("airflow_home")
def test_who_is_asked_to_force_a_release_is_told_so_loudly() -> None:
    from dags.release import question

    checks = [
        {"name": "better than the champion", "passed": False, "reason": "It is worse by 0.0100."},
        {"name": "answers in time", "passed": True, "reason": "14 ms."},
        {"name": "no harm to new users", "passed": False, "reason": "It harms them."},
    ]
    verdict = {"champion": 3, "primary": {}, "heads": {}, "checks": checks, "sentence": "Rejected: it is worse."}

    asked = question(verdict, ["Report: `report.html`"], "the champion shows\nwhat is withdrawn", "ana")
    assert asked.warning.startswith("FORCED, the gate REJECTED it")
    said = asked.body.split("\n\n")
    assert said[0] == "## The gate REJECTED this candidate"
    assert said[1] == "Rejected: it is worse."
    assert said[2] == "It failed 2 of 3 checks:"
    assert (
        said[3] == "- **better than the champion**: It is worse by 0.0100.\n- **no harm to new users**: It harms them."
    )
    assert "ana asks to force it" in said[4]
    assert said[5] == "> the champion shows what is withdrawn"
    assert said[-1] == "Report: `report.html`"

    assert question(verdict, ["Report: `report.html`"], "", "ana") == ("", "Report: `report.html`")


def test_a_forced_release_is_started_by_hand_and_asked_for_as_any_other(parsed: dict[str, Any]) -> None:
    dag = parsed["dags"]["release"]
    assert dag["triggers"] == ["candidate"]  # one turned down starts nothing
    assert dag["tasks"]["candidate"]["inlets"] == ["candidate", "turned_down"]
    reason = Draft202012Validator(dag["params"]["force_reason"])
    for text, accepted in (
        ("", True),
        ("an audit asks for it", True),
        ("two\nlines", True),
        ("  ", False),
        ("\n", False),
    ):
        assert reason.is_valid(text) == accepted, text


@pytest.mark.usefixtures("airflow_home")
def test_settings_by_which_no_canary_can_be_judged_fail_before_any_work() -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags.release import check_ab

    check_ab({})
    check_ab({"guardrails": {"watch_time": 0.1}, "confidence": 0.99})
    for policy, says in (
        ({"guardrail": {}}, "ab_policy: unknown parameter guardrail"),
        ({"guardrails": {"likes": 0.1}, "effect": 2.0}, "effect is 2.0, .*; guardrails has 'likes'"),
    ):
        with pytest.raises(AirflowFailException, match=says):
            check_ab(policy)
