"""A model server that speaks TF Serving's gRPC and REST API, used where no TF Serving is configured.

    python -m serving.model_server --home HOME --grpc-port 8500 --rest-port 8501

It serves every version in HOME/models/recall and HOME/models/rank, and from the first HandleReloadConfigRequest on
what that says. Without a release it runs and answers NOT_FOUND.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc

from penstock.release import MODELS, base_path
from serving.messages import (
    SERVING_DEFAULT,
    from_tensor,
    management_messages,
    metadata_messages,
    predict_messages,
    status_messages,
    to_tensor,
)
from serving.rest import Server, metadata
from serving.servables import Model, RequestError, Servable, Servables

THREADS = 4
POLL_SECONDS = 1.0
DRAIN_SECONDS = 10.0
MESSAGE_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class _Services:
    """The two gRPC services, a method a call."""

    def __init__(self, servables: Servables) -> None:
        self.servables = servables

    def _find(self, request: Any) -> Servable:
        if not request.HasField("model_spec"):
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        return self.servables.find(spec.name, version, spec.version_label)

    def predict(self, request: Any) -> Any:
        servable = self._find(request)
        name = request.model_spec.signature_name or SERVING_DEFAULT
        servable.signature(name)
        inputs = {}
        for alias, tensor in request.inputs.items():
            try:
                inputs[alias] = from_tensor(tensor)
            except ValueError as error:
                message = f"tensor parsing error: {alias}: {error}"
                raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, message) from None
        outputs = servable.predict(name, inputs, list(request.output_filter))
        response = predict_messages.PredictResponse()
        response.model_spec.name = servable.name
        response.model_spec.version.value = servable.version
        response.model_spec.signature_name = name
        for alias, array in outputs.items():
            response.outputs[alias].CopyFrom(to_tensor(array))
        return response

    def get_model_metadata(self, request: Any) -> Any:
        servable = self._find(request)
        if not request.metadata_field:
            message = "GetModelMetadataRequest must specify at least one metadata_field"
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)
        for name in request.metadata_field:
            if name != "signature_def":
                raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, f"Metadata field {name} is not supported")
        return metadata(servable)

    def get_model_status(self, request: Any) -> Any:
        if not request.HasField("model_spec"):
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, "Missing ModelSpec")
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        if spec.version_label:
            version = self._find(request).version
        response = status_messages.GetModelStatusResponse()
        for number, state in self.servables.states(spec.name, version).items():
            status = response.model_version_status.add(
                version=number, state=status_messages.ModelVersionStatus.State.Value(state.state)
            )
            if state.error:
                status.status.error_code = grpc.StatusCode.UNKNOWN.value[0]
                status.status.error_message = state.error
        return response

    def handle_reload_config(self, request: Any) -> Any:
        self.servables.configure(_models(request.config))
        return management_messages.ReloadConfigResponse()


def _models(config: Any) -> list[Model]:
    """A ModelServerConfig as models."""
    if config.WhichOneof("config") != "model_config_list":
        message = (
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
            "supported"
        )
        raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)
    models: list[Model] = []
    for entry in config.model_config_list.config:
        if not entry.name or not entry.base_path:
            raise RequestError(
                grpc.StatusCode.INVALID_ARGUMENT, f"Expected model {entry.name} to have a name and a base_path"
            )
        if entry.name in {model.name for model in models}:
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, f"Illegal to list model {entry.name} multiple times")
        choice = entry.model_version_policy
        models.append(
            Model(
                name=entry.name,
                base_path=Path(entry.base_path),
                policy=choice.WhichOneof("policy_choice") or "latest",
                latest=choice.latest.num_versions or 1,
                versions=tuple(choice.specific.versions),
                labels=dict(entry.version_labels),
            )
        )
    return models


def _unary(act: Callable[[Any], Any], request: Any, response: Any) -> grpc.RpcMethodHandler:
    def call(message: Any, context: grpc.ServicerContext) -> Any:
        try:
            return act(message)
        except RequestError as error:
            return context.abort(error.code, error.message)

    return grpc.unary_unary_rpc_method_handler(
        call, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


def _handlers(servables: Servables) -> tuple[grpc.GenericRpcHandler, ...]:
    services = _Services(servables)
    prediction = {
        "Predict": _unary(services.predict, predict_messages.PredictRequest, predict_messages.PredictResponse),
        "GetModelMetadata": _unary(
            services.get_model_metadata,
            metadata_messages.GetModelMetadataRequest,
            metadata_messages.GetModelMetadataResponse,
        ),
    }
    management = {
        "GetModelStatus": _unary(
            services.get_model_status, status_messages.GetModelStatusRequest, status_messages.GetModelStatusResponse
        ),
        "HandleReloadConfigRequest": _unary(
            services.handle_reload_config,
            management_messages.ReloadConfigRequest,
            management_messages.ReloadConfigResponse,
        ),
    }
    return (
        grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", prediction),
        grpc.method_handlers_generic_handler("tensorflow.serving.ModelService", management),
    )


class PortError(RuntimeError):
    """Another process listens where the server should."""


class ModelServer:
    """The server, from `start` to `stop`. Ports of 0 are chosen free; `grpc_port` and `rest_port` tell which.

    Raises:
        PortError: one of the ports is taken.
    """

    def __init__(self, home: Path, grpc_port: int, rest_port: int, host: str = "127.0.0.1") -> None:
        self.servables = Servables()
        self.models = [Model(name, base_path(home, name)) for name in MODELS]
        self._stopped = threading.Event()
        self._grpc = grpc.server(ThreadPoolExecutor(THREADS), options=[("grpc.so_reuseport", 0), *MESSAGE_OPTIONS])
        self._grpc.add_generic_rpc_handlers(_handlers(self.servables))
        try:
            self.grpc_port = self._grpc.add_insecure_port(f"{host}:{grpc_port}")
        except RuntimeError:
            raise PortError(f"port {grpc_port} of {host} is in use; stop what listens there or set another") from None
        try:
            self._rest = Server((host, rest_port), self.servables)
        except OSError as error:
            raise PortError(f"port {rest_port} of {host}: {error.strerror}; set another") from None
        self.rest_port: int = self._rest.server_address[1]
        self._threads = [
            threading.Thread(target=self._rest.serve_forever, name="rest"),
            threading.Thread(target=self._follow, name="follow"),
        ]

    def start(self) -> None:
        """Loads what is there, then answers."""
        for message in self.servables.follow(self.models):
            print(f"model server: {message}", file=sys.stderr, flush=True)
        self._grpc.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Takes no more requests, and finishes those that are running."""
        self._stopped.set()
        self._grpc.stop(DRAIN_SECONDS).wait()
        if self._threads[0].is_alive():
            self._rest.shutdown()
        self._rest.server_close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            for message in self.servables.follow():
                print(f"model server: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m serving.model_server", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--grpc-port", type=int, default=8500)
    parser.add_argument("--rest-port", type=int, default=8501)
    parser.add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        server = ModelServer(arguments.home.resolve(), arguments.grpc_port, arguments.rest_port, arguments.host)
    except PortError as error:
        sys.exit(f"model server: {error}")
    server.start()
    served = ", ".join(f"{name} {versions}" for name, versions in server.servables.served.items())
    where = f"gRPC {arguments.host}:{server.grpc_port}, REST {arguments.host}:{server.rest_port}"
    print(f"model server: {where}, serving {served}", flush=True)
    ended.wait()
    server.stop()


if __name__ == "__main__":
    main()
