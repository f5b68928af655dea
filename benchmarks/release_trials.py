"""Faults at every step of making, loading, routing, withdrawing and taking back a release, under constant requests.

    python -m benchmarks.release_trials [--quick] [--only ACT]

Each trial starts an act in a process of its own on a home with seven small releases, a model server, a gateway and an
S3 store, has one fault happen at one of its steps, looks whether anything is lost, runs the same command again and
looks whether all is as the act should leave it. Somebody asks the gateway for recommendations all the time: release N
recommends nothing but items of its own, so that an answer made of two releases shows.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import httpx
import numpy as np

from benchmarks.faults import CLOCK_FILE, FAKETIME, Fault, Kind, Steps, Wire
from benchmarks.table import Comparison, machine, show, show_columns, write
from penstock import release, routing
from penstock.release import MODELS, Candidate, ReleaseError
from penstock.release_store import ReleaseStore
from penstock.routing import Routing, RoutingError
from serving import rollout
from serving.model_client import ModelClient, ModelError
from serving.rollout import RolloutError, Servers

Harm = Literal["kill", "torn", "full", "clock", "store away", "server away", "server killed", "two at once"]
BY_SIGNAL: tuple[Harm, ...] = ("store away", "server away", "server killed", "two at once")
TRIALS: dict[Harm, int] = {
    "kill": 12,
    "torn": 6,
    "full": 6,
    "clock": 3,
    "store away": 4,
    "server away": 4,
    "server killed": 2,
    "two at once": 4,
}
RELEASES = 7
KEEP = 3
CATALOGUE = 1000
"""Release N recommends items N*1000 and following."""

LIVE = Routing(champion=4, previous=(1, 3))
TRYING = routing.canary(LIVE, 5, 0.5)
FORWARD = Routing(champion=5, previous=(1, 3, 4))
ACT_SECONDS = 120.0
USERS = range(50)


@dataclass(frozen=True)
class Act:
    """A command, from what it starts, what it should leave, and what it needs.

    Attributes:
        rival: what somebody else does at the same time.
        both: what is live when the rival has ended, and the act after it.
    """

    name: str
    start: Routing
    command: Callable[[Path, Servers], object]
    end: Routing
    needs: frozenset[str] = frozenset({"server"})
    rival: Callable[[Path, Servers], object] | None = None
    both: Routing | None = None


def _promote(number: int) -> Callable[[Path, Servers], object]:
    return lambda home, at: rollout.promote(home, number, by="ana", reason="a trial", at=at)


def _build(home: Path, at: Servers) -> object:
    """Makes release 8, of the same candidate at each try."""
    parts = ("recall", "rank", "weights", "verdict", "rehearsal", "report.html")
    made = Candidate(*(home / "candidate" / part for part in parts))
    said = {"approved_by": "ana", "run_id": "the new one", "git_revision": "abc", "environment": "def"}
    return release.build(home, made, **said, store=ReleaseStore(at.releases))


BOTH = frozenset({"server", "store"})
ACTS = (
    Act("build", LIVE, _build, LIVE, frozenset({"store"}), _build, LIVE),
    Act("fetch and load", LIVE, lambda home, at: rollout.load(home, RELEASES, at=at), LIVE, BOTH),
    Act(
        "canary",
        LIVE,
        lambda home, at: rollout.canary(home, 5, 0.5, by="ana", at=at),
        TRYING,
        rival=_promote(6),
        both=routing.canary(routing.promote(LIVE, 6), 5, 0.5),
    ),
    Act(
        "promote",
        TRYING,
        _promote(5),
        FORWARD,
        BOTH,
        rival=_promote(6),
        both=routing.promote(routing.promote(LIVE, 6), 5),
    ),
    Act(
        "withdraw",
        TRYING,
        lambda home, at: rollout.withdraw(home, by="ana", reason="a trial", at=at),
        LIVE,
        rival=_promote(5),
        both=FORWARD,
    ),
    Act(
        "roll back",
        FORWARD,
        lambda home, at: rollout.rollback(home, by="ana", reason="a trial", leaving=5, at=at),
        LIVE,
        rival=lambda home, at: rollout.rollback(home, by="ben", reason="a trial", leaving=5, at=at),
        both=LIVE,
    ),
)


def _child(act: str, home: Path, at: Servers, fault: Fault, parent: Connection) -> None:
    """The act in a process of its own, with the fault."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 – what it tells is looked for, not read
    steps = Steps(fault, parent, home)
    said = "done"
    try:
        next(one for one in ACTS if one.name == act).command(home, at)
    except (RolloutError, ReleaseError) as error:
        said = str(error)
    steps.end()
    parent.send((steps.taken, said))


