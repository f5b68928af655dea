"""Whether a model server behaves as TF Serving does, line by line; any server, stock or embedded.

    python -m serving.conformance 127.0.0.1:8500 --rest 127.0.0.1:8501 --base-path /tmp/conformance

It makes small SavedModels in the base path, which the server must see (under `--seen-as`, if its path is another), and
has the server load them in place of what it serves: point it at a server that nobody uses. Each line is one behaviour;
the exit code is 1 if one fails. Messages are held to their first words, which TF Serving's versions have in common.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from serving.messages import (
    MAX_MESSAGE,
    ModelServiceStub,
    PredictionLog,
    PredictionServiceStub,
    SavedModel,
    TensorProto,
    from_tensor,
    management_messages,
    metadata_messages,
    predict_messages,
    status_messages,
    to_tensor,
)

MODEL = "conformance"
GOOD, BROKEN = (1, 2, 3), (8, 9)
"""Versions that load, of which 3 warms up; and those whose warm-up file is no TFRecord, or asks what fails."""

SECONDS = 60.0
TEXT = np.array([b"a", b"\xc3\xa9"], object)
EVERY: dict[str, np.ndarray] = {
    "bool": np.array([True, False]),
    "float16": np.array([1.5, -2.0], np.float16),
    "float32": np.array([0.1, np.nan], np.float32),
    "float64": np.array([0.1, np.inf]),
    "int8": np.array([-128, 127], np.int8),
    "int16": np.array([-5, 5], np.int16),
    "int32": np.array([-(2**31), 2**31 - 1], np.int32),
    "int64": np.array([-(2**63), 2**63 - 1], np.int64),
    "string": TEXT,
    "uint8": np.array([0, 255], np.uint8),
}


class CheckError(AssertionError):
    """A server that does something else."""


def make(base_path: Path) -> None:
    """Writes the versions of the model, unless they are there."""
    import tensorflow as tf

    class Small(tf.Module):
        """Answers that name the version: y = x · version, z = n + version."""

        def __init__(self, version: int) -> None:
            super().__init__()
            self.version = tf.Variable(float(version))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x"), tf.TensorSpec([None], tf.int64, "n")])
        def two(self, x: Any, n: Any) -> Any:
            return {"y": x * self.version, "z": n + tf.cast(self.version, tf.int64)}

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
        def one(self, x: Any) -> Any:
            return {"y": x * self.version}

        @tf.function(input_signature=[{name: _spec(tf, name, value) for name, value in EVERY.items()}])
        def every(self, inputs: Any) -> Any:
            return {f"{name}_out": tf.identity(value) for name, value in inputs.items()}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
        def text(self, text: Any) -> Any:
            return {"text": tf.identity(text), "raw_bytes": tf.identity(text)}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, "k")])
        def scalar(self, k: Any) -> Any:
            with tf.control_dependencies([tf.debugging.assert_non_negative(k, "k must not be negative")]):
                return {"k": tf.identity(k)}

        @tf.function(input_signature=[tf.TensorSpec([], tf.float64, "seconds")])
        def wait(self, seconds: Any) -> Any:
            start = tf.timestamp()
            (turns,) = tf.while_loop(lambda _: tf.timestamp() < start + seconds, lambda turn: (turn + 1,), (0,))
            return {"version": self.version, "turns": turns}

    for version in (*GOOD, *BROKEN):
        out = base_path / MODEL / str(version)
        if out.exists():
            continue
        building = base_path / f".building-{version}"
        shutil.rmtree(building, ignore_errors=True)
        module = Small(version)
        signatures = {name: getattr(module, name) for name in ("one", "every", "text", "scalar", "wait")}
        tf.saved_model.save(module, str(building), signatures={"serving_default": module.two, **signatures})
        extra = building / "assets.extra"
        if version not in (1, 2):
            extra.mkdir()
        if version == 3:
            requests = [_request({"x": np.ones(2, np.float32), "n": np.ones(2, np.int64)})]
            _write_records(extra / "tf_serving_warmup_requests", [_log(request) for request in requests])
        if version == 8:
            (extra / "tf_serving_warmup_requests").write_bytes(b"this is no TFRecord")
        if version == 9:
            _write_records(extra / "tf_serving_warmup_requests", [_log(_request({"x": np.ones(2, np.float32)}))])
        out.parent.mkdir(exist_ok=True)
        building.rename(out)


def _spec(tf: Any, name: str, value: np.ndarray) -> Any:
    return tf.TensorSpec([None], tf.string if value.dtype.kind == "O" else tf.as_dtype(value.dtype), name)


def _write_records(path: Path, records: Sequence[bytes]) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def _log(request: Any) -> bytes:
    log = PredictionLog()
    log.predict_log.request.CopyFrom(request)
    return log.SerializeToString()


def _request(inputs: Mapping[str, np.ndarray], outputs: Sequence[str] = (), **spec: Any) -> Any:
    request = predict_messages.PredictRequest(output_filter=outputs)
    request.model_spec.name = spec.get("model", MODEL)
    request.model_spec.signature_name = spec.get("signature", "")
    if "version" in spec:
        request.model_spec.version.value = spec["version"]
    if "label" in spec:
        request.model_spec.version_label = spec["label"]
    for name, array in inputs.items():
        request.inputs[name].CopyFrom(to_tensor(array))
    return request


TWO: dict[str, np.ndarray] = {"x": np.array([1.0, 2.0], np.float32), "n": np.array([10, 20], np.int64)}


@dataclass
class Subject:
    """The server under test.

    Attributes:
        base_path: as the server sees it.
        made: the same directory as it is called here.
        config: what it was last told to serve: versions and labels.
    """

    channel: grpc.Channel
    rest: str
    base_path: str
    made: Path
    config: tuple[tuple[int, ...], dict[str, int]] | None = None
    prediction: Any = field(init=False)
    management: Any = field(init=False)

    def __post_init__(self) -> None:
        self.prediction = PredictionServiceStub(self.channel)
        self.management = ModelServiceStub(self.channel)

    def predict(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] = (), **spec: Any) -> Any:
        return self.prediction.Predict(_request(inputs, outputs, **spec), timeout=SECONDS)

    def reload(self, versions: Sequence[int], labels: Mapping[str, int] | None = None, **entry: str) -> None:
        """Tells the server what to serve; it may answer before it does."""
        self.config = None
        request = management_messages.ReloadConfigRequest()
        config = request.config.model_config_list.config.add(
            name=MODEL, base_path=f"{self.base_path}/{MODEL}", model_platform="tensorflow"
        )
        for key, value in entry.items():
            setattr(config, key, value)
        config.model_version_policy.specific.versions.extend(versions)
        for label, version in (labels or {}).items():
            config.version_labels[label] = version
        self.management.HandleReloadConfigRequest(request, timeout=SECONDS)

    def serve(self, versions: Sequence[int], labels: Mapping[str, int] | None = None) -> None:
        """Serves just these versions, and returns when that is so."""
        if self.config == (tuple(versions), dict(labels or {})):
            return
        self.reload(versions)
        self.until(lambda: self.available() == set(versions))
        if labels:
            self.reload(versions, labels)
        self.config = (tuple(versions), dict(labels or {}))

    def states(self) -> dict[int, tuple[str, int]]:
        """Version → its state, and the code of its error."""
        request = status_messages.GetModelStatusRequest()
        request.model_spec.name = MODEL
        try:
            response = self.management.GetModelStatus(request, timeout=SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return {}
            raise
        name = status_messages.ModelVersionStatus.State.Name
        return {found.version: (name(found.state), found.status.error_code) for found in response.model_version_status}

    def available(self) -> set[int]:
        return {version for version, (state, _) in self.states().items() if state == "AVAILABLE"}

    def until(self, holds: Callable[[], bool], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise CheckError(f"not so after {seconds:.0f} s; the versions are {self.states()}")
            time.sleep(0.02)

    def http(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the document that REST answers."""
        connection = HTTPConnection(self.rest, timeout=SECONDS)
        try:
            text = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
            connection.request(method, path, text)
            response = connection.getresponse()
            content = response.read().decode()
            kind = response.getheader("Content-Type") or ""
            return response.status, json.loads(content) if kind.startswith("application/json") else content
        finally:
            connection.close()


