"""SavedModels by name and version, loaded and unloaded as a TF Serving model config says.

A version runs in a TensorFlow session, as in TF Serving: the arrays of a request are fed to the graph that the
signature names, which costs less than calling the signature as a Python function, and errors are TF Serving's own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.saved_model.loader_impl import SavedModelLoader

from serving.messages import SERVING_DEFAULT, PredictionLog, dtype_name, from_tensor
from serving.monitoring import Metrics

State = Literal["LOADING", "AVAILABLE", "UNLOADING", "END"]

WARM_UP = Path("assets.extra") / "tf_serving_warmup_requests"
WARM_UP_RECORDS = 1000
MAX_INPUT_BYTES = 1 << 28
"""The memory that the inputs of a request may take; a few bytes can claim any shape."""

LOADING_NICE = 15
"""How far a load stands back behind the requests that run: as nice, of at most 19."""

CALLABLES = 32
"""Choices of outputs whose preparation a version keeps."""


Made = TypeVar("Made")


class RequestError(Exception):
    """A request that is answered with one of gRPC's status codes and TF Serving's words."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def _invalid(message: str) -> RequestError:
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


@dataclass(frozen=True)
class Model:
    """Where the versions of a model lie and which of them to serve.

    `policy`: `all`, `latest` (the highest `latest` of them) or `specific` (`versions`, which must be there).
    """

    name: str
    base_path: Path
    policy: Literal["all", "latest", "specific"] = "all"
    latest: int = 1
    versions: tuple[int, ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)

    def wanted(self) -> tuple[int, ...]:
        """The versions to serve now, in order."""
        if self.policy == "specific":
            return tuple(sorted(set(self.versions)))
        try:
            names = [path.name for path in self.base_path.iterdir() if path.name.isdecimal() and path.is_dir()]
        except FileNotFoundError:
            return ()
        there = sorted(map(int, names))
        return tuple(there if self.policy == "all" else there[-self.latest :])


@dataclass(frozen=True)
class _Input:
    """An input of a signature; of `shape` None any shape will do, and -1 is any size."""

    name: str
    feed: str
    dtype: int
    shape: tuple[int, ...] | None


def _inputs(signature: Any) -> tuple[_Input, ...]:
    """The inputs of a signature in the order that TF Serving counts them."""
    found = [
        _Input(
            name,
            info.name,
            info.dtype,
            None if info.tensor_shape.unknown_rank else tuple(dim.size for dim in info.tensor_shape.dim),
        )
        for name, info in signature.inputs.items()
    ]
    return tuple(sorted(found, key=lambda input_: input_.feed))


