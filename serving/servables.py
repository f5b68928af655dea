"""SavedModels by name and version, loaded and unloaded as a TF Serving model config says."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import tensorflow as tf

from serving.messages import NUMPY, SERVING_DEFAULT, SavedModel, dtype_name

State = Literal["LOADING", "AVAILABLE", "END"]


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


class Servable:
    """One version of a SavedModel, in memory."""

    def __init__(self, name: str, version: int, path: Path) -> None:
        self.name = name
        self.version = version
        graphs = SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs
        serving = [graph for graph in graphs if "serve" in graph.meta_info_def.tags]
        if not serving:
            raise ValueError(f"{path}: no graph with the tag serve in it")
        self.signatures: dict[str, Any] = dict(serving[0].signature_def)
        self._loaded = tf.saved_model.load(str(path))
        self._functions: dict[str, Any] = dict(self._loaded.signatures)

    def signature(self, name: str) -> Any:
        """The SignatureDef called `name` (empty: the default one)."""
        found = self.signatures.get(name or SERVING_DEFAULT)
        if found is None or (name or SERVING_DEFAULT) not in self._functions:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name or SERVING_DEFAULT}" not found.'
            )
        return found

    def predict(
        self, signature_name: str, inputs: Mapping[str, np.ndarray], output_filter: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """The outputs of a signature for `inputs` by name; those in `output_filter`, or all.

        Raises:
            RequestError: the inputs or the filter do not fit the signature, or the graph cannot run them.
        """
        signature = self.signature(signature_name)
        _check_names(signature, set(inputs))
        for name, array in inputs.items():
            _check_input(name, array, signature.inputs[name])
        outputs = _check_filter(signature, output_filter)
        try:
            tensors = {name: tf.constant(array) for name, array in inputs.items()}
            answer = self._functions[signature_name or SERVING_DEFAULT](**tensors)
            return {name: answer[name].numpy() for name in outputs}
        except tf.errors.OpError as error:
            code = next(
                (code for code in grpc.StatusCode if code.value[0] == error.error_code), grpc.StatusCode.UNKNOWN
            )
            raise RequestError(code, _reason(str(error.message))) from error
        except (TypeError, ValueError) as error:
            raise _invalid(str(error).splitlines()[0]) from error


def _reason(message: str) -> str:
    """What a graph complains of, without where: its line is the one before the first node."""
    return message.split("\n\t [[")[0].splitlines()[-1]


def _check_names(signature: Any, sent: set[str]) -> None:
    required = set(signature.inputs)
    if sent == required:
        return
    if len(sent) == len(required):
        unknown = min(sent - required)
        raise _invalid(
            f"input tensor alias not found in signature: {unknown}. Inputs expected to be in the set "
            f"{{{','.join(sorted(required))}}}."
        )
    raise _invalid(
        f"input size does not match signature: {len(sent)}!={len(required)} len({{{','.join(sorted(sent))}}}) != "
        f"len({{{','.join(sorted(required))}}}). Sent extra: {{{','.join(sorted(sent - required))}}}. "
        f"Missing but required: {{{','.join(sorted(required - sent))}}}."
    )


def _check_input(name: str, array: np.ndarray, info: Any) -> None:
    expected = NUMPY.get(info.dtype)
    if expected != array.dtype:
        raise _invalid(f"input {name}: expects {dtype_name(info.dtype)} but {array.dtype} is provided")
    if info.tensor_shape.unknown_rank:
        return
    shape = [dim.size for dim in info.tensor_shape.dim]
    fits = len(shape) == array.ndim and all(want in (-1, have) for want, have in zip(shape, array.shape, strict=False))
    if not fits:
        raise _invalid(f"input {name}: expects shape {shape} but {list(array.shape)} is provided")


def _check_filter(signature: Any, output_filter: Sequence[str]) -> list[str]:
    for place, name in enumerate(output_filter):
        if name not in signature.outputs:
            raise _invalid(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{{{','.join(sorted(signature.outputs))}}}."
            )
        if name in output_filter[:place]:
            raise _invalid(f"duplicate output tensor alias: {name}")
    return list(output_filter) or sorted(signature.outputs)


@dataclass(frozen=True)
class VersionState:
    """Where a version stands; an END with an error is a version that did not load."""

    state: State
    error: str = ""


class Servables:
    """The models served. Reading takes no lock: what is served is replaced as a whole, after what is new is loaded."""

    def __init__(self) -> None:
        self._change = threading.Lock()
        self._models: dict[str, Model] = {}
        self._served: dict[str, dict[int, Servable]] = {}
        self._states: dict[str, dict[int, VersionState]] = {}

    def configure(self, models: Sequence[Model]) -> None:
        """Serves `models` from now on: loads what they want and only then unloads the rest.

        Raises:
            RequestError: a version is not there or does not load; what was served before is served on.
        """
        with self._change:
            served, errors = self._load(models, set())
            if errors:
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

    def find(self, name: str, version: int | None = None, label: str = "") -> Servable:
        """The version of a model that a request asks for; the newest if it names none.

        Raises:
            RequestError: it is not served.
        """
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
        if not name:
            raise _invalid("ModelSpec has no name specified.")
        states = self._states.get(name, {})
        if version is not None:
            if version not in states:
                raise RequestError(grpc.StatusCode.NOT_FOUND, f"Could not find version {version} of model {name}")
            return {version: states[version]}
        if not states:
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {name}")
        return dict(sorted(states.items(), reverse=True))

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
        self._state(name, version, VersionState("LOADING"))
        try:
            return Servable(name, version, path)
        except Exception as error:  # whatever is wrong with the files, the server must go on
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._state(name, version, VersionState("END", f"{name} version {version} does not load: {reason}"))
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION, f"{name} version {version} does not load: {reason}"
            ) from error

    def _state(self, name: str, version: int, state: VersionState) -> None:
        self._states = self._states | {name: self._states.get(name, {}) | {version: state}}

    def _replace(self, served: dict[str, dict[int, Servable]]) -> None:
        states = {name: dict(versions) for name, versions in self._states.items()}
        for name in states.keys() | served.keys():
            of_name = states.setdefault(name, {})
            for version, state in of_name.items():
                if version not in served.get(name, {}) and not state.error:
                    of_name[version] = VersionState("END")
            of_name |= {version: VersionState("AVAILABLE") for version in served.get(name, {})}
        self._served = served
        self._states = states
