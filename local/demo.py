"""The main job, watched: a log → prepare → train → approval → replay → release → live recommendations → feedback."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from local import supervisor
from local.airflow import ENDED, Airflow, AirflowError
from local.place import LocalError, Place

Task = dict[str, Any]

APPROVER = "admin"
DAYS = 14
VISITS = 600
SHARE = 0.2
SIGN_OF_LIFE_SECONDS = 20
MIN_IMPRESSIONS = 800
MIN_USERS = 40
READING_SECONDS = 4
"""Between an approval's appearance and its answer: Airflow fails an answer that overtakes the asking task's exit."""


@dataclass(frozen=True)
class Source:
    """Where the log comes from: a module of penstock.datasets, its settings, and the day the audience lives, if any."""

    name: str
    options: dict[str, Any]
    day: int | None = None


def source_of(data: str, place: Place, options: dict[str, Any]) -> Source:
    """What `data` is: nothing (the simulator, one day older for each day lived), KuaiRand-Pure, or a log of one's own.

    Raises:
        LocalError: it is none of these.
    """
    if not data:
        days = int(options.get("days", DAYS)) + lived(place)
        return Source("simulator", options | {"days": days}, day=days)
    path = Path(data).resolve()
    if not path.is_dir():
        raise LocalError(f"DATA={data}: no such directory")
    if (path / "events").is_dir():
        return Source("canonical", {"path": str(path)})
    if any(found for folder in (path, path / "data") for found in folder.glob("log_standard*_pure.csv")):
        return Source("kuairand", {"path": str(path)})
    raise LocalError(
        f"DATA={data} is neither KuaiRand-Pure (data/log_standard_*_pure.csv) nor a log in the layout of "
        "penstock/events.py (events/dt=YYYY-MM-DD/*.parquet, users.parquet, items.parquet)"
    )


def lived(place: Place) -> int:
    """How many days the audience has lived through the gateway so far."""
    try:
        return int(json.loads((place.home / "demo.json").read_text())["days_lived"])
    except (FileNotFoundError, ValueError, KeyError):
        return 0


def remember_day(place: Place) -> None:
    """One day more has been lived."""
    path = place.home / "demo.json"
    path.with_suffix(".part").write_text(json.dumps({"days_lived": lived(place) + 1}))
    path.with_suffix(".part").replace(path)


def run(place: Place, data: str, *, keep: bool, options: dict[str, Any] | None = None) -> int:
    """The demo; returns 0 if a release was promoted and answered a recommendation.

    Raises:
        LocalError: something a person has to do first, or a DAG failed.
    """
    source = source_of(data, place, options or {})
    with supervisor.locked(place.home, "demo.lock") as free:
        if not free:
            other = (place.home / "demo.lock").read_text().strip()
            raise LocalError(f"a demo runs on {place.home} already (process {other}): wait for its end, or stop it")
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=120)
        with services(place, console) as own:
            code = Demo(place, source, console).run(fresh=own)
            if keep and own:
                console.print("\n[bold]Everything goes on running until Ctrl-C here, or `make down` elsewhere.[/]")
                wait_for_the_end(place)
            return code


@contextmanager
def services(place: Place, console: Console) -> Iterator[bool]:
    """The services, started and stopped here (yields True) unless they run already."""
    if supervisor.running(place.home):
        if supervisor.read_status(place.home).get("state") != "ready":
            raise LocalError(f"the services of {place.home} are just starting or stopping: try again in a moment")
        console.print("The services run already; they are used, and go on running afterwards.")
        yield False
        return
    console.rule("services", align="left")
    child = supervisor.start(place, lambda line: console.print(line, markup=False))
    try:
        yield True
    finally:
        if supervisor.running(place.home):
            console.print("Stopping the services …")
            supervisor.down(place)
        child.wait()


def wait_for_the_end(place: Place) -> None:
    try:
        while supervisor.running(place.home):
            time.sleep(1)
    except KeyboardInterrupt:
        return
    if reason := supervisor.read_status(place.home).get("error"):
        raise LocalError(reason)


class Demo:
    """One round of the loop over Airflow's REST API and the gateway."""

    def __init__(self, place: Place, source: Source, console: Console) -> None:
        self._place = place
        self._source = source
        self._console = console
        self._traffic = None if source.day is None else Traffic(place, source.options, source.day)

    def run(self, *, fresh: bool) -> int:
        began = time.monotonic()
        try:
            with Airflow.log_in(self._place, APPROVER) as airflow:
                if fresh:
                    self._clear(airflow)
                code = self._loop(airflow)
        except AirflowError as error:
            # a service that died says more than the connection it broke
            raise LocalError(supervisor.read_status(self._place.home).get("error") or str(error)) from error
        self._say(f"The loop took {time.monotonic() - began:.0f} s.")
        return code

    def _say(self, text: str = "") -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _clear(self, airflow: Airflow) -> None:
        """Runs that an interrupted demo left would hold up the new ones."""
        for dag in supervisor.DAGS:
            for run in airflow.runs(dag, state=["running", "queued"]):
                airflow.mark_failed(dag, run["dag_run_id"])
                self._say(f"{dag}: {run['dag_run_id']} was left unfinished; it is marked failed")

    def _loop(self, airflow: Airflow) -> int:
        run_id = f"demo__{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}"
        self._console.rule(f"prepare: the log of {self._source.name}", align="left")
        airflow.trigger("prepare", run_id, {"source": self._source.name, "options": self._source.options})
        self.follow(airflow, "prepare", run_id)
        self._say(f"  Data Docs: {airflow.links('prepare', run_id, 'validate')['Data Docs']}")
        examples = Path(airflow.xcom("prepare", run_id, "examples")["artifacts"]["examples"]["uri"])

        self._console.rule("train: recall, rank, weights, gate, report", align="left")
        train = self.triggered(airflow, "train", run_id)
        self.follow(airflow, "train", train)
        judged = airflow.xcom("train", train, "report")
        verdict = json.loads((Path(judged["verdict"]) / "verdict.json").read_text())
        self._show_verdict(verdict)

        promoted = False
        if verdict["approved"]:
            self._console.rule("release", align="left")
            promoted = self.release(airflow, self.triggered(airflow, "release", train))
        answered = self._show_recommendations(examples)
        if answered and self._traffic:
            self._console.rule("the audience", align="left")
            self._say(self._traffic.send(VISITS))
        self._show_addresses(Path(judged["report"]))
        if not verdict["approved"]:
            self._say("No new release: the gate turned the candidate down, for the reasons above.")
        elif not promoted:
            self._say("No new release: its canary was withdrawn.")
        elif not answered:
            self._say("No recommendations came from the release: see the gateway's log.")
        return 0 if promoted and answered else 1

    def triggered(self, airflow: Airflow, dag: str, source_run: str) -> str:
        end = time.monotonic() + 120
        while time.monotonic() < end or airflow.runs(dag, state=["queued"]):
            if found := airflow.triggered_by(dag, source_run):
                return found
            time.sleep(0.5)
        raise LocalError(f"{dag} was not started by {source_run}; look at {self._place.url('airflow')}")

    def follow(self, airflow: Airflow, dag: str, run_id: str, each: Callable[[list[Task]], None] | None = None) -> None:
        """Tells the end of each task until the run ends; `each` is called with the tasks about every second.

        Raises:
            LocalError: a task failed; the message is its own.
        """
        told: set[tuple[str, int]] = set()
        quiet_since = time.monotonic()
        with self._console.status(dag) as live:
            while True:
                ended = airflow.run(dag, run_id)["state"] in ENDED
                tasks = airflow.tasks(dag, run_id)
                for task in tasks:
                    key = (task["task_id"], task["map_index"])
                    if key not in told and task["state"] in ("success", "failed", "skipped"):
                        told.add(key)
                        quiet_since = time.monotonic()
                        took = f"{task['duration'] or 0:6.1f} s" if task["state"] != "skipped" else "        "
                        self._say(f"  {dag} · {_name(task):<28}{took}  {task['state']}")
                if ended:
                    failed = [task for task in tasks if task["state"] == "failed"]
                    if failed:
                        error = airflow.error(dag, run_id, failed[0])
                        raise LocalError(f"{dag} failed in task {_name(failed[0])}: {error}")
                    return
                if each:
                    each(tasks)
                now = datetime.now(UTC)
                doing = " ∥ ".join(f"{dag} · {_name(task)} {_age(task, now)}" for task in tasks if _works(task)) or dag
                live.update(doing)
                # where there is no live line, a sign of life
                if not self._console.is_terminal and time.monotonic() >= quiet_since + SIGN_OF_LIFE_SECONDS:
                    quiet_since = time.monotonic()
                    self._say(f"  … {doing}")
                time.sleep(1)

    def release(self, airflow: Airflow, run_id: str) -> bool:
        """Follows a release and answers its approvals; whether it was promoted."""
        seen: dict[tuple[str, int], float] = {}
        sent = replayed = judged = False

        def each(tasks: list[Task]) -> None:
            nonlocal sent, replayed, judged
            if not judged and any(task["task_id"] == "evidence" and task["state"] == "success" for task in tasks):
                judged = True
                shown = airflow.xcom("release", run_id, "evidence")
                if shown["action"] != "ask":
                    self._say(f"  {shown['sentence']}")
            if not replayed and any(task["task_id"] == "replay" and task["state"] == "success" for task in tasks):
                replayed = True
                self._say(f"  {airflow.xcom('release', run_id, 'replay')['sentence']}")
            for approval in airflow.approvals("release", run_id):
                key = approval["task_instance"]["task_id"], approval["task_instance"]["try_number"]
                asked = seen.setdefault(key, time.monotonic())
                if time.monotonic() >= asked + READING_SECONDS:
                    seen[key] = math.inf
                    self._answer(airflow, run_id, key[0], approval)
            if not sent and any(task["task_id"] == "canary" and task["state"] == "success" for task in tasks):
                sent = True
                if self._traffic:
                    self._say(self._traffic.send(VISITS))

        self.follow(airflow, "release", run_id, each)
        return airflow.state("release", run_id, "promote") == "success"

    def _answer(self, airflow: Airflow, run_id: str, task: str, approval: dict[str, Any]) -> None:
        self._say(f"\n  Airflow asks: {approval['subject']}")
        option, why = "Approve", "the gate approved it"
        if task == "approve_promotion":
            shown = airflow.xcom("release", run_id, "evidence")
            for names, rows in shown["tables"]:
                self._table(f"online so far, by {names[0]}", names, rows)
            self._say(f"  {shown['sentence']}")
            option, why = decide(shown["measures"])
        form = {
            "share": SHARE,
            "wait_minutes": 2,
            "min_impressions": MIN_IMPRESSIONS if self._traffic else 0,
            "min_users": MIN_USERS if self._traffic else 0,
        }
        said = airflow.answer("release", run_id, task, option, form if task == "approve" else {})
        who = said["responded_by"]["name"]
        self._say(f"  → answered over the REST API as user {who}: {option} ({why})\n")

    def _table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in header:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            # titles and markup both use brackets
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)

    def _show_verdict(self, verdict: dict[str, Any]) -> None:
        champion = verdict["champion"]
        header = ["head", "AUC of the head, test slice", "95 % interval", "popularity"]
        header += [] if champion is None else [f"release {champion}", "difference", "95 % interval"]
        rows = []
        for name, head in verdict["heads"].items():
            row = [name, f"{head['auc']:.4f}", _interval(head["low"], head["high"]), f"{head['popularity']:.4f}"]
            if champion is not None and head["champion"] is not None:
                difference = _interval(head["difference_low"], head["difference_high"], "+")
                row += [f"{head['champion']:.4f}", f"{head['difference']:+.4f}", difference]
            rows.append(row)
        self._table("the gate's verdict", header, rows)
        self._say(verdict["sentence"])
        for check in verdict["checks"]:
            if not check["passed"]:
                self._say(f"  not passed: {check['name']}: {check['reason']}")

    def _show_recommendations(self, examples: Path) -> bool:
        """Prints what a few users of the log get at its end; whether each got something."""
        end_ms, users, items = some_users(examples)
        rows = []
        url = self._place.url("gateway")
        for user, viewed in users:
            request = {"user_id": user, "k": 5, "context": {"time_ms": end_ms}, "preview": True}
            answer = httpx.post(f"{url}/recommend", json=request, timeout=30, headers=token())
            if answer.is_error:
                failure = answer.json()
                self._say(f"no recommendations: {failure.get('error')}; {failure.get('remedy', '')}")
                return False
            slate = answer.json()
            got = [f"{items.get(item['item_id'], item['item_id'])}  {item['score']:.3f}" for item in slate["items"]]
            seen = [items.get(item, str(item)) for item in viewed]
            rows.append([str(user), f"{slate['release']}", "\n".join(seen), "\n".join(got)])
        self._console.rule("live", align="left")
        self._table(
            "recommendations", ["user", "release", "long-viewed last [category]", "recommended [category], score"], rows
        )
        return all(row[3] for row in rows)

    def _show_addresses(self, report: Path) -> None:
        self._console.rule("where things are", align="left")
        self._say(f"{'report':<13}{report}")
        for line in self._place.addresses():
            self._say(line)


