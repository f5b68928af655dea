"""What is online after feedback is what the log and the feedback give offline, whatever happened in between."""

from __future__ import annotations

import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from feature_repo.online import Online
from feature_repo.store import refresh
from penstock.features import feature_tables, view
from penstock.feedback import FeedbackLog, append_feedback, new_request_id
from serving.pusher import Pusher, Slates, Step
from tests.serving.conftest import END_MS, until
from tests.small_log import HOUR, START, an_event, write_log

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
FOREVER = 1e6
ACTIVITY = [feature.name for feature in view("user_activity").features if feature.name != "feedback_sequence"]
LABELS = ("click", "long_view", "like", "profile_enter")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log before any feedback: users 0 to 4, items 0 to 11, some of whom and which feedback will be of."""
    rng = random.Random(5)
    events = []
    for number in range(200):
        labels = {label: int(rng.random() < 0.3) for label in LABELS}
        at = START + rng.randrange(48 * 3600) * HOUR / 3600
        events.append(an_event(number, number % 5, number % 12, at, scenario=number % 2, **labels))
    return write_log(tmp_path_factory.mktemp("source"), events)


def log_of(source: Path, feedback: Path, folder: Path) -> Path:
    """The log and the feedback, as the prepare DAG's first task makes it."""
    shutil.copytree(source, folder)
    append_feedback(folder, feedback)
    return folder


class Home:
    """A home with a feature store of a log, and the gateway's log of feedback."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.source = path, source
        self.materialise()

    @property
    def feedback(self) -> Path:
        return self.path / "feedback"

    def materialise(self) -> None:
        """What the prepare DAG does with the feedback that there is."""
        log = log_of(self.source, self.feedback, self.path / f"log {time.monotonic_ns()}")
        refresh(self.path, log, self.path / "out")

    @contextmanager
    def store_away(self) -> Iterator[None]:
        """The database of the online store is somewhere else for a while."""
        database = self.path / "feast" / "packed.db"
        database.rename(database.with_name("elsewhere"))
        try:
            yield
        finally:
            database.with_name("elsewhere").rename(database)

    @contextmanager
    def gateway(self) -> Iterator[tuple[FeedbackLog, Pusher]]:
        """What of the gateway takes feedback."""
        with FeedbackLog(self.feedback) as log:
            pusher = Pusher(self.path, log, lambda: Online(self.path))
            pusher.start()
            try:
                yield log, pusher
            finally:
                pusher.close()

    def online(self) -> dict[int, dict[str, Any]]:
        """What the online store holds of everyone."""
        online = Online(self.path)
        found = {user: activity.stored() for user, activity in online.activity(range(12)).items()}
        return {user: {name: stored[name] for name in ACTIVITY} for user, stored in found.items()}

    def offline(self) -> dict[int, dict[str, Any]]:
        """What the log and the feedback give of everyone, when all of it has arrived."""
        log = log_of(self.source, self.feedback, self.path / f"log {time.monotonic_ns()}")
        table = feature_tables(log)["user_activity"].sort("event_timestamp").unique("user_id", keep="last")
        rows = {row["user_id"]: {name: row[name] for name in ACTIVITY} for row in table.iter_rows(named=True)}
        nothing: dict[str, Any] = {name: [] for name in ACTIVITY}
        return {user: rows.get(user, nothing) for user in range(12)}


@pytest.fixture
def home(tmp_path: Path, source: Path) -> Home:
    return Home(tmp_path / "home", source)


class Visitors:
    """Users, known and new, whose requests and outcomes come in parts, late, twice, and of no request at all."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.slates: list[tuple[int, list[int]]] = []
        self.time_ms = END_MS + 47 * HOUR_MS

    def visit(self, log: FeedbackLog) -> int:
        """One request or one feedback; its number."""
        rng = self.rng
        if not self.slates or rng.random() < 0.5:
            self.time_ms += rng.choice([1, 1000, MINUTE_MS, 20 * MINUTE_MS])
            request_id, items = new_request_id(), rng.sample(range(14), 4)
            self.slates.append((request_id, items))
            return log.impressions(
                request_id,
                rng.randrange(9),
                items,
                time_ms=self.time_ms,
                scenario=rng.randrange(2),
                device=0,
                release=1,
                variant="champion",
                features_us=END_MS * 1000,
            )
        request_id, items = rng.choice([*self.slates[-8:], (new_request_id(), [1])])
        events = [
            {"item_id": rng.choice([*items, 77]), **{label: int(rng.random() < 0.3) for label in LABELS}}
            for _ in range(rng.randrange(4))
        ]
        return log.outcomes(request_id, events)