def _rival(act: str, home: Path, at: Servers) -> None:
    """What somebody else does; it may be refused."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    command = next(one for one in ACTS if one.name == act).rival
    assert command is not None
    try:
        command(home, at)
    except (RolloutError, ReleaseError):
        sys.exit(1)


@dataclass
class Answers:
    """What somebody who asks all the time was told."""

    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def take(self, answer: httpx.Response) -> None:
        """One answer; mixed if an item is not of the release that it names."""
        if answer.status_code != 200:
            self.told["refused"] += 1
            return
        slate = answer.json()
        mixed = {item["item_id"] // CATALOGUE for item in slate["items"]} - {slate["release"]}
        self.told["mixed" if mixed else "degraded" if slate.get("degraded") else "whole"] += 1
        if mixed:
            self.wrong.append(f"release {slate['release']} answered items of {sorted(mixed)}")


class Place:
    """The home, its servers, and its store."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self._pristine = folder / "releases"
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = folder
        self.ports = {name: _free_port() for name in ("model", "rest", "gateway", "s3")}
        self._make()
        self._start(
            "s3", [f"{Path(sys.executable).parent}/moto_server", "-H", "127.0.0.1", "-p", str(self.ports["s3"])]
        )
        self.store_wire, self.server_wire = Wire(self.ports["s3"]), Wire(self.ports["model"])
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store_wire.port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }
        self.at = Servers(f"127.0.0.1:{self.server_wire.port}", "s3://penstock/releases", KEEP)
        self._direct = Servers(f"127.0.0.1:{self.ports['model']}")
        _until(lambda: _listens(self.ports["s3"]), "the S3 server")
        self._fill_store()
        self.serve()
        self._put(LIVE)
        self._start_gateway()
        self.scores = self._scores()

    def _make(self) -> None:
        from feature_repo.store import refresh
        from tests.serving.conftest import build, make_candidate, write_known_log

        with tempfile.TemporaryDirectory() as scratch:
            refresh(self.home, write_known_log(Path(scratch) / "log"), Path(scratch) / "out")
            for number in range(1, RELEASES + 1):
                build(self.home, Path(scratch) / str(number), parent=number - 1 or None)
            make_candidate(self.home / "candidate", RELEASES + 1)
        shutil.copytree(self.home / "releases", self._pristine)

    def _fill_store(self) -> None:
        import boto3

        boto3.client("s3").create_bucket(Bucket="penstock")
        self._restore_store()

    def _restore_store(self) -> None:
        store = ReleaseStore(self.at.releases)
        wanted, there = set(range(1, RELEASES + 1)), set(store.numbers())
        for number in there - wanted:
            store.delete(number)
        for number in wanted - there:
            store.publish(self._pristine / str(number), number)

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._servers[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def _start_gateway(self) -> None:
        where = ["--home", str(self.home), "--port", str(self.ports["gateway"])]
        model = ["--model-server", f"127.0.0.1:{self.ports['model']}"]
        self._start("gateway", [sys.executable, "-W", "ignore", "-m", "serving.gateway", *where, *model])
        _until(self._ready, "the gateway")

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.gateway}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def gateway(self) -> str:
        return f"http://127.0.0.1:{self.ports['gateway']}"

    def serve(self) -> None:
        """Starts the model server, in place of one that may run."""
        self.kill_server()
        ports = ["--grpc-port", str(self.ports["model"]), "--rest-port", str(self.ports["rest"])]
        where = [sys.executable, "-W", "ignore", "-m", "serving.model_server", "--home", str(self.home)]
        self._start("model server", [*where, *ports])
        _until(self._serves, "the model server")

    def _serves(self) -> bool:
        try:
            with ModelClient(self._direct.model_server) as client:
                client.ready(MODELS[0], 1)
        except ModelError:
            return False
        return True

    def kill_server(self) -> None:
        """kill -9."""
        if server := self._servers.pop("model server", None):
            server.kill()
            server.wait()

    def stop(self) -> None:
        """Ends everything that was started here."""
        for server in self._servers.values():
            server.terminate()
        for server in self._servers.values():
            server.wait()
        self.store_wire.close()
        self.server_wire.close()

    def reset(self, start: Routing, act: str) -> None:
        """The home, the store and the model server as a trial begins."""
        self.store_wire.mend()
        self.server_wire.mend()
        there = release.releases(self.home)
        for number in set(there) - set(range(1, RELEASES + 1)):
            shutil.rmtree(release.directory(self.home, number))
        for number in range(1, RELEASES + 1):
            if number not in there:
                shutil.copytree(self._pristine / str(number), release.directory(self.home, number))
        if act == "fetch and load":
            shutil.rmtree(release.directory(self.home, RELEASES))
        self._restore_store()
        self._put(start)

    def _put(self, document: Routing) -> None:
        path = self.home / "routing.json"
        path.with_suffix(".jsonl").unlink(missing_ok=True)
        for number in document.releases:
            release.link(self.home, number)
        base_paths = {model: release.base_path(self.home.resolve(), model) for model in MODELS}
        with ModelClient(self._direct.model_server) as client:
            client.load(base_paths, document.releases)
        routing.write(path, document)
        release.unlink_all_but(self.home, document.releases)

    def _scores(self) -> bytes:
        """What the champion of `LIVE` says of a user, to the bit."""
        asked = {"user_id": 7, "k": 10, "context": {"time_ms": 1_700_000_000_000}, "preview": True}
        answer = httpx.post(f"{self.gateway}/recommend", json=asked, timeout=30).json()
        return repr([(item["item_id"], item["score"], item["heads"]) for item in answer["items"]]).encode()

    def losses(self, act: str, documents: Sequence[Routing]) -> list[str]:
        """What is not as it must be whatever has happened: nothing of it is empty."""
        found = []
        try:
            live = routing.read(self.home / "routing.json")
        except RoutingError as error:
            return [f"routing: {error}"]
        if not any(_same(live, document) for document in documents):
            found.append(f"routing: {live}")
        for number in release.releases(self.home):
            try:
                release.verify(self.home, number)
            except ReleaseError as error:
                found.append(f"release {number}: {error}")
        kept = {*range(RELEASES - KEEP + 1, RELEASES + 1), *live.releases}
        kept -= {RELEASES} if act == "fetch and load" else set()
        if lost := kept - set(release.releases(self.home)):
            found.append(f"lost: releases {sorted(lost)}")
        return found

    def unfinished(self, act: Act, documents: Sequence[Routing]) -> list[str]:
        """What is not as the act should have left it."""
        found = self.losses(act.name, documents)
        live = routing.read(self.home / "routing.json")
        with ModelClient(self._direct.model_server) as client:
            for number in live.releases:
                for model in MODELS:
                    try:
                        if not client.ready(model, number):
                            found.append(f"{model} {number} is not loaded")
                    except ModelError as error:
                        found.append(str(error))
        stale = [path.name for path in (self.home / "releases").glob(".*-*")]
        if act.name == "build":
            numbers = [number for number in release.releases(self.home) if number > RELEASES]
            stored = [number for number in ReleaseStore(self._store_directly()).numbers() if number > RELEASES]
            if len(numbers) != 1 or stored != numbers or stale:
                found.append(f"made: {numbers}, in the store: {stored}, left over: {stale}")
        if act.name == "fetch and load" and (RELEASES not in release.releases(self.home) or stale):
            found.append(f"release {RELEASES} is not there; left over: {stale}")
        if act.name == "roll back" and not found and self._scores() != self.scores:
            found.append("the scores are not those of before, to the bit")
        return found

    def _store_directly(self) -> str:
        self.store_wire.mend()
        return self.at.releases


