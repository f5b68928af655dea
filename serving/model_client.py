"""A client of TF Serving, stock or embedded: arrays in and out, every request for one named version.

It speaks gRPC. Where that cannot be reached and a REST address is given, REST answers predictions, status and metadata;
it has nothing that loads a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np

from serving.messages import (
    MAX_MESSAGE,
    NUMPY,
    QUEUE_FULL,
    SERVING_DEFAULT,
    ModelServiceStub,
    PredictionServiceStub,
    fill,
    from_tensor,
    management_messages,
    metadata_messages,
    predict_messages,
    status_messages,
)
from serving.rest_client import RestClient, RestError

LOAD_SECONDS = 120.0
POLL_SECONDS = 0.05
LABELS = ("stable", "canary")
NO_LABELS = "Model labels does not init yet"
_CHANNEL = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
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
        rest: host:port or URL of its REST API, asked when gRPC does not answer; empty: none.
    """

    def __init__(self, address: str, timeout_seconds: float = 5.0, rest: str = "") -> None:
        self.address = address
        self.timeout_seconds = timeout_seconds
        self._channel = grpc.insecure_channel(address, options=_CHANNEL)
        self._prediction = PredictionServiceStub(self._channel)
        self._management = ModelServiceStub(self._channel)
        self._rest = RestClient(rest) if rest else None
        self._signatures: dict[tuple[str, int], tuple[Signature, Any]] = {}

    def close(self) -> None:
        """Ends the channel."""
        self._channel.close()
        if self._rest is not None:
            self._rest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def signature(self, model: str, version: int) -> Signature:
        """The default signature of a version; asked for once, as a version never changes.

        Raises:
            ModelError: the call failed, or the version lacks the signature.
        """
        return self._signature(model, version)[0]

    def predict(
        self, model: str, version: int, inputs: Mapping[str, np.ndarray], seconds: float | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs of a version's default signature by name.

        Args:
            seconds: until the deadline of this call; none: `timeout_seconds`.

        Raises:
            ModelError: the call failed.
        """
        request = predict_messages.PredictRequest()
        request.model_spec.name = model
        request.model_spec.version.value = version
        tensors = request.inputs
        for name, array in inputs.items():
            fill(tensors[name], array)
        limit = self.timeout_seconds if seconds is None else seconds

        def over_rest(rest: RestClient) -> dict[str, np.ndarray]:
            return rest.predict(model, version, self._signature(model, version)[1], inputs, limit)

        response = self._ask(self._prediction.Predict, request, f"{model} version {version}", over_rest, limit)
        if isinstance(response, dict):
            return response
        return {name: from_tensor(tensor) for name, tensor in response.outputs.items()}

    def ready(self, model: str, version: int) -> bool:
        """Whether a version answers requests.

        Raises:
            ModelError: the server is away, or the version did not load.
        """
        what = f"{model} version {version}"
        try:
            found = self._ask(
                self._management.GetModelStatus,
                _status_request(model, version),
                what,
                lambda rest: rest.available(model, version, self.timeout_seconds),
            )
        except ModelError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        if isinstance(found, bool):
            return found
        (status,) = found.model_version_status
        if status.status.error_code:
            raise ModelError(
                grpc.StatusCode.FAILED_PRECONDITION, f"{what} at {self.address}: {status.status.error_message}"
            )
        return bool(status.state == status_messages.ModelVersionStatus.AVAILABLE)

    def load(
        self,
        base_paths: Mapping[str, Path],
        versions: Sequence[int],
        seconds: float = LOAD_SECONDS,
        labels: Mapping[str, int] | None = None,
    ) -> None:
        """Has the server serve exactly `versions` of each model, and waits until it does.

        It takes up to three configs: one that loads what is new while labels stay where they are, as TF Serving refuses
        a label on a version that is not available; one that moves the labels; and one that unloads the rest, so that a
        label never names a version on its way out. What else the server serves is unloaded.

        Args:
            base_paths: model → its base path, as the server sees it.
            seconds: how long loading may take.
            labels: label → version, the same for each model; none: `LABELS` stay on the versions that stay.

        Raises:
            ModelError: the server is away, a version does not load, or not in time; or its gRPC API does not answer,
                as REST cannot load.
            ValueError: a label is of a version that is not to be served.
        """
        wanted = sorted(set(versions))
        if labels and not set(labels.values()) <= set(wanted):
            raise ValueError(f"labels {dict(labels)} are not all of versions {wanted}")
        deadline = time.monotonic() + seconds
        what = f"loading of {', '.join(base_paths)} versions {', '.join(map(str, wanted))}"
        now = {model: self.labels(model, {*LABELS, *(labels or {})}) for model in base_paths}
        kept = {model: sorted({*wanted, *now[model].values()}) for model in base_paths}
        last = {
            model: {label: version for label, version in now[model].items() if version in wanted}
            if labels is None
            else dict(labels)
            for model in base_paths
        }
        self._reload(base_paths, kept, now, what, deadline)
        # stock TF Serving answers at once and loads in the background
        while not all(self.ready(model, version) for model in base_paths for version in wanted):
            if time.monotonic() > deadline:
                raise ModelError(
                    grpc.StatusCode.DEADLINE_EXCEEDED, f"{what} at {self.address} is not done in {seconds:.0f} s"
                )
            time.sleep(POLL_SECONDS)
        if last != now:
            self._reload(base_paths, kept, last, what, deadline)
        if any(kept[model] != wanted for model in base_paths):
            self._reload(base_paths, dict.fromkeys(base_paths, wanted), last, what, deadline)

    def _reload(
        self,
        base_paths: Mapping[str, Path],
        versions: Mapping[str, Sequence[int]],
        labels: Mapping[str, Mapping[str, int]],
        what: str,
        deadline: float,
    ) -> None:
        request = management_messages.ReloadConfigRequest()
        for model, base_path in base_paths.items():
            config = request.config.model_config_list.config.add(
                name=model, base_path=str(base_path), model_platform="tensorflow"
            )
            config.model_version_policy.specific.versions.extend(versions[model])
            for label, version in labels[model].items():
                config.version_labels[label] = version
        seconds = max(deadline - time.monotonic(), 0.001)
        response = self._ask(self._management.HandleReloadConfigRequest, request, what, seconds=seconds)
        if response.status.error_code:
            raise ModelError(
                grpc.StatusCode.FAILED_PRECONDITION, f"{what} at {self.address}: {response.status.error_message}"
            )

    def labels(self, model: str, names: Iterable[str]) -> dict[str, int]:
        """The labels that lead to a version now; TF Serving does not list them."""
        found = {}
        for label in sorted(names):
            request = metadata_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
            request.model_spec.name = model
            request.model_spec.version_label = label
            try:
                response = self._ask(self._prediction.GetModelMetadata, request, f"{model} {label}")
            except ModelError as error:
                # UNAVAILABLE, with these words, is a server that has never had a config
                if error.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND) or NO_LABELS in str(
                    error
                ):
                    continue
                raise
            found[label] = response.model_spec.version.value
        return found

    def _signature(self, model: str, version: int) -> tuple[Signature, Any]:
        """A version's default signature, and its SignatureDef."""
        known = self._signatures.get((model, version))
        if known is not None:
            return known
        request = metadata_messages.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = model
        request.model_spec.version.value = version
        what = f"{model} version {version}"
        found = self._ask(
            self._prediction.GetModelMetadata,
            request,
            what,
            lambda rest: rest.signature(model, version, self.timeout_seconds),
        )
        if isinstance(found, metadata_messages.GetModelMetadataResponse):
            signatures = metadata_messages.SignatureDefMap()
            found.metadata["signature_def"].Unpack(signatures)
            found = signatures.signature_def.get(SERVING_DEFAULT)
        if found is None:
            raise ModelError(
                grpc.StatusCode.FAILED_PRECONDITION, f"{what} at {self.address} has no signature {SERVING_DEFAULT}"
            )
        inputs = {
            name: Input(
                NUMPY.get(info.dtype, np.dtype(object)),
                None if info.tensor_shape.unknown_rank else len(info.tensor_shape.dim),
            )
            for name, info in found.inputs.items()
        }
        known = Signature(inputs, tuple(sorted(found.outputs))), found
        self._signatures[model, version] = known
        return known

    def _ask(
        self,
        method: Any,
        request: Any,
        what: str,
        over_rest: Callable[[RestClient], Any] | None = None,
        seconds: float | None = None,
    ) -> Any:
        """What gRPC answers; or, where it cannot be reached, REST."""
        try:
            return method(request, timeout=self.timeout_seconds if seconds is None else seconds)
        except grpc.RpcError as error:
            code = error.code()
            reason = error.details() or code.name
            if code is not grpc.StatusCode.UNAVAILABLE or reason.startswith(QUEUE_FULL):
                raise ModelError(code, f"{what} at {self.address}: {reason}") from error
            away = f"the model server does not answer ({reason.splitlines()[0]})"
            if self._rest is None:
                raise ModelError(code, f"{what} at {self.address}: {away}") from error
            if over_rest is None:
                message = f"{what} at {self.address}: {away}; over REST models cannot be loaded: make gRPC reachable"
                raise ModelError(code, message) from error
        try:
            return over_rest(self._rest)
        except RestError as error:
            raise ModelError(error.code, f"{what} at {self.address}: {away}; over REST: {error}") from error


def _status_request(model: str, version: int) -> Any:
    request = status_messages.GetModelStatusRequest()
    request.model_spec.name = model
    request.model_spec.version.value = version
    return request
