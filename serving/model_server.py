"""A model server that speaks TF Serving's gRPC and REST API, used where no TF Serving is configured.

    python -m serving.model_server --home HOME --grpc-port 8500 --rest-port 8501

It serves every version in HOME/models/recall and HOME/models/rank, and from the first HandleReloadConfigRequest on
what that says. Without a release it runs and answers NOT_FOUND.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
from google.protobuf.message import DecodeError

from penstock.release import MODELS, base_path
from serving.messages import (
    MAX_MESSAGE,
    QUEUE_FULL,
    SERVING_DEFAULT,
    fill,
    management_messages,
    metadata_messages,
    predict_messages,
    status_messages,
)
from serving.monitoring import Metrics
from serving.pool import BoundedPool
from serving.rest import Server, metadata
from serving.servables import Model, RequestError, Servables

THREADS = 4
QUEUE = 256
"""Requests that wait for a thread; a further one is told UNAVAILABLE."""

RELOADS = 16
POLL_SECONDS = 1.0
DRAIN_SECONDS = 10.0
PLATFORM = "tensorflow"
MESSAGE_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]


def _invalid(message: str) -> RequestError:
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


class _Services:
    """The two gRPC services, a method a call."""

    def __init__(self, servables: Servables) -> None:
        self.servables = servables

    def predict(self, request: Any) -> Any:
        name, version, label = _asked(request)
        with self.servables.lease(name, version, label) as servable:
            signature = request.model_spec.signature_name or SERVING_DEFAULT
            outputs = servable.predict(signature, request.inputs, request.output_filter)
            response = predict_messages.PredictResponse()
            response.model_spec.name = servable.name
            response.model_spec.version.value = servable.version
            response.model_spec.signature_name = signature
            for alias, array in outputs.items():
                fill(response.outputs[alias], array)
            return response

    def get_model_metadata(self, request: Any) -> Any:
        asked = _asked(request)
        if not request.metadata_field:
            raise _invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != "signature_def":
                raise _invalid(f"Metadata field {name} is not supported")
        with self.servables.lease(*asked) as servable:
            return metadata(servable)

    def get_model_status(self, request: Any) -> Any:
        name, version, _ = _asked(request)  # TF Serving takes no notice of a label here
        response = status_messages.GetModelStatusResponse()
        for number, state in self.servables.states(name, version).items():
            status = response.model_version_status.add(
                version=number, state=status_messages.ModelVersionStatus.State.Value(state.state)
            )
            status.status.error_code = state.code.value[0]
            status.status.error_message = state.error
        return response

    def handle_reload_config(self, request: Any) -> Any:
        self.servables.configure(_models(request.config))
        return management_messages.ReloadConfigResponse()


def _asked(request: Any) -> tuple[str, int | None, str]:
    """The name, version and label that a request asks for."""
    if not request.HasField("model_spec"):
        raise _invalid("Missing ModelSpec")
    spec = request.model_spec
    return spec.name, spec.version.value if spec.HasField("version") else None, spec.version_label


def _models(config: Any) -> list[Model]:
    """A ModelServerConfig as models."""
    if config.WhichOneof("config") != "model_config_list":
        raise _invalid(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
            "supported"
        )
    models: list[Model] = []
    for entry in config.model_config_list.config:
        if entry.name in {model.name for model in models}:
            raise _invalid(f"Illegal to list model {entry.name} multiple times in config list")
        if not entry.base_path.startswith("/"):
            raise _invalid(
                f"Expected model {entry.name} to have an absolute path or URI; got base_path()={entry.base_path}"
            )
        if not entry.model_platform:
            raise _invalid(
                "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
                "ModelServerConfig::model_platform."
            )
        if entry.model_platform != PLATFORM:
            raise _invalid(f"Model {entry.name} requests unsupported platform {entry.model_platform}")
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


@dataclass(frozen=True)
class _Method:
    """How a gRPC method is answered: by `act`, on the threads of `pool`."""

    act: Callable[[Any], Any]
    request: Any
    response: Any
    pool: BoundedPool


class _Handler(grpc.GenericRpcHandler):
    """Answers what it has room for and refuses the rest before it is read."""

    def __init__(self, methods: dict[str, _Method], metrics: Metrics, known: Callable[[str], bool]) -> None:
        self._metrics = metrics
        self._known = known
        self._refusals = BoundedPool(1, QUEUE, "refusals")
        self._accepting = {name: self._unary(method) for name, method in methods.items()}
        self._refusing = {name: self._refusal(method) for name, method in methods.items()}
        self._methods = methods

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call, by whether there is room for it."""
        name = handler_call_details.method
        method = self._methods.get(name)
        if method is None:
            return None
        return self._refusing[name] if method.pool.full else self._accepting[name]

    def close(self) -> None:
        self._refusals.shutdown()

    def _unary(self, method: _Method) -> grpc.RpcMethodHandler:
        counted = method.request is predict_messages.PredictRequest

        # gRPC itself does not begin a call whose deadline has passed while it waited
        def call(content: bytes, context: grpc.ServicerContext) -> Any:
            try:
                message = method.request.FromString(content)
            except DecodeError as error:  # read here, as grpc logs each with a traceback
                return context.abort(grpc.StatusCode.INTERNAL, str(error))
            if not counted:
                try:
                    return method.act(message)
                except RequestError as error:
                    return context.abort(error.code, error.message)
            started = time.perf_counter()
            model = message.model_spec.name if self._known(message.model_spec.name) else ""
            try:
                response = method.act(message)
            except RequestError as error:
                self._metrics.requests.add(model, error.code.name)
                return context.abort(error.code, error.message)
            taken = (time.perf_counter() - started) * 1e6
            self._metrics.request_latency.add(model, "Predict", "GRPC", microseconds=taken)
            self._metrics.requests.add(model, "OK")
            return response

        call.experimental_thread_pool = method.pool  # type: ignore[attr-defined]
        return grpc.unary_unary_rpc_method_handler(call, response_serializer=method.response.SerializeToString)

    def _refusal(self, method: _Method) -> grpc.RpcMethodHandler:
        def call(messages: Any, context: grpc.ServicerContext) -> Any:
            if method.request is predict_messages.PredictRequest:
                self._metrics.requests.add("", "UNAVAILABLE")
            return context.abort(
                grpc.StatusCode.UNAVAILABLE, f"{QUEUE_FULL}: {method.pool.queue} wait already; try again later"
            )

        call.experimental_thread_pool = self._refusals  # type: ignore[attr-defined]
        return grpc.stream_unary_rpc_method_handler(call)  # which does not wait for the message


