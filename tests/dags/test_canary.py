"""The tasks of the release DAG that judge a canary, on a real home, feedback log and MLflow, without a scheduler."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import routing
from penstock.experiment import CLOCKS_MS, Split
from penstock.feedback import FeedbackLog
from penstock.routing import Routing

# Airflow's own providers import from where Airflow no longer wants it
pytestmark = pytest.mark.filterwarnings("ignore:The .airflow:FutureWarning")

PAIR = replace(routing.canary(Routing(champion=1), 2, 0.4), updated_at="2000-01-01T00:00:00.000+00:00")


class Run:
    """What a task sees of its run."""

    run_id, dag_id = "a run", "release"

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.try_number = 1

    def xcom_pull(self, task_ids: str) -> Any:
        return self.told.get(task_ids)


class Canary:
    """A home with a canary, and the DAG's tasks on it."""

    def __init__(self, home: Path, task: Callable[[str], Any], run_id: str) -> None:
        self.home, self._task = home, task
        self.minimum = {"impressions": 0, "users": 0, "wait_minutes": 0}
        self.policy: dict[str, Any] = {}
        self.told: dict[str, Any] = {"candidate": {"run_id": run_id, "champion": 1}, "build": 2}
        routing.write(home / "routing.json", PAIR)

    @property
    def live(self) -> Routing:
        return routing.read(self.home / "routing.json")

    def begin(self) -> None:
        split = Split.of(PAIR)
        assert split
        self.told["canary"] = {"split": asdict(split), "minimum": self.minimum, "policy": self.policy}

    def visits(self, better: float = 1.0, share: float = 0.4) -> None:
        generator = np.random.default_rng(1)
        users = 300
        taste = generator.beta(4, 4, users)
        pair = replace(PAIR, share=share)
        where = {"time_ms": 0, "scenario": 0, "device": 0, "features_us": 0}
        with FeedbackLog(self.home / "feedback") as log:
            for request, user in enumerate(generator.integers(0, users, 900).tolist()):
                variant = routing.variant(pair, user)
                log.impressions(request, user, range(5), **where, release=pair.release(variant) or 0, variant=variant)
                clicks = generator.random(5) < taste[user] * (better if variant == "challenger" else 1)
                events = [{"item_id": item, "click": int(click)} for item, click in enumerate(clicks)]
                log.outcomes(request, events)
        time.sleep(2 * CLOCKS_MS / 1000)  # what has just arrived is left for the next look

    def run(self, name: str, *arguments: Any) -> Any:
        """What a task gives, remembered as Airflow does."""
        from airflow.sdk.definitions._internal.contextmanager import _CURRENT_CONTEXT

        run = Run(self.told)
        params = {"ab_policy": self.policy, "force_reason": "", "require_replay": True}
        _CURRENT_CONTEXT.append({"ti": run, "dag_run": run, "run_id": run.run_id, "params": params})  # type: ignore[arg-type]
        try:
            given = self._task(name)(*arguments)
        finally:
            _CURRENT_CONTEXT.pop()
        value = getattr(given, "xcom_value", given)
        if getattr(given, "is_done", True):
            self.told[name] = value
        return given


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
        from dags.release import release

        dag = release()
        yield lambda name: dag.get_task(name).python_callable


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Where MLflow is, and the run of the candidate, of which both releases are."""
    from components import tracking

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    run_id = tracking.log_run(uri, "a candidate", {}, {}, [])
    for number in (1, 2):
        (folder / str(number)).mkdir()
        (folder / str(number) / "manifest.json").write_text("{}")
        manifest = {"release": number, "run_id": run_id, "approved_by": "ana", "parent": None}
        manifest |= {"git_revision": "abc", "verdict": "better"}
        tracking.register_release(uri, folder / str(number), manifest)
    return uri, run_id


@pytest.fixture
def canary(
    tmp_path: Path, task: Callable[[str], Any], mlflow: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> Canary:
    uri, run_id = mlflow
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return Canary(tmp_path, task, run_id)


def aliases(uri: str) -> set[str]:
    from mlflow import MlflowClient

    return set(MlflowClient(uri, registry_uri=uri).get_registered_model("penstock").aliases)


def test_evidence_waits_for_its_minimum_and_then_asks(canary: Canary, mlflow: tuple[str, str]) -> None:
    canary.minimum = {"impressions": 10**6, "users": 0, "wait_minutes": 10**9}
    canary.begin()
    canary.visits()
    assert not canary.run("evidence", canary.told["canary"]).is_done
    assert canary.live == PAIR

    canary.minimum = {"impressions": 100, "users": 10, "wait_minutes": 10**9}
    canary.begin()
    assert canary.run("evidence", canary.told["canary"]).is_done
    told = canary.told["evidence"]
    assert told["action"] == "ask"
    assert told["sentence"].startswith("Release 2 against 1: clicks an impression not told apart (")
    assert told["body"].startswith(told["sentence"])
    assert "| clicks an impression | " in told["body"]
    assert [names[0] for names, _ in told["tables"]] == ["measure", "variant"]
    page = canary.home / "runs" / "release" / "a_run" / "evidence" / "evidence.html"
    assert told["body"].endswith(f"`{page}`")
    assert "Penstock canary: release 2 against 1" in page.read_text()
    json.dumps(told, allow_nan=False)  # as Airflow keeps it
    assert canary.live == PAIR

    from mlflow import MlflowClient

    uri, run_id = mlflow
    assert {"evidence.html", "evidence.json"} <= {file.path for file in MlflowClient(uri).list_artifacts(run_id)}
    metrics = MlflowClient(uri).get_run(run_id).data.metrics
    assert metrics["ab/click/difference"] == told["measures"]["click"]["difference"]


def test_evidence_goes_on_without_mlflow(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    canary.begin()
    canary.visits()
    assert canary.run("evidence", canary.told["canary"]).is_done
    assert canary.told["evidence"]["body"].endswith("evidence.html`")


def test_a_breached_guardrail_withdraws_without_asking(canary: Canary, mlflow: tuple[str, str]) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    from dags.stages import follow_routing

    follow_routing()
    assert aliases(mlflow[0]) == {"champion", "challenger"}
    canary.minimum = {"impressions": 10**6, "users": 0, "wait_minutes": 10**9}  # long before the minimum
    canary.begin()
    canary.visits(better=0.4)
    assert canary.run("evidence", canary.told["canary"]).is_done
    told = canary.told["evidence"]
    assert told["action"] == "withdraw"
    live = canary.live
    assert (live.champion, live.challenger, live.by, live.reason) == (1, None, "guardrail", told["sentence"])
    assert aliases(mlflow[0]) == {"champion"}
    with pytest.raises(AirflowSkipException, match=r"nobody is asked to promote release 2\. Release 2 harms users"):
        canary.run("replay")
    canary.run("withdraw")
    assert canary.live == live  # who withdrew it and why stays
    assert canary.run("guard", canary.told["canary"]) is True


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_broken_split_withdraws_and_fails(canary: Canary, share: float) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    canary.begin()
    canary.visits(share=share)
    with pytest.raises(AirflowFailException, match=r"release 2 is withdrawn\. The evidence on release 2 is broken"):
        canary.run("evidence", canary.told["canary"])
    assert canary.live.challenger is None
    assert "the share is 40.0%" in canary.live.reason


def test_a_guardrail_also_holds_while_a_person_is_asked(canary: Canary) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    canary.begin()
    assert canary.run("evidence", canary.told["canary"]).is_done  # by the wait: nothing was shown yet
    assert canary.told["evidence"]["action"] == "ask"
    assert not canary.run("guard", canary.told["canary"])
    canary.visits(better=0.4)
    # a person who is faster than the guard does not promote it
    canary.told["approve_promotion"] = {"chosen_options": ["Approve"], "responded_by_user": {"name": "ana"}}
    with pytest.raises(AirflowFailException, match=r"release 2 is withdrawn, not promoted\. Release 2 harms users"):
        canary.run("promote")
    assert canary.live.by == "guardrail"

    routing.write(canary.home / "routing.json", PAIR)
    assert canary.run("guard", canary.told["canary"]) is True
    assert canary.live.by == "guardrail"
    with pytest.raises(AirflowFailException, match="release 2 is no canary any more, it was ended by guardrail"):
        canary.run("promote")


def test_a_canary_that_somebody_ended_asks_nobody(canary: Canary) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    canary.begin()
    routing.write(canary.home / "routing.json", routing.stamp(routing.withdraw(PAIR), "ana", "it looks odd"))
    assert canary.run("evidence", canary.told["canary"]).is_done
    with pytest.raises(AirflowSkipException, match="The canary was ended by ana: it looks odd"):
        canary.run("replay")


def test_another_canary_is_left_alone(canary: Canary) -> None:
    canary.begin()
    other = routing.canary(PAIR, 3, 0.1)
    routing.write(canary.home / "routing.json", other)
    from dags.release import withdraw_by

    with pytest.raises(Exception, match="release 3 is not registered"):  # the aliases follow what is live
        withdraw_by(canary.told["canary"], "ana", "a test")
    assert canary.live == other
