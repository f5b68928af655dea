"""TF Serving's REST API: its paths, row and column format, and error bodies."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict

from serving.messages import NUMPY, SERVING_DEFAULT, dtype_name, metadata_messages
from serving.servables import RequestError, Servable, Servables

PATH = re.compile(
    r"/v1/models/(?P<model>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?(?P<act>/metadata|:predict)?"
)
MAX_BODY = 64 << 20
HTTP = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def _invalid(message: str) -> RequestError:
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


def metadata(servable: Servable) -> Any:
    """GetModelMetadata's answer for `servable`."""
    response = metadata_messages.GetModelMetadataResponse()
    response.model_spec.name = servable.name
    response.model_spec.version.value = servable.version
    signatures = metadata_messages.SignatureDefMap(signature_def=servable.signatures)
    response.metadata["signature_def"].Pack(signatures)
    return response


def answer(servables: Servables, method: str, path: str, body: bytes) -> Any:
    """The JSON document that answers a request.

    Raises:
        RequestError: with the code and message that the error body gets.
    """
    match = PATH.fullmatch(path)
    if match is None or (method == "POST") != (match["act"] == ":predict"):
        raise _invalid(f"Malformed request: {method} {path}")
    model, label = match["model"], match["label"] or ""
    version = int(match["version"]) if match["version"] else None
    if match["act"] == ":predict":
        return _predict(servables.find(model, version, label), body)
    if match["act"] == "/metadata":
        found = metadata(servables.find(model, version, label))
        signatures = metadata_messages.SignatureDefMap()
        found.metadata["signature_def"].Unpack(signatures)
        return {
            "model_spec": {"name": model, "signature_name": "", "version": str(found.model_spec.version.value)},
            "metadata": {"signature_def": MessageToDict(signatures, preserving_proto_field_name=True)},
        }
    if label:
        version = servables.find(model, label=label).version
    states = servables.states(model, version)
    return {
        "model_version_status": [
            {
                "version": str(number),
                "state": state.state,
                "status": {"error_code": "UNKNOWN" if state.error else "OK", "error_message": state.error},
            }
            for number, state in states.items()
        ]
    }


def _predict(servable: Servable, body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"JSON Parse error: {error}") from None
    if not isinstance(document, dict):
        raise _invalid("JSON Value: is not object")
    name = document.get("signature_name", SERVING_DEFAULT)
    if not isinstance(name, str):
        raise _invalid("'signature_name' key must be a string value.")
    infos = servable.signature(name).inputs
    if ("instances" in document) == ("inputs" in document):
        if "inputs" in document:
            raise _invalid("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
        raise _invalid("Missing 'inputs' or 'instances' key")
    by_row = "instances" in document
    inputs = _rows(document["instances"], infos) if by_row else _columns(document["inputs"], infos)
    outputs = servable.predict(name, inputs)
    return {"predictions": _as_rows(outputs)} if by_row else {"outputs": _as_columns(outputs)}


def _columns(value: Any, infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(value, dict) or set(value) == {"b64"}:
        if len(infos) > 1:
            raise _invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        return {name: _array(value, name, info) for name, info in infos.items()}
    for name in infos:
        if name not in value:
            raise _invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _array(value[name], name, info) for name, info in infos.items()}


def _rows(rows: Any, infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(rows, list):
        raise _invalid("Excepting 'instances' to be an list/array")
    if not rows:
        raise _invalid("No values in 'instances' array")
    if not isinstance(rows[0], dict) or set(rows[0]) == {"b64"}:
        if len(infos) > 1:
            raise _invalid(
                "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
                "tensorinfo_map"
            )
        return {name: _array(rows, name, info) for name, info in infos.items()}
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise _invalid(f"Expecting object but got list at item {place} of input list")
        if set(row) != set(infos):
            raise _invalid(
                f"Failed to process element: {place} of 'instances' list. JSON object: must only have keys: "
                f"{','.join(sorted(infos))}"
            )
    return {name: _array([row[name] for row in rows], name, info) for name, info in infos.items()}


def _array(value: Any, name: str, info: Any) -> np.ndarray:
    """A JSON value as the array that an input wants."""
    dtype = NUMPY.get(info.dtype)
    if dtype is None:
        raise _invalid(f"input {name}: dtype {dtype_name(info.dtype)} is not served")
    if dtype.kind == "O":
        return _strings(value, name)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):
        raise _invalid(f"input {name}: encountered lists of different sizes") from None
    accepted = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    if array.size and array.dtype.kind not in accepted:
        raise _invalid(f"input {name}: JSON Value is not of expected type: {dtype_name(info.dtype)}")
    if array.size and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise _invalid(f"input {name}: JSON Value is out of range of type: {dtype_name(info.dtype)}")
    return array.astype(dtype)


def _strings(value: Any, name: str) -> np.ndarray:
    def decode(item: Any) -> Any:
        if isinstance(item, list):
            return [decode(part) for part in item]
        if isinstance(item, dict) and set(item) == {"b64"}:
            try:
                return base64.b64decode(item["b64"], validate=True)
            except (ValueError, TypeError):
                raise _invalid(f"input {name}: not base64") from None
        if isinstance(item, str):
            return item.encode()
        raise _invalid(f"input {name}: JSON Value is not of expected type: string")

    try:
        return np.array(decode(value), dtype=object)
    except (ValueError, RecursionError):
        raise _invalid(f"input {name}: encountered lists of different sizes") from None


def _plain(array: np.ndarray) -> Any:
    """An array as JSON values; bytes as text where they are text, else as base64."""
    if array.dtype.kind != "O":
        return array.tolist()

    def text(item: Any) -> Any:
        if isinstance(item, list):
            return [text(part) for part in item]
        try:
            return item.decode()
        except UnicodeDecodeError:
            return {"b64": base64.b64encode(item).decode()}

    return text(array.tolist())


def _as_columns(outputs: Mapping[str, np.ndarray]) -> Any:
    plain = {name: _plain(array) for name, array in outputs.items()}
    return plain if len(plain) > 1 else next(iter(plain.values()))


def _as_rows(outputs: Mapping[str, np.ndarray]) -> list[Any]:
    sizes = set()
    for name, array in outputs.items():
        if array.ndim == 0:
            raise _invalid(f"Tensor name: {name} has no shape information ")
        sizes.add(array.shape[0])
    if len(sizes) > 1:
        raise _invalid(f"Tensor name: {', '.join(outputs)} has inconsistent batch size: {sorted(sizes)}")
    plain = _as_columns(outputs)
    if len(outputs) == 1:
        return list(plain)
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with connections kept open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet an answer: 40 ms less on some networks
    timeout = 60
    servables: Servables

    def do_GET(self) -> None:
        self._respond(b"")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True
            self._send(411 if not length else 413, {"error": f"Content-Length is required, at most {MAX_BODY}"})
            return
        self._respond(self.rfile.read(int(length)))

    def _respond(self, body: bytes) -> None:
        try:
            document, status = answer(self.servables, self.command, self.path, body), 200
        except RequestError as error:
            document, status = {"error": error.message}, HTTP.get(error.code, 500)
        self._send(status, document)

    def _send(self, status: int, document: Any) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: requests are not news."""


class Server(ThreadingHTTPServer):
    """The REST API of `servables` on one address."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], servables: Servables) -> None:
        super().__init__(address, type("BoundHandler", (Handler,), {"servables": servables}))
