from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from prometheus_client.parser import text_string_to_metric_families
from tensorflow_serving.apis import classification_pb2

from serving import conformance, rest
from serving.conformance import GRPC_CHECKS, MODEL, REST_CHECKS, TWO, Subject
from serving.messages import MAX_MESSAGE, QUEUE_FULL, PredictionLog, SavedModel, from_tensor, to_tensor
from serving.model_server import ModelServer, PortError
from serving.monitoring import BOUNDS, PATH, Histogram
from serving.servables import WARM_UP, WARM_UP_RECORDS, Model, RequestError, Servables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small models of the conformance suite."""
    path = tmp_path_factory.mktemp("models")
    conformance.make(path)
    return path


@contextmanager
def served(home: Path, base_path: Path, **limits: int) -> Iterator[tuple[ModelServer, Subject]]:
    server = ModelServer(home, 0, 0, **limits)
    server.start()
    subject = conformance.connect(f"127.0.0.1:{server.grpc_port}", f"127.0.0.1:{server.rest_port}", base_path)
    try:
        yield server, subject
    finally:
        subject.channel.close()
        server.stop()


@pytest.fixture(scope="module")
def started(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelServer, Subject]]:
    """A server of a home without a release, as first seen."""
    with served(tmp_path_factory.mktemp("home"), base_path) as running:
        yield running


@pytest.fixture
def subject(started: tuple[ModelServer, Subject]) -> Subject:
    started[1].serve((1, 2))
    return started[1]


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("check", [*GRPC_CHECKS, *REST_CHECKS], ids=lambda check: check.__name__)
def test_it_does_as_tf_serving_does(started: tuple[ModelServer, Subject], check: Callable[[Subject], None]) -> None:
    conformance.run(check, started[1])


def test_the_suite_says_what_holds_and_what_does_not(
    started: tuple[ModelServer, Subject], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(_: Subject) -> None:
        raise conformance.CheckError("it is not")

    monkeypatch.setattr(conformance, "GRPC_CHECKS", (conformance.a_scalar_is_one, wrong))
    monkeypatch.setattr(conformance, "REST_CHECKS", (conformance.rest_answers_rows,))
    server, subject = started
    addresses = (f"127.0.0.1:{server.grpc_port}", "--rest", f"127.0.0.1:{server.rest_port}")
    monkeypatch.setattr(sys, "argv", ["", *addresses, "--base-path", str(subject.made)])
    with pytest.raises(SystemExit) as ended:
        conformance.main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ["holds  a scalar is one", "FAILS  wrong: it is not", "holds  rest answers rows", "2 of 3 hold"]


def test_a_version_answers_what_its_signature_does(subject: Subject) -> None:
    """The server runs the graph as TF Serving does, by a way of the session's that is not public."""
    loaded = tf.saved_model.load(str(subject.made / MODEL / "2"))
    wanted = loaded.signatures["serving_default"](**{name: tf.constant(array) for name, array in TWO.items()})
    response = subject.predict(TWO)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(from_tensor(response.outputs[name]), tensor.numpy())


def test_answers_carry_their_bytes_in_tensor_content(subject: Subject) -> None:
    tensor = subject.predict(TWO).outputs["y"]
    assert tensor.tensor_content == np.array([2, 4], np.float32).tobytes()
    assert not tensor.float_val


@pytest.mark.parametrize(
    ("inputs", "signature", "message"),
    [
        ({"k": np.array([1, 2], np.int32)}, "scalar", "input k: expects shape [] but [2] is provided"),
        ({"x": np.zeros((1, 3), np.float32)}, "one", "input x: expects shape [-1, 2] but [1, 3] is provided"),
        (TWO | {"n": np.zeros((1, 1), np.int64)}, "", "input n: expects shape [-1] but [1, 1] is provided"),
        (
            TWO | {"x": TWO["x"].astype(np.float64)},
            "",
            "Expects arg[1] to be float but double is provided (input x)",
        ),
    ],
)
def test_the_input_that_does_not_fit_is_named(
    subject: Subject, inputs: dict[str, np.ndarray], signature: str, message: str
) -> None:
    found = refused(lambda: subject.predict(inputs, signature=signature))
    assert found == (grpc.StatusCode.INVALID_ARGUMENT, message)