def _same(one: Routing, other: Routing) -> bool:
    """By all that decides who answers whom; former champions that were deleted may have gone from the list."""
    keys = ("champion", "challenger", "share", "salt")
    alike = all(getattr(one, key) == getattr(other, key) for key in keys)
    kept = tuple(number for number in other.previous if number in one.previous)
    return alike and one.previous == kept and one.previous[-1:] == other.previous[-1:]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial; `lost` and `unfinished` are empty where all is well."""

    act: str
    harm: Harm
    step: int
    said: str
    lost: tuple[str, ...]
    unfinished: tuple[str, ...]
    again_seconds: float


class Trials:
    """The processes of the trials are forked from one that has imported what they need."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._clock = place.home.parent / "clock"
        self._clock.write_text("+0")
        preload = os.environ.get("LD_PRELOAD")
        if Path(FAKETIME).exists():
            os.environ |= {"LD_PRELOAD": FAKETIME, CLOCK_FILE: str(self._clock)}
            os.environ |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["benchmarks.release_trials"])
        self._run("withdraw", LIVE, Fault("none"))  # starts the server of forks, which keeps this environment
        if Path(FAKETIME).exists():
            del os.environ["LD_PRELOAD"]
            if preload:
                os.environ["LD_PRELOAD"] = preload

    def steps(self, act: Act) -> int:
        """How many steps the act takes when nothing goes wrong."""
        self.place.reset(act.start, act.name)
        taken, said = self._run(act.name, act.start, Fault("none"))
        if said != "done" or (wrong := self.place.unfinished(act, [act.end])):
            raise RuntimeError(f"{act.name} without a fault: {said}, {wrong}")
        return taken

    def trial(self, act: Act, harm: Harm, step: int) -> Outcome:
        """One fault, and the same command again."""
        self.place.reset(act.start, act.name)
        self._clock.write_text("+0")
        kind: Kind = "signal" if harm in BY_SIGNAL else harm  # type: ignore[assignment]
        rivals: list[BaseProcess] = []
        _, said = self._run(act.name, act.start, Fault(kind, step), lambda: self._break(act, harm, rivals))
        for rival in rivals:
            rival.join(ACT_SECONDS)
        end = [act.end]
        meanwhile = [act.start, act.end]
        if harm == "two at once":
            assert act.both is not None
            end = [act.both]
            meanwhile += [act.both, routing.promote(act.start, 5)]
            meanwhile += [routing.promote(before, 6) for before in (act.start, act.end)]
        lost = self.place.losses(act.name, meanwhile)
        self.place.store_wire.mend()
        self.place.server_wire.mend()
        if harm == "server killed":
            self.place.serve()
        began = time.monotonic()
        _, again = self._run(act.name, act.start, Fault("none"))
        seconds = time.monotonic() - began
        self._clock.write_text("+0")
        unfinished = self.place.unfinished(act, end)
        if again != "done":
            unfinished.append(f"again: {again}")
        return Outcome(act.name, harm, step, said, tuple(lost), tuple(unfinished), seconds)

    def _break(self, act: Act, harm: Harm, rivals: list[BaseProcess]) -> None:
        if harm == "store away":
            self.place.store_wire.cut()
        elif harm == "server away":
            self.place.server_wire.cut()
        elif harm == "server killed":
            self.place.kill_server()
        else:
            rival = self._processes.Process(target=_rival, args=(act.name, self.place.home, self.place.at))
            rival.start()
            rivals.append(rival)

    def _run(self, act: str, start: Routing, fault: Fault, happen: Callable[[], None] | None = None) -> tuple[int, str]:
        here, there = self._processes.Pipe()
        process = self._processes.Process(target=_child, args=(act, self.place.home, self.place.at, fault, there))
        process.start()
        there.close()
        deadline = time.monotonic() + ACT_SECONDS
        try:
            while wait([here], timeout=max(0.0, deadline - time.monotonic())):
                said = here.recv()
                if said != "step":
                    process.join()
                    return said
                assert happen is not None
                happen()
                here.send("go on")
            process.kill()
            return 0, "it hangs"
        except (EOFError, ConnectionError):
            process.join()
            return 0, "killed"
        finally:
            here.close()