def test_the_stored_rows_are_those_of_the_log_and_the_feedback(home: Home) -> None:
    visitors = Visitors(1)
    with home.gateway() as (log, pusher):
        for _ in range(150):
            last = visitors.visit(log)
        until(lambda: pusher.status().waiting == 0)
        assert pusher.status().records == last == 150
        assert home.online() == home.offline()


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_or_counted_twice(seed: int, home: Home) -> None:
    """The store is away, the gateway starts again, and everything is materialised, at any moment."""
    visitors = Visitors(seed)
    rng = random.Random(seed)
    for _ in range(4):
        with home.gateway() as (log, pusher):
            for _ in range(3):
                act = rng.choice(["away", "materialise", "go on", "go on"])
                if act == "away":
                    with home.store_away():
                        for _ in range(rng.randrange(1, 40)):
                            visitors.visit(log)
                        until(lambda: pusher.status().away_since_ms is not None)
                else:
                    for _ in range(rng.randrange(40)):
                        visitors.visit(log)
                if act == "materialise":
                    materialising = threading.Thread(target=home.materialise)
                    materialising.start()
                    while materialising.is_alive():
                        visitors.visit(log)
                        time.sleep(0.01)
                for _ in range(rng.randrange(20)):
                    visitors.visit(log)
            if rng.random() < 0.5:
                until(lambda: pusher.status().waiting == 0)
        if rng.random() < 0.5:
            # all of it is there already: a killed gateway pushed it
            with home.gateway() as (log, pusher):
                until(lambda: pusher.status().waiting == 0)
                before = home.online()
                home.materialise()
            assert home.online() == before
    with home.gateway() as (log, pusher):
        visitors.visit(log)
        until(lambda: pusher.status().waiting == 0)
    assert home.online() == home.offline()


def test_everything_twice_counts_once(home: Home) -> None:
    visitors = Visitors(3)
    with home.gateway() as (log, pusher):
        for _ in range(60):
            visitors.visit(log)
        until(lambda: pusher.status().waiting == 0)
    once = home.online()
    # a materialisation of what there was before the feedback, and then one of all of it: both are gone over again
    refresh(home.path, home.source, home.path / "out")
    assert home.online() != once
    for _ in range(2):
        with home.gateway() as (log, pusher):
            until(lambda: pusher.status().waiting == 0)
        assert home.online() == once
    home.materialise()
    with home.gateway() as (log, pusher):
        until(lambda: pusher.status().waiting == 0)
    assert home.online() == once == home.offline()


