"""A client of TF Serving's gRPC API, stock or embedded: arrays in and out, every request for one named version."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np

from serving.messages import (
    NUMPY,
    SERVING_DEFAULT,
    ModelServiceStub,
    PredictionServiceStub,
    from_tensor,
    management_messages,
    metadata_messages,
    predict_messages,
    status_messages,
    to_tensor,
)

LOAD_SECONDS = 120.0
_CHANNEL = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # a restarted server is found again within a second, not after two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class ModelError(RuntimeError):
    """A call of the model server that failed; `code` is gRPC's, the message names model, version and address."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Input:
    """One input of a signature; `rank` None means any."""

    dtype: np.dtype
    rank: int | None


@dataclass(frozen=True)
class Signature:
    """Inputs by name, and the names of the outputs."""

    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]


class ModelClient:
    """A channel to one model server, for all threads of a process.

    Args:
        address: host:port of its gRPC API.
        timeout_seconds: deadline of one call.
    """

    def __init__(self, address: str, timeout_seconds: float = 5.0) -> None:
        self.address = address
        self.timeout_seconds = timeout_seconds
        self._channel = grpc.insecure_channel(address, options=_CHANNEL)
        self._prediction = PredictionServiceStub(self._channel)
        self._management = ModelServiceStub(self._channel)
        self._signatures: dict[tuple[str, int], Signature] = {}

    def close(self) -> None:
        """Ends the channel."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def signature(self, model: str, version: int) -> Signature:
        """The default signature of a version; asked for once, as a version never changes.

        Raises:
            ModelError: the call failed, or the version lacks the signature.
        """
        known = self._signatures.get((model, version))
        if known is not None:
            return known
        request = metadata_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = model
        request.model_spec.version.value = version
        response = self._call(self._prediction.GetModelMetadata, request, f"{model} version {version}")
        signatures = metadata_messages.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        if SERVING_DEFAULT not in signatures.signature_def:
            raise ModelError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{model} version {version} at {self.address} has no signature {SERVING_DEFAULT}",
            )
        found = signatures.signature_def[SERVING_DEFAULT]
        inputs = {
            name: Input(
                NUMPY.get(info.dtype, np.dtype(object)),
                None if info.tensor_shape.unknown_rank else len(info.tensor_shape.dim),
            )
            for name, info in found.inputs.items()
        }
        known = Signature(inputs, tuple(sorted(found.outputs)))
        self._signatures[model, version] = known
        return known

    def predict(
        self, model: str, version: int, inputs: Mapping[str, np.ndarray], seconds: float | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs of a version's default signature by name.

        Args:
            seconds: deadline of this call; None: that of the client.

        Raises:
            ModelError: the call failed.
        """
        request = predict_messages.PredictRequest()
        request.model_spec.name = model
        request.model_spec.version.value = version
        for name, array in inputs.items():
            request.inputs[name].CopyFrom(to_tensor(array))
        response = self._call(self._prediction.Predict, request, f"{model} version {version}", seconds)
        return {name: from_tensor(tensor) for name, tensor in response.outputs.items()}

    def ready(self, model: str, version: int) -> bool:
        """Whether a version answers requests.

        Raises:
            ModelError: the server is away, or the version did not load.
        """
        request = status_messages.GetModelStatusRequest()
        request.model_spec.name = model
        request.model_spec.version.value = version
        try:
            response = self._call(self._management.GetModelStatus, request, f"{model} version {version}")
        except ModelError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        (found,) = response.model_version_status
        if found.status.error_code:
            raise ModelError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{model} version {version} at {self.address}: {found.status.error_message}",
            )
        return bool(found.state == status_messages.ModelVersionStatus.AVAILABLE)

    def load(
        self,
        base_paths: Mapping[str, Path],
        versions: Sequence[int],
        seconds: float = LOAD_SECONDS,
        labels: Mapping[str, int] | None = None,
    ) -> None:
        """Has the server serve exactly `versions` of each model under `labels`, and waits until it does.

        Args:
            base_paths: model → its base path, as the server sees it.
            seconds: how long loading may take.
            labels: label → version; a label is given when its version is there, as TF Serving wants it.

        Raises:
            ModelError: the server is away, a version does not load, or not in time.
        """
        request = management_messages.ReloadConfigRequest()
        for model, base_path in base_paths.items():
            config = request.config.model_config_list.config.add(
                name=model, base_path=str(base_path), model_platform="tensorflow"
            )
            config.model_version_policy.specific.versions.extend(sorted(versions))
        what = f"loading of {', '.join(base_paths)} versions {', '.join(map(str, sorted(versions)))}"
        deadline = time.monotonic() + seconds
        response = self._call(self._management.HandleReloadConfigRequest, request, what, seconds)
        if response.status.error_code:
            raise ModelError(
                grpc.StatusCode.FAILED_PRECONDITION, f"{what} at {self.address}: {response.status.error_message}"
            )
        # stock TF Serving answers at once and loads in the background
        while not all(self.ready(model, version) for model in base_paths for version in versions):
            if time.monotonic() > deadline:
                raise ModelError(
                    grpc.StatusCode.DEADLINE_EXCEEDED, f"{what} at {self.address} is not done in {seconds:.0f} s"
                )
            time.sleep(0.05)
        if labels:
            for config in request.config.model_config_list.config:
                config.version_labels.update(labels)
            self._call(self._management.HandleReloadConfigRequest, request, f"labelling of {what}", seconds)

    def _call(self, method: Any, request: Any, what: str, seconds: float | None = None) -> Any:
        try:
            return method(request, timeout=seconds or self.timeout_seconds)
        except grpc.RpcError as error:
            code = error.code()
            reason = error.details() or code.name
            if code is grpc.StatusCode.UNAVAILABLE:
                reason = f"the model server does not answer ({reason.splitlines()[0]})"
            raise ModelError(code, f"{what} at {self.address}: {reason}") from error