def _equal(found: Any, wanted: Any, what: str = "the answer") -> None:
    if found != wanted:
        raise CheckError(f"{what} is {found!r}, not {wanted!r}")


def _same(found: np.ndarray, wanted: np.ndarray, what: str = "the answer") -> None:
    _equal((found.dtype, found.shape), (wanted.dtype, wanted.shape), f"dtype and shape of {what}")
    if not np.array_equal(found, wanted, equal_nan=wanted.dtype.kind == "f"):
        raise CheckError(f"{what} is {found}, not {wanted}")


def _refused(call: Callable[[], Any], code: grpc.StatusCode, *parts: str) -> None:
    try:
        answer = call()
    except grpc.RpcError as error:
        message = error.details() or ""
        if error.code() is not code or not all(part in message for part in parts):
            raise CheckError(f"refused with {error.code().name}: {message!r}, not {code.name}: {parts}") from None
        return
    raise CheckError(f"answered {str(answer)[:200]!r}, not {code.name}: {parts}")


def _refused_over_rest(found: tuple[int, Any], status: int, *parts: str) -> None:
    message = found[1].get("error", "") if isinstance(found[1], dict) else str(found[1])
    if found[0] != status or not all(part in message for part in parts):
        raise CheckError(f"answered {found[0]} {str(found[1])[:300]!r}, not {status} with {parts}")


INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
FAILED = grpc.StatusCode.FAILED_PRECONDITION


def predict_answers_by_name_with_dtype_and_shape(subject: Subject) -> None:
    response = subject.predict(TWO)
    _equal(sorted(response.outputs), ["y", "z"], "the outputs")
    _same(from_tensor(response.outputs["y"]), np.array([2, 4], np.float32))
    _same(from_tensor(response.outputs["z"]), np.array([12, 22], np.int64))


