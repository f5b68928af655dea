"""The embedded model server beside its models called in process.

`make bench-model-server` prints the tables and writes build/bench/model_server.json; QUICK=1 is a smaller form of it.
The server runs in a process of its own; so does a gRPC server of the same kind with one call that does nothing, whose
round trip is taken off. The model is MMoE over all features that rank models read, with KuaiRand-Pure's numbers of ids
and weights that are not trained; a request is 200 rows, as the gateway sends them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.rank_speed import SIZES
from benchmarks.table import Comparison, machine, show, show_columns, write
from serving.messages import predict_messages
from serving.model_client import ModelClient
from serving.model_server import THREADS
from serving.monitoring import Metrics
from serving.servables import Servable

ROWS = 200
CLIENTS = 4
LISTS = {"history_items": 50}
"""Elements of a list; of others, 8."""

COSTS, THROUGHPUT = 1.15, 0.5
NULL = "/null/Null"


@dataclass(frozen=True)
class Size:
    """How often everything is called, one after another, and how long throughput is measured."""

    rounds: int
    seconds: float


FULL = Size(1000, 8.0)
QUICK = Size(100, 2.0)
WARM_UP = 20

Act = Callable[[], Any]


def export_model(out: Path) -> None:
    """Writes the SavedModel."""
    import keras

    import penstock
    from penstock import export
    from penstock.examples import FEATURES, Schema
    from penstock.ranking import Ranking

    keras.utils.set_random_seed(1)
    vocabularies = {
        feature.vocabulary: np.arange(SIZES.get(feature.vocabulary, 1000), dtype=np.int64)
        for feature in FEATURES
        if feature.vocabulary
    }
    scales = {feature.name: (1.0, 1.5) for feature in FEATURES if feature.kind in ("count", "number")}
    schema = Schema(FEATURES, vocabularies, scales, rows=1_000_000)
    module = penstock.module("rank", "mmoe")
    config = penstock.config(module, {})
    model = Ranking(module.build(config, schema), config, 10.0, schema.size("device"))
    model.build()
    export.export_rank(model, schema, out)


def requests(signature: Any) -> dict[str, np.ndarray]:
    """The inputs of one request."""
    random = np.random.default_rng(2)
    inputs = {}
    for name, spec in signature.structured_input_signature[1].items():
        shape = (ROWS,) if spec.shape.rank == 1 else (ROWS, LISTS.get(name, 8))
        values = random.integers(0, 1000, shape) if spec.dtype.is_integer else random.exponential(3.0, shape)
        inputs[name] = values.astype(spec.dtype.as_numpy_dtype)
    return inputs


@contextmanager
def process(*command: str | Path) -> Iterator[str]:
    """The first line that a process says, which ends with the block."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *map(str, command)], stdout=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stdout is not None
            yield started.stdout.readline()
        finally:
            started.terminate()


