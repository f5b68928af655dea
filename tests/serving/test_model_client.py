from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from serving import conformance
from serving.conformance import MODEL, TWO
from serving.messages import SavedModel
from serving.model_client import ModelClient, ModelError
from serving.model_server import ModelServer
from serving.servables import Servables

SIGNATURES = {"every": conformance.EVERY, "text": {"text": conformance.TEXT}, "one": {"x": np.ones((2, 2), np.float32)}}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conformance suite's models, and its signatures as default signatures of models of their own."""
    path = tmp_path_factory.mktemp("models")
    conformance.make(path)
    for name in SIGNATURES:
        out = path / name / "1"
        out.parent.mkdir()
        (path / MODEL / "1").rename(out)
        file = out / "saved_model.pb"
        document = SavedModel.FromString(file.read_bytes())
        definitions = document.meta_graphs[0].signature_def
        definitions["serving_default"].CopyFrom(definitions[name])
        file.write_bytes(document.SerializeToString())
        conformance.make(path)  # what was moved away
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    started = ModelServer(tmp_path_factory.mktemp("home"), 0, 0)
    started.start()
    yield started
    started.stop()


@pytest.fixture
def client(server: ModelServer) -> Iterator[ModelClient]:
    with ModelClient(f"127.0.0.1:{server.grpc_port}", timeout_seconds=20) as client:
        yield client


def nobody() -> str:
    """An address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def over_rest(server: ModelServer) -> Iterator[ModelClient]:
    with ModelClient(nobody(), timeout_seconds=20, rest=f"127.0.0.1:{server.rest_port}") as client:
        yield client


def labelled(servables: Servables, *labels: str) -> list[int]:
    found = []
    for label in labels:
        with servables.lease(MODEL, label=label) as servable:
            found.append(servable.version)
    return found


def test_a_label_leads_to_an_available_version_all_the_while(
    server: ModelServer, client: ModelClient, base_path: Path
) -> None:
    """Though versions come and go below it, and TF Serving refuses it where there is nothing yet."""
    paths = {MODEL: base_path / MODEL}
    client.load(paths, (1, 2), labels={"stable": 1, "canary": 2})
    assert labelled(server.servables, "stable", "canary") == [1, 2]
    ended = threading.Event()
    errors = []

    def ask() -> None:
        while not ended.is_set():
            try:
                labelled(server.servables, "stable", "canary")
            except Exception as error:
                errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        client.load(paths, (2, 3), labels={"stable": 2, "canary": 3})
        client.load(paths, (1,), labels={"stable": 1, "canary": 1})
        client.load(paths, (3, 1), labels={"stable": 3, "canary": 1})
    finally:
        ended.set()
        thread.join()
    assert errors == []
    assert server.servables.served == {MODEL: [1, 3]}
    assert labelled(server.servables, "stable", "canary") == [3, 1]


def test_labels_stay_unless_others_are_given(server: ModelServer, client: ModelClient, base_path: Path) -> None:
    paths = {MODEL: base_path / MODEL}
    client.load(paths, (1, 2), labels={"stable": 1, "canary": 2, "other": 2})
    client.load(paths, (1, 3))
    assert labelled(server.servables, "stable") == [1]
    assert client.labels(MODEL, ("stable", "canary", "other")) == {"stable": 1}
    client.load(paths, (1, 3), labels={})
    assert client.labels(MODEL, ("stable", "canary", "other")) == {}
    with pytest.raises(ValueError, match=r"labels \{'stable': 2\} are not all of versions \[1, 3\]"):
        client.load(paths, (1, 3), labels={"stable": 2})


def test_what_does_not_load_is_named(client: ModelClient, base_path: Path) -> None:
    paths = {MODEL: base_path / MODEL}
    with pytest.raises(ModelError, match=f"loading of {MODEL} versions 1, 8 at .*: {MODEL} version 8 does not load"):
        client.load(paths, (1, 8))
    with pytest.raises(ModelError, match="Could not find version 77") as caught:
        client.load(paths, (1, 77))
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    with pytest.raises(ModelError, match="does not answer") as caught, ModelClient(nobody()) as away:
        away.load(paths, (1,))
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_each_call_has_its_deadline(client: ModelClient, base_path: Path) -> None:
    client.load({MODEL: base_path / MODEL}, (1,))
    with pytest.raises(ModelError) as caught:
        client.predict(MODEL, 1, TWO, seconds=1e-6)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert set(client.predict(MODEL, 1, TWO, seconds=20)) == {"y", "z"}
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # takes connections, and says nothing
        ModelClient("127.0.0.1:1", 0.2, f"127.0.0.1:{silent.getsockname()[1]}") as waiting,
        pytest.raises(ModelError) as caught,
    ):
        waiting.ready(MODEL, 1)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("name", SIGNATURES)
def test_rest_answers_what_grpc_does(name: str, server: ModelServer, client: ModelClient, base_path: Path) -> None:
    inputs = SIGNATURES[name]
    client.load({name: base_path / name}, (1,))
    with over_rest(server) as other:
        assert other.ready(name, 1)
        assert not other.ready(name, 77)
        assert other.signature(name, 1) == client.signature(name, 1)
        wanted, found = client.predict(name, 1, inputs), other.predict(name, 1, inputs)
        assert found.keys() == wanted.keys()
        for output, array in wanted.items():
            assert found[output].dtype == array.dtype
            np.testing.assert_array_equal(found[output], array)


def test_where_grpc_is_away_rest_says_what_it_cannot_do(server: ModelServer, base_path: Path) -> None:
    with over_rest(server) as client:
        with pytest.raises(ModelError, match="over REST models cannot be loaded: make gRPC reachable"):
            client.load({MODEL: base_path / MODEL}, (1,))
        with pytest.raises(ModelError, match="over REST: Servable not found for request: Specific") as caught:
            client.predict("q", 1, TWO)
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
    with ModelClient(nobody(), rest=nobody()) as client, pytest.raises(ModelError) as caught:
        client.ready(MODEL, 1)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_refuses_is_not_asked_again_over_rest(base_path: Path, tmp_path: Path) -> None:
    server = ModelServer(tmp_path, 0, 0, threads=1, queue=0)
    server.start()
    address, rest = f"127.0.0.1:{server.grpc_port}", f"127.0.0.1:{server.rest_port}"
    try:
        with ModelClient(address, timeout_seconds=20, rest=rest) as client:
            client.load({MODEL: base_path / MODEL}, (1,))
            release = threading.Event()
            held = server.pool.submit(release.wait)
            with pytest.raises(ModelError, match="The queue of requests is full") as caught:
                client.predict(MODEL, 1, TWO)
            assert "over REST" not in str(caught.value)
            release.set()
            held.result()
            assert client.predict(MODEL, 1, TWO)
    finally:
        server.stop()