def predict_says_who_answered(subject: Subject) -> None:
    spec = subject.predict(TWO).model_spec
    _equal((spec.name, spec.version.value, spec.signature_name), (MODEL, 2, "serving_default"))


def every_dtype_goes_in_and_out(subject: Subject) -> None:
    response = subject.predict(EVERY, signature="every")
    for name, array in EVERY.items():
        _same(from_tensor(response.outputs[f"{name}_out"]), array, name)


def values_in_fields_are_read_and_continued(subject: Subject) -> None:
    request = _request(TWO)
    request.inputs["x"].Clear()
    request.inputs["x"].MergeFrom(TensorProto(dtype=1, float_val=[1.0, 3.0]))
    request.inputs["n"].Clear()
    request.inputs["n"].MergeFrom(TensorProto(dtype=9, int64_val=[7]))
    for name in ("x", "n"):
        request.inputs[name].tensor_shape.dim.add(size=3)
    response = subject.prediction.Predict(request, timeout=SECONDS)
    _same(from_tensor(response.outputs["y"]), np.array([2, 6, 6], np.float32))
    _same(from_tensor(response.outputs["z"]), np.array([9, 9, 9], np.int64))


def an_input_without_elements_is_one(subject: Subject) -> None:
    response = subject.predict({"x": np.zeros((0, 2), np.float32)}, signature="one")
    _same(from_tensor(response.outputs["y"]), np.zeros((0, 2), np.float32))


def a_scalar_is_one(subject: Subject) -> None:
    response = subject.predict({"k": np.array(3, np.int32)}, signature="scalar")
    _same(from_tensor(response.outputs["k"]), np.array(3, np.int32))


def an_output_filter_chooses(subject: Subject) -> None:
    _equal(list(subject.predict(TWO, ["z"]).outputs), ["z"], "the outputs")


def an_unknown_output_is_refused(subject: Subject) -> None:
    parts = ("output tensor alias not found in signature: q Outputs expected to be in the set {y,z}.",)
    _refused(lambda: subject.predict(TWO, ["q"]), INVALID, *parts)


def an_output_named_twice_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.predict(TWO, ["y", "y"]), INVALID, "duplicate output tensor alias: y")


def a_signature_is_chosen_by_name(subject: Subject) -> None:
    response = subject.predict({"x": np.ones((1, 2), np.float32)}, signature="one")
    _equal(response.model_spec.signature_name, "one", "the signature")
    _same(from_tensor(response.outputs["y"]), np.full((1, 2), 2, np.float32))


def an_unknown_signature_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.predict(TWO, signature="q"), FAILED, 'Serving signature key "q" not found.')


def the_newest_version_answers_who_names_none(subject: Subject) -> None:
    _equal(subject.predict(TWO).model_spec.version.value, 2, "the version")


def a_version_is_chosen_by_number(subject: Subject) -> None:
    _equal(subject.predict(TWO, version=1).model_spec.version.value, 1, "the version")


def a_version_is_chosen_by_label(subject: Subject) -> None:
    subject.serve((1, 2), {"stable": 1, "canary": 2})
    for label, version in (("stable", 1), ("canary", 2)):
        _equal(subject.predict(TWO, label=label).model_spec.version.value, version, f"the version labelled {label}")


def an_unknown_model_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.predict(TWO, model="q"), NOT_FOUND, "Servable not found for request: Latest(q)")


def an_unknown_version_is_refused(subject: Subject) -> None:
    parts = (f"Servable not found for request: Specific({MODEL}, 77)",)
    _refused(lambda: subject.predict(TWO, version=77), NOT_FOUND, *parts)


def an_unknown_label_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.predict(TWO, label="q"), INVALID, "Unrecognized servable version label: q")


def a_request_without_a_model_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.prediction.Predict(predict_messages.PredictRequest()), INVALID, "Missing ModelSpec")
    _refused(lambda: subject.predict(TWO, model=""), INVALID, "ModelSpec has no name specified.")


def a_missing_input_is_refused(subject: Subject) -> None:
    parts = ("input size does not match signature: 1!=2 len({x}) != len({n,x}).", "Missing but required: {n}.")
    _refused(lambda: subject.predict({"x": TWO["x"]}), INVALID, *parts)


def a_further_input_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.predict(TWO | {"q": TWO["x"]}), INVALID, "3!=2", "Sent extra: {q}.")


def an_input_of_another_name_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.predict({"x": TWO["x"], "q": TWO["n"]}), INVALID, "input", "alias")


def an_input_of_another_dtype_is_refused(subject: Subject) -> None:
    inputs = TWO | {"n": TWO["n"].astype(np.int32)}
    _refused(lambda: subject.predict(inputs), INVALID, "Expects arg[0] to be int64 but int32 is provided")