class Servable:
    """One version of a SavedModel, in memory until `close`.

    Raises:
        RequestError: it cannot be read, or does not answer its warm-up requests.
    """

    def __init__(self, name: str, version: int, path: Path, metrics: Metrics) -> None:
        self.name = name
        self.version = version
        self._metrics = metrics
        self._change = threading.Condition()
        self._running = 0
        self._closing = False
        if not any((path / f"saved_model.{ending}").exists() for ending in ("pb", "pbtxt")):
            raise RequestError(
                grpc.StatusCode.NOT_FOUND,
                f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {path}",
            )
        started = time.perf_counter()
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph)
        try:
            with graph.as_default():
                loaded = SavedModelLoader(str(path)).load(self._session, ["serve"])
            self.signatures: dict[str, Any] = dict(loaded.signature_def)
            self._inputs = {key: _inputs(signature) for key, signature in self.signatures.items()}
            self._callable = lru_cache(CALLABLES)(self._prepare)
            taken = (time.perf_counter() - started) * 1e6
            self._warm_up(path)
        except BaseException as error:
            self._session.close()
            metrics.load_attempts.add(str(path), "fail")
            raise _load_error(error) from error
        metrics.load_attempts.add(str(path), "success")
        metrics.load_latency.add(str(path), by=round(taken))

    def signature(self, name: str) -> Any:
        """The SignatureDef called `name` (empty: the default one)."""
        found = self.signatures.get(name or SERVING_DEFAULT)
        if found is None:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name or SERVING_DEFAULT}" not found.'
            )
        return found

    def predict(
        self, signature_name: str, inputs: Mapping[str, Any], output_filter: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """The outputs of a signature for `inputs` (TensorProtos by name); those in `output_filter`, or all.

        Raises:
            RequestError: the inputs or the filter do not fit the signature, or the graph cannot run them.
        """
        signature = self.signature(signature_name)
        key = signature_name or SERVING_DEFAULT
        arrays = _arrays(signature, self._inputs[key], inputs)
        try:
            run, outputs = self._callable(key, tuple(output_filter))
            started = time.perf_counter()
            found = run(*arrays)
        except tf.errors.OpError as error:
            raise _op_error(error) from error
        except (TypeError, ValueError) as error:
            raise _invalid(str(error).splitlines()[0]) from error
        taken = (time.perf_counter() - started) * 1e6
        self._metrics.runtime_latency.add(self.name, "Predict", "TF1", microseconds=taken)
        return dict(zip(outputs, found, strict=True))

    @contextmanager
    def entered(self) -> Iterator[bool]:
        """For the time of a request; whether it may run, which it may not any more once `close` was called."""
        with self._change:
            open_ = not self._closing
            self._running += open_
        try:
            yield open_
        finally:
            with self._change:
                self._running -= open_
                self._change.notify_all()

    def close(self) -> None:
        """Waits for the requests that run, and frees the memory."""
        with self._change:
            self._closing = True
            self._change.wait_for(lambda: not self._running)
        self._callable.cache_clear()
        self._session.close()

    def _prepare(
        self, signature_name: str, output_filter: tuple[str, ...]
    ) -> tuple[Callable[..., list[np.ndarray]], list[str]]:
        """A function of the inputs in their order, and the names of what it gives."""
        signature = self.signatures[signature_name]
        outputs = _outputs(signature, output_filter)
        options = config_pb2.CallableOptions()
        options.feed.extend(input_.feed for input_ in self._inputs[signature_name])
        options.fetch.extend(signature.outputs[name].name for name in outputs)
        # not public, but what `Session.run` takes a millisecond more for, with feeds of a hundred inputs
        return self._session._make_callable_from_options(options), outputs

    def _warm_up(self, path: Path) -> None:
        """Runs the requests that lie beside the model, so that the first user does not wait for what is made lazily."""
        file = path / WARM_UP
        if not file.exists():
            return
        started = time.perf_counter()
        try:
            for number, record in enumerate(tf.data.TFRecordDataset(str(file)).as_numpy_iterator(), 1):
                self._warm_up_by(record, file)
                if number > WARM_UP_RECORDS:
                    raise _invalid(f"Number of warmup records exceeds the maximum ({WARM_UP_RECORDS}) at {file}")
        except tf.errors.DataLossError as error:
            message = f"{error.message}. Please verify your warmup data is in TFRecord format."
            raise RequestError(grpc.StatusCode.DATA_LOSS, message) from error
        taken = (time.perf_counter() - started) * 1e6
        self._metrics.warmup_latency.add(str(path), "OK", microseconds=taken)

    def _warm_up_by(self, record: bytes, file: Path) -> None:
        try:
            log = PredictionLog.FromString(record)
        except DecodeError as error:
            raise _invalid(f"Failed to parse warmup record: {record[:100]!r} from {file}") from error
        kind = log.WhichOneof("log_type")
        if kind == "session_run_log":
            number = log.DESCRIPTOR.fields_by_name[kind].number
            raise RequestError(grpc.StatusCode.UNIMPLEMENTED, f"Unsupported log_type for warmup: {number}")
        if kind == "predict_log":  # what else there may be is of services that are not served here
            request = log.predict_log.request
            self.predict(request.model_spec.signature_name, request.inputs, request.output_filter)


def _behind(make: Callable[[], Made]) -> Made:
    """What `make` gives, by a thread that gets the processor when those that answer leave it."""
    made: Future[Made] = Future()

    def run() -> None:
        with suppress(OSError):  # a priority for each thread is Linux's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICE)
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    thread = threading.Thread(target=run, name="load")
    thread.start()
    thread.join()
    return made.result()


def _op_error(error: tf.errors.OpError) -> RequestError:
    code = next((code for code in grpc.StatusCode if code.value[0] == error.error_code), grpc.StatusCode.UNKNOWN)
    return RequestError(code, str(error.message).split("\n\t [[")[0])  # without the nodes it came through


def _load_error(error: BaseException) -> BaseException:
    if isinstance(error, tf.errors.OpError):
        return _op_error(error)
    if isinstance(error, OSError):
        return RequestError(grpc.StatusCode.DATA_LOSS, str(error))
    if isinstance(error, RuntimeError) and "tags" in str(error):
        return RequestError(
            grpc.StatusCode.NOT_FOUND, "Could not find meta graph def matching supplied tags: { serve }"
        )
    return error


def _arrays(signature: Any, required: Sequence[_Input], inputs: Mapping[str, Any]) -> list[np.ndarray]:
    """The inputs of a signature in order: as sent, or its defaults."""
    if len(inputs) > len(required) or (len(inputs) < len(required) and not signature.defaults):
        sent, known = set(inputs), {input_.name for input_ in required}
        raise _invalid(
            f"input size does not match signature: {len(sent)}!={len(known)} len({_joined(sent)}) != "
            f"len({_joined(known)}). Sent extra: {_joined(sent - known)}. "
            f"Missing but required: {_joined(known - sent)}."
        )
    tensors = dict(inputs.items())
    arrays = []
    size = 0
    for place, input_ in enumerate(required):
        tensor = tensors.pop(input_.name, None)
        if tensor is None:
            if input_.name not in signature.defaults:
                raise _invalid(
                    f"Signature input alias: {input_.name}(feed name: {input_.feed}) not found in request and no "
                    f"default value provided. Inputs expected to be in the request {_joined(inputs)}, or default input "
                    f"alias set: {','.join(sorted(signature.defaults))}"
                )
            tensor = signature.defaults[input_.name]
        try:
            array = from_tensor(tensor)
        except ValueError:
            raise _invalid(f"tensor parsing error: {input_.name}") from None
        size += array.nbytes
        if size > MAX_INPUT_BYTES:
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"The inputs take more than {MAX_INPUT_BYTES} bytes")
        if tensor.dtype != input_.dtype:
            raise _invalid(
                f"Expects arg[{place}] to be {dtype_name(input_.dtype)} but {dtype_name(tensor.dtype)} is provided "
                f"(input {input_.name})"
            )
        _check_shape(input_, array)
        arrays.append(array)
    if tensors:
        used = ",".join(sorted(set(inputs) - set(tensors)))
        raise _invalid(
            f"Inputs contains invalid name. Used request inputs: {used}, request input: {','.join(sorted(inputs))}"
        )
    return arrays


