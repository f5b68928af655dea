"""One request: the user's features → recall → item features → rank → fuse, all of one release."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from feature_repo.online import Online, Request
from penstock import release, routing
from penstock.features import SERVICES, VIEWS, Column, Ragged
from penstock.fusion import fuse
from penstock.release import MODELS, ReleaseError
from penstock.routing import Routing, RoutingError, Variant
from serving.model_client import Input, ModelClient, ModelError
from serving.settings import Settings

PADDING = -1

KNOWN_OF_USER = [
    feature.name
    for view in VIEWS
    if view.entity == "user"
    for feature in view.features
    if feature.name != "feedback_sequence"
]

Columns = Mapping[str, Column]


class UnavailableError(RuntimeError):
    """What a request needs is not there: `args` are why, and what to do about it."""

    @property
    def why(self) -> str:
        return str(self.args[0])

    @property
    def remedy(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Vectors:
    """The features that a slate was ranked by.

    Attributes:
        service: the rank model's feature service.
        features_us: the cutoff of the materialisation that they are of, µs since 1970.
        user: of one row: what is the same for all items.
        of_items: a row an item, in displayed order.
    """

    service: str
    features_us: int
    user: Columns
    of_items: Columns


@dataclass(frozen=True)
class Slate:
    """The items for a user, best first, the release that chose them, and of what."""

    release: int
    variant: Variant
    cold_start: bool
    vectors: Vectors
    items: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    heads: tuple[dict[str, float], ...] = ()


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

    def recommend(self, user_id: int, k: int, request: Request) -> Slate:
        """The best `k` of the items that are not among the last that the user long-viewed.

        Raises:
            UnavailableError: no release is live, or the model server or the feature store does not answer.
        """
        before = self._current()
        try:
            return self._recommend(before, user_id, k, request)
        except ModelError as error:
            # a release may be unloaded between reading the document and asking for it: then there is a newer document
            if error.code is grpc.StatusCode.NOT_FOUND and self._current() != before:
                try:
                    return self._recommend(self._current(), user_id, k, request)
                except ModelError as again:
                    raise self._unavailable(again) from again
            raise self._unavailable(error) from error

    def ready(self) -> Routing:
        """The routing that can be obeyed: its releases are loaded, and the feature store answers.

        Raises:
            UnavailableError: one of them is not.
        """
        current = self._current()
        for number in current.answering:
            service = self._service(number)
            with _reading():
                self.online().user(0, service, Request(0, 0, 0))
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

    def _service(self, number: int) -> str:
        """The feature service that answers of a release are made of: the rank model's, which has all of recall's.

        One reading for both models: both see the same of the user.
        """
        services = self._manifest(number)["feature_services"]
        for model, service in services.items():
            if service not in SERVICES:
                raise UnavailableError(
                    f"{model} of release {number} reads the feature service {service}, which there is no more: there"
                    f" are {', '.join(SERVICES)}",
                    "train a candidate and approve its release",
                )
        return str(services["rank"])

    def online(self) -> Online:
        """The feature store, opened once.

        Raises:
            StoreError: it cannot be.
        """
        if self._online is None:
            with self._opening:
                self._online = self._online or Online(self._settings.home)
        return self._online

    def _recommend(self, current: Routing, user_id: int, k: int, request: Request) -> Slate:
        variant = routing.variant(current, user_id)
        number = current.release(variant)
        assert number is not None  # a variant is only drawn for a release there is
        service = self._service(number)
        while True:
            with _reading():
                before = self.online().materialised()
            slate = self._slate(number, variant, service, user_id, k, request, before.cutoff_us)
            with _reading():
                if self.online().materialised() == before:  # else its features are of two
                    return slate

    def _slate(
        self,
        number: int,
        variant: Variant,
        service: str,
        user_id: int,
        k: int,
        request: Request,
        features_us: int,
    ) -> Slate:
        manifest = self._manifest(number)
        asked = {"user_id": np.array([user_id]), **request.columns()}
        with _reading():
            user = self.online().user(user_id, service, request)
        columns: Columns = {
            **user,
            **asked,
            "k": np.array(max(self._settings.candidates, k), np.int32),
            "exclude": user["history_items"],
        }
        found = self._predict("recall", number, columns, 1)["ids"][0]
        ids = found[found >= 0]
        cold_start = not any(_says_anything(user[name]) for name in KNOWN_OF_USER if name in user)
        if not len(ids):
            return Slate(number, variant, cold_start, Vectors(service, features_us, user, {}))

        with _reading():
            items = self.online().items(ids, service, user, request)
        heads = self._predict("rank", number, {**user, **asked, **items, "item_id": ids}, len(ids))
        heads = {name: np.asarray(heads[name], np.float64) for name in manifest["heads"]}
        scores = fuse(heads, manifest["weights"], manifest["fusion"])
        if not np.isfinite(scores).all():
            raise UnavailableError(
                f"rank of release {number} gives scores that are not finite", "roll back to the former release"
            )
        best = np.argsort(-scores, kind="stable")[:k]
        of_best = {name: column.take(best) for name, column in items.items()}
        return Slate(
            release=number,
            variant=variant,
            cold_start=cold_start,
            vectors=Vectors(service, features_us, user, of_best),
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


@contextmanager
def _reading() -> Iterator[None]:
    """Turns what the feature store raises into the answer that says so."""
    try:
        yield
    except Exception as error:  # Feast and its stores raise anything; none of it may become a 500
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"the feature store does not answer: {reason}", "fill it by a run of the prepare DAG"
        ) from error


def _says_anything(column: Column) -> bool:
    return bool(column.lengths.any() if isinstance(column, Ragged) else column.any())


def _input(column: Column, spec: Input, rows: int) -> np.ndarray:
    """A column of one row or `rows`, in the dtype and rank of an input: lists are padded with -1."""
    if isinstance(column, Ragged):
        array = np.full((len(column), max(1, *column.lengths)), PADDING, spec.dtype)
        array[np.arange(array.shape[1]) < column.lengths[:, None]] = column.values
    else:
        array = column.astype(spec.dtype)
    return array if spec.rank == 0 or len(array) == rows else np.broadcast_to(array, (rows, *array.shape[1:]))


def as_json(slate: Slate) -> list[dict[str, Any]]:
    """The items of a slate as the gateway answers them."""
    ranked = zip(slate.items, slate.scores, slate.heads, strict=True)
    return [
        {"item_id": item, "position": position, "score": score, "heads": heads}
        for position, (item, score, heads) in enumerate(ranked)
    ]