def an_input_of_another_shape_is_refused(subject: Subject) -> None:
    _refused(lambda: subject.predict(TWO | {"n": np.arange(3)[None, None]}, signature="every"), INVALID)
    _refused(lambda: subject.predict({"k": np.array([-1, 2], np.int32)}, signature="scalar"), INVALID)


def a_tensor_that_is_none_is_refused(subject: Subject) -> None:
    def broken(change: Callable[[Any], None]) -> Callable[[], Any]:
        request = _request(TWO)
        change(request.inputs["n"])
        return lambda: subject.prediction.Predict(request, timeout=SECONDS)

    def content(tensor: Any) -> None:
        tensor.tensor_content = b"abc"

    def rank(tensor: Any) -> None:
        tensor.tensor_shape.unknown_rank = True

    def size(tensor: Any) -> None:
        tensor.tensor_shape.dim[0].size = -3

    def dtype(tensor: Any) -> None:
        tensor.dtype = 0

    for change in (content, rank, size, dtype):
        _refused(broken(change), INVALID, "tensor parsing error: n")


def what_the_graph_refuses_has_its_code(subject: Subject) -> None:
    negative = {"k": np.array(-1, np.int32)}
    _refused(lambda: subject.predict(negative, signature="scalar"), INVALID, "k must not be negative")


def a_message_that_is_none_is_refused(subject: Subject) -> None:
    raw = subject.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    _refused(lambda: raw(b"\xff\xff\xff", timeout=SECONDS), grpc.StatusCode.INTERNAL)
    subject.predict(TWO)


def a_deadline_is_kept(subject: Subject) -> None:
    request = _request({"seconds": np.array(0.5)}, signature="wait")
    started = time.monotonic()
    _refused(lambda: subject.prediction.Predict(request, timeout=0.1), grpc.StatusCode.DEADLINE_EXCEEDED)
    if time.monotonic() - started > 0.4:
        raise CheckError("the answer came after the deadline")


def metadata_describes_the_signatures(subject: Subject) -> None:
    request = metadata_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = MODEL
    response = subject.prediction.GetModelMetadata(request, timeout=SECONDS)
    _equal((response.model_spec.name, response.model_spec.version.value), (MODEL, 2))
    found = metadata_messages.SignatureDefMap()
    response.metadata["signature_def"].Unpack(found)
    written = SavedModel.FromString((subject.made / MODEL / "2" / "saved_model.pb").read_bytes())
    wanted = written.meta_graphs[0].signature_def
    _equal(set(found.signature_def), set(wanted), "the signatures")
    for name in ("serving_default", "one", "every"):
        _equal(found.signature_def[name].inputs, wanted[name].inputs, f"the inputs of {name}")
        _equal(found.signature_def[name].outputs, wanted[name].outputs, f"the outputs of {name}")


def metadata_of_a_version_or_a_label(subject: Subject) -> None:
    subject.serve((1, 2), {"stable": 1, "canary": 2})
    request = metadata_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = MODEL
    request.model_spec.version.value = 1
    _equal(subject.prediction.GetModelMetadata(request, timeout=SECONDS).model_spec.version.value, 1, "the version")
    request.model_spec.version_label = "canary"
    _equal(subject.prediction.GetModelMetadata(request, timeout=SECONDS).model_spec.version.value, 2, "the version")


def metadata_must_be_asked_for_by_field(subject: Subject) -> None:
    request = metadata_messages.GetModelMetadataRequest()
    ask = subject.prediction.GetModelMetadata
    _refused(lambda: ask(request, timeout=SECONDS), INVALID, "Missing ModelSpec")
    request.model_spec.name = MODEL
    parts = ("GetModelMetadataRequest must specify at least one metadata_field",)
    _refused(lambda: ask(request, timeout=SECONDS), INVALID, *parts)
    request.metadata_field.append("weights")
    _refused(lambda: ask(request, timeout=SECONDS), INVALID, "Metadata field ", "weights")


def metadata_of_what_is_not_served_is_refused(subject: Subject) -> None:
    request = metadata_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = MODEL
    request.model_spec.version.value = 77
    ask = subject.prediction.GetModelMetadata
    _refused(lambda: ask(request, timeout=SECONDS), NOT_FOUND, f"Specific({MODEL}, 77)")


def status_tells_every_version_newest_first(subject: Subject) -> None:
    request = status_messages.GetModelStatusRequest()
    request.model_spec.name = MODEL
    response = subject.management.GetModelStatus(request, timeout=SECONDS)
    versions = [found.version for found in response.model_version_status]
    _equal(versions, sorted(versions, reverse=True), "the versions")
    _equal({version: subject.states()[version] for version in (1, 2)}, {1: ("AVAILABLE", 0), 2: ("AVAILABLE", 0)})


def status_of_one_version(subject: Subject) -> None:
    request = status_messages.GetModelStatusRequest()
    request.model_spec.name = MODEL
    request.model_spec.version.value = 1
    (found,) = subject.management.GetModelStatus(request, timeout=SECONDS).model_version_status
    _equal((found.version, found.state), (1, status_messages.ModelVersionStatus.AVAILABLE))