def test_services_that_are_not_there_are_unimplemented(subject: Subject) -> None:
    request = classification_pb2.ClassificationRequest()
    assert refused(lambda: subject.prediction.Classify(request))[0] is grpc.StatusCode.UNIMPLEMENTED
    status, document = subject.http("POST", f"/v1/models/{MODEL}:classify", "{}")
    assert (status, document) == (501, {"error": "classify is not served here; use predict"})


def test_a_signature_that_only_initialises_cannot_be_asked(subject: Subject) -> None:
    code, message = refused(lambda: subject.predict({}, signature="__saved_model_init_op"))
    assert code is grpc.StatusCode.OUT_OF_RANGE
    assert "NoOp" in message
    subject.predict(TWO)


def copied(base_path: Path, folder: Path, version: int) -> Path:
    """Version 1 of the model, as `version` of a model below `folder`."""
    out = folder / MODEL / str(version)
    shutil.copytree(base_path / MODEL / "1", out)
    return out


def loaded(folder: Path, *versions: int) -> Servables:
    servables = Servables()
    servables.configure([Model(MODEL, folder / MODEL, "specific", versions=versions)])
    return servables


def test_an_input_with_a_default_may_be_left_out(base_path: Path, tmp_path: Path) -> None:
    file = copied(base_path, tmp_path, 1) / "saved_model.pb"
    document = SavedModel.FromString(file.read_bytes())
    document.meta_graphs[0].signature_def["serving_default"].defaults["n"].CopyFrom(to_tensor(np.array([7])))
    file.write_bytes(document.SerializeToString())
    servables = loaded(tmp_path, 1)
    with servables.lease(MODEL) as servable:
        outputs = servable.predict("", {"x": to_tensor(TWO["x"])})
        assert outputs["z"].tolist() == [8]
        with pytest.raises(RequestError, match="Signature input alias: x") as caught:
            servable.predict("", {"n": to_tensor(TWO["n"])})
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no default value provided" in caught.value.message
    servables.close()


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (lambda path: path.write_bytes(b"no graph"), grpc.StatusCode.DATA_LOSS, "Cannot parse"),
        (lambda path: path.unlink(), grpc.StatusCode.NOT_FOUND, "Could not find SavedModel .pb or .pbtxt"),
    ],
)
def test_a_model_that_does_not_load_is_said_and_harms_nobody(
    base_path: Path, tmp_path: Path, spoil: Callable[[Path], None], code: grpc.StatusCode, reason: str
) -> None:
    copied(base_path, tmp_path, 1)
    copied(base_path, tmp_path, 2)
    spoil(copied(base_path, tmp_path, 5) / "saved_model.pb")
    servables = loaded(tmp_path, 1)
    servables.configure([Model(MODEL, tmp_path / MODEL, "specific", versions=(1,), labels={"stable": 1})])
    with pytest.raises(RequestError, match=f"{MODEL} version 5 does not load: {reason}") as caught:
        servables.configure([Model(MODEL, tmp_path / MODEL, "specific", versions=(1, 2, 5))])
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert servables.states(MODEL, 5)[5].code is code
    assert servables.served == {MODEL: [1]}
    with servables.lease(MODEL, label="stable") as servable:
        assert servable.version == 1
    while servables.states(MODEL, 2)[2].state != "END":  # it was loaded in vain
        time.sleep(0.01)
    servables.close()


def test_a_base_path_that_changes_loads_the_version_anew(base_path: Path, tmp_path: Path) -> None:
    copied(base_path, tmp_path / "a", 1)
    copied(base_path, tmp_path / "b", 1)
    servables = loaded(tmp_path / "a", 1)
    with servables.lease(MODEL) as before:
        servables.configure([Model(MODEL, tmp_path / "b" / MODEL, "specific", versions=(1,))])
        with servables.lease(MODEL) as after:
            assert after is not before
        assert before.predict("", {name: to_tensor(array) for name, array in TWO.items()})
    assert servables.states(MODEL)[1].state == "AVAILABLE"
    servables.close()