def serve_nothing() -> None:
    """A server whose only call gives back what it is sent."""
    handler = grpc.unary_unary_rpc_method_handler(lambda message, _: message)
    service, name = NULL.strip("/").split("/")
    server = grpc.server(
        ThreadPoolExecutor(THREADS), handlers=(grpc.method_handlers_generic_handler(service, {name: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


def in_turn(acts: Mapping[str, Act], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each act in each round: all meet the same moments of the machine."""
    for act in acts.values():
        for _ in range(WARM_UP):
            act()
    times = {name: np.empty(rounds) for name in acts}
    for place in range(rounds):
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            times[name][place] = (time.perf_counter() - started) * 1000.0
    return times


def a_second(acts: list[Act], seconds: float) -> float:
    """How often the acts are done a second, each on a thread of its own."""
    ended = threading.Event()
    counts = [0] * len(acts)

    def repeat(place: int) -> None:
        while not ended.is_set():
            acts[place]()
            counts[place] += 1

    threads = [threading.Thread(target=repeat, args=(place,)) for place in range(len(acts))]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    ended.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def parts(saved_model: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, Act]:
    """What a Predict consists of besides its transport, each on its own."""
    from serving.messages import fill, from_tensor

    servable = Servable("rank", 1, saved_model, Metrics())

    def build() -> Any:
        request = predict_messages.PredictRequest()
        for name, array in inputs.items():
            fill(request.inputs[name], array)
        return request

    request = build()
    content = request.SerializeToString()
    parsed = predict_messages.PredictRequest.FromString(content)
    arrays = [from_tensor(parsed.inputs[name]) for name in (input_.name for input_ in servable._inputs["predict"])]
    run, _ = servable._callable("predict", ())
    return {
        "client: arrays to a message": build,
        "client: message to bytes": request.SerializeToString,
        "server: bytes to a message": lambda: predict_messages.PredictRequest.FromString(content),
        "server: message to arrays, checks": lambda: [from_tensor(tensor) for tensor in parsed.inputs.values()],
        "server: the graph": lambda: run(*arrays),
    }


def measure(folder: Path, size: Size) -> list[Comparison]:
    """All measures."""
    import tensorflow as tf

    print("exporting the model ...", flush=True)
    export_model(folder)
    saved_model = folder / "saved_model"
    (folder / "models" / "rank").mkdir(parents=True)
    (folder / "models" / "rank" / "1").symlink_to(saved_model)
    server = ("serving.model_server", "--home", folder, "--grpc-port", "0", "--rest-port", "0")
    with process(*server) as said, process("benchmarks.model_server", "--null") as null_said:
        address = said.split("gRPC ")[1].split(",")[0]
        null = grpc.insecure_channel(null_said.strip()).unary_unary(NULL)
        loaded = tf.saved_model.load(str(saved_model))
        signature = loaded.signatures["serving_default"]
        inputs = requests(signature)
        print(f"{len(inputs)} inputs, {sum(array.nbytes for array in inputs.values()):,} bytes", flush=True)
        ready = {name: tf.constant(array) for name, array in inputs.items()}
        clients = [ModelClient(address, timeout_seconds=60.0) for _ in range(CLIENTS)]

        def called() -> Any:
            return {name: tensor.numpy() for name, tensor in signature(**ready).items()}

        def called_with_arrays() -> Any:
            tensors = {name: tf.constant(array) for name, array in inputs.items()}
            return {name: tensor.numpy() for name, tensor in signature(**tensors).items()}

        def asked(client: ModelClient) -> Act:
            return lambda: client.predict("rank", 1, inputs)

        answer, wanted = asked(clients[0])(), called()
        if any(not np.array_equal(answer[name], array) for name, array in wanted.items()):
            raise SystemExit("the server answers something else than the signature")
        print("latency ...", flush=True)
        acts = {
            "an empty round trip": lambda: null(b""),
            "signature, tensors made": called,
            "signature, of arrays": called_with_arrays,
            "Predict": asked(clients[0]),
        }
        times = in_turn(acts, size.rounds)
        print("throughput ...", flush=True)
        rates: dict[str, list[float]] = {}
        for _ in range(3):
            for name, of in (
                ("in process, one caller", [called]),
                (f"in process, {CLIENTS} callers", [called] * CLIENTS),
                (f"{CLIENTS} clients", [asked(client) for client in clients]),
            ):
                rates.setdefault(name, []).append(a_second(of, size.seconds / 3))
        for client in clients:
            client.close()
    print("parts ...", flush=True)
    spent = in_turn(parts(saved_model, inputs), size.rounds // 2)
    _show(times | spent, rates)
    beyond = float(np.median(times["Predict"] - times["an empty round trip"]))
    rate = {name: statistics.median(found) for name, found in rates.items()}
    one = float(np.median(times["signature, tensors made"]))
    arrays = float(np.median(times["signature, of arrays"]))
    what = f"Predict of {ROWS} rows beyond an empty round trip"
    clients_rate = rate[f"{CLIENTS} clients"]
    return [
        Comparison(what, beyond, one, "signature in process, tensors made", "ms", at_most=COSTS),
        Comparison(what, beyond, arrays, "signature in process, of arrays", "ms", at_most=COSTS),
        Comparison(
            f"{CLIENTS} clients",
            clients_rate,
            rate["in process, one caller"],
            "in process, one caller",
            "requests/s",
            at_least=THROUGHPUT,
        ),
        Comparison(
            f"{CLIENTS} clients",
            clients_rate,
            rate[f"in process, {CLIENTS} callers"],
            f"in process, {CLIENTS} callers",
            "requests/s",
            at_least=THROUGHPUT,
        ),
    ]


def _show(times: Mapping[str, np.ndarray], rates: Mapping[str, list[float]]) -> None:
    show_columns(
        "Milliseconds",
        {
            "what": list(times),
            "p50": [float(np.median(found)) for found in times.values()],
            "p25": [float(np.quantile(found, 0.25)) for found in times.values()],
            "p75": [float(np.quantile(found, 0.75)) for found in times.values()],
            "p99": [float(np.quantile(found, 0.99)) for found in times.values()],
        },
    )
    show_columns(
        "Requests a second",
        {
            "what": list(rates),
            "median of 3": [statistics.median(found) for found in rates.values()],
            "least": [min(found) for found in rates.values()],
            "most": [max(found) for found in rates.values()],
        },
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute")
    parser.add_argument("--null", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.null:
        serve_nothing()
        return
    print(machine())
    with tempfile.TemporaryDirectory(prefix="penstock-") as name:
        rows = measure(Path(name), QUICK if arguments.quick else FULL)
    show("The model server", rows)
    print(f"written to {write('model_server', rows)}")


if __name__ == "__main__":
    main()