def status_of_what_is_not_there_is_refused(subject: Subject) -> None:
    request = status_messages.GetModelStatusRequest()
    ask = subject.management.GetModelStatus
    _refused(lambda: ask(request, timeout=SECONDS), INVALID, "Missing ModelSpec")
    request.model_spec.name = "q"
    _refused(lambda: ask(request, timeout=SECONDS), NOT_FOUND, "Could not find any versions of model q")
    request.model_spec.name = MODEL
    request.model_spec.version.value = 77
    _refused(lambda: ask(request, timeout=SECONDS), NOT_FOUND, f"Could not find version 77 of model {MODEL}")


def reload_serves_just_what_it_says(subject: Subject) -> None:
    subject.serve((1,))
    _refused(lambda: subject.predict(TWO, version=2), NOT_FOUND, f"Specific({MODEL}, 2)")
    subject.until(lambda: subject.states()[2] == ("END", 0))
    subject.serve((1, 2))
    _equal(subject.predict(TWO, version=2).model_spec.version.value, 2, "the version")


def a_config_that_is_none_is_refused(subject: Subject) -> None:
    empty = management_messages.ReloadConfigRequest()
    ask = subject.management.HandleReloadConfigRequest
    parts = ("ServerModelConfig type not supported by HandleReloadConfigRequest.",)
    _refused(lambda: ask(empty, timeout=SECONDS), INVALID, *parts)
    parts = ("to have an absolute path or URI; got base_path()=models",)
    _refused(lambda: subject.reload((1,), base_path="models"), INVALID, f"Expected model {MODEL}", *parts)
    _refused(lambda: subject.reload((1,), model_platform="q"), INVALID, "platform")
    _refused(lambda: subject.reload((1,), model_platform=""), INVALID, "Illegal setting neither")
    twice = management_messages.ReloadConfigRequest()
    for _ in range(2):
        twice.config.model_config_list.config.add(name="a", base_path="/a", model_platform="tensorflow")
    _refused(lambda: ask(twice, timeout=SECONDS), INVALID, "Illegal to list model a multiple times in config list")
    _equal(subject.available(), {1, 2}, "what is served")


def a_label_needs_a_version_that_is_available(subject: Subject) -> None:
    parts = (f"Request to assign label to version 3 of model {MODEL}, which is not currently available for inference",)
    _refused(lambda: subject.reload((1, 2, 3), {"canary": 3}), FAILED, *parts)


def a_label_moves_with_the_config(subject: Subject) -> None:
    subject.serve((1, 2), {"stable": 1})
    subject.serve((1, 2), {"stable": 2})
    _equal(subject.predict(TWO, label="stable").model_spec.version.value, 2, "the version labelled stable")
    subject.serve((1, 2))
    _refused(lambda: subject.predict(TWO, label="stable"), INVALID, "Unrecognized servable version label: stable")


@contextmanager
def _asking(subject: Subject, **spec: Any) -> Iterator[list[str]]:
    """Errors of requests that are sent without pause while the block runs."""
    ended = threading.Event()
    errors: list[str] = []

    def ask() -> None:
        while not ended.is_set():
            try:
                subject.predict(TWO, **spec)
            except grpc.RpcError as error:
                errors.append(f"{error.code().name}: {error.details()}")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def a_new_version_is_loaded_before_the_old_one_goes(subject: Subject) -> None:
    subject.serve((1,))
    with _asking(subject) as errors:
        for version in (2, 1, 2):
            subject.serve((version,))
    _equal(errors, [], "what failed while versions changed")


def a_label_that_moves_fails_nobody(subject: Subject) -> None:
    subject.serve((1, 2), {"stable": 1})
    with _asking(subject, label="stable") as errors:
        for version in (2, 1, 2):
            subject.reload((1, 2), {"stable": version})
    _equal(errors, [], "what failed while the label moved")


def a_request_that_runs_outlives_its_version(subject: Subject) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(subject.predict, {"seconds": np.array(1.0)}, signature="wait", version=1)
        time.sleep(0.2)
        subject.reload((2,))
        response = asked.result()
    _same(from_tensor(response.outputs["version"]), np.array(1, np.float32))
    subject.until(lambda: subject.states()[1] == ("END", 0))


def a_version_warms_up_before_it_answers(subject: Subject) -> None:
    subject.serve((1, 2, 3))
    _equal(subject.predict(TWO, version=3).model_spec.version.value, 3, "the version")
    if subject.rest:
        status, page = subject.http("GET", "/monitoring/prometheus/metrics")
        if status == 200 and not re.search(r":model_warmup_latency_count\{.*/3\".*\} [1-9]", page):
            raise CheckError("no warm-up of version 3 is counted")


def a_broken_warm_up_keeps_a_version_away(subject: Subject) -> None:
    for version in BROKEN:
        try:
            subject.reload((1, 2, version))
        except grpc.RpcError as error:
            if error.code() is not FAILED:
                raise CheckError(f"refused with {error.code().name}: {error.details()}") from None
        time.sleep(0.5)
        _equal(subject.available(), {1, 2}, "what is served")
        _refused(partial(subject.predict, TWO, version=version), NOT_FOUND)


