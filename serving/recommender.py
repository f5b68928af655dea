"""One request: the user's features → recall → item features → rank → fuse, all of one release."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from feature_repo.store import Online
from penstock import release, routing
from penstock.features import request_features
from penstock.fusion import fuse
from penstock.release import MODELS, ReleaseError
from penstock.routing import Routing, RoutingError, Variant
from serving.model_client import Input, ModelClient, ModelError
from serving.settings import Settings

PADDING = -1

Columns = Mapping[str, np.ndarray | list[Any]]


class UnavailableError(RuntimeError):
    """What a request needs is not there: `args` are why, and what to do about it."""

    @property
    def why(self) -> str:
        return str(self.args[0])

    @property
    def remedy(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Context:
    """Where and when a request was made; `time_ms` is in ms since 1970 (UTC), None means now."""

    scenario: int = 0
    device: int = 0
    time_ms: int | None = None


@dataclass(frozen=True)
class Slate:
    """The items for a user, best first, and the release that chose them."""

    release: int
    variant: Variant
    cold_start: bool
    items: tuple[int, ...]
    scores: tuple[float, ...]
    heads: tuple[dict[str, float], ...]


class RoutingFile:
    """The routing document, read again whenever the file was replaced; of a damaged one the last good stands."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._routing = Routing()
        self._lock = threading.Lock()

    def current(self) -> Routing:
        """What is to be obeyed now.

        Raises:
            RoutingError: the document cannot be read, and none could be before.
        """
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            seen = None
        if seen != self._seen:
            with self._lock:
                try:
                    self._routing = routing.read(self._path)
                    self._seen = seen
                except RoutingError:
                    if self._routing.champion is None:
                        raise
        return self._routing