@contextmanager
def asking(place: Place) -> Iterator[Answers]:
    """Somebody asks for recommendations all the time."""
    answers, ended = Answers(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=place.gateway, timeout=30) as client:
            for user in itertools.cycle(USERS):
                if ended.wait(0.05):
                    return
                answers.take(client.post("/recommend", json={"user_id": user, "k": 10, "preview": True}))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join()


def planned(steps: dict[str, int], quick: bool) -> list[tuple[Act, Harm, int]]:
    """Act, harm and step of each trial: spread over the steps of the act."""
    trials: list[tuple[Act, Harm, int]] = []
    for act, (harm, count) in itertools.product(ACTS, TRIALS.items()):
        if harm == "store away" and "store" not in act.needs:
            continue
        if harm in ("server away", "server killed") and "server" not in act.needs:
            continue
        if (harm == "two at once" and act.rival is None) or (harm == "clock" and not Path(FAKETIME).exists()):
            continue
        most = min(count, 1 if quick else count, steps[act.name])
        places = np.linspace(1, steps[act.name], most + 2)[1:-1] if quick else np.linspace(1, steps[act.name], most)
        trials += [(act, harm, int(step)) for step in dict.fromkeys(np.rint(places))]
    return trials


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _until(holds: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} does not start")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one fault of a kind an act")
    parser.add_argument("--only", help="one act", choices=[act.name for act in ACTS])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="release-trials-") as folder:
        place = Place(Path(folder))
        try:
            trials = Trials(place)
            steps = {act.name: trials.steps(act) for act in ACTS}
            todo = [one for one in planned(steps, arguments.quick) if arguments.only in (None, one[0].name)]
            with asking(place) as answers:
                outcomes = []
                for place_of, (act, harm, step) in enumerate(todo, 1):
                    print(f"{place_of} of {len(todo)}: {act.name}, {harm} at step {step}", flush=True)
                    outcomes.append(trials.trial(act, harm, step))
        finally:
            place.stop()
    report(outcomes, steps, answers)