def a_missing_directory_harms_nobody(subject: Subject) -> None:
    try:
        subject.reload((1, 2, 77))
    except grpc.RpcError as error:
        if error.code() is not NOT_FOUND:
            raise CheckError(f"refused with {error.code().name}: {error.details()}") from None
    _equal(subject.available(), {1, 2}, "what is served")


def rest_answers_columns(subject: Subject) -> None:
    body = {"inputs": {"x": [1, 2.5], "n": [10, 20]}}
    _equal(subject.http("POST", f"/v1/models/{MODEL}:predict", body), (200, {"outputs": {"y": [2, 5], "z": [12, 22]}}))


def rest_answers_rows(subject: Subject) -> None:
    body = {"instances": [{"x": 1, "n": 10}, {"x": 2.5, "n": 20}]}
    rows = [{"y": 2, "z": 12}, {"y": 5, "z": 22}]
    _equal(subject.http("POST", f"/v1/models/{MODEL}:predict", body), (200, {"predictions": rows}))


def rest_takes_one_input_without_its_name(subject: Subject) -> None:
    path = f"/v1/models/{MODEL}:predict"
    for key, said in (("instances", "predictions"), ("inputs", "outputs")):
        body = {"signature_name": "one", key: [[1, 2], [3, 4]]}
        _equal(subject.http("POST", path, body), (200, {said: [[2, 4], [6, 8]]}))


def rest_chooses_version_and_label(subject: Subject) -> None:
    subject.serve((1, 2), {"stable": 1})
    body = {"signature_name": "one", "inputs": [[1, 2]]}
    for choice in ("versions/1", "labels/stable"):
        found = subject.http("POST", f"/v1/models/{MODEL}/{choice}:predict", body)
        _equal(found, (200, {"outputs": [[1, 2]]}), choice)


def rest_writes_the_shortest_numbers(subject: Subject) -> None:
    status, document = subject.http("POST", f"/v1/models/{MODEL}/versions/1:predict", {"inputs": _columns()})
    _equal(status, 200, "the status")
    _equal(document["outputs"]["y"], [0.1, 1e-30, 16777216.0], "the numbers")


def _columns() -> dict[str, list[float]]:
    return {"x": [0.1, 1e-30, 16777216.0], "n": [1, 2, 3]}


def rest_carries_what_is_no_number(subject: Subject) -> None:
    body = '{"inputs": {"x": [NaN, Infinity, -Infinity], "n": [1, 2, 3]}}'
    status, document = subject.http("POST", f"/v1/models/{MODEL}:predict", body)
    _equal(status, 200, "the status")
    _equal(str(document["outputs"]["y"]), "[nan, inf, -inf]", "the numbers")


def rest_carries_text_and_bytes(subject: Subject) -> None:
    raw = base64.b64encode(TEXT[1]).decode()
    body = {"signature_name": "text", "instances": ["a", {"b64": raw}]}
    rows = [{"text": "a", "raw_bytes": {"b64": "YQ=="}}, {"text": "é", "raw_bytes": {"b64": raw}}]
    _equal(subject.http("POST", f"/v1/models/{MODEL}:predict", body), (200, {"predictions": rows}))


def rest_refuses_what_is_not_served(subject: Subject) -> None:
    body = {"inputs": _columns()}
    cases: tuple[tuple[str, int, str], ...] = (
        ("q", 404, "Servable not found for request: Latest(q)"),
        (f"{MODEL}/versions/77", 404, f"Servable not found for request: Specific({MODEL}, 77)"),
        (f"{MODEL}/labels/q", 400, "Unrecognized servable version label: q"),
    )
    for path, status, message in cases:
        _refused_over_rest(subject.http("POST", f"/v1/models/{path}:predict", body), status, message)
    named = {"signature_name": "q", "inputs": _columns()}
    parts = ('Serving signature name: "q" not found in signature def',)
    _refused_over_rest(subject.http("POST", f"/v1/models/{MODEL}:predict", named), 400, *parts)