def test_an_unloaded_version_is_freed_when_its_last_request_ends(base_path: Path, tmp_path: Path) -> None:
    copied(base_path, tmp_path, 1)
    copied(base_path, tmp_path, 2)
    servables = loaded(tmp_path, 1)
    with servables.lease(MODEL, 1) as servable:
        gone = weakref.ref(servable)
        servables.configure([Model(MODEL, tmp_path / MODEL, "specific", versions=(2,))])
        assert servables.states(MODEL, 1)[1].state == "UNLOADING"
        assert servable.predict("", {name: to_tensor(array) for name, array in TWO.items()})
    del servable
    while servables.states(MODEL, 1)[1].state != "END":
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
    assert gone() is None
    servables.close()


def records(path: Path, logs: list[PredictionLog]) -> None:
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


def test_a_thousand_warm_up_requests_are_run_and_no_more_are_taken(base_path: Path, tmp_path: Path) -> None:
    log = PredictionLog()
    for name, array in TWO.items():
        log.predict_log.request.inputs[name].CopyFrom(to_tensor(array))
    records(copied(base_path, tmp_path, 1) / WARM_UP, [log] * WARM_UP_RECORDS)
    records(copied(base_path, tmp_path, 2) / WARM_UP, [log] * (WARM_UP_RECORDS + 1))
    servables = loaded(tmp_path, 1)
    assert f":tensorflow:serving:runtime_latency_count{{{of(MODEL)}}} {WARM_UP_RECORDS}\n" in servables.metrics.page()
    with pytest.raises(RequestError, match=rf"Number of warmup records exceeds the maximum \({WARM_UP_RECORDS}\)"):
        servables.configure([Model(MODEL, tmp_path / MODEL, "specific", versions=(1, 2))])
    servables.close()


def of(model: str) -> str:
    return f'model_name="{model}",API="Predict",runtime="TF1"'


def test_a_warm_up_of_another_kind_is_refused_or_left_out(base_path: Path, tmp_path: Path) -> None:
    session, classify = PredictionLog(), PredictionLog()
    session.session_run_log.SetInParent()
    classify.classify_log.SetInParent()
    records(copied(base_path, tmp_path, 1) / WARM_UP, [session])
    records(copied(base_path, tmp_path, 2) / WARM_UP, [classify])
    with pytest.raises(RequestError, match="Unsupported log_type for warmup: 5"):
        loaded(tmp_path, 1)
    loaded(tmp_path, 2).close()


@contextmanager
def busy(subject: Subject, requests: int, seconds: float = 1.0) -> Iterator[list[Future[Any]]]:
    """So many requests that take their time, sent from threads of their own."""
    wait = {"seconds": np.array(seconds)}
    with ThreadPoolExecutor(requests) as pool:
        yield [pool.submit(subject.predict, wait, signature="wait") for _ in range(requests)]


def test_what_it_has_no_room_for_is_refused_at_once(base_path: Path, tmp_path: Path) -> None:
    with served(tmp_path, base_path, threads=1, queue=2) as (server, subject):
        subject.serve((1,))
        with busy(subject, 3) as asked:
            until(lambda: server.pool.waiting == 2)
            code, message = refused(lambda: subject.predict(TWO))
            assert (code, message) == (
                grpc.StatusCode.UNAVAILABLE,
                f"{QUEUE_FULL}: 2 wait already; try again later",
            )
            status, document = subject.http("POST", f"/v1/models/{MODEL}:predict", {"inputs": {}})
            assert (status, document) == (503, {"error": message})
            assert subject.available() == {1}  # whoever asks how it stands is answered
            assert "penstock_model_server_queue_length{} 2\n" in subject.http("GET", PATH)[1]
            assert [request.exception() for request in asked] == [None] * 3
        assert list(subject.predict(TWO).outputs)
        page = subject.http("GET", PATH)[1]
        assert "penstock_model_server_queue_length{} 0\n" in page
        assert ':tensorflow:serving:request_count{model_name="",status="UNAVAILABLE"} 1\n' in page