class Traffic:
    """The simulator's audience, visiting through the gateway on the day after the log."""

    def __init__(self, place: Place, options: dict[str, Any], day: int) -> None:
        from penstock import config
        from penstock.datasets import simulator

        self._place, self._url = place, place.url("gateway")
        self._begun = False
        self._audience = simulator.Audience(config(simulator, options))
        self._visits = self._audience.requests(day, 4 * VISITS)
        self._day = day

    def send(self, count: int) -> str:
        """The next `count` visits of the day: a slate each, and what the user did with it. Returns a sentence."""
        began = time.monotonic()
        if not self._begun:
            remember_day(self._place)  # at once: a day that breaks off must not be lived again before its own end
            self._begun = True
        lanes: list[list[tuple[int, int, int, int]]] = [[] for _ in range(4)]
        for visit in islice(self._visits, count):
            lanes[visit[0] % len(lanes)].append(visit)  # a user makes one visit after the other

        def follow(lane: list[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
            return [self._visit(client, *visit) for visit in lane]

        with (
            httpx.Client(base_url=self._url, timeout=60, headers=token()) as client,
            ThreadPoolExecutor(len(lanes)) as pool,
        ):
            outcomes = [outcome for lane in pool.map(follow, lanes) for outcome in lane]
        shown = sum(shown for shown, _ in outcomes)
        clicks = sum(clicks for _, clicks in outcomes)
        took = time.monotonic() - began
        return (
            f"{len(outcomes)} visits of day {self._day + 1} went through the gateway in {took:.0f} s: "
            f"{shown} impressions, {clicks} clicks; they are part of the next log"
        )

    def _visit(self, client: httpx.Client, user: int, time_ms: int, device: int, scenario: int) -> tuple[int, int]:
        from penstock.feedback import OUTCOMES

        context = {"time_ms": time_ms, "device": device, "scenario": scenario}
        answer = client.post("/recommend", json={"user_id": user, "k": 10, "context": context})
        if answer.is_error:
            raise LocalError(f"the gateway refused a visit ({answer.status_code}): {answer.text}")
        slate = answer.json()
        shown = [item["item_id"] for item in slate["items"]]
        acts = self._audience.respond(
            user, shown, time_ms=time_ms, device=device, scenario=scenario, request_id=slate["request_id"]
        )
        events = [
            {"item_id": item} | {name: act[name] for name in OUTCOMES} for item, act in zip(shown, acts, strict=True)
        ]
        client.post("/feedback", json={"request_id": slate["request_id"], "events": events}).raise_for_status()
        return len(shown), sum(act["click"] for act in acts)


def decide(measures: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Promotes unless the evidence says that a measure is worse; a breached guardrail has withdrawn it before."""
    if not measures:
        return "Approve", "the gate approved it; too few have seen it yet"
    worse = [name.replace("_", " ") for name, found in measures.items() if found["result"] == "worse"]
    if worse:
        return "Reject", f"{', '.join(worse)}: worse than the champion's, with confidence"
    return "Approve", "the gate approved it, and no measure is worse with confidence"


def token() -> dict[str, str]:
    """What the gateway asks of whoever asks it, if it asks for anything."""
    said = os.environ.get("PENSTOCK_GATEWAY_TOKEN", "")
    return {"Authorization": f"Bearer {said}"} if said else {}


def some_users(examples: Path, count: int = 4) -> tuple[int, list[tuple[int, list[int]]], dict[int, str]]:
    """The log's end in ms, a few users with what they long-viewed last, and a line on each item."""
    import polars as pl

    window = json.loads((examples / "window.json").read_text())
    end_ms = int(datetime.fromisoformat(window["test_end"]).timestamp() * 1000)
    rows = pl.read_parquet(examples / "test.parquet", columns=["user_id", "event_time", "history_items"])
    users = (
        rows.filter(pl.col("history_items").list.len() >= 3)
        .sort("event_time", "user_id", descending=[True, False])
        .unique("user_id", keep="first", maintain_order=True)
        .head(count)
        .with_columns(pl.col("history_items").list.tail(3))
    )
    items = pl.read_parquet(examples / "items.parquet", columns=["item_id", "category", "title"])
    lines = {item: f"{title or f'item {item}'} [{category}]" for item, category, title in items.iter_rows()}
    return end_ms, list(users.select("user_id", "history_items").iter_rows()), lines


def _interval(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.4f} to {high:{sign}.4f}"


def _name(task: Task) -> str:
    label = task.get("rendered_map_index")
    return f"{task['task_id']} [{label}]" if task["map_index"] >= 0 and label else task["task_id"]


def _works(task: Task) -> bool:
    return task["state"] in ("running", "awaiting_input", "up_for_reschedule")


def _age(task: Task, now: datetime) -> str:
    started = task["start_date"]
    return f"{(now - datetime.fromisoformat(started)).total_seconds():.0f} s" if started else ""
