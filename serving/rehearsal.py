"""A candidate in a fresh model server, asked as the gateway asks: whether it answers, what, and how fast."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from penstock.durable import replace_file
from penstock.examples import read_slice
from penstock.features import names_of
from penstock.release import FEATURE_SERVICES, MODELS, PROBE, ReleaseError, base_path
from penstock.scoring import feed
from serving import probe
from serving.model_client import LOAD_SECONDS, ModelClient, ModelError, Signature

VERSION = 1
ITEMS = 200
"""An answer of the recall model, and a request to the rank model, has so many items."""

WARM_UP = 3
"""The first requests are not timed: a model server warms up before it gets any."""

REQUEST = {"user_id", "item_id", "time_ms", "scenario", "device"}
"""What a request itself says."""


def rehearse(examples: Path, recall: Path, rank: Path, out: Path, requests: int = 300) -> dict[str, Any]:
    """Loads both models of a candidate in a new server, sends logged test rows, and writes `rehearsal.json`.

    A request is a call of the recall model for a row and one of the rank model for `ITEMS` rows, as the gateway makes
    them. What is answered is held against `trained.parquet`, what the trained models say of the same rows.

    Args:
        recall, rank: the directories of the exported models.
        requests: how many; they are told apart only by their rows, which repeat when there are fewer.

    `probe.json` beside it is what both models answer to a request that says nothing (`serving.probe`), as far as they
    answer the same twice: by it a server that has loaded the release is told from one that has not.

    Returns:
        What was written: `requests`, `finite`, `largest_difference` (of probabilities, and of recall scores by the
        largest score), `p50_ms` and `p99_ms`; and `error`, a sentence, where there is no answer.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with _server({"recall": recall / "saved_model", "rank": rank / "saved_model"}) as client:
            replace_file(out / PROBE, (json.dumps(_steady(client), indent=1) + "\n").encode())
            found = _asked(client, examples, recall, rank, requests) | {"error": None}
    except (ModelError, ReleaseError, RehearsalError, OSError, pl.exceptions.PolarsError) as error:
        found = {"requests": 0, "finite": False, "error": str(error).splitlines()[0].rstrip(".")}
    (out / "rehearsal.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _steady(client: ModelClient) -> dict[str, dict[str, list[Any]]]:
    once, again = (probe.answers(client, VERSION) for _ in range(2))
    return {
        model: {name: values for name, values in outputs.items() if values == again[model].get(name)}
        for model, outputs in once.items()
    }


class RehearsalError(RuntimeError):
    """A candidate that cannot be asked."""


@contextmanager
def _server(models: dict[str, Path]) -> Iterator[ModelClient]:
    """A client of a new server of these models, on a free port of this machine, which ends with the block."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        for name, path in models.items():
            base_path(home, name).mkdir(parents=True)
            (base_path(home, name) / str(VERSION)).symlink_to(path.resolve())
        command = [sys.executable, "-W", "ignore", "-m", "serving.model_server", "--home", str(home)]
        log = home / "log"
        with log.open("w") as lines:
            server = subprocess.Popen(
                [*command, "--grpc-port", "0", "--rest-port", "0"], stdout=lines, stderr=subprocess.STDOUT
            )
        try:
            client = ModelClient(_address(server, log), timeout_seconds=30.0)
            try:
                yield client
            finally:
                client.close()
        finally:
            server.terminate()
            server.wait()


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + LOAD_SECONDS
    while time.monotonic() < deadline:
        said = re.search(r"gRPC ([\w.:]+),", log.read_text())
        if said:
            return said.group(1)
        if server.poll() is not None:
            break
        time.sleep(0.1)
    last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
    raise RehearsalError(f"a fresh model server did not start in {LOAD_SECONDS:.0f} s: {last}")


def _asked(client: ModelClient, examples: Path, recall: Path, rank: Path, requests: int) -> dict[str, Any]:
    rows = read_slice(examples, "test")
    trained = {name: pl.read_parquet(path / "trained.parquet") for name, path in (("recall", recall), ("rank", rank))}
    of_users, of_rows = (
        part.select("event_id").join(rows, "event_id", how="left", maintain_order="left") for part in trained.values()
    )
    items = pl.read_parquet(recall / "items.parquet")
    place = {item: at for at, item in enumerate(items["item_id"].to_list())}
    vectors = np.array(items["vector"].to_list(), np.float64)
    queries = np.array(trained["recall"]["vector"].to_list(), np.float64)
    signatures = {name: client.signature(name, VERSION) for name in MODELS}
    for name, signature in signatures.items():
        _check_inputs(name, signature)
    times, finite, largest = [], True, 0.0
    for number in range(-WARM_UP, requests):
        user, at = number % of_users.height, (number * ITEMS) % of_rows.height
        chosen = np.arange(at, at + ITEMS) % of_rows.height
        inputs = _inputs(signatures["recall"], of_users[user]) | {
            "k": np.array(ITEMS, np.int32),
            "exclude": feed(of_users[user], "history_items", np.dtype(np.int64), 2),
        }
        batch = _inputs(signatures["rank"], of_rows[chosen])
        started = time.perf_counter()
        answer = client.predict("recall", VERSION, inputs)
        heads = client.predict("rank", VERSION, batch)
        if number >= 0:
            times.append((time.perf_counter() - started) * 1000)
        some = answer["ids"][0] >= 0
        scores = answer["scores"][0][some].astype(np.float64)
        finite = finite and bool(np.isfinite(scores).all()) and all(np.isfinite(said).all() for said in heads.values())
        if not finite:
            break
        strange = [int(item) for item in answer["ids"][0][some] if int(item) not in place]
        if strange:
            raise RehearsalError(f"recall answers item {strange[0]}, which its items.parquet does not have")
        expected = vectors[[place[int(item)] for item in answer["ids"][0][some]]] @ queries[user]
        apart = np.abs(scores - expected) / np.maximum(np.abs(expected).max(initial=0.0), 1.0)
        largest = max(largest, float(apart.max(initial=0.0)))
        for name in trained["rank"].columns[1:]:
            said, wanted = heads[name.removeprefix("p_")], trained["rank"][name].to_numpy()[chosen]
            scale = 1.0 if name != "p_watch_time" else max(float(np.abs(wanted).max()), 1.0)
            largest = max(largest, float(np.abs(said - wanted).max()) / scale)
    p50, p99 = np.quantile(times, (0.5, 0.99))
    return {
        "requests": len(times),
        "finite": finite,
        "largest_difference": largest,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
    }


def _check_inputs(name: str, signature: Signature) -> None:
    """A model that reads what no feature service gives would answer nothing, whatever it says of the log."""
    given = names_of(FEATURE_SERVICES["rank"]) | REQUEST | {"k", "exclude"}  # one reading answers both models
    unknown = sorted(set(signature.inputs) - given)
    if unknown:
        raise RehearsalError(f"{name} reads {', '.join(unknown)}, which the feature service does not give")


def _inputs(signature: Signature, rows: pl.DataFrame) -> dict[str, np.ndarray]:
    return {
        name: feed(rows, name, spec.dtype, spec.rank or 0)
        for name, spec in signature.inputs.items()
        if name not in ("k", "exclude")
    }
