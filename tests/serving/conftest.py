"""A real home: a small feature store, releases of tiny SavedModels, the model server and the gateway."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest
import tensorflow as tf
import uvicorn
from fastapi import FastAPI

from feature_repo.store import refresh
from penstock import popular, release, routing
from penstock.features import PRIOR_IMPRESSIONS
from penstock.release import Candidate
from penstock.routing import Routing
from serving.gateway import create_app
from serving.model_client import ModelClient
from serving.model_server import ModelServer
from serving.settings import Settings
from tests.small_log import HOUR, START, an_event, write_log

ITEMS = 40
CATALOGUE = 1000
"""Release N recommends items N*1000 … N*1000+39 and its rank model knows them by that: a mixed release shows."""

UPLOADED_MS = int((START - 5 * HOUR).timestamp() * 1000)
"""When `tests.small_log` uploads all items."""

END_MS = int((START + HOUR).timestamp() * 1000)
"""The end of the log."""

KNOWN_USER = 7
CROWD = 1
HISTORY = [1000, 1003, 2001]


class Recall(tf.Module):
    """Items N*1000, N*1000+1, … in that order, without the excluded. A user's vector is 1 and the history's length."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.ids = tf.constant(np.arange(ITEMS) + number * CATALOGUE, tf.int64)

    @tf.function(
        input_signature=[
            {
                "history_items": tf.TensorSpec([None, None], tf.int64, "history_items"),
                "register_days": tf.TensorSpec([None], tf.float32, "register_days"),
                "hour": tf.TensorSpec([None], tf.int64, "hour"),
                "k": tf.TensorSpec([], tf.int32, "k"),
                "exclude": tf.TensorSpec([None, None], tf.int64, "exclude"),
            }
        ]
    )
    def recommend(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        excluded = tf.reduce_any(self.ids[None, :, None] == raw["exclude"][:, None, :], axis=-1)
        scores = tf.where(excluded, -np.inf, tf.range(ITEMS, 0, -1, tf.float32)[None, :])
        scores += 0 * raw["register_days"][:, None]
        scores, places = tf.math.top_k(scores, tf.minimum(raw["k"], ITEMS))
        ids = tf.where(tf.math.is_finite(scores), tf.gather(self.ids, places), -1)
        missing = [[0, 0], [0, raw["k"] - tf.shape(ids)[1]]]
        seen = tf.reduce_sum(tf.cast(raw["history_items"] >= 0, tf.float32), axis=1)
        query = tf.stack([tf.ones_like(seen), seen], axis=1)
        return {"ids": tf.pad(ids, missing, constant_values=-1), "scores": tf.pad(scores, missing), "query": query}


class Rank(tf.Module):
    """click: 1 for items of the same release, else 0. long_view: the item's click rate. like: its age in days."""

    def __init__(self, number: int, broken: bool) -> None:
        super().__init__()
        self.number = number
        self.broken = broken

    @tf.function(
        input_signature=[
            {
                "item_id": tf.TensorSpec([None], tf.int64, "item_id"),
                "user_id": tf.TensorSpec([None], tf.int64, "user_id"),
                "history_items": tf.TensorSpec([None, None], tf.int64, "history_items"),
                "tags": tf.TensorSpec([None, None], tf.int64, "tags"),
                "scenario": tf.TensorSpec([None], tf.int64, "scenario"),
                "item_click_rate_7d": tf.TensorSpec([None], tf.float32, "item_click_rate_7d"),
                "item_age_hours": tf.TensorSpec([None], tf.float32, "item_age_hours"),
            }
        ]
    )
    def predict(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        same = tf.cast(raw["item_id"] // CATALOGUE == self.number, tf.float32)
        return {
            "click": same * (np.nan if self.broken else 1.0),
            "long_view": raw["item_click_rate_7d"],
            "like": raw["item_age_hours"] / 24,
        }


def save(module: tf.Module, name: str, path: Path) -> None:
    signature = getattr(module, name)
    tf.saved_model.save(module, str(path), signatures={"serving_default": signature, name: signature})


WEIGHTS = {"click": 1.0, "long_view": 0.5, "like": 0.0}


def fusion_of(number: int) -> str:
    return "weighted_product" if number == 2 else "weighted_sum"


def make_candidate(folder: Path, number: int, *, broken: bool = False, parent: int | None = None) -> Candidate:
    """The outputs of a run that trained and judged tiny models; they know the number of the release they will be."""
    save(Recall(number), "recommend", folder / "recall" / "saved_model")
    save(Rank(number, broken), "predict", folder / "rank" / "saved_model")
    verdict = {"approved": True, "sentence": "", "champion": parent, "heads": {}, "data_window": {}}
    known = {
        "recall": {"ids": [number * CATALOGUE + place for place in range(10)], "scores": [40.0 - n for n in range(10)]},
        "rank": {"click": [1.0] * 10, "long_view": [0.0] * 10, "like": [0.0] * 10},
    }
    files = {
        "recall/config.json": '{"model": "tiny", "config": {}, "seed": 1}',
        "recall/metrics.json": '{"inputs": [], "validation": {}, "test": {}}',
        "rank/config.json": '{"model": "tiny", "config": {}, "seed": 1}',
        "rank/metrics.json": '{"inputs": [], "validation": {}, "test": {}}',
        "weights/weights.json": json.dumps({"fusion": fusion_of(number), "weights": WEIGHTS}),
        "verdict/verdict.json": json.dumps(verdict),
        "rehearsal/probe.json": json.dumps(known),
        "report.html": "<p>report</p>",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    vectors = pl.Series([[1.0, float(place)] for place in range(ITEMS)], dtype=pl.List(pl.Float32))
    ids = pl.Series(range(number * CATALOGUE, number * CATALOGUE + ITEMS))
    pl.DataFrame({"item_id": ids, "vector": vectors}).write_parquet(folder / "recall" / "items.parquet")
    often = {"segment": "", "rank": range(ITEMS), "item_id": range(number * CATALOGUE, number * CATALOGUE + ITEMS)}
    pl.DataFrame(often, schema=popular.SCHEMA).write_parquet(folder / "recall" / popular.FILE)
    return Candidate(*(folder / part for part in ("recall", "rank", "weights", "verdict", "rehearsal", "report.html")))


def build(home: Path, folder: Path, *, broken: bool = False, parent: int | None = None) -> int:
    """Makes the next release of `home`."""
    number = max(release.releases(home), default=0) + 1
    made = make_candidate(folder, number, broken=broken, parent=parent)
    said = {"run_id": f"run {number}", "git_revision": "abc", "environment": "def", "approved_by": "a person"}
    built = release.build(home, made, **said)
    assert built == number
    return number


def impressions(item: int) -> int:
    """A different number for each item of a release, in no order of theirs; none of them is clicked."""
    return 1 + item * 17 % ITEMS


OFTEN = 9999
"""An item of no release, which all clicks are of."""

CLICKS = 500


def click_rate(item: int) -> float:
    """What item_click_rate_7d is."""
    shown = 1 + CLICKS + 3 * sum(impressions(place) for place in range(ITEMS))
    return float(np.float32(PRIOR_IMPRESSIONS * (CLICKS / shown) / (impressions(item) + PRIOR_IMPRESSIONS)))


def write_known_log(folder: Path) -> Path:
    """A log of one hour: one known user, and a crowd that was shown the items of releases 1 to 3."""
    items = [number * CATALOGUE + place for number in (1, 2, 3) for place in range(ITEMS)]
    shown = [item for item in items for _ in range(impressions(item))]
    events = [an_event(0, KNOWN_USER, OFTEN, START)]
    events += [an_event(1 + n, CROWD, OFTEN, START + timedelta(seconds=n), click=1) for n in range(CLICKS)]
    events += [an_event(1 + CLICKS + n, CROWD, item, START + timedelta(seconds=1 + n)) for n, item in enumerate(shown)]
    before = START - HOUR
    history = {"user_id": KNOWN_USER, "event_time": before, "created_time": before, "items": HISTORY}
    return write_log(folder, events, [history])


@dataclass(frozen=True)
class System:
    """What runs: releases 1 and 2 are good, the rank model of 3 gives NaN."""

    home: Path
    address: str
    rest: str
    server: ModelServer

    @property
    def settings(self) -> Settings:
        return Settings(home=self.home, model_server=self.address, served_share=1.0, deadline_seconds=30.0)

    def load(self, numbers: tuple[int, ...]) -> None:
        """Has the model server serve just these releases."""
        for number in numbers:
            release.link(self.home, number)
        base_paths = {model: release.base_path(self.home, model) for model in release.MODELS}
        with ModelClient(self.address) as client:
            client.load(base_paths, numbers)
        release.unlink_all_but(self.home, numbers)

    def put(self, document: Routing) -> None:
        """Makes `document` what is obeyed, and loads what it names."""
        self.load(document.releases)
        routing.write(self.home / "routing.json", document)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    home = tmp_path_factory.mktemp("home")
    refresh(home, write_known_log(tmp_path_factory.mktemp("log")), home / "out")
    for number in (1, 2, 3):
        build(home, tmp_path_factory.mktemp(f"candidate{number}"), broken=number == 3)
    server = ModelServer(home, 0, 0)
    server.start()
    yield System(home, f"127.0.0.1:{server.grpc_port}", f"http://127.0.0.1:{server.rest_port}", server)
    server.stop()


@pytest.fixture
def system(started: System, monkeypatch: pytest.MonkeyPatch) -> System:
    """The system with release 1 live and nothing else."""
    monkeypatch.setenv("PENSTOCK_MODEL_SERVER", started.address)
    started.put(Routing(champion=1))
    return started


@contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of `app`, served on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # requests wait from here on
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def gateway(system: System) -> Iterator[httpx.Client]:
    with serving(create_app(system.settings)) as client:
        yield client


def lines(home: Path) -> list[str]:
    """What the gateway's log holds."""
    return [line for path in sorted((home / "feedback").glob("*.jsonl")) for line in path.read_text().splitlines()]


def until(holds: Callable[[], bool]) -> None:
    """Waits for it; the test's own time limit ends that."""
    while not holds():
        time.sleep(0.01)
