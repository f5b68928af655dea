"""Kubeflow Pipelines' API v2beta1 on a port of this machine, made of the models of its own client.

Runs go through the states they are told. One that succeeds does what its last step does on a cluster: it keeps the
outputs, of which this server knows only that somebody has written them.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api

from components import keep


class PipelinesServer:
    """A cluster with one experiment and the runs it was sent."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.runs: dict[str, api.V2beta1Run] = {}
        self.experiments: list[api.V2beta1Experiment] = []
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        """What each run goes through, a state a look."""
        self.keeps = True
        self.failure = ""
        self.faults: dict[str, deque[int | str]] = {}
        """By call, what it answers before it works: a status, "lost" after the work is done, or "slow"."""
        self.calls: list[str] = []
        self.token = ""
        self._looks: dict[str, int] = {}
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method: str, url: str, body: dict[str, Any]) -> tuple[str, Any]:
        """The name of a call, and what does it."""
        path, _, act = urlsplit(url).path.removeprefix("/apis/v2beta1/").partition(":")
        kind, _, run_id = path.partition("/")
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        if kind == "experiments":
            if method == "GET":
                return "list_experiments", lambda: api.V2beta1ListExperimentsResponse(experiments=self.experiments)
            return "create_experiment", lambda: self._create_experiment(body)
        if act == "terminate":
            return "terminate", lambda: self._terminate(run_id)
        if run_id:
            return "get_run", lambda: self._look(run_id)
        if method == "GET":
            return "list_runs", lambda: self._list(query)
        return "create_run", lambda: self._create(body)

    def _create_experiment(self, body: dict[str, Any]) -> api.V2beta1Experiment:
        made = api.V2beta1Experiment(experiment_id="the-experiment", display_name=body["display_name"])
        self.experiments.append(made)
        return made

    def _create(self, body: dict[str, Any]) -> api.V2beta1Run:
        assert body["experiment_id"] == "the-experiment"
        run_id = f"run-{len(self.runs) + 1}"
        self.runs[run_id] = api.V2beta1Run(
            run_id=run_id,
            experiment_id=body["experiment_id"],
            display_name=body["display_name"],
            pipeline_spec=body["pipeline_spec"],
            runtime_config=api.V2beta1RuntimeConfig(parameters=body["runtime_config"]["parameters"]),
            created_at=datetime.now(UTC),
            state=self.states[0],
        )
        return self.runs[run_id]

    def _list(self, query: dict[str, str]) -> api.V2beta1ListRunsResponse:
        assert query["experiment_id"] == "the-experiment"
        (predicate,) = json.loads(query["filter"])["predicates"]
        assert (predicate["operation"], predicate["key"]) == ("EQUALS", "display_name")
        found = [run for run in self.runs.values() if run.display_name == predicate["stringValue"]]
        return api.V2beta1ListRunsResponse(runs=found[::-1], total_size=len(found))

    def _look(self, run_id: str) -> api.V2beta1Run:
        run = self.runs[run_id]
        if run.state in ("CANCELING", "CANCELED"):
            run.state = "CANCELED"
            return run
        self._looks[run_id] = min(self._looks.get(run_id, -1) + 1, len(self.states) - 1)
        run.state = self.states[self._looks[run_id]]
        if run.state == "SUCCEEDED" and self.keeps:
            self._keep(run)
        if run.state == "FAILED":
            error = api.GoogleRpcStatus(code=13, message=self.failure)
            task = api.V2beta1PipelineTaskDetail(display_name="double", state="FAILED", error=error)
            run.run_details = api.V2beta1RunDetails(task_details=[task])
            run.error = api.GoogleRpcStatus(code=13, message="a task failed")
        return run

    def _terminate(self, run_id: str) -> dict[str, Any]:
        self.runs[run_id].state = "CANCELING"
        return {}

    def _keep(self, run: api.V2beta1Run) -> None:
        """What the task `keep` gets of its producers, and does."""
        spec = run.pipeline_spec["pipeline_spec"]
        task = spec["root"]["dag"]["tasks"]["keep"]
        definitions = spec["components"][task["componentRef"]["name"]]["inputDefinitions"]
        inputs: dict[str, Any] = {"parameterValues": {}, "artifacts": {}}
        for name, source in task["inputs"]["parameters"].items():
            given = source.get("componentInputParameter")
            inputs["parameterValues"][name] = run.runtime_config.parameters[given] if given else 3
        for name, source in task["inputs"].get("artifacts", {}).items():
            made = source["taskOutputArtifact"]
            uri = self.store / run.run_id / made["producerTask"] / made["outputArtifactKey"]
            uri.mkdir(parents=True, exist_ok=True)
            (uri / "numbers.txt").write_text("2\n4\n6")
            kind = definitions["artifacts"][name]["artifactType"]
            inputs["artifacts"][name] = {"artifacts": [{"uri": str(uri), "type": kind, "metadata": {"rows": 3.0}}]}
        keep.keep({"inputs": inputs})


class _Handler(BaseHTTPRequestHandler):
    cluster: PipelinesServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        name, work = self.cluster.answer(self.command, self.path, body)
        self.cluster.calls.append(name)
        if self.cluster.token and self.headers.get("Authorization") != f"Bearer {self.cluster.token}":
            return self._send(401, {"code": 16, "message": "the token has expired"})
        faults = self.cluster.faults.get(name)
        fault = faults.popleft() if faults else 0
        if isinstance(fault, int) and fault:
            return self._send(fault, {"code": 13, "message": "in trouble"})
        if fault == "slow":
            time.sleep(0.5)
        try:
            answer = work()
        except KeyError as error:
            return self._send(404, {"code": 5, "message": f"Run {error} not found"})
        if fault == "lost":
            self.close_connection = True
            return None
        return self._send(200, api.ApiClient().sanitize_for_serialization(answer))

    do_GET = do_POST = _serve  # noqa: N815

    def _send(self, status: int, document: Any) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass
