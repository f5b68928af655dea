"""Requests that nobody would write: the server answers each with a code of TF Serving's, and the next one rightly."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import conformance
from serving.conformance import MODEL, TWO, Subject
from serving.messages import TensorProto, from_tensor
from serving.model_server import ModelServer

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
METHODS = (
    "PredictionService/Predict",
    "PredictionService/GetModelMetadata",
    "ModelService/GetModelStatus",
    "ModelService/HandleReloadConfigRequest",
)
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    base_path = tmp_path_factory.mktemp("models")
    conformance.make(base_path)
    server = ModelServer(tmp_path_factory.mktemp("home"), 0, 0)
    server.start()
    found = conformance.connect(f"127.0.0.1:{server.grpc_port}", f"127.0.0.1:{server.rest_port}", base_path)
    found.serve((1,))
    yield found
    found.channel.close()
    server.stop()


def answers_rightly(subject: Subject) -> None:
    response = subject.predict(TWO)
    np.testing.assert_array_equal(from_tensor(response.outputs["y"]), TWO["x"])


def parses(method: str, content: bytes) -> bool:
    messages = {
        METHODS[0]: conformance.predict_messages.PredictRequest,
        METHODS[1]: conformance.metadata_messages.GetModelMetadataRequest,
        METHODS[2]: conformance.status_messages.GetModelStatusRequest,
        METHODS[3]: conformance.management_messages.ReloadConfigRequest,
    }
    try:
        messages[method].FromString(content)
    except DecodeError:
        return False
    return True


def send(subject: Subject, method: str, content: bytes) -> grpc.StatusCode:
    call = subject.channel.unary_unary(f"/tensorflow.serving.{method}")
    try:
        call(content, timeout=60)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def check(subject: Subject, method: str, content: bytes) -> None:
    code = send(subject, method, content)
    if parses(method, content):
        assert code in REFUSALS | {grpc.StatusCode.OK}, code
    else:  # as gRPC's C++ servers say it
        assert code is grpc.StatusCode.INTERNAL
    answers_rightly(subject)


@FUZZ
@given(method=st.sampled_from(METHODS[:3]), content=st.binary(max_size=200))
def test_bytes_at_random(subject: Subject, method: str, content: bytes) -> None:
    check(subject, method, content)


@FUZZ
@given(data=st.data())
def test_a_request_with_bytes_changed(subject: Subject, data: st.DataObject) -> None:
    signature = data.draw(st.sampled_from(["", "every", "text", "scalar"]))
    inputs = {"": TWO, "every": conformance.EVERY, "text": {"text": conformance.TEXT}, "scalar": {"k": np.array(1)}}
    content = bytearray(conformance._request(inputs[signature], signature=signature).SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        act = data.draw(st.sampled_from(("set", "cut", "double")))
        if act == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif act == "cut" and len(content) > 1:
            del content[place : place + data.draw(st.integers(1, 8))]
        else:
            content[place:place] = content[place : place + 16]
        if not content:
            break
    check(subject, METHODS[0], bytes(content))


TENSORS = st.builds(
    lambda dtype, sizes, unknown, content, values: _tensor(dtype, sizes, unknown, content, values),
    dtype=st.one_of(st.integers(0, 40), st.sampled_from((1, 3, 7, 9, 10, 19, 101, 999))),
    sizes=st.lists(
        st.one_of(st.integers(-2, 4), st.sampled_from((1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)))), max_size=5
    ),
    unknown=st.booleans(),
    content=st.one_of(
        st.just(b""),
        st.binary(max_size=40),
        st.just(struct.pack("<2f", float("nan"), float("inf"))),
        st.just(b"\0" * 16),
    ),
    values=st.fixed_dictionaries(
        {},
        optional={
            "float_val": st.lists(st.floats(width=32), max_size=3),
            "int_val": st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=3),
            "int64_val": st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=3),
            "string_val": st.lists(st.binary(max_size=5), max_size=3),
            "bool_val": st.lists(st.booleans(), max_size=3),
            "half_val": st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=3),
        },
    ),
)


def _tensor(dtype: int, sizes: list[int], unknown: bool, content: bytes, values: dict[str, list]) -> Any:
    tensor = TensorProto(dtype=dtype, tensor_content=content, **values)
    tensor.tensor_shape.unknown_rank = unknown
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


@FUZZ
@given(tensor=TENSORS, where=st.sampled_from(("", "every", "text", "scalar")), place=st.integers(0, 9))
def test_tensors_of_any_dtype_shape_and_content(subject: Subject, tensor: Any, where: str, place: int) -> None:
    inputs = {"": TWO, "every": conformance.EVERY, "text": {"text": conformance.TEXT}, "scalar": {"k": np.array(1)}}
    request = conformance._request(inputs[where], signature=where)
    names = sorted(request.inputs)
    request.inputs[names[place % len(names)]].CopyFrom(tensor)
    check(subject, METHODS[0], request.SerializeToString())


@FUZZ
@given(
    name=st.one_of(st.sampled_from((MODEL, "")), st.text(max_size=5)),
    version=st.one_of(st.none(), st.sampled_from((1, 2)), st.integers(-(1 << 63), (1 << 63) - 1)),
    label=st.one_of(st.just(""), st.text(max_size=5)),
    signature=st.one_of(st.just(""), st.text(max_size=5)),
    outputs=st.lists(st.one_of(st.sampled_from(("y", "z")), st.text(max_size=5)), max_size=3),
    method=st.sampled_from(METHODS[:3]),
)
def test_requests_for_anything(
    subject: Subject, name: str, version: int | None, label: str, signature: str, outputs: list[str], method: str
) -> None:
    spec: dict[str, Any] = {"model": name, "signature": signature}
    if version is not None:
        spec["version"] = version
    elif label:
        spec["label"] = label
    request = conformance._request(TWO, outputs, **spec)
    check(subject, method, request.SerializeToString())


@FUZZ
@given(
    name=st.one_of(st.just(MODEL), st.text(max_size=5)),
    path=st.one_of(st.text(max_size=10), st.just("/"), st.just("/nowhere"), st.just("/dev/null")),
    platform=st.sampled_from(("", "tensorflow", "other")),
    versions=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=2),
    labels=st.dictionaries(st.text(max_size=3), st.integers(-2, 2), max_size=2),
)
def test_configs_of_anything_harm_nobody(
    subject: Subject, name: str, path: str, platform: str, versions: list[int], labels: dict[str, int]
) -> None:
    request = conformance.management_messages.ReloadConfigRequest()
    config = request.config.model_config_list.config.add(name=name, base_path=path, model_platform=platform)
    config.model_version_policy.specific.versions.extend(versions)
    for label, version in labels.items():
        config.version_labels[label] = version
    assert send(subject, METHODS[3], request.SerializeToString()) in REFUSALS
    answers_rightly(subject)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from((1e300, 1 << 70, {"b64": "YQ=="}, {"b64": "?"}, {"b64": 1})),
    ),
    lambda part: st.one_of(
        st.lists(part, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(("x", "n", "b64", "k")), st.text(max_size=3)), part, max_size=3),
    ),
    max_leaves=8,
)
DOCUMENTS = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {},
        optional={
            "instances": JSON,
            "inputs": st.one_of(JSON, st.fixed_dictionaries({"x": JSON, "n": JSON})),
            "signature_name": st.one_of(st.sampled_from(("one", "every", "text", "scalar", "")), JSON),
        },
    ),
)


@FUZZ
@given(document=DOCUMENTS)
def test_rest_is_sent_any_document(subject: Subject, document: Any) -> None:
    status, answer = subject.http("POST", f"/v1/models/{MODEL}:predict", json.dumps(document))
    assert status in (200, 400, 404, 429), answer
    assert status == 200 or set(answer) == {"error"}
    answers_rightly(subject)


@FUZZ
@given(body=st.one_of(st.binary(max_size=60), st.sampled_from((b"[" * 100_000, b"\xff", b'{"inputs": "\\ud800"}'))))
def test_rest_is_sent_any_bytes(subject: Subject, body: bytes) -> None:
    status, answer = subject.http("POST", f"/v1/models/{MODEL}:predict", body)
    assert status == 400, answer
    assert "error" in answer
    answers_rightly(subject)


@FUZZ
@given(
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
    method=st.sampled_from(("GET", "POST")),
)
def test_rest_is_asked_any_path(subject: Subject, path: str, method: str) -> None:
    status, _ = subject.http(method, f"/v1/models/{path}", "{}" if method == "POST" else None)
    assert status in (400, 404, 501)
    answers_rightly(subject)