def rest_refuses_what_is_no_request(subject: Subject) -> None:
    path = f"/v1/models/{MODEL}:predict"
    cases: tuple[tuple[Any, str], ...] = (
        ("", "JSON Parse error: The document is empty"),
        ("{", "JSON Parse error"),
        ("[]", "Is not object"),
        ("{}", "Missing 'inputs' or 'instances' key"),
        ({"signature_name": 1}, "'signature_name' key must be a string value."),
        ({"inputs": {}, "instances": []}, "only one of 'inputs' or 'instances' keys to exist"),
        ({"instances": {}}, "Excepting 'instances' to be an list/array"),
        ({"instances": []}, "No values in 'instances' array"),
        ({"instances": [1]}, "instances is a plain list, but expecting list of objects"),
        ({"instances": [{"x": 1, "n": 1}, 1]}, "Expecting object but got list at item 1 of input list"),
        ({"signature_name": "one", "instances": [[1, 2], {"x": [1]}]}, "Expecting value/list but got object at item 1"),
        ({"instances": [{"x": 1}]}, "Failed to process element: 0 of 'instances' list. JSON object: "),
        ({"instances": [{"x": 1}]}, "must only have keys: n,x"),
        ({"instances": [{"x": 1, "q": 1}]}, "JSON object: does not have named input: q"),
        ({"instances": [{"x": "a", "n": 1}]}, "Failed to process element: 0 key: x of 'instances' list. Error: "),
        ({"signature_name": "one", "instances": [[1, 2], [1]]}, "Expecting tensor size: 2 but got: 1"),
        ({"inputs": [1]}, "inputs is a plain value/list, but expecting an object"),
        ({"inputs": {"n": [1]}}, "Missing named input: x in 'inputs' object."),
        ({"inputs": {"x": ["a"], "n": [1]}}, 'JSON Value: "a" Type: String is not of expected type: float'),
        ({"inputs": {"x": [True], "n": [1]}}, "JSON Value: true Type: True is not of expected type: float"),
        ({"inputs": {"x": [1], "n": [1.5]}}, "JSON Value: 1.5 Type: Number is not of expected type: int64"),
        ({"inputs": {"x": [16777217], "n": [1]}}, "JSON value: 16777217 to float without loss of precision."),
        ({"inputs": {"x": [1, [2]], "n": [1]}}, "Encountered list at unexpected level: 1 expected < 1"),
        ({"inputs": {"x": [[1], 2], "n": [1]}}, "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ({"inputs": {"x": [[1], [2, 3]], "n": [1]}}, "Encountered list at unexpected size: 2 at level: 1"),
        ({"signature_name": "text", "inputs": [{"b64": "?"}]}, "Unable to base64 decode"),
        ({"signature_name": "text", "inputs": [{"b65": "a"}]}, "not formatted correctly for base64 data"),
    )
    for body, message in cases:
        try:
            _refused_over_rest(subject.http("POST", path, body), 400, message)
        except CheckError as error:
            raise CheckError(f"{body!r}: {error}") from None


def rest_refuses_rows_of_what_has_none(subject: Subject) -> None:
    body: dict[str, Any] = {"signature_name": "scalar", "instances": [1]}
    _equal(subject.http("POST", f"/v1/models/{MODEL}:predict", body)[0], 400, "the status")
    body = {"signature_name": "scalar", "inputs": 1}
    _equal(subject.http("POST", f"/v1/models/{MODEL}:predict", body), (200, {"outputs": 1}))


def rest_tells_the_status(subject: Subject) -> None:
    available = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    found = subject.http("GET", f"/v1/models/{MODEL}/versions/1")
    _equal(found, (200, {"model_version_status": [available]}))
    status, document = subject.http("GET", f"/v1/models/{MODEL}")
    _equal((status, available in document["model_version_status"]), (200, True))
    _refused_over_rest(subject.http("GET", "/v1/models/q"), 404, "Could not find any versions of model q")
    parts = (f"Could not find version 77 of model {MODEL}",)
    _refused_over_rest(subject.http("GET", f"/v1/models/{MODEL}/versions/77"), 404, *parts)
    _refused_over_rest(subject.http("GET", "/v1/models"), 400, "Missing model name in request.")


def rest_tells_the_metadata(subject: Subject) -> None:
    status, document = subject.http("GET", f"/v1/models/{MODEL}/metadata")
    _equal(status, 200, "the status")
    _equal(document["model_spec"], {"name": MODEL, "signature_name": "", "version": "2"})
    found = document["metadata"]["signature_def"]["signature_def"]["serving_default"]
    shape = {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    _equal((found["inputs"]["n"]["dtype"], found["inputs"]["n"]["tensor_shape"]), ("DT_INT64", shape), "the input n")
    _equal(found["method_name"], "tensorflow/serving/predict", "the method")


def rest_knows_its_paths(subject: Subject) -> None:
    for method, path in (("POST", f"/v1/models/{MODEL}"), ("GET", f"/v1/models/{MODEL}:predict"), ("GET", "/v1/q")):
        _refused_over_rest(subject.http(method, path, "{}"), 400, f"Malformed request: {method} {path}")
    _equal(subject.http("GET", "/v2")[0], 404, "the status of a path that is none")
    body = {"inputs": {"x": [1], "n": [1]}}
    _equal(subject.http("POST", f"/V1/MODELS/{MODEL}:PREDICT", body)[0], 200, "the status in capitals")


def rest_counts_what_was_asked(subject: Subject) -> None:
    def count() -> int:
        status, page = subject.http("GET", "/monitoring/prometheus/metrics")
        if status != 200:
            raise CheckError(f"answered {status}: a stock server needs --monitoring_config_file")
        found = re.search(rf':tensorflow:serving:request_count\{{model_name="{MODEL}",status="OK"\}} (\d+)', page)
        for name in (":tensorflow:serving:request_latency_bucket", ":tensorflow:serving:runtime_latency_bucket"):
            if name not in page:
                raise CheckError(f"there is no {name}")
        return int(found[1]) if found else 0

    subject.predict(TWO)
    before = count()
    subject.predict(TWO)
    subject.until(lambda: count() == before + 1, 5.0)


GRPC_CHECKS: tuple[Callable[[Subject], None], ...] = (
    predict_answers_by_name_with_dtype_and_shape,
    predict_says_who_answered,
    every_dtype_goes_in_and_out,
    values_in_fields_are_read_and_continued,
    an_input_without_elements_is_one,
    a_scalar_is_one,
    an_output_filter_chooses,
    an_unknown_output_is_refused,
    an_output_named_twice_is_refused,
    a_signature_is_chosen_by_name,
    an_unknown_signature_is_refused,
    the_newest_version_answers_who_names_none,
    a_version_is_chosen_by_number,
    a_version_is_chosen_by_label,
    an_unknown_model_is_refused,
    an_unknown_version_is_refused,
    an_unknown_label_is_refused,
    a_request_without_a_model_is_refused,
    a_missing_input_is_refused,
    a_further_input_is_refused,
    an_input_of_another_name_is_refused,
    an_input_of_another_dtype_is_refused,
    an_input_of_another_shape_is_refused,
    a_tensor_that_is_none_is_refused,
    what_the_graph_refuses_has_its_code,
    a_message_that_is_none_is_refused,
    a_deadline_is_kept,
    metadata_describes_the_signatures,
    metadata_of_a_version_or_a_label,
    metadata_must_be_asked_for_by_field,
    metadata_of_what_is_not_served_is_refused,
    status_tells_every_version_newest_first,
    status_of_one_version,
    status_of_what_is_not_there_is_refused,
    reload_serves_just_what_it_says,
    a_config_that_is_none_is_refused,
    a_label_needs_a_version_that_is_available,
    a_label_moves_with_the_config,
    a_new_version_is_loaded_before_the_old_one_goes,
    a_label_that_moves_fails_nobody,
    a_request_that_runs_outlives_its_version,
    a_version_warms_up_before_it_answers,
    a_broken_warm_up_keeps_a_version_away,
    a_missing_directory_harms_nobody,
)
REST_CHECKS: tuple[Callable[[Subject], None], ...] = (
    rest_answers_columns,
    rest_answers_rows,
    rest_takes_one_input_without_its_name,
    rest_chooses_version_and_label,
    rest_writes_the_shortest_numbers,
    rest_carries_what_is_no_number,
    rest_carries_text_and_bytes,
    rest_refuses_what_is_not_served,
    rest_refuses_what_is_no_request,
    rest_refuses_rows_of_what_has_none,
    rest_tells_the_status,
    rest_tells_the_metadata,
    rest_knows_its_paths,
    rest_counts_what_was_asked,
)


def run(check: Callable[[Subject], None], subject: Subject) -> None:
    """One check, on versions 1 and 2 without labels.

    Raises:
        CheckError: the server does something else.
    """
    subject.serve((1, 2))
    try:
        check(subject)
    except grpc.RpcError as error:
        raise CheckError(f"{error.code().name}: {error.details()}") from error
    except (OSError, ValueError, KeyError) as error:
        raise CheckError(f"{type(error).__name__}: {error}") from error


def connect(address: str, rest: str, made: Path, base_path: str = "") -> Subject:
    """A server by its addresses.

    Args:
        made: where the models are.
        base_path: what the server calls that, if not the same.
    """
    options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
    return Subject(grpc.insecure_channel(address, options=options), rest, base_path or str(made), made)


def main() -> None:
    """Runs every check against a server."""
    parser = argparse.ArgumentParser(prog="python -m serving.conformance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("address", help="host:port of its gRPC API")
    parser.add_argument("--rest", default="", help="host:port of its REST API; without it, that is not looked at")
    parser.add_argument("--base-path", type=Path, required=True, help="where the SavedModels are made")
    parser.add_argument("--seen-as", default="", help="what the server calls the base path, if not the same")
    arguments = parser.parse_args()
    base_path = arguments.base_path.resolve()
    base_path.mkdir(parents=True, exist_ok=True)
    print(f"making SavedModels in {base_path} ...", flush=True)
    make(base_path)
    subject = connect(arguments.address, arguments.rest, base_path, arguments.seen_as)
    failed = 0
    checks = (*GRPC_CHECKS, *(REST_CHECKS if arguments.rest else ()))
    for check in checks:
        what = check.__name__.replace("_", " ")
        try:
            run(check, subject)
        except CheckError as error:
            failed += 1
            print(f"FAILS  {what}: {error}", flush=True)
        except grpc.RpcError as error:
            sys.exit(
                f"conformance: {arguments.address} does not load the models: {error.code().name}: {error.details()}"
            )
        else:
            print(f"holds  {what}", flush=True)
    print(f"{len(checks) - failed} of {len(checks)} hold")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
