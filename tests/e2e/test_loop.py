"""The whole loop on a small simulated log: real Airflow, a real approval over REST, real serving."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from components import tracking
from local import reconcile, supervisor
from local.airflow import ENDED, Airflow
from local.demo import Demo, source_of
from local.place import Place
from penstock import release, routing
from penstock.feedback import read_feedback
from serving.model_client import ModelClient
from tests.local.ports import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]  # the whole loop is one fixture

# enough likes in the test slice for the gate to judge them
SMALL = {"users": 1500, "items": 800, "items_per_day": 30, "days": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("home"), free_ports())
    child = supervisor.start(place, print)
    try:
        yield place
    finally:
        supervisor.down(place)
        child.wait()


@pytest.fixture(scope="module")
def airflow(place: Place) -> Iterator[Airflow]:
    with Airflow.log_in(place, "admin") as session:
        yield session


@pytest.fixture(scope="module")
def told(place: Place) -> str:
    """The first round of the demo, which promotes the first release; what it said on the screen."""
    screen = io.StringIO()
    demo = Demo(place, source_of("", place, SMALL), Console(file=screen, width=120))
    code = demo.run(fresh=True)
    print(screen.getvalue())
    assert code == 0
    return screen.getvalue()


@pytest.fixture(scope="module")
def demo(place: Place, told: str) -> Demo:
    return Demo(place, source_of("", place, SMALL), Console(file=io.StringIO()))


def live(place: Place) -> routing.Routing:
    return routing.read(place.home / "routing.json")


def recommend(place: Place, **body: object) -> httpx.Response:
    return httpx.post(f"{place.url('gateway')}/recommend", json=body, timeout=30)


def wait(airflow: Airflow, dag: str, run_id: str) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        state = airflow.run(dag, run_id)["state"]
        if state in ENDED:
            return str(state)
        time.sleep(1)
    raise AssertionError(f"{dag} {run_id} did not end")


def failure(airflow: Airflow, dag: str, run_id: str) -> str:
    """The error of the one task that failed."""
    assert wait(airflow, dag, run_id) == "failed"
    failed = [task for task in airflow.tasks(dag, run_id) if task["state"] == "failed"]
    assert len(failed) == 1
    return airflow.error(dag, run_id, failed[0])


def test_the_loop_ends_with_a_release_that_a_named_user_approved(place: Place, told: str) -> None:
    document = live(place)
    assert document.champion == 1
    assert document.by == "admin"
    manifest = json.loads((place.home / "releases" / "1" / "manifest.json").read_text())
    assert manifest["approved_by"] == "admin"
    assert manifest["parent"] is None
    assert "answered over the REST API as user admin: Approve" in told


def test_the_screen_shows_verdict_recommendations_report_and_addresses(place: Place, told: str) -> None:
    manifest = json.loads((place.home / "releases" / "1" / "manifest.json").read_text())
    assert manifest["verdict"] in told
    for text in ("popularity", "recommended", *place.addresses()):
        assert text in told
    report = next(line.split()[1] for line in told.splitlines() if line.startswith("report "))
    assert Path(report).suffix == ".html"
    assert "<html" in Path(report).read_text()


def test_the_gateway_answers_from_the_release(place: Place, told: str) -> None:
    slate = recommend(place, user_id=1, k=10, preview=True).json()
    assert (slate["release"], slate["variant"]) == (1, "champion")
    assert len({item["item_id"] for item in slate["items"]}) == 10
    stranger = recommend(place, user_id=10**9, preview=True).json()
    assert stranger["cold_start"]
    assert stranger["items"]


def test_what_the_audience_did_is_kept_for_the_next_log(place: Place, told: str) -> None:
    rows = read_feedback(place.home / "feedback")
    assert rows.height > 1000
    assert set(rows["release"]) == {1}
    assert 0 < rows["click"].sum() < rows.height
    # the day after the log, which the next round simulates
    assert source_of("", place, SMALL).options["days"] == SMALL["days"] + 1


def test_mlflow_knows_run_and_champion(place: Place, told: str) -> None:
    manifest = json.loads((place.home / "releases" / "1" / "manifest.json").read_text())
    api = f"{place.url('mlflow')}/api/2.0/mlflow"
    run = httpx.get(f"{api}/runs/get", params={"run_id": manifest["run_id"]}, timeout=30).json()["run"]
    assert run["info"]["status"] == "FINISHED"
    assert run["data"]["metrics"]
    query = {"name": "penstock", "alias": "champion"}
    version = httpx.get(f"{api}/registered-models/alias", params=query, timeout=30).json()["model_version"]
    assert {tag["key"]: tag["value"] for tag in version["tags"]}["release"] == "1"


def test_what_is_changed_behind_the_document_is_found_and_mended(
    place: Place, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reconcile.run(place, {}, mend=False) == 0
    assert "all is as the routing document says" in capsys.readouterr().out
    tracking.set_aliases(place.url("mlflow"), champion=None, challenger=None)
    base_paths = {model: release.base_path(place.home, model) for model in release.MODELS}
    with ModelClient(f"127.0.0.1:{place.ports['model server (gRPC)']}") as client:
        client.load(base_paths, (1,), labels={})
    assert reconcile.run(place, {}, mend=False) == 1
    found = capsys.readouterr().out
    assert "MLflow, alias champion: none; should be: release 1" in found
    assert "model server, label stable of rank: none; should be: 1" in found
    assert reconcile.run(place, {}, mend=True) == 0
    assert "mended: all is as the routing document says" in capsys.readouterr().out


def test_the_data_docs_are_linked_from_airflow_and_kept_in_mlflow(airflow: Airflow, place: Place, told: str) -> None:
    run = next(run["dag_run_id"] for run in airflow.runs("prepare"))
    link = airflow.links("prepare", run, "validate")["Data Docs"]
    assert link
    assert link in told
    mlflow_run = airflow.xcom("prepare", run, "validate")["parameters"]["run_id"]
    assert link.startswith(place.url("mlflow"))
    assert f"/runs/{mlflow_run}/artifacts/data_docs.html" in link
    query = {"path": "data_docs.html", "run_uuid": mlflow_run}
    page = httpx.get(f"{place.url('mlflow')}/get-artifact", params=query, timeout=30).text
    assert "The log keeps the rules." in page
    # and the candidate says which log it was trained on
    manifest = json.loads((place.home / "releases" / "1" / "manifest.json").read_text())
    query = {"run_id": manifest["run_id"]}
    candidate = httpx.get(f"{place.url('mlflow')}/api/2.0/mlflow/runs/get", params=query, timeout=30).json()["run"]
    assert {"key": "validation", "value": mlflow_run} in candidate["data"]["tags"]


def test_the_release_was_replayed_before_it_was_promoted(airflow: Airflow, place: Place, told: str) -> None:
    (run,) = airflow.runs("release", state=["success"])
    sentence = airflow.xcom("release", run["dag_run_id"], "replay")["sentence"]
    assert sentence.startswith("Online equals offline: ")
    assert "vectors of 200 probed users are equal bit for bit (100 %; goal 99.99 %)" in sentence
    assert sentence in told
    manifest = json.loads((place.home / "releases" / "1" / "manifest.json").read_text())
    api = f"{place.url('mlflow')}/api/2.0/mlflow"
    query = {"run_id": manifest["run_id"]}
    metrics = httpx.get(f"{api}/runs/get", params=query, timeout=30).json()["run"]["data"]["metrics"]
    assert {metric["key"]: metric["value"] for metric in metrics}["replay/equal_share"] == 1
    files = httpx.get(f"{api}/artifacts/list", params=query, timeout=30).json()["files"]
    assert {"replay.html", "replay.json"} <= {file["path"] for file in files}


def test_an_unknown_model_fails_the_first_task_with_the_known_names(airflow: Airflow, told: str) -> None:
    airflow.trigger("train", "unknown-model", {"rank_models": ["oracle"]})
    error = failure(airflow, "train", "unknown-model")
    assert "unknown rank 'oracle': there are" in error
    assert "mmoe" in error


def test_there_is_nothing_to_roll_back_to(airflow: Airflow, place: Place, told: str) -> None:
    airflow.trigger("rollback", "too-early")
    assert "there is no former release to roll back to: release 1 is the first" in failure(
        airflow, "rollback", "too-early"
    )
    assert live(place).champion == 1


def test_a_candidate_held_against_another_champion_is_not_released(airflow: Airflow, told: str) -> None:
    airflow.trigger("release", "stale")
    assert "was held against release None, but 1 is live now" in failure(airflow, "release", "stale")


def test_nothing_is_forced_that_was_not_turned_down(airflow: Airflow, told: str) -> None:
    airflow.trigger("release", "nothing", {"force_reason": "the test asks for it"})
    assert "there is nothing to force" in failure(airflow, "release", "nothing")


def test_a_second_training_is_held_against_the_champion(airflow: Airflow, place: Place, demo: Demo) -> None:
    """By hand, another model on the same examples: canaried, promoted, rolled back; forced, if the gate says no."""
    other = {"rank_models": ["shared_bottom"], "recall_config": {"epochs": 4}, "seed": 2}
    airflow.trigger("train", "again", other)
    demo.follow(airflow, "train", "again")
    judged = airflow.xcom("train", "again", "report")
    verdict = json.loads((Path(judged["verdict"]) / "verdict.json").read_text())
    assert verdict["champion"] == 1
    assert airflow.state("train", "again", "publish") == ("success" if verdict["approved"] else "skipped")
    assert airflow.state("train", "again", "set_aside") == ("skipped" if verdict["approved"] else "success")
    if verdict["approved"]:
        released = demo.triggered(airflow, "release", "again")
        forced = None
    else:
        assert live(place).champion == 1
        released = "forced"
        airflow.trigger("release", released, {"force_reason": "the test asks for it"})
        forced = {"by": "admin", "reason": "the test asks for it", "verdict": verdict["sentence"]}
    promoted = demo.release(airflow, released)
    replayed = airflow.xcom("release", released, "replay")["sentence"]
    assert json.loads((place.home / "releases" / "2" / "manifest.json").read_text())["forced"] == forced
    assert "logged requests and" in replayed
    assert "(100 %; goal 99.99 %)" in replayed
    assert live(place).champion == (2 if promoted else 1)
    assert live(place).challenger is None
    if promoted:
        airflow.trigger("rollback", "back", {"reason": "the test says so"})
        assert wait(airflow, "rollback", "back") == "success"
        assert (live(place).champion, live(place).reason) == (1, "the test says so")
        assert recommend(place, user_id=1, preview=True).json()["release"] == 1


def test_a_service_that_dies_ends_all_and_says_why(place: Place, told: str) -> None:
    status = supervisor.read_status(place.home)
    services = [psutil.Process(service["pid"]) for service in status["services"].values()]
    psutil.Process(status["services"]["gateway"]["pid"]).kill()
    psutil.Process(status["pid"]).wait(90)
    status = supervisor.read_status(place.home)
    assert status["state"] == "failed"
    assert "gateway ended with signal 9" in status["error"]
    assert not any(service.is_running() for service in services)