class Recommender:
    """Answers requests from a home directory and a model server; safe for many threads.

    Args:
        settings: `candidates` are recalled and ranked, in one call of each model.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._routing = RoutingFile(settings.home / "routing.json")
        self._models = ModelClient(settings.model_server, settings.timeout_seconds)
        self._online: Online | None = None
        self._opening = threading.Lock()
        self._manifests: dict[int, dict[str, Any]] = {}

    def close(self) -> None:
        """Ends the channel to the model server."""
        self._models.close()

    def recommend(self, user_id: int, k: int, context: Context) -> Slate:
        """The best `k` of the items that the user has not long-viewed.

        Raises:
            UnavailableError: no release is live, or the model server or the feature store does not answer.
        """
        before = self._current()
        try:
            return self._recommend(before, user_id, k, context)
        except ModelError as error:
            # a release may be unloaded between reading the document and asking for it: then there is a newer document
            if error.code is grpc.StatusCode.NOT_FOUND and self._current() != before:
                try:
                    return self._recommend(self._current(), user_id, k, context)
                except ModelError as again:
                    raise self._unavailable(again) from again
            raise self._unavailable(error) from error

    def ready(self) -> Routing:
        """The routing that can be obeyed: its releases are loaded, and the feature store answers.

        Raises:
            UnavailableError: one of them is not.
        """
        current = self._current()
        self._features("users", [0], "recall_v1")
        for number in current.answering:
            for model in MODELS:
                try:
                    loaded = self._models.ready(model, number)
                except ModelError as error:
                    raise self._unavailable(error) from error
                if not loaded:
                    raise UnavailableError(f"{model} of release {number} is not loaded", self._load_again(number))
        return current

    def _current(self) -> Routing:
        try:
            current = self._routing.current()
        except RoutingError as error:
            raise UnavailableError(str(error), "promote a release again") from error
        if current.champion is None:
            raise UnavailableError("no release is live", "train a candidate and approve its release")
        return current

    def _unavailable(self, error: ModelError) -> UnavailableError:
        if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return UnavailableError(str(error), f"start the model server at {self._models.address}, or see its log")
        if error.code is grpc.StatusCode.NOT_FOUND:
            return UnavailableError(str(error), self._load_again(self._current().champion))
        return UnavailableError(str(error), "roll back to the former release, and see the model server's log")

    def _load_again(self, number: int | None) -> str:
        return f"load it: python -m serving.rollout --home {self._settings.home} load {number}"

    def _manifest(self, number: int) -> dict[str, Any]:
        if number not in self._manifests:
            try:
                self._manifests[number] = release.manifest(self._settings.home, number)
            except ReleaseError as error:
                raise UnavailableError(str(error), "restore it, or roll back to the former release") from error
        return self._manifests[number]

    def _features(self, of: str, ids: Sequence[int], service: str) -> dict[str, np.ndarray | list[Any]]:
        """Online features of users or items."""
        try:
            if self._online is None:
                with self._opening:
                    self._online = self._online or Online(self._settings.home)
            read = self._online.users if of == "users" else self._online.items
            return read(ids, service)
        except Exception as error:  # Feast and its stores raise anything; none of it may become a 500
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnavailableError(
                f"the feature store does not answer: {reason}", "fill it by a run of the prepare DAG"
            ) from error

    def _recommend(self, current: Routing, user_id: int, k: int, context: Context) -> Slate:
        variant = routing.variant(current, user_id)
        number = current.release(variant)
        assert number is not None  # a variant is only drawn for a release there is
        manifest = self._manifest(number)
        services = manifest["feature_services"]
        time_ms = time.time_ns() // 1_000_000 if context.time_ms is None else context.time_ms
        asked = {"scenario": np.array([context.scenario]), "device": np.array([context.device])}

        user = self._features("users", [user_id], services["recall"])
        history = np.asarray(user["history_items"][0], np.int64)
        columns: Columns = {
            **user,
            **asked,
            **{name: np.atleast_1d(value) for name, value in request_features(time_ms, 0).items()},
            "user_id": np.array([user_id]),
            "k": np.array(max(self._settings.candidates, k), np.int32),
            "exclude": [history],
        }
        found = self._predict("recall", number, columns, 1)["ids"][0]
        ids = found[found >= 0]
        cold_start = not any(np.any(values[0]) for values in user.values())
        if not len(ids):
            return Slate(number, variant, cold_start, (), (), ())

        items = self._features("items", ids.tolist(), services["rank"])
        columns = {
            **self._features("users", [user_id], services["rank"]),
            **asked,
            **items,
            **request_features(time_ms, items["upload_time_ms"]),
            "user_id": np.array([user_id]),
            "item_id": ids,
        }
        heads = self._predict("rank", number, columns, len(ids))
        heads = {name: np.asarray(heads[name], np.float64) for name in manifest["heads"]}
        scores = fuse(heads, manifest["weights"])
        if not np.isfinite(scores).all():
            raise UnavailableError(
                f"rank of release {number} gives scores that are not finite", "roll back to the former release"
            )
        best = np.argsort(-scores, kind="stable")[:k]
        return Slate(
            release=number,
            variant=variant,
            cold_start=cold_start,
            items=tuple(ids[best].tolist()),
            scores=tuple(scores[best].tolist()),
            heads=tuple({name: float(values[place]) for name, values in heads.items()} for place in best),
        )

    def _predict(self, model: str, number: int, columns: Columns, rows: int) -> dict[str, np.ndarray]:
        """Calls a model with the inputs that its signature asks for, found in `columns` by name."""
        signature = self._models.signature(model, number)
        missing = sorted(set(signature.inputs) - set(columns))
        if missing:
            raise UnavailableError(
                f"{model} of release {number} wants {', '.join(missing)}, which no feature service gives",
                "roll back to the former release",
            )
        inputs = {name: _input(columns[name], spec, rows) for name, spec in signature.inputs.items()}
        return self._models.predict(model, number, inputs)


def _input(values: np.ndarray | list[Any], spec: Input, rows: int) -> np.ndarray:
    """`values`, of one row or `rows`, in the dtype and rank of an input: lists are padded with -1."""
    if spec.rank == 0:
        return np.asarray(values, spec.dtype)
    if spec.rank == 2:
        array = np.full((len(values), max(1, *map(len, values))), PADDING, spec.dtype)
        for row, value in zip(array, values, strict=True):
            row[: len(value)] = value
    else:
        array = np.asarray(values).astype(spec.dtype)
    return array if len(array) == rows else np.broadcast_to(array, (rows, *array.shape[1:]))


def as_json(slate: Slate) -> list[dict[str, Any]]:
    """The items of a slate as the gateway answers them."""
    ranked = zip(slate.items, slate.scores, slate.heads, strict=True)
    return [
        {"item_id": item, "position": position, "score": score, "heads": heads}
        for position, (item, score, heads) in enumerate(ranked)
    ]