@pytest.mark.parametrize("clock", ["now", "the full hour of the log's end", "tomorrow, on the hour"])
def test_what_came_just_before_a_materialisation_is_in_it(clock: str, home: Home) -> None:
    now_ms = time.time_ns() // 1_000_000
    time_ms = {"now": now_ms, "tomorrow, on the hour": (now_ms // HOUR_MS + 24) * HOUR_MS}.get(
        clock, END_MS + 48 * HOUR_MS
    )
    with home.gateway() as (log, pusher):
        slate = {"scenario": 0, "device": 0, "release": 1, "variant": "champion", "features_us": 0}
        log.impressions(1, 3, [1, 2], time_ms=time_ms, **slate)
        time.sleep(0.005)
        log.outcomes(1, [{"item_id": 2, "long_view": 1}])
        until(lambda: pusher.status().waiting == 0)
        home.materialise()
        assert home.online() == home.offline()
        log.outcomes(1, [{"item_id": 1, "click": 1}])
        until(lambda: pusher.status().waiting == 0)
    assert home.online() == home.offline()


def test_a_store_that_is_away_is_told_once_and_so_is_its_return(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    visitors = Visitors(4)
    with home.gateway() as (log, pusher):
        visitors.visit(log)
        until(lambda: pusher.status().waiting == 0)
        with home.store_away():
            for _ in range(5):
                visitors.visit(log)
            until(lambda: pusher.status().away_since_ms is not None)
            status = pusher.status()
            assert (status.records, status.waiting) == (6, 5)
            assert "packed.db" in str(status.reason)
            pusher.wait(6, FOREVER)  # nobody waits for a store that is away
        until(lambda: pusher.status().away_since_ms is None)
        assert pusher.status().waiting == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gateway:")]
    assert len(told) == 2
    assert told[0].startswith(f"gateway: feedback waits in {home.feedback}: ")
    assert told[1] == "gateway: the feature store has taken 5 records that waited"


def test_a_store_that_others_write_to_is_waited_for(home: Home) -> None:
    visitors = Visitors(5)
    with home.gateway() as (log, pusher):
        other = sqlite3.connect(home.path / "feast" / "packed.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        for _ in range(5):
            last = visitors.visit(log)
        pusher.wait(last, 0.2)
        assert pusher.status().waiting > 0
        pusher.wait(last, FOREVER)  # and nobody else while nothing moves
        other.execute("ROLLBACK")
        other.close()
        until(lambda: pusher.status().waiting == 0)
    assert home.online() == home.offline()


def test_a_line_that_is_no_record_holds_up_what_follows_until_it_is_moved_away(home: Home) -> None:
    visitors = Visitors(9)
    with home.gateway() as (log, pusher):
        for _ in range(10):
            visitors.visit(log)
        until(lambda: pusher.status().waiting == 0)
        broken = home.feedback / "9998-01-01.jsonl"
        broken.write_text("{\n")
        until(lambda: "9998-01-01.jsonl, line 1: not a record" in str(pusher.status().reason))
        visitors.visit(log)
        broken.rename(home.path / "broken")
        until(lambda: pusher.status().waiting == 0 and pusher.status().reason is None)
    assert home.online() == home.offline()


def test_before_the_first_materialisation_feedback_waits(tmp_path: Path, source: Path) -> None:
    home = Home.__new__(Home)
    home.path, home.source = tmp_path / "home", source
    visitors = Visitors(6)
    with home.gateway() as (log, pusher):
        for _ in range(20):
            visitors.visit(log)
        until(lambda: pusher.status().away_since_ms is not None)
        refresh(home.path, source, home.path / "out")
        until(lambda: pusher.status().waiting == 0 and pusher.status().away_since_ms is None)
    assert home.online() == home.offline()


def test_feedback_that_was_removed_does_not_hold_up_what_comes(home: Home) -> None:
    with home.gateway() as (log, pusher):
        visitors = Visitors(7)
        for _ in range(60):
            visitors.visit(log)
        until(lambda: pusher.status().waiting == 0)
    home.materialise()
    shutil.rmtree(home.feedback)
    slate = {"time_ms": visitors.time_ms + HOUR_MS, "scenario": 0, "device": 0, "release": 1, "variant": "champion"}
    with home.gateway() as (log, pusher):
        for user in range(9):
            log.impressions(user, user, [1], **slate, features_us=0)
        until(lambda: pusher.status().waiting == 0)
    hour = slate["time_ms"] // HOUR_MS
    assert all(
        row["hour_starts"][-1] == hour and row["hour_impressions"][-1] == 1 for row in list(home.online().values())[:9]
    )


def record(sequence: int, request_id: int, *, at_ms: int = 0, **fields: Any) -> dict[str, Any]:
    kind = "impressions" if "items" in fields else "outcomes"
    context = {"user_id": 7, "time_ms": 5, "scenario": 1} if kind == "impressions" else {}
    return {"sequence": sequence, "kind": kind, "request_id": request_id, "arrived_ms": at_ms, **context, **fields}


def test_records_become_what_is_new_in_them() -> None:
    slates = Slates()
    assert slates.step(record(1, 9, items=[10, 11])) == Step(1, 7, 5, 1, shown=2)
    assert slates.step(record(2, 9, items=[10])) is None  # of one request, the first counts
    told = record(3, 9, events=[{"item_id": 10, "click": 1}, {"item_id": 99, "click": 1}, {"item_id": 10, "like": 1}])
    assert slates.step(told) == Step(3, 7, 5, 1, outcomes=((10, 0, 1), (10, 1, 5)))
    assert slates.step(told) is None
    assert slates.step(record(4, 9, events=[{"item_id": 11, "click": 0, "watch_time_ms": 5}])) is None
    assert slates.step(record(5, 8, events=[{"item_id": 10, "click": 1}])) is None
    assert slates.step(record(6, 7, items=[])) is None
    slates.close()


def test_outcomes_may_come_for_seven_days() -> None:
    slates = Slates()
    week_ms = 7 * 24 * HOUR_MS
    slates.step(record(1, 1, items=[10]))
    slates.step(record(2, 2, items=[10], at_ms=week_ms))
    assert slates.step(record(3, 1, events=[{"item_id": 10, "click": 1}], at_ms=week_ms)) is not None
    slates.step(record(4, 3, items=[10], at_ms=week_ms + 1))
    assert slates.step(record(5, 1, events=[{"item_id": 10, "like": 1}], at_ms=week_ms + 1)) is None
    assert slates.step(record(6, 2, events=[{"item_id": 10, "like": 1}], at_ms=week_ms + 1)) is not None
    slates.close()
