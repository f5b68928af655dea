"""TF Serving's REST API as a client: predictions in column format, status and metadata."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import grpc
import httpx
import numpy as np
from google.protobuf.json_format import ParseDict, ParseError

from serving.messages import NUMPY, SERVING_DEFAULT, SignatureDef

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class RestError(RuntimeError):
    """A request that failed; `code` is what gRPC would have said."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class RestClient:
    """A client for all threads of a process; `address` is host:port or an URL."""

    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=address if "://" in address else f"http://{address}")

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def predict(
        self, model: str, version: int, signature: Any, inputs: Mapping[str, np.ndarray], timeout: float
    ) -> dict[str, np.ndarray]:
        """The outputs of a version's default signature, whose SignatureDef is `signature`.

        Raises:
            RestError: the call failed.
        """
        body = {"inputs": {name: _plain(array) for name, array in inputs.items()}}
        path = f"/v1/models/{model}/versions/{version}:predict"
        found = self._ask("POST", path, timeout, content=json.dumps(body).encode())["outputs"]
        names = sorted(signature.outputs)
        named = {names[0]: found} if len(names) == 1 else found
        return {name: _array(named[name], signature.outputs[name].dtype) for name in names}

    def available(self, model: str, version: int, timeout: float) -> bool:
        """Whether a version answers requests.

        Raises:
            RestError: the call failed, or the version did not load.
        """
        document = self._ask("GET", f"/v1/models/{model}/versions/{version}", timeout)
        (found,) = document["model_version_status"]
        if found["status"]["error_code"] != "OK":
            raise RestError(grpc.StatusCode.FAILED_PRECONDITION, found["status"]["error_message"])
        return bool(found["state"] == "AVAILABLE")

    def signature(self, model: str, version: int, timeout: float) -> Any:
        """The SignatureDef of a version's default signature, None if it has none.

        Raises:
            RestError: the call failed.
        """
        document = self._ask("GET", f"/v1/models/{model}/versions/{version}/metadata", timeout)
        signatures = document["metadata"]["signature_def"]["signature_def"]
        if SERVING_DEFAULT not in signatures:
            return None
        try:
            return ParseDict(signatures[SERVING_DEFAULT], SignatureDef(), ignore_unknown_fields=True)
        except ParseError as error:
            raise RestError(grpc.StatusCode.INTERNAL, f"its metadata cannot be read: {error}") from error

    def _ask(self, method: str, path: str, timeout: float, content: bytes | None = None) -> Any:
        try:
            response = self._http.request(method, path, content=content, timeout=timeout)
            document = response.json()
        except httpx.TimeoutException as error:
            raise RestError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer in {timeout:g} s") from error
        except (httpx.TransportError, ValueError) as error:
            raise RestError(grpc.StatusCode.UNAVAILABLE, str(error) or type(error).__name__) from error
        if response.is_success:
            return document
        code = CODES.get(response.status_code, grpc.StatusCode.UNKNOWN)
        raise RestError(code, document.get("error", f"HTTP {response.status_code}"))


def _plain(array: np.ndarray) -> Any:
    if array.dtype.kind not in "OSU":
        return array.tolist()

    def said(value: Any) -> Any:
        if isinstance(value, list):
            return [said(part) for part in value]
        return value if isinstance(value, str) else {"b64": base64.b64encode(value).decode()}

    return said(array.tolist())


def _array(value: Any, number: int) -> np.ndarray:
    dtype = NUMPY[number]
    if dtype.kind != "O":
        return np.asarray(value, dtype)

    def read(part: Any) -> Any:
        if isinstance(part, list):
            return [read(inner) for inner in part]
        return base64.b64decode(part["b64"]) if isinstance(part, dict) else part.encode()

    return np.array(read(value), dtype)