def report(outcomes: Sequence[Outcome], steps: dict[str, int], answers: Answers) -> None:
    """Prints the tables and writes the figures."""
    print(machine())
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.act, outcome.harm].append(outcome)
    show_columns(
        "faults",
        {
            "act": [act for act, _ in groups],
            "steps": [steps[act] for act, _ in groups],
            "fault": [harm for _, harm in groups],
            "trials": [len(found) for found in groups.values()],
            "something lost": [sum(bool(one.lost) for one in found) for found in groups.values()],
            "not recovered": [sum(bool(one.unfinished) for one in found) for found in groups.values()],
            "again, s": [max(one.again_seconds for one in found) for found in groups.values()],
        },
    )
    for outcome in outcomes:
        for wrong in (*outcome.lost, *outcome.unfinished):
            print(f"{outcome.act}, {outcome.harm} at step {outcome.step} ({outcome.said}): {wrong}")
    print(f"answers meanwhile: {dict(answers.told)}")
    for wrong in answers.wrong[:5]:
        print(wrong)
    total = sum(answers.told.values())
    rows = [
        Comparison("faults", len(outcomes), 200, "goal", "faults", at_least=1.0 if len(outcomes) > 100 else None),
        Comparison(
            "acts that lost something", sum(bool(one.lost) for one in outcomes), len(outcomes), "all", "acts", at_most=0
        ),
        Comparison(
            "acts not recovered", sum(bool(one.unfinished) for one in outcomes), len(outcomes), "all", "acts", at_most=0
        ),
        Comparison("answers of mixed releases", answers.told["mixed"], total, "all", "answers", at_most=0),
    ]
    show("release trials", rows)
    print(write("release_trials", rows))


if __name__ == "__main__":
    main()
