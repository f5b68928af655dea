"""Airflow over its REST API: trigger, follow, answer."""

from __future__ import annotations

import json
from typing import Any, Self

import httpx

from local.place import Place

ENDED = ("success", "failed")


class AirflowError(RuntimeError):
    """Airflow is away or refuses; the message is its own."""


class Airflow:
    """A session of one user."""

    def __init__(self, url: str, token: str) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v2", headers={"Authorization": f"Bearer {token}"}, timeout=60)

    @staticmethod
    def log_in(place: Place, user: str) -> Airflow:
        """A session as `user`, with the password this home has for it."""
        password = json.loads(place.passwords.read_text())[user]
        url = place.url("airflow")
        try:
            answer = httpx.post(f"{url}/auth/token", json={"username": user, "password": password}, timeout=60)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise AirflowError(f"no log-in to Airflow at {url}: {error}") from error
        return Airflow(url, answer.json()["access_token"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _call(self, method: str, path: str, **request: Any) -> Any:
        try:
            answer = self._client.request(method, path, **request)
        except httpx.HTTPError as error:
            raise AirflowError(f"Airflow does not answer: {error}") from error
        if answer.is_error:
            try:
                detail = answer.json().get("detail", answer.text)
            except ValueError:
                detail = answer.text
            raise AirflowError(f"Airflow refuses {method} {path} ({answer.status_code}): {detail}")
        return answer.json()

    def has_dag(self, dag: str) -> bool:
        """Whether Airflow has read this DAG."""
        return self._client.get(f"/dags/{dag}").status_code == 200

    def trigger(self, dag: str, run_id: str, conf: dict[str, Any] | None = None) -> None:
        """Starts a run with `conf` as its params."""
        self._call(
            "POST", f"/dags/{dag}/dagRuns", json={"logical_date": None, "dag_run_id": run_id, "conf": conf or {}}
        )

    def runs(self, dag: str, **filters: Any) -> list[dict[str, Any]]:
        """Runs of a DAG, newest first."""
        query = {"order_by": "-run_after", "limit": 100} | filters
        return self._call("GET", f"/dags/{dag}/dagRuns", params=query)["dag_runs"]

    def run(self, dag: str, run_id: str) -> dict[str, Any]:
        return self._call("GET", f"/dags/{dag}/dagRuns/{run_id}")

    def triggered_by(self, dag: str, source_run: str) -> str | None:
        """The run of `dag` that was started by an asset which `source_run` made, once it has begun."""
        for run in self.runs(dag, run_type="asset_triggered"):
            # Airflow answers 500 for the asset events of a run that still waits
            if run["start_date"] is None:
                continue
            events = self._call("GET", f"/dags/{dag}/dagRuns/{run['dag_run_id']}/upstreamAssetEvents")
            if any(event["source_run_id"] == source_run for event in events["asset_events"]):
                return run["dag_run_id"]
        return None

    def tasks(self, dag: str, run_id: str) -> list[dict[str, Any]]:
        """The task instances of a run."""
        path = f"/dags/{dag}/dagRuns/{run_id}/taskInstances"
        return self._call("GET", path, params={"limit": 200})["task_instances"]

    def state(self, dag: str, run_id: str, task: str) -> str | None:
        """The state of one (unmapped) task of a run."""
        return self._call("GET", f"/dags/{dag}/dagRuns/{run_id}/taskInstances/{task}")["state"]

    def xcom(self, dag: str, run_id: str, task: str) -> Any:
        """What a task returned."""
        path = f"/dags/{dag}/dagRuns/{run_id}/taskInstances/{task}/xcomEntries/return_value"
        return self._call("GET", path, params={"deserialize": False, "stringify": False})["value"]

    def links(self, dag: str, run_id: str, task: str) -> dict[str, str | None]:
        """The addresses behind the buttons of a task, by name."""
        return self._call("GET", f"/dags/{dag}/dagRuns/{run_id}/taskInstances/{task}/links")["extra_links"]

    def error(self, dag: str, run_id: str, task: dict[str, Any]) -> str:
        """The last error in the log of a task instance, in its own words."""
        path = f"/dags/{dag}/dagRuns/{run_id}/taskInstances/{task['task_id']}/logs/{task['try_number']}"
        query = {"map_index": task["map_index"], "full_content": True}
        content = self._call("GET", path, params=query, headers={"Accept": "application/json"})["content"]
        for line in reversed(content):
            for detail in reversed(line.get("error_detail") or []) if isinstance(line, dict) else ():
                return f"{detail['exc_type']}: {detail['exc_value']}"
        return "no error in its log"

    def mark_failed(self, dag: str, run_id: str) -> None:
        """Ends a run."""
        self._call("PATCH", f"/dags/{dag}/dagRuns/{run_id}", json={"state": "failed"})

    def approvals(self, dag: str, run_id: str) -> list[dict[str, Any]]:
        """Approvals of a run that wait for an answer: subject, body, and which task."""
        path = f"/dags/{dag}/dagRuns/{run_id}/hitlDetails"
        return self._call("GET", path, params={"state": "awaiting_input", "response_received": False})["hitl_details"]

    def answer(self, dag: str, run_id: str, task: str, option: str, form: dict[str, Any]) -> dict[str, Any]:
        """Answers an approval, and fills in its form, as this session's user."""
        path = f"/dags/{dag}/dagRuns/{run_id}/taskInstances/{task}/-1/hitlDetails"
        return self._call("PATCH", path, json={"chosen_options": [option], "params_input": form})