def _methods(
    servables: Servables, predictions: BoundedPool, status: BoundedPool, reloads: BoundedPool
) -> dict[str, _Method]:
    services = _Services(servables)
    predict, metadata, management = predict_messages, metadata_messages, management_messages
    return {
        "/tensorflow.serving.PredictionService/Predict": _Method(
            services.predict, predict.PredictRequest, predict.PredictResponse, predictions
        ),
        "/tensorflow.serving.PredictionService/GetModelMetadata": _Method(
            services.get_model_metadata, metadata.GetModelMetadataRequest, metadata.GetModelMetadataResponse, status
        ),
        "/tensorflow.serving.ModelService/GetModelStatus": _Method(
            services.get_model_status,
            status_messages.GetModelStatusRequest,
            status_messages.GetModelStatusResponse,
            status,
        ),
        "/tensorflow.serving.ModelService/HandleReloadConfigRequest": _Method(
            services.handle_reload_config, management.ReloadConfigRequest, management.ReloadConfigResponse, reloads
        ),
    }


class PortError(RuntimeError):
    """Another process listens where the server should."""


class ModelServer:
    """The server, from `start` to `stop`. Ports of 0 are chosen free; `grpc_port` and `rest_port` tell which.

    Args:
        threads: requests that run at once.
        queue: requests that may wait for them.

    Raises:
        PortError: one of the ports is taken.
    """

    def __init__(
        self,
        home: Path,
        grpc_port: int,
        rest_port: int,
        host: str = "127.0.0.1",
        threads: int = THREADS,
        queue: int = QUEUE,
    ) -> None:
        self.metrics = Metrics()
        self.servables = Servables(self.metrics)
        self.models = [Model(name, base_path(home, name)) for name in MODELS]
        self._stopped = threading.Event()
        self.pool = BoundedPool(threads, queue, "predict")
        # a load takes long and a full queue must not hide the status: each has threads of its own
        status, reloads = BoundedPool(2, queue, "status"), BoundedPool(1, RELOADS, "reload")
        self._handler = _Handler(
            _methods(self.servables, self.pool, status, reloads), self.metrics, self.servables.knows
        )
        self.metrics.gauge("penstock_model_server_queue_length", lambda: self.pool.waiting)
        self.metrics.gauge("penstock_model_server_running", lambda: self.pool.running)
        self._grpc = grpc.server(
            status,
            handlers=(self._handler,),
            options=[("grpc.so_reuseport", 0), *MESSAGE_OPTIONS],
            maximum_concurrent_rpcs=4 * (threads + queue),
        )
        try:
            self.grpc_port = self._grpc.add_insecure_port(f"{host}:{grpc_port}")
        except RuntimeError:
            raise PortError(f"port {grpc_port} of {host} is in use; stop what listens there or set another") from None
        try:
            self._rest = Server((host, rest_port), self.servables, self.pool)
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
        ended = self._grpc.stop(DRAIN_SECONDS)
        if self._threads[0].is_alive():
            self._rest.shutdown()
        self._rest.drain(DRAIN_SECONDS)
        self._rest.server_close()
        ended.wait()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self.pool.shutdown()
        self._handler.close()
        self.servables.close()

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
    parser.add_argument("--threads", type=int, default=THREADS, help="requests that run at once")
    parser.add_argument("--queue", type=int, default=QUEUE, help="requests that may wait for them")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        server = ModelServer(
            arguments.home.resolve(),
            arguments.grpc_port,
            arguments.rest_port,
            arguments.host,
            arguments.threads,
            arguments.queue,
        )
    except PortError as error:
        sys.exit(f"model server: {error}")
    server.start()
    gc.collect()
    gc.freeze()  # what is here stays: a collection would hold all requests for a quarter of a second to find it again
    served = ", ".join(f"{name} {versions}" for name, versions in server.servables.served.items())
    where = f"gRPC {arguments.host}:{server.grpc_port}, REST {arguments.host}:{server.rest_port}"
    print(f"model server: {where}, serving {served}", flush=True)
    while not ended.wait(POLL_SECONDS):  # a signal that another thread is given does not end a wait without limit
        pass
    server.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is answered: no thread of gRPC's or TensorFlow's holds up the end of the interpreter


if __name__ == "__main__":
    main()
