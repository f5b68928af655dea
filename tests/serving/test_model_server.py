from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2

from penstock import release, routing
from penstock.routing import Routing
from serving.messages import (
    ModelServiceStub,
    PredictionServiceStub,
    from_tensor,
    management_messages,
    metadata_messages,
    predict_messages,
    status_messages,
    to_tensor,
)
from serving.model_server import ModelServer, PortError
from tests.serving.conftest import System

ROOT = Path(__file__).resolve().parents[2]

RECALL = {
    "history_items": np.array([[1, -1]], np.int64),
    "register_days": np.array([3.0], np.float32),
    "hour": np.array([4], np.int64),
    "k": np.array(5, np.int32),
    "exclude": np.array([[1001]], np.int64),
}


@pytest.fixture
def stubs(system: System):
    with grpc.insecure_channel(system.address) as channel:
        yield PredictionServiceStub(channel), ModelServiceStub(channel)


def predict_request(
    inputs: dict[str, np.ndarray], model: str = "recall", version: int | None = None, **spec: str
) -> Any:
    request = predict_messages.PredictRequest()
    request.model_spec.name = model
    if version is not None:
        request.model_spec.version.value = version
    for key, value in spec.items():
        setattr(request.model_spec, key, value)
    for name, array in inputs.items():
        request.inputs[name].CopyFrom(to_tensor(array))
    return request


def refused(method: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        method(request, timeout=20)
    return caught.value.code(), caught.value.details()


def test_predict_answers_and_says_by_whom(stubs) -> None:
    response = stubs[0].Predict(predict_request(RECALL), timeout=20)
    assert from_tensor(response.outputs["ids"]).tolist() == [[1000, 1002, 1003, 1004, 1005]]
    assert from_tensor(response.outputs["scores"]).dtype == np.float32
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("recall", 1, "serving_default")


def test_predict_takes_what_a_stock_client_sends(stubs) -> None:
    request = predict_request({}, version=1, signature_name="recommend")
    for name, array in RECALL.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array.tolist(), array.dtype))
    response = stubs[0].Predict(request, timeout=20)
    assert tf.make_ndarray(response.outputs["ids"]).tolist() == [[1000, 1002, 1003, 1004, 1005]]


def test_an_output_filter_chooses(stubs) -> None:
    request = predict_request(RECALL)
    request.output_filter.append("ids")
    assert list(stubs[0].Predict(request, timeout=20).outputs) == ["ids"]
    request.output_filter.append("ids")
    assert refused(stubs[0].Predict, request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "duplicate output tensor alias: ids",
    )
    request.output_filter[:] = ["vectors"]
    code, message = refused(stubs[0].Predict, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message == (
        "output tensor alias not found in signature: vectors Outputs expected to be in the set {ids,scores}."
    )


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in RECALL.items() if key != name}


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        (without("k"), ["4!=5", "Sent extra: {}.", "Missing but required: {k}."]),
        (RECALL | {"age": np.array([1])}, ["6!=5", "Sent extra: {age}.", "Missing but required: {}."]),
        (without("k") | {"K": RECALL["k"]}, ["input tensor alias not found in signature: K."]),
        (RECALL | {"k": np.array(5, np.int64)}, ["input k", "expects int32 but int64 is provided"]),
        (RECALL | {"k": np.array([5], np.int32)}, ["input k", "expects shape [] but [1] is provided"]),
        (RECALL | {"exclude": np.array([1])}, ["input exclude", "expects shape [-1, -1] but [1] is provided"]),
        (RECALL | {"k": np.array(-1, np.int32)}, ["k >= 0, got -1"]),
    ],
)
def test_inputs_that_do_not_fit_are_named(stubs, inputs: dict[str, np.ndarray], parts: list[str]) -> None:
    code, message = refused(stubs[0].Predict, predict_request(inputs))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert all(part in message for part in parts), message