def test_a_request_whose_deadline_has_passed_is_not_run(base_path: Path, tmp_path: Path) -> None:
    with served(tmp_path, base_path, threads=1) as (server, subject):
        subject.serve((1,))
        with busy(subject, 1) as asked:
            until(lambda: server.pool.running == 1)
            request = conformance._request(TWO)
            code, _ = refused(lambda: subject.prediction.Predict(request, timeout=0.1))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert asked[0].exception() is None
        until(lambda: not server.pool.running)
        assert f":tensorflow:serving:runtime_latency_count{{{of(MODEL)}}} 1\n" in server.metrics.page()


def test_rest_has_a_deadline(base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "SECONDS", 0.2)
    with served(tmp_path, base_path) as (_, subject):
        subject.serve((1,))
        body = {"signature_name": "wait", "inputs": 0.5}
        assert subject.http("POST", f"/v1/models/{MODEL}:predict", body)[0] == 504


def test_a_message_that_is_too_large_is_refused(subject: Subject) -> None:
    rows = np.zeros(MAX_MESSAGE // 4, np.float32)
    code, message = refused(lambda: subject.predict(TWO | {"x": rows}))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in message


def test_few_bytes_that_claim_much_memory_are_refused(subject: Subject) -> None:
    request = conformance._request(TWO)
    tensor = request.inputs["n"]
    tensor.tensor_content = b""
    tensor.tensor_shape.dim[0].size = (1 << 25) + 1
    code, message = refused(lambda: subject.prediction.Predict(request))
    assert (code, "bytes" in message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


@pytest.mark.parametrize(
    ("length", "status"), [(str(MAX_MESSAGE + 1), b"413"), ("many", b"413"), ("-1", b"413"), (None, b"411")]
)
def test_a_body_must_say_its_length(subject: Subject, length: str | None, status: bytes) -> None:
    said = f"Content-Length: {length}\r\n" if length else ""
    request = f"POST /v1/models/{MODEL}:predict HTTP/1.1\r\nHost: a\r\n{said}\r\n"
    with socket.create_connection(("127.0.0.1", int(subject.rest.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # it also ends the connection
    assert answer.split(b" ")[1] == status


def test_connections_are_bounded(base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "CONNECTIONS", 2)
    with served(tmp_path, base_path) as (server, _), ExitStack() as open_:
        address = ("127.0.0.1", server.rest_port)
        request = b"GET /v1/models/q HTTP/1.1\r\nHost: a\r\n\r\n"
        for _ in range(2):
            connection = open_.enter_context(socket.create_connection(address, timeout=20))
            connection.sendall(request)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404")
        with socket.create_connection(address, timeout=20) as connection:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 503")


def test_metrics_are_prometheus_and_do_not_grow_with_what_is_asked(subject: Subject) -> None:
    subject.predict(TWO)
    subject.http("POST", f"/v1/models/{MODEL}:predict", {"inputs": {"x": [1], "n": [1]}})
    for name in ("q", "r"):
        refused(lambda name=name: subject.predict(TWO, model=name))
    page = subject.http("GET", PATH)[1]
    families = {family.name: family for family in text_string_to_metric_families(page)}
    counts = {tuple(s.labels.values()): s.value for s in families[":tensorflow:serving:request_count"].samples}
    assert counts[MODEL, "OK"] >= 2
    assert counts["", "NOT_FOUND"] >= 2
    assert {model for model, _ in counts} == {MODEL, ""}
    latency = families[":tensorflow:serving:request_latency"]
    assert latency.type == "histogram"
    assert {sample.labels["entrypoint"] for sample in latency.samples} == {"GRPC", "REST"}
    path = str(subject.made / MODEL / "1")
    attempts = families[":tensorflow:cc:saved_model:load_attempt_count"].samples
    assert {"model_path": path, "status": "success"} in [sample.labels for sample in attempts]
    (taken,) = [
        s for s in families[":tensorflow:cc:saved_model:load_latency"].samples if s.labels["model_path"] == path
    ]
    assert 1e3 < taken.value < 1e8


def test_latencies_fall_into_tf_servings_buckets() -> None:
    histogram = Histogram("latency", ("model",))
    for value in (10.0, 10.1, 18.0, 1e12):
        histogram.add('a"b', microseconds=value)
    lines = histogram.lines()
    assert lines[:3] == [
        'latency_bucket{model="a\\"b",le="10"} 1',
        'latency_bucket{model="a\\"b",le="18"} 3',
        'latency_bucket{model="a\\"b",le="32.4"} 3',
    ]
    assert lines[len(BOUNDS) - 1 : len(BOUNDS) + 1] == [
        f'latency_bucket{{model="a\\"b",le="{10 * 1.8**32:g}"}} 3',
        'latency_bucket{model="a\\"b",le="+Inf"} 4',
    ]
    assert lines[-1] == 'latency_count{model="a\\"b"} 4'


def until(holds: Callable[[], bool]) -> None:
    """Waits for it; the test's own time limit ends that."""
    while not holds():
        time.sleep(0.01)


def test_a_server_follows_its_base_paths_until_it_is_told_otherwise(base_path: Path, tmp_path: Path) -> None:
    server = ModelServer(tmp_path, 0, 0)
    try:
        server.servables.follow(server.models)
        assert server.servables.served == {"recall": [], "rank": []}
        (tmp_path / "models" / "recall" / "4").mkdir(parents=True)
        shutil.copytree(base_path / MODEL / "1", tmp_path / "models" / "recall" / "1")
        (message,) = server.servables.follow()
        assert message.startswith("recall version 4 does not load")
        assert server.servables.served == {"recall": [1], "rank": []}
        assert server.servables.follow() == []
        shutil.rmtree(tmp_path / "models" / "recall")
        server.servables.follow()
        assert server.servables.served == {"recall": [], "rank": []}
    finally:
        server.stop()


def test_a_port_in_use_is_named(started: tuple[ModelServer, Subject], tmp_path: Path) -> None:
    server, _ = started
    for ports in ((server.grpc_port, 0), (0, server.rest_port)):
        with pytest.raises(PortError, match=f"port {max(ports)} of 127.0.0.1"):
            ModelServer(tmp_path, *ports)


def test_the_command_answers_what_runs_when_it_is_told_to_end(base_path: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "recall").mkdir(parents=True)
    (tmp_path / "models" / "recall" / "1").symlink_to(base_path / MODEL / "1")
    command = [sys.executable, "-m", "serving.model_server", "--home", str(tmp_path), "--grpc-port", "0"]
    with subprocess.Popen(
        [*command, "--rest-port", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.endswith("serving recall [1], rank []\n"), line
            found = re.search(r"gRPC (\S+), REST (\S+),", line)
            assert found is not None
            # loads stand back; the threads that answer, TensorFlow's among them, do not
            threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
            own = os.getpriority(os.PRIO_PROCESS, process.pid)
            assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {own}
            subject = conformance.connect(found[1], found[2], base_path)
            wait = {"seconds": np.array(1.5)}
            with ThreadPoolExecutor(2) as pool:
                over_grpc = pool.submit(subject.predict, wait, model="recall", signature="wait")
                body = json.dumps({"signature_name": "wait", "inputs": 1.5})
                over_rest = pool.submit(subject.http, "POST", "/v1/models/recall:predict", body)
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
                assert from_tensor(over_grpc.result().outputs["version"]) == 1
                status, document = over_rest.result()
                assert (status, document["outputs"]["version"]) == (200, 1)
            try:
                assert process.wait(30) == 0
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)  # it says where its threads stand
                raise AssertionError(process.communicate(timeout=30)[1]) from None
            subject.channel.close()
            assert process.stderr is not None
            # the one line that TensorFlow writes whatever it is told
            said = [text for text in process.stderr.read().splitlines() if "absl::InitializeLog" not in text]
            assert [text for text in said if not text.startswith("I0000")] == []
        finally:
            process.kill()


def test_it_ends_after_the_last_byte_of_the_last_answer(tmp_path: Path) -> None:
    server = ModelServer(tmp_path, 0, 0)
    server.start()
    stopping = threading.Thread(target=server.stop)
    with server._rest.answering():
        stopping.start()
        stopping.join(2)
        assert stopping.is_alive()
    stopping.join(10)
    assert not stopping.is_alive()


def test_nothing_is_left_running(base_path: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with served(tmp_path, base_path) as (_, subject):
        subject.serve((1,))
        subject.predict(TWO)
    left = [thread.name for thread in set(threading.enumerate()) - before if not thread.daemon]
    assert left == []
