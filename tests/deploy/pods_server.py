"""An API of Kubernetes whose pods are processes of this machine: as much as an executor of Airflow asks for."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

Pod = dict[str, Any]
POD = {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": ["list", "create", "delete"]}
KINDS = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "groups": []},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [POD]},
    "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
}


class PodsServer:
    """Runs the arguments of each pod's container, in the environment and with the Python that it is told.

    `made` holds every pod as it was asked for, `deleted` the names of those that were ended.
    """

    def __init__(self, python: str, environment: Mapping[str, str], folder: Path) -> None:
        self.made: list[Pod] = []
        self.deleted: set[str] = set()
        self._python, self._environment, self._folder = python, dict(environment), folder
        self._pods: dict[str, Pod] = {}
        self._watchers: list[queue.Queue[tuple[str, Pod]]] = []
        self._lock = threading.Lock()
        self._version = 1
        handler = type("Handler", (_Handler,), {"pods": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> PodsServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, pod: Pod) -> Pod:
        name = pod["metadata"]["name"]
        self.made.append(json.loads(json.dumps(pod)))
        pod["metadata"] |= {"uid": name, "creationTimestamp": "2026-01-01T00:00:00Z"}
        with self._lock:
            self._pods[name] = pod
            self._tell("ADDED", pod, {"phase": "Pending"})
        threading.Thread(target=self._run, args=(pod,), daemon=True).start()
        return pod

    def change(self, name: str, change: Pod) -> Pod | None:
        with self._lock:
            if pod := self._pods.get(name):
                for part, values in change["metadata"].items():
                    pod["metadata"].setdefault(part, {}).update(values)
                self._tell("MODIFIED", pod, pod["status"])
            return pod

    def delete(self, name: str) -> None:
        with self._lock:
            self.deleted.add(name)
            if pod := self._pods.pop(name, None):
                pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                self._tell("DELETED", pod, pod["status"])

    def list(self, selector: str) -> Pod:
        with self._lock:
            items = [pod for pod in self._pods.values() if _chosen(pod, selector)]
            return {"kind": "PodList", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    def watch(self) -> queue.Queue[tuple[str, Pod]]:
        """What happens from now on, after all that there is."""
        events: queue.Queue[tuple[str, Pod]] = queue.Queue()
        with self._lock:
            for pod in self._pods.values():
                events.put(("ADDED", json.loads(json.dumps(pod))))
            self._watchers.append(events)
        return events

    def _run(self, pod: Pod) -> None:
        (container,) = pod["spec"]["containers"]
        running = {"name": container["name"], "ready": True, "restartCount": 0, "image": "", "imageID": ""}
        with self._lock:
            self._tell(
                "MODIFIED", pod, {"phase": "Running", "containerStatuses": [running | {"state": {"running": {}}}]}
            )
        command = [self._python, *container["args"][1:]] if container["args"][0] == "python" else container["args"]
        with (self._folder / f"{pod['metadata']['name']}.log").open("wb") as log:
            done = subprocess.run(command, env=self._environment, cwd=self._folder, stdout=log, stderr=log, check=False)
        ended = running | {"state": {"terminated": {"exitCode": done.returncode}}}
        phase = "Failed" if done.returncode else "Succeeded"
        with self._lock:
            self._tell("MODIFIED", pod, {"phase": phase, "containerStatuses": [ended]})

    def _tell(self, what: str, pod: Pod, status: Pod) -> None:
        self._version += 1
        pod["status"] = status
        pod["metadata"]["resourceVersion"] = str(self._version)
        for events in self._watchers:
            events.put((what, json.loads(json.dumps(pod))))


def _chosen(pod: Pod, selector: str) -> bool:
    labels = pod["metadata"].get("labels", {})
    for one in filter(None, selector.split(",")):
        name, equal, value = one.partition("!=") if "!=" in one else one.partition("=")
        if (labels.get(name) == value) != (equal == "="):
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    pods: PodsServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = urlparse(self.path)
        options = {name: values[0] for name, values in parse_qs(asked.query).items()}
        selector = options.get("labelSelector", "")
        if asked.path in KINDS:
            self._answer(KINDS[asked.path])
        elif options.get("watch", "").lower() == "true":
            self._watch(selector)
        else:
            self._answer(self.pods.list(selector))

    def do_POST(self) -> None:
        self._answer(self.pods.create(self._body()), 201)

    def do_PATCH(self) -> None:
        found = self.pods.change(self._name(), self._body())
        self._answer(found or {"kind": "Status", "code": 404}, 200 if found else 404)

    def do_DELETE(self) -> None:
        self._body()
        self.pods.delete(self._name())
        self._answer({"kind": "Status", "status": "Success"})

    def _name(self) -> str:
        return urlparse(self.path).path.rsplit("/", 1)[1]

    def _body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def _answer(self, body: Any, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _watch(self, selector: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = self.pods.watch()
        while True:
            what, pod = events.get()
            if _chosen(pod, selector):
                line = json.dumps({"type": what, "object": pod}).encode() + b"\n"
                try:
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                except OSError:  # whoever watched has gone
                    return