def test_a_tensor_that_is_none_is_refused(stubs) -> None:
    request = predict_request(RECALL)
    request.inputs["k"].tensor_content = b"abc"
    code, message = refused(stubs[0].Predict, request)
    assert (code, message.startswith("tensor parsing error: k")) == (grpc.StatusCode.INVALID_ARGUMENT, True)


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ({"version": 7}, grpc.StatusCode.NOT_FOUND, "Servable not found for request: Specific(recall, 7)"),
        ({"model": "nope"}, grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(nope)"),
        ({"model": ""}, grpc.StatusCode.INVALID_ARGUMENT, "ModelSpec has no name specified."),
        (
            {"signature_name": "x"},
            grpc.StatusCode.FAILED_PRECONDITION,
            'Serving signature key "x" not found.',
        ),
        (
            {"version_label": "stable"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "Unrecognized servable version label: stable",
        ),
    ],
)
def test_what_is_not_served_is_named(stubs, spec: dict[str, Any], code: grpc.StatusCode, message: str) -> None:
    assert refused(stubs[0].Predict, predict_request(RECALL, **spec)) == (code, message)


def test_a_request_without_a_model_is_refused(stubs) -> None:
    for method, request in (
        (stubs[0].Predict, predict_messages.PredictRequest()),
        (stubs[0].GetModelMetadata, metadata_messages.GetModelMetadataRequest()),
        (stubs[1].GetModelStatus, status_messages.GetModelStatusRequest()),
    ):
        assert refused(method, request) == (grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")


def test_calls_that_are_not_served_are_unimplemented(stubs) -> None:
    request = classification_pb2.ClassificationRequest()
    assert refused(stubs[0].Classify, request)[0] is grpc.StatusCode.UNIMPLEMENTED


def test_metadata_describes_the_signatures(stubs) -> None:
    request = metadata_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "recall"
    response = stubs[0].GetModelMetadata(request, timeout=20)
    signatures = metadata_messages.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    assert response.model_spec.version.value == 1
    assert set(signatures.signature_def["serving_default"].inputs) == set(RECALL)
    request.metadata_field[:] = ["weights"]
    assert refused(stubs[0].GetModelMetadata, request)[1] == "Metadata field weights is not supported"
    request.metadata_field[:] = []
    assert "at least one metadata_field" in refused(stubs[0].GetModelMetadata, request)[1]


def status(stubs: Any, version: int | None = None) -> dict[int, str]:
    request = status_messages.GetModelStatusRequest()
    request.model_spec.name = "recall"
    if version is not None:
        request.model_spec.version.value = version
    response = stubs[1].GetModelStatus(request, timeout=20)
    name = status_messages.ModelVersionStatus.State.Name
    return {found.version: name(found.state) for found in response.model_version_status}


def reload_request(home: Path, *versions: int, model: str = "recall") -> Any:
    request = management_messages.ReloadConfigRequest()
    config = request.config.model_config_list.config.add(name=model, base_path=str(release.base_path(home, model)))
    config.model_version_policy.specific.versions.extend(versions)
    return request


def test_reload_serves_what_it_says_and_keeps_what_it_had_if_that_fails(system: System, stubs) -> None:
    assert status(stubs, 1) == {1: "AVAILABLE"}
    release.link(system.home, 2)
    both = reload_request(system.home, 1, 2)
    both.config.model_config_list.config[0].version_labels["canary"] = 2
    stubs[1].HandleReloadConfigRequest(both, timeout=60)
    assert status(stubs)[2] == "AVAILABLE"
    labelled = stubs[0].Predict(predict_request(RECALL, version_label="canary"), timeout=20)
    assert labelled.model_spec.version.value == 2
    code, message = refused(stubs[1].HandleReloadConfigRequest, reload_request(system.home, 2, 9))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "Could not find version 9 of model recall" in message
    assert status(stubs) == status(stubs) | {1: "AVAILABLE", 2: "AVAILABLE"}
    stubs[1].HandleReloadConfigRequest(reload_request(system.home, 2), timeout=60)
    assert status(stubs) == status(stubs) | {1: "END", 2: "AVAILABLE"}
    assert refused(stubs[0].Predict, predict_request(RECALL, version=1))[0] is grpc.StatusCode.NOT_FOUND
    request = status_messages.GetModelStatusRequest()
    request.model_spec.name = "recall"
    request.model_spec.version.value = 77
    assert refused(stubs[1].GetModelStatus, request) == (
        grpc.StatusCode.NOT_FOUND,
        "Could not find version 77 of model recall",
    )


def test_a_model_that_does_not_load_is_said_and_harms_nobody(system: System, stubs, tmp_path: Path) -> None:
    broken = tmp_path / "recall" / "5"
    shutil.copytree(release.directory(system.home, 1) / "recall", broken)
    (broken / "saved_model.pb").chmod(0o644)
    (broken / "saved_model.pb").write_bytes(b"no graph")
    request = management_messages.ReloadConfigRequest()
    config = request.config.model_config_list.config.add(name="recall", base_path=str(broken.parent))
    config.model_version_policy.specific.versions.append(5)
    code, message = refused(stubs[1].HandleReloadConfigRequest, request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert message.startswith("recall version 5 does not load")
    assert stubs[0].Predict(predict_request(RECALL), timeout=20).model_spec.version.value == 1


@pytest.mark.parametrize(
    ("configs", "message"),
    [([("recall", "")], "to have a name and a base_path"), ([("a", "/x"), ("a", "/x")], "list model a multiple times")],
)
def test_a_config_that_is_none_is_refused(stubs, configs: list[tuple[str, str]], message: str) -> None:
    request = management_messages.ReloadConfigRequest()
    assert "ServerModelConfig type not supported" in refused(stubs[1].HandleReloadConfigRequest, request)[1]
    for name, base_path in configs:
        request.config.model_config_list.config.add(name=name, base_path=base_path)
    code, text = refused(stubs[1].HandleReloadConfigRequest, request)
    assert (code, message in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_rest_answers_by_row_and_by_column(system: System) -> None:
    columns = {name: array.tolist() for name, array in RECALL.items()}
    answer = httpx.post(f"{system.rest}/v1/models/recall/versions/1:predict", json={"inputs": columns})
    assert answer.json()["outputs"]["ids"] == [[1000, 1002, 1003, 1004, 1005]]
    row = {"item_id": 1001, "user_id": 1, "history_items": [1], "tags": [], "scenario": 0, "item_age_hours": 12}
    rows = [row | {"item_click_rate_7d": rate} for rate in (0.25, 0.5)]
    answer = httpx.post(f"{system.rest}/v1/models/rank:predict", json={"instances": rows})
    assert answer.json() == {
        "predictions": [
            {"click": 1.0, "like": 0.5, "long_view": 0.25},
            {"click": 1.0, "like": 0.5, "long_view": 0.5},
        ]
    }


def test_rest_tells_status_and_metadata(system: System) -> None:
    found = httpx.get(f"{system.rest}/v1/models/rank/versions/1").json()
    available = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert found == {"model_version_status": [available]}
    assert available in httpx.get(f"{system.rest}/v1/models/rank").json()["model_version_status"]
    described = httpx.get(f"{system.rest}/v1/models/rank/metadata").json()
    assert described["model_spec"] == {"name": "rank", "signature_name": "", "version": "1"}
    inputs = described["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]
    assert inputs["item_id"]["dtype"] == "DT_INT64"


@pytest.mark.parametrize(
    ("path", "body", "status_code", "message"),
    [
        ("recall/versions/7:predict", "{}", 404, "Servable not found for request: Specific(recall, 7)"),
        ("nope:predict", "{}", 404, "Servable not found for request: Latest(nope)"),
        ("recall:predict", "{", 400, "JSON Parse error"),
        ("recall:predict", "[]", 400, "is not object"),
        ("recall:predict", "{}", 400, "Missing 'inputs' or 'instances' key"),
        ("recall:predict", '{"inputs": {}, "instances": []}', 400, "only one of 'inputs' or 'instances'"),
        ("recall:predict", '{"instances": []}', 400, "No values in 'instances' array"),
        ("recall:predict", '{"instances": 1}', 400, "to be an list/array"),
        ("recall:predict", '{"instances": [1]}', 400, "expecting list of objects"),
        ("recall:predict", '{"instances": [{"k": 1}]}', 400, "must only have keys: exclude,history_items,hour,k"),
        ("recall:predict", '{"inputs": [1]}', 400, "inputs is a plain value/list"),
        ("recall:predict", '{"inputs": {"k": 1}}', 400, "Missing named input: "),
        ("recall:predict", '{"signature_name": "x", "inputs": {}}', 400, 'Serving signature key "x" not found.'),
        ("recall:predict", '{"signature_name": 1, "inputs": {}}', 400, "must be a string"),
        ("recall:explain", "{}", 400, "Malformed request: POST /v1/models/recall:explain"),
        ("recall", "{}", 400, "Malformed request: POST"),
    ],
)
def test_rest_says_what_is_wrong(system: System, path: str, body: str, status_code: int, message: str) -> None:
    response = httpx.post(f"{system.rest}/v1/models/{path}", content=body)
    assert response.status_code == status_code
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("value", "message"),
    [("1.5", "not of expected type: int64"), ('"a"', "not of expected type"), ("[1, [2]]", "lists of different sizes")],
)
def test_rest_says_which_value_is_wrong(system: System, value: str, message: str) -> None:
    inputs = '"history_items": [[1]], "register_days": [1], "k": 1, "exclude": [[]], "hour": ' + value
    response = httpx.post(f"{system.rest}/v1/models/recall:predict", content=f'{{"inputs": {{{inputs}}}}}')
    assert response.status_code == 400
    assert response.json()["error"].startswith("input hour: ")
    assert message in response.json()["error"]


def test_rest_names_models_that_are_not_there(system: System) -> None:
    response = httpx.get(f"{system.rest}/v1/models/nope")
    assert (response.status_code, response.json()) == (404, {"error": "Could not find any versions of model nope"})
    assert httpx.get(f"{system.rest}/v2").status_code == 400


def test_a_server_follows_its_base_paths_until_it_is_told_otherwise(started: System, tmp_path: Path) -> None:
    (tmp_path / "releases").symlink_to(started.home / "releases")
    server = ModelServer(tmp_path, 0, 0)
    try:
        server.servables.follow(server.models)
        assert server.servables.served == {"recall": [], "rank": []}
        release.link(tmp_path, 1)
        (tmp_path / "models" / "recall" / "4").mkdir()
        (message,) = server.servables.follow()
        assert message.startswith("recall version 4 does not load")
        assert server.servables.served == {"recall": [1], "rank": [1]}
        assert server.servables.follow() == []
        release.unlink_all_but(tmp_path, ())
        server.servables.follow()
        assert server.servables.served == {"recall": [], "rank": []}
    finally:
        server.stop()


def test_a_port_in_use_is_named(started: System, tmp_path: Path) -> None:
    for ports in ((started.server.grpc_port, 0), (0, started.server.rest_port)):
        with pytest.raises(PortError, match=f"port {max(ports)} of 127.0.0.1"):
            ModelServer(tmp_path, *ports)


def test_the_command_runs_without_a_release_and_ends_on_sigterm(tmp_path: Path) -> None:
    routing.write(tmp_path / "routing.json", Routing())
    command = [sys.executable, "-m", "serving.model_server", "--home", str(tmp_path), "--grpc-port", "0"]
    with subprocess.Popen(
        [*command, "--rest-port", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.endswith("serving recall [], rank []\n"), line
            address = line.split("gRPC ")[1].split(",")[0]
            with grpc.insecure_channel(address) as channel:
                code, _ = refused(PredictionServiceStub(channel).Predict, predict_request(RECALL))
            assert code is grpc.StatusCode.NOT_FOUND
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert process.stderr is not None
            # the one line that TensorFlow writes whatever it is told
            said = [text for text in process.stderr.read().splitlines() if "absl::InitializeLog" not in text]
            assert [text for text in said if not text.startswith("I0000")] == []
        finally:
            process.kill()
