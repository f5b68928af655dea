"""TF Serving's REST API: its paths, row and column format, and error bodies."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict

from serving import monitoring
from serving.messages import MAX_MESSAGE, NUMPY, QUEUE_FULL, SERVING_DEFAULT, dtype_name, metadata_messages, to_tensor
from serving.pool import BoundedPool
from serving.servables import RequestError, Servable, Servables

PREDICT = re.compile(
    r"/v1/models/(?P<model>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?:(?P<act>classify|regress|predict)",
    re.IGNORECASE | re.ASCII,
)
STATUS = re.compile(
    r"/v1/models(?:/(?P<model>[^/:]+))?(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?(?P<act>/metadata)?",
    re.IGNORECASE | re.ASCII,
)
CONNECTIONS = 128
SECONDS = 30.0
"""How long a request may take, as by default in TF Serving."""

SAID = 200
"""So much of a value is repeated when it is refused."""

HTTP = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
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


def _asked(match: re.Match[str]) -> tuple[str, int | None, str]:
    version = match["version"]
    if version and int(version) >= 1 << 63:
        raise _invalid(f"Failed to convert version: {version} to numeric.")
    return unquote(match["model"] or ""), int(version) if version else None, unquote(match["label"] or "")


def look_up(servables: Servables, path: str) -> Any:
    """The JSON document that answers a GET: the status of a model, or its metadata.

    Raises:
        RequestError: with the code and message that the error body gets.
    """
    match = STATUS.fullmatch(path)
    if match is None:
        raise _invalid(f"Malformed request: GET {path}")
    name, version, label = _asked(match)
    if not name:
        raise _invalid("Missing model name in request.")
    if match["act"]:
        with servables.lease(name, version, label) as servable:
            found = metadata(servable)
        signatures = metadata_messages.SignatureDefMap()
        found.metadata["signature_def"].Unpack(signatures)
        how = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
        return {
            "model_spec": {"name": name, "signature_name": "", "version": str(found.model_spec.version.value)},
            "metadata": {"signature_def": MessageToDict(signatures, **how)},
        }
    return {
        "model_version_status": [
            {
                "version": str(number),
                "state": state.state,
                "status": {"error_code": state.code.name, "error_message": state.error},
            }
            for number, state in servables.states(name, version).items()
        ]
    }


def predict(servables: Servables, path: str, body: bytes) -> Any:
    """The JSON document that answers a POST.

    Raises:
        RequestError: as `look_up`.
    """
    match = PREDICT.fullmatch(path)
    if match is None:
        raise _invalid(f"Malformed request: POST {path}")
    asked = _asked(match)
    if match["act"].lower() != "predict":
        raise RequestError(grpc.StatusCode.UNIMPLEMENTED, f"{match['act']} is not served here; use predict")
    started = time.perf_counter()
    model = asked[0] if servables.knows(asked[0]) else ""
    try:
        document, name = _parsed(body)
        with servables.lease(*asked) as servable:
            answer = _predict(servable, document, name)
    except RequestError as error:
        servables.metrics.requests.add(model, error.code.name)
        raise
    taken = (time.perf_counter() - started) * 1e6
    servables.metrics.request_latency.add(model, "Predict", "REST", microseconds=taken)
    servables.metrics.requests.add(model, "OK")
    return answer


def _predict(servable: Servable, document: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in servable.signatures:
        raise _invalid(f'Serving signature name: "{name}" not found in signature def')
    infos = servable.signatures[name].inputs
    if not infos:
        raise _invalid(f"Failed to get input map for signature: {'DEFAULT' if name == SERVING_DEFAULT else name}")
    if "instances" in document and "inputs" in document:
        raise _wrong(document, "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ")
    if "instances" in document:
        inputs = _rows(document, infos)
    elif "inputs" in document:
        inputs = _columns(document["inputs"], infos)
    else:
        raise _invalid("Missing 'inputs' or 'instances' key")
    outputs = servable.predict(name, {alias: to_tensor(array) for alias, array in inputs.items()})
    if "instances" in document:
        return {"predictions": _as_rows(outputs)}
    return {"outputs": _as_columns(outputs)}


def _parsed(body: bytes) -> tuple[dict[str, Any], str]:
    """The document, and the name of the signature that it asks for."""
    if not body:
        raise _invalid("JSON Parse error: The document is empty")
    try:
        document = json.loads(body)
    except json.JSONDecodeError as error:
        raise _invalid(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise _invalid(f"JSON Parse error: {str(error).splitlines()[0]}") from None
    if not isinstance(document, dict):
        raise _wrong(document, "Is not object")
    name = document.get("signature_name", SERVING_DEFAULT)
    if not isinstance(name, str):
        raise _wrong(document, "not formatted correctly. 'signature_name' key must be a string value.")
    return document, name or SERVING_DEFAULT


def _said(value: Any) -> str:
    try:
        text = json.dumps(value, indent=4)
    except RecursionError:
        text = "..."
    return text if len(text) <= SAID else f"{text[:SAID]}..."


def _wrong(value: Any, what: str) -> RequestError:
    return _invalid(f"JSON Value: {_said(value)} {what}")


def _is_bytes(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _columns(value: Any, infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(value, dict) or _is_bytes(value):
        if len(infos) > 1:
            raise _invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        return {name: _array(value, info.dtype) for name, info in infos.items()}
    arrays = {}
    for name, info in infos.items():
        if name not in value:
            raise _invalid(f"Missing named input: {name} in 'inputs' object.")
        arrays[name] = _array(value[name], info.dtype)
    return arrays


def _rows(document: dict[str, Any], infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    rows = document["instances"]
    if not isinstance(rows, list):
        raise _wrong(document, "Excepting 'instances' to be an list/array")
    if not rows:
        raise _wrong(document, "No values in 'instances' array")
    if not isinstance(rows[0], dict) and len(infos) > 1:
        raise _invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    by_name = isinstance(rows[0], dict) and not _is_bytes(rows[0])
    found: dict[str, list[np.ndarray]] = {name: [] for name in infos}
    for place, row in enumerate(rows):
        if by_name != (isinstance(row, dict) and not _is_bytes(row)):
            kinds = ("object", "list") if by_name else ("value/list", "object")
            raise _invalid(f"Expecting {kinds[0]} but got {kinds[1]} at item {place} of input list")
        for name, value in row.items() if by_name else ((next(iter(infos)), row),):
            key = f" key: {name}" if by_name else ""
            try:
                if name not in infos:
                    raise _invalid(f"JSON object: does not have named input: {name}")
                array = _array(value, infos[name].dtype)
                first = found[name][0] if found[name] else array
                if array.size != first.size:
                    raise _invalid(f"Expecting tensor size: {first.size} but got: {array.size}")
                if array.shape != first.shape:
                    raise _invalid(f"Expecting shape {_shape(first)} but got: {_shape(array)}")
            except RequestError as error:
                raise _invalid(
                    f"Failed to process element: {place}{key} of 'instances' list. Error: {error.code.name}: "
                    f"{error.message}"
                ) from None
            found[name].append(array)
        if by_name and set(row) != set(infos):
            raise _invalid(
                f"Failed to process element: {place} of 'instances' list. JSON object: {_said(row)} must only have "
                f"keys: {','.join(sorted(infos))}"
            )
    return {name: np.stack(arrays) for name, arrays in found.items()}


def _shape(array: np.ndarray) -> str:
    return f"[{','.join(map(str, array.shape))}]"


def _array(value: Any, number: int) -> np.ndarray:
    """A JSON value as an array of a TensorFlow dtype."""
    dtype = NUMPY.get(number)
    if dtype is None:
        raise RequestError(
            grpc.StatusCode.UNIMPLEMENTED, f"Conversion of JSON Value: {_said(value)} to type: {dtype_name(number)}"
        )
    shape = []
    part = value
    while isinstance(part, list):
        shape.append(len(part))
        if not part:
            break
        part = part[0]
    values: list[Any] = []
    _collect(value, shape, 0, values)
    convert = {"f": _float, "i": _integer, "u": _integer, "b": _bool, "O": _string}[dtype.kind]
    if not _plainly(values, dtype):
        values = [convert(item, number, dtype) for item in values]
    array = np.empty(len(values), dtype)
    array[:] = values
    return array.reshape(shape)


def _collect(value: Any, shape: list[int], level: int, into: list[Any]) -> None:
    if not isinstance(value, list):
        if level != len(shape):
            raise _wrong(
                value, f"found at incorrect level: {level + 1} in the JSON DOM. Expected at level: {len(shape)}"
            )
        into.append(value)
        return
    if level >= len(shape):
        raise _invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise _invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    if level == len(shape) - 1 and list not in set(map(type, value)):
        into.extend(value)
        return
    for part in value:
        _collect(part, shape, level + 1, into)


def _plainly(values: list[Any], dtype: np.dtype) -> bool:
    """Whether all of `values` are what `dtype` takes as it is; told without a look at each."""
    types = set(map(type, values))
    if dtype.kind == "f" and types == {float}:
        found = np.array(values)
        return not (np.isfinite(found) & (np.abs(found) > np.finfo(dtype).max)).any()
    if dtype.kind == "b":
        return types == {bool}
    if dtype.kind in "iu" and types == {int}:
        limits = np.iinfo(dtype)
        return min(values) >= limits.min and max(values) <= limits.max
    return False


def _type_error(value: Any, number: int) -> RequestError:
    kinds = {type(None): "Null", dict: "Object", list: "Array", str: "String", int: "Number", float: "Number"}
    kind = str(value) if isinstance(value, bool) else kinds[type(value)]
    return _invalid(f"JSON Value: {_said(value)} Type: {kind} is not of expected type: {dtype_name(number)}")


def _float(value: Any, number: int, dtype: np.dtype) -> float:
    if type(value) not in (int, float):
        raise _type_error(value, number)
    limits = np.finfo(dtype)
    if isinstance(value, int):
        lossy = abs(value) > (1 << (limits.nmant + 1)) - 1
    else:
        lossy = bool(np.isfinite(value)) and abs(value) > float(limits.max)
    if lossy:
        raise _invalid(f"Cannot convert JSON value: {_said(value)} to {dtype_name(number)} without loss of precision.")
    return float(value)


def _integer(value: Any, number: int, dtype: np.dtype) -> int:
    limits = np.iinfo(dtype)
    if type(value) is not int or not limits.min <= value <= limits.max:
        raise _type_error(value, number)
    return value


def _bool(value: Any, number: int, dtype: np.dtype) -> bool:
    if type(value) is not bool:
        raise _type_error(value, number)
    return value


def _string(value: Any, number: int, dtype: np.dtype) -> bytes:
    if isinstance(value, dict):
        if not _is_bytes(value):
            raise _wrong(value, "not formatted correctly for base64 data")
        try:
            return base64.b64decode(value["b64"] + "=" * (-len(value["b64"]) % 4), validate=True)
        except ValueError:
            raise _invalid("Unable to base64 decode") from None
    if not isinstance(value, str):
        raise _type_error(value, number)
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise _invalid("JSON Parse error: The surrogate pair in string is invalid.") from None


def _plain(name: str, array: np.ndarray) -> Any:
    """An array as JSON values: numbers by as few digits as say them, bytes as text or base64."""
    if array.dtype in (np.float32, np.float16):
        return _nested([_short(value) for value in array.ravel().tolist()], array.shape)
    if array.dtype.kind != "O":
        return array.tolist()
    return _nested([_text(value, name.endswith("_bytes")) for value in array.ravel().tolist()], array.shape)


def _short(value: float) -> float:
    six = float(f"{value:.6g}")
    return six if value != value or np.float32(six) == value else float(f"{value:.9g}")


def _text(value: bytes, binary: bool) -> Any:
    if not binary:
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(value).decode()}


def _nested(values: list[Any], shape: tuple[int, ...]) -> Any:
    if not shape:
        return values[0]
    for size in reversed(shape[1:]):
        count = len(values) // size if size else int(np.prod(shape[:-1]))
        values = [values[place * size : (place + 1) * size] for place in range(count)]
    return values


def _as_columns(outputs: Mapping[str, np.ndarray]) -> Any:
    plain = {name: _plain(name, array) for name, array in outputs.items()}
    return plain if len(plain) > 1 else next(iter(plain.values()))


def _as_rows(outputs: Mapping[str, np.ndarray]) -> list[Any]:
    batch = 0
    for name, array in outputs.items():
        if array.ndim == 0:
            raise _invalid(f"Tensor name: {name} has no shape information ")
        if len(array) < 1:
            raise _invalid(f"Tensor name: {name} has invalid batch size: {len(array)}")
        if batch not in (0, len(array)):
            raise _invalid(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {batch}")
        batch = len(array)
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
    server: Server

    def do_GET(self) -> None:
        self._respond(b"")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or int(length) > MAX_MESSAGE:
            self.close_connection = True
            self._send(413 if length else 411, {"error": f"Content-Length is required, at most {MAX_MESSAGE}"})
            return
        if self.server.pool.full:
            self.close_connection = True  # with the body unread
            self._send(503, {"error": f"{QUEUE_FULL}: {self.server.pool.queue} wait already; try again later"})
            return
        body = self.rfile.read(int(length))
        if len(body) == int(length):
            self._respond(body)

    def do_PUT(self) -> None:
        self.close_connection = True
        self._send(400, {"error": f"Malformed request: {self.command} {self.path}"})

    do_DELETE = do_PATCH = do_OPTIONS = do_PUT  # noqa: N815

    def _respond(self, body: bytes) -> None:
        with self.server.answering():
            if self.server.closing:
                self._send(503, {"error": "The server is stopping"})
                return
            path = self.path.partition("?")[0]
            if path == monitoring.PATH:
                self._write(200, "text/plain", self.server.servables.metrics.page().encode())
                return
            if not path.lower().startswith("/v1/"):
                self._send(404, {"error": f"{path} is not here; the API begins with /v1/models"})
                return
            try:
                document, status = self._answer(path, body), 200
            except RequestError as error:
                document, status = {"error": error.message}, HTTP.get(error.code, 500)
            self._send(status, document)

    def _answer(self, path: str, body: bytes) -> Any:
        if self.command == "GET":
            return look_up(self.server.servables, path)
        future = self.server.pool.submit(predict, self.server.servables, path, body)
        try:
            return future.result(SECONDS)
        except (TimeoutError, CancelledError):
            future.cancel()
            raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, f"No answer in {SECONDS:.0f} s") from None

    def _send(self, status: int, document: Any) -> None:
        self._write(status, "application/json", json.dumps(document).encode())

    def _write(self, status: int, kind: str, content: bytes) -> None:
        if self.server.closing:
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: requests are not news."""


class _Answering:
    """Counts the requests between their reading and their last byte."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._count = 0

    def __enter__(self) -> None:
        with self._change:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._count -= 1
            self._change.notify_all()

    def wait(self, seconds: float) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._count, seconds)


class Server(ThreadingHTTPServer):
    """The REST API of `servables` on one address; predictions run on `pool`, connections have a thread each."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], servables: Servables, pool: BoundedPool) -> None:
        super().__init__(address, Handler)
        self.servables = servables
        self.pool = pool
        self.closing = False
        self._answering = _Answering()
        self._connections = threading.BoundedSemaphore(CONNECTIONS)

    def answering(self) -> _Answering:
        """For the time of a request."""
        return self._answering

    def drain(self, seconds: float) -> None:
        """Waits for the requests that are being answered."""
        self.closing = True
        self._answering.wait(seconds)

    def process_request(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """Refuses a connection too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        assert isinstance(request, socket)
        request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """Frees the place of a connection that has ended."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """Quiet: a client that went away is no news."""