def _joined(names: Any) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _check_shape(input_: _Input, array: np.ndarray) -> None:
    """TF Serving leaves that to the graph, which has less to say of it, or breaks."""
    shape = input_.shape
    if shape is None or shape == array.shape:
        return
    if len(shape) != array.ndim or any(want not in (-1, have) for want, have in zip(shape, array.shape, strict=True)):
        raise _invalid(f"input {input_.name}: expects shape {list(shape)} but {list(array.shape)} is provided")


def _outputs(signature: Any, output_filter: Sequence[str]) -> list[str]:
    for place, name in enumerate(output_filter):
        if name not in signature.outputs:
            raise _invalid(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_joined(signature.outputs)}."
            )
        if name in output_filter[:place]:
            raise _invalid(f"duplicate output tensor alias: {name}")
    return list(output_filter) or sorted(signature.outputs)


@dataclass(frozen=True)
class VersionState:
    """Where a version stands; an END with an error is a version that did not load."""

    state: State
    code: grpc.StatusCode = grpc.StatusCode.OK
    error: str = ""


class Servables:
    """The models served. Reading takes no lock: what is served is replaced as a whole, after what is new is loaded."""

    def __init__(self, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics()
        self._change = threading.Lock()
        self._state_change = threading.Lock()
        self._models: dict[str, Model] = {}
        self._served: dict[str, dict[int, Servable]] = {}
        self._states: dict[str, dict[int, VersionState]] = {}
        self._drains: list[threading.Thread] = []
        # the first session makes the threads that all share: a load's own would have its low priority
        tf.compat.v1.Session(graph=tf.Graph()).close()

    def close(self) -> None:
        """Unloads everything, when the requests that run have ended."""
        with self._change:
            self._replace({})
            drains = self._drains
        for thread in drains:
            thread.join()

    def configure(self, models: Sequence[Model]) -> None:
        """Serves `models` from now on: loads what they want and only then unloads the rest.

        Raises:
            RequestError: a version is not there or does not load, or a label is of a version that is not available;
                what was served before is served on.
        """
        with self._change:
            for model in models:
                for version in model.labels.values():
                    if version not in self._served.get(model.name, {}):
                        raise RequestError(
                            grpc.StatusCode.FAILED_PRECONDITION,
                            f"Request to assign label to version {version} of model {model.name}, which is not "
                            "currently available for inference",
                        )
            # labels move first: whoever asks by label is never sent to a version that is on its way out
            before = self._models
            labels = {model.name: model.labels for model in models}
            self._models = {
                name: replace(model, labels=labels.get(name, model.labels)) for name, model in before.items()
            }
            served, errors = self._load(models, set())
            if errors:
                self._models = before
                self._unload(served, self._served)
                raise errors[0]
            self._models = {model.name: model for model in models}
            self._replace(served)

    def follow(self, models: Sequence[Model] | None = None) -> list[str]:
        """Loads what has come into the base paths, unloads what has gone, and goes on past what does not load.

        Args:
            models: replaces the models served; none: those served now.

        Returns:
            A message for each version that did not load; one that failed before is not tried again.
        """
        with self._change:
            if models is not None:
                self._models = {model.name: model for model in models}
            following = [model for model in self._models.values() if model.policy != "specific" or models is not None]
            failed = {
                (name, version) for name, states in self._states.items() for version, at in states.items() if at.error
            }
            served, errors = self._load(following, failed)
            kept = {name: versions for name, versions in self._served.items() if name in self._models}
            self._replace(kept | served)
            return [error.message for error in errors]

    @contextmanager
    def lease(self, name: str, version: int | None = None, label: str = "") -> Iterator[Servable]:
        """The version of a model that a request asks for (the newest if it names none), which stays for its time.

        Raises:
            RequestError: it is not served.
        """
        while True:
            servable = self._find(name, version, label)
            with servable.entered() as entered:
                if entered:
                    yield servable
                    return

    def _find(self, name: str, version: int | None, label: str) -> Servable:
        if not name:
            raise _invalid("ModelSpec has no name specified.")
        versions = self._served.get(name, {})
        if label:
            labels = self._models[name].labels if name in self._models else {}
            if label not in labels:
                raise _invalid(f"Unrecognized servable version label: {label}")
            version = labels[label]
        if version is None and versions:
            return versions[max(versions)]
        if version is None or version not in versions:
            asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {asked}")
        return versions[version]

    def states(self, name: str, version: int | None = None) -> dict[int, VersionState]:
        """Version → where it stands, newest first; only `version` if it is given.

        Raises:
            RequestError: there is no such model or version.
        """
        states = self._states.get(name, {})
        if version is not None:
            if version not in states:
                raise RequestError(grpc.StatusCode.NOT_FOUND, f"Could not find version {version} of model {name}")
            return {version: states[version]}
        if not states:
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {name}")
        return dict(sorted(states.items(), reverse=True))

    def knows(self, name: str) -> bool:
        """Whether a version of this model is or was served."""
        return name in self._states

    @property
    def served(self) -> dict[str, list[int]]:
        """Model → its versions in memory."""
        return {name: sorted(versions) for name, versions in self._served.items()}

    def _load(
        self, models: Sequence[Model], skipped: set[tuple[str, int]]
    ) -> tuple[dict[str, dict[int, Servable]], list[RequestError]]:
        """What `models` want, with the versions already in memory used again, and an error for each that failed."""
        served: dict[str, dict[int, Servable]] = {}
        errors: list[RequestError] = []
        for model in models:
            versions = served.setdefault(model.name, {})
            for version in model.wanted():
                path = model.base_path / str(version)
                old = self._served.get(model.name, {}).get(version)
                if old is not None and self._models.get(model.name, model).base_path == model.base_path:
                    versions[version] = old
                elif (model.name, version) not in skipped:
                    try:
                        versions[version] = self._load_one(model.name, version, path)
                    except RequestError as error:
                        errors.append(error)
        return served, errors

    def _load_one(self, name: str, version: int, path: Path) -> Servable:
        if not path.is_dir():
            raise RequestError(
                grpc.StatusCode.NOT_FOUND, f"Could not find version {version} of model {name} in {path.parent}"
            )
        if version not in self._served.get(name, {}):
            self._state(name, version, VersionState("LOADING"))
        try:
            return _behind(lambda: Servable(name, version, path, self.metrics))
        except Exception as error:  # whatever is wrong with the files, the server must go on
            code = error.code if isinstance(error, RequestError) else grpc.StatusCode.UNKNOWN
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            message = f"{name} version {version} does not load: {reason}"
            if version not in self._served.get(name, {}):
                self._state(name, version, VersionState("END", code, message))
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, message) from error

    def _replace(self, served: dict[str, dict[int, Servable]]) -> None:
        for name, versions in served.items():
            for version in versions:
                self._state(name, version, VersionState("AVAILABLE"))
        before, self._served = self._served, served
        self._unload(before, served)

    def _unload(
        self, servables: Mapping[str, Mapping[int, Servable]], kept: Mapping[str, Mapping[int, Servable]]
    ) -> None:
        """Frees the memory of `servables` without the `kept`, each when the last of its requests has ended."""
        for name, versions in servables.items():
            for version, servable in versions.items():
                instead = kept.get(name, {}).get(version)
                if instead is servable:
                    continue
                if instead is None:
                    self._state(name, version, VersionState("UNLOADING"))
                thread = threading.Thread(target=self._drain, args=(servable,), name=f"drain {name} {version}")
                thread.start()
                self._drains = [other for other in self._drains if other.is_alive()] + [thread]

    def _drain(self, servable: Servable) -> None:
        servable.close()
        with self._state_change:
            of_name = self._states[servable.name]
            if of_name[servable.version].state == "UNLOADING":  # and not loaded again meanwhile
                ended = of_name | {servable.version: VersionState("END")}
                self._states = self._states | {servable.name: ended}

    def _state(self, name: str, version: int, state: VersionState) -> None:
        with self._state_change:
            self._states = self._states | {name: self._states.get(name, {}) | {version: state}}
