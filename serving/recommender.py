"""One request: features → recall → rank → fuse → diversify, all of one release, and what is left when a part is away.

A stage that fails or is out of time is left out, never the answer: without the user's activity the user is taken for
a new one; without recall the most popular items are answered; without the rank model recall's order stands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from feature_repo.materialised import Materialised
from feature_repo.online import Online, Request
from penstock import routing
from penstock.diversity import rerank
from penstock.features import SERVICES, VIEWS, Column, Ragged
from penstock.fusion import fuse
from penstock.look_alike import LookAlikeError
from penstock.release import MODELS, ReleaseError
from penstock.routing import Routing, RoutingError, Variant
from serving.deadline import Breaker, Deadline
from serving.held import Held, Releases
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

NOT_ANSWERING = {"away", "deadline"}
"""The reasons that say that waiting for a dependency was in vain."""

NOT_LOADED = "not_loaded"
REASONS = {
    grpc.StatusCode.UNAVAILABLE: "away",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "overloaded",
    grpc.StatusCode.NOT_FOUND: NOT_LOADED,
}

Columns = Mapping[str, Column]


class UnavailableError(RuntimeError):
    """What a request needs is not there: `args` are why, and what to do about it."""

    @property
    def why(self) -> str:
        return str(self.args[0])

    @property
    def remedy(self) -> str:
        return str(self.args[1])


class StageError(UnavailableError):
    """A stage that is left out; which there are, and the reasons, are in docs/gateway.md."""

    def __init__(self, stage: str, reason: str, why: str, remedy: str) -> None:
        super().__init__(why, remedy)
        self.stage = stage
        self.reason = reason


@dataclass(frozen=True)
class Vectors:
    """The features that a slate was ranked by.

    Attributes:
        service: the rank model's feature service.
        features_us: the cutoff of the materialisation that they are of, µs since 1970.
        user: of one row: what is the same for all items.
        of_items: a row an item, in displayed order; nothing if the items' features were not read.
    """

    service: str
    features_us: int
    user: Columns
    of_items: Columns


@dataclass
class Slate:
    """The items for a user, best first, the release that chose them, and how.

    Attributes:
        answered: False if there was nothing to answer.
        heads: of each item, what the rank model says; empty without it.
        vectors: None without features.
        places: of each item, its place in the order of the scores, before any re-ranking, from 0.
        recalled: of each item, its score and its place in recall's order, None of one that was not recalled; empty
            without recall.
        alike: of each item, how it scores by those who liked it; None of one that look-alike did not find.
        degraded: stages that were left out, each with the reason.
        why, remedy: of the first of them.
        seconds: what each stage took.
    """

    release: int
    variant: Variant
    answered: bool = True
    cold_start: bool = True
    vectors: Vectors | None = None
    items: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    heads: list[dict[str, float]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    recalled: list[tuple[float | None, int | None]] = field(default_factory=list)
    alike: list[float | None] = field(default_factory=list)
    degraded: dict[str, str] = field(default_factory=dict)
    why: str = ""
    remedy: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds what is done within to a stage's time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def without(self, error: StageError) -> None:
        """Notes that a stage is left out."""
        self.degraded[error.stage] = error.reason
        if not self.why:
            self.why, self.remedy = error.why, error.remedy


class RoutingFile:
    """The routing document, read again whenever the file was replaced; of a damaged one the last good stands."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._routing = Routing()
        self._lock = threading.Lock()

    @property
    def seen(self) -> Routing:
        """What was to be obeyed when it was last looked at."""
        return self._routing

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
        self._releases = Releases(settings.home, with_vectors=settings.trade_off < 1.0)
        self._models = ModelClient(settings.model_server, settings.deadline_seconds, settings.model_server_rest)
        self._online: Online | None = None
        self._opening = threading.Lock()
        # reading is given up when its time is over; a thread that hangs is not waited for
        self._readers = ThreadPoolExecutor(settings.concurrency, "features")
        self._reading = Breaker()

    def close(self) -> None:
        """Ends the channel to the model server."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._models.close()

    def recommend(self, user_id: int, k: int, request: Request, began: float | None = None) -> Slate:
        """The best `k` of the items that are not among the last that the user long-viewed.

        Args:
            began: when the request came, of time.perf_counter.

        Raises:
            UnavailableError: no release is live; or nothing can be recalled, and it does not say what is popular.
        """
        deadline = Deadline(self._settings.deadline_seconds, began)
        while True:
            current = self._current()
            slate = self._slate(current, user_id, k, request, deadline)
            if slate is None:
                continue
            # a release may be unloaded between reading the document and asking for it: then there is a newer document
            if NOT_LOADED not in slate.degraded.values() or self._current() is current:
                break
        if not slate.answered:
            raise UnavailableError(slate.why, slate.remedy)
        return slate

    def ready(self) -> tuple[Routing, dict[str, str]]:
        """The routing that is obeyed, and what answers are without, by stage, with the reason.

        Raises:
            UnavailableError: there would be no answer.
        """
        current = self._current()
        without: dict[str, str] = {}
        for number in current.answering:
            held, slate = self._held(number), Slate(number, "champion")
            try:
                self._read(self._service(held), 0, Request(0, 0, 0))
            except StageError as error:
                slate.without(error)
            for model in MODELS:
                try:
                    if not self._models.ready(model, number):
                        why = f"{model} of release {number} is not loaded"
                        slate.without(StageError(model, NOT_LOADED, why, self._load_again(number)))
                except ModelError as error:
                    slate.without(self._failed(model, number, error))
            # without the online store there are still the tables in memory
            blind = "features" in slate.degraded and (self._online is None or slate.degraded["features"] == "unfit")
            if held.popular is None and (blind or "recall" in slate.degraded):
                raise UnavailableError(slate.why, slate.remedy)
            without |= slate.degraded
        return current, without

    def release(self, variant: Variant) -> int:
        """Which release answers for a variant, as of the last request; 0: none."""
        return self._routing.seen.release(variant) or 0

    def online(self) -> Online:
        """The feature store, opened once.

        Raises:
            StoreError: it cannot be.
        """
        if self._online is None:
            with self._opening:
                self._online = self._online or Online(self._settings.home)
        return self._online

    def open(self, seconds: float) -> None:
        """Opens the feature store and asks for the models, as far as that is done in so many seconds."""
        with suppress(UnavailableError, FutureTimeoutError):
            self._readers.submit(self.ready).result(seconds)

    def _slate(self, current: Routing, user_id: int, k: int, request: Request, deadline: Deadline) -> Slate | None:
        """The answer of a release; None when the features it was made of are of two materialisations."""
        variant = routing.variant(current, user_id)
        number = current.release(variant)
        assert number is not None  # a variant is only drawn for a release there is
        held, slate = self._held(number), Slate(number, variant)
        with slate.timed("features"):
            read = self._features(slate, held, user_id, request, deadline)
        if read is None:
            return self._popular(slate, held, request, None, k)
        materialised, service, user = read
        slate.cold_start = not is_known(user)
        slate.vectors = Vectors(service, materialised.cutoff_us, user, {})
        asked = {"user_id": np.array([user_id]), **request.columns()}
        columns: Columns = {
            **user,
            **asked,
            "k": np.array(max(self._settings.candidates, k), np.int32),
            "exclude": user["history_items"],
        }
        try:
            with slate.timed("recall"):
                found = self._ask("recall", held, columns, 1, deadline)
        except StageError as error:
            slate.without(error)
            return self._popular(slate, held, request, user, k)
        ids = found["ids"][0]
        scores = found["scores"][0][ids >= 0].astype(np.float64)
        ids = ids[ids >= 0]
        if not np.isfinite(scores).all():
            why = f"recall of release {number} gives scores that are not finite"
            slate.without(StageError("recall", "not_finite", why, "roll back to the former release"))
            return self._popular(slate, held, request, user, k)
        with slate.timed("look_alike"):
            alike = self._look_alike(slate, held, found, user)
        ids, recalled = _joined(ids, scores, alike)
        if not len(ids):
            return slate
        assert self._online is not None
        items: Columns = {}
        heads: dict[str, np.ndarray] = {}
        # without the rank model recall's order stands, before what it has not found
        scores = np.where(np.isnan(recalled), np.nanmin(recalled, initial=np.inf), recalled)
        scores[np.isinf(scores)] = 0.0
        try:
            with slate.timed("items"), _reading():
                items = self._online.items(ids, service, user, request)
                if self._online.materialised() != materialised:
                    return None
            with slate.timed("rank"):
                heads = self._ask("rank", held, {**user, **asked, **items, "item_id": ids}, len(ids), deadline)
            with slate.timed("fuse"):
                heads, scores = self._fused(held, heads)
        except StageError as error:
            slate.without(error)
            if error.stage == "features":
                slate.degraded["rank"] = error.reason
            heads = {}
        with slate.timed("diversity"):
            best, places = self._diversified(slate, held, ids, scores, items, k)
            explored = _explored(best, np.isnan(recalled), int(k * self._settings.exploration_share))
            if explored is not best:
                best, places = explored, _places(scores)[explored].tolist()
        slate.items, slate.scores, slate.places = ids[best].tolist(), scores[best].tolist(), places
        values = zip(*(heads[name][best].tolist() for name in heads), strict=True)
        slate.heads = [dict(zip(heads, row, strict=True)) for row in values] if heads else [{} for _ in slate.items]
        slate.recalled = [
            (None, None) if np.isnan(recalled[row]) else (float(recalled[row]), row) for row in best.tolist()
        ]
        slate.alike = [alike.get(item) for item in slate.items]
        of_items = {name: column.take(best) for name, column in items.items()}
        slate.vectors = Vectors(service, materialised.cutoff_us, user, of_items)
        return slate

    def _features(
        self, slate: Slate, held: Held, user_id: int, request: Request, deadline: Deadline
    ) -> tuple[Materialised, str, Columns] | None:
        """The user's row, of which materialisation and service; without the online store, as of a new user.

        None if there is not even that: nothing is materialised, or the store was never open.
        """
        try:
            service = self._service(held)
        except StageError as error:
            slate.without(error)
            return None
        try:
            seconds = deadline.left("features")
            if not seconds:
                why = "the time of the request was over before the feature store could be asked"
                raise StageError("features", "late", why, _SLOW)
            if not self._reading.allows():
                raise StageError("features", "not_asked", "the feature store has not answered several requests", _FILL)
            try:
                read = self._readers.submit(self._read, service, user_id, request).result(seconds)
            except FutureTimeoutError:
                why = f"the feature store does not answer in {seconds * 1000:.0f} ms"
                raise StageError(
                    "features", "deadline", why, "see what keeps it, or raise PENSTOCK_DEADLINE_MS"
                ) from None
            self._reading.answered()
            return read
        except StageError as error:
            if error.reason in NOT_ANSWERING:
                self._reading.failed()
            slate.without(error)
        if self._online is None:
            return None
        try:
            with _reading():
                return self._online.materialised(), service, self._online.user(user_id, service, request, pushed=False)
        except StageError:
            return None

    def _read(self, service: str, user_id: int, request: Request) -> tuple[Materialised, str, Columns]:
        with _reading():
            online = self.online()
            return online.materialised(), service, online.user(user_id, service, request)

    def _fused(self, held: Held, heads: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        manifest = held.manifest
        named = {name: np.asarray(heads[name], np.float64) for name in manifest["heads"]}
        scores = fuse(named, manifest["weights"], manifest["fusion"])
        if not all(np.isfinite(values).all() for values in (scores, *named.values())):
            why = f"rank of release {held.number} gives scores that are not finite"
            raise StageError("rank", "not_finite", why, "roll back to the former release")
        return named, scores

    def _diversified(
        self, slate: Slate, held: Held, ids: np.ndarray, scores: np.ndarray, items: Columns, k: int
    ) -> tuple[np.ndarray, list[int]]:
        """Which of the items are answered, and the place that each had by its score."""
        trade_off, cap, vectors, authors = self._settings.trade_off, self._settings.author_cap, None, None
        if trade_off < 1.0:
            if held.vectors is None:
                why = f"the item vectors of release {held.number} are not read, or not yet"
                slate.without(StageError("diversity", "no_vectors", why, "see the gateway's log"))
                trade_off = 1.0
            else:
                vectors = held.vectors.take(ids)
        if cap:
            authors = items.get("author_id")
            if authors is None:
                why = "without their features the authors of items are not known"
                slate.without(StageError("diversity", "no_authors", why, _FILL))
                cap = 0
        assert authors is None or isinstance(authors, np.ndarray)
        best = rerank(scores, k, trade_off=trade_off, vectors=vectors, cap=cap, authors=authors)
        if trade_off == 1.0 and not cap:
            return best, list(range(len(best)))
        return best, _places(scores)[best].tolist()

    def _look_alike(self, slate: Slate, held: Held, found: Mapping[str, np.ndarray], user: Columns) -> dict[int, float]:
        """The items that those liked whom the user is like, best first, with their scores; none without a table."""
        if not self._settings.look_alike or "query" not in found:
            return {}
        try:
            table = held.look_alike.current()
            if table is None:
                return {}
            history = user["history_items"]
            seen = history.values if isinstance(history, Ragged) else np.empty(0, np.int64)
            ids, scores = table.best(found["query"][0], seen, self._settings.look_alike)
        except (LookAlikeError, OSError) as error:
            slate.without(StageError("look_alike", "unfit", str(error), "run the look_alike DAG"))
            return {}
        return dict(zip(ids.tolist(), scores.tolist(), strict=True))

    def _popular(self, slate: Slate, held: Held, request: Request, user: Columns | None, k: int) -> Slate:
        """What is popular where the user is, without what he is known to have seen."""
        if held.popular is None:
            slate.answered = False
            return slate
        slate.degraded.setdefault("recall", slate.degraded.get("features", ""))
        slate.degraded.setdefault("rank", slate.degraded["recall"])
        with slate.timed("popular"):
            history = None if user is None else user["history_items"]
            seen = history.values if isinstance(history, Ragged) else np.empty(0, np.int64)
            new = None if user is None or "features" in slate.degraded else not len(seen)
            slate.items = held.popular.best(request.scenario, new, seen, k).tolist()
        slate.scores = [1.0 / (1 + place) for place in range(len(slate.items))]
        slate.heads = [{} for _ in slate.items]
        slate.places = list(range(len(slate.items)))
        return slate

    def _ask(self, model: str, held: Held, columns: Columns, rows: int, deadline: Deadline) -> dict[str, np.ndarray]:
        """Calls a model with the inputs that its signature asks for, found in `columns` by name.

        Raises:
            StageError: it does not answer, or not in time.
        """
        breaker, number = held.breakers[model], held.number
        seconds = deadline.left(model)
        if not seconds:
            why = f"the time of the request was over before {model} of release {number} could be asked"
            raise StageError(model, "late", why, _SLOW)
        if not breaker.allows():
            why = f"{model} of release {number} at {self._models.address} has not answered several requests"
            raise StageError(model, "not_asked", why, self._start_again())
        try:
            signature = self._models.signature(model, number)
            missing = sorted(set(signature.inputs) - set(columns))
            if missing:
                why = f"{model} of release {number} wants {', '.join(missing)}, which no feature service gives"
                raise StageError(model, "unfit", why, "roll back to the former release")
            inputs = {name: as_input(columns[name], spec, rows) for name, spec in signature.inputs.items()}
            found = self._models.predict(model, number, inputs, seconds)
        except ModelError as error:
            failed = self._failed(model, number, error)
            if failed.reason in NOT_ANSWERING:
                breaker.failed()
            raise failed from error
        breaker.answered()
        return found

    def _failed(self, model: str, number: int, error: ModelError) -> StageError:
        """Why a stage is left out that the model server gave no answer to."""
        reason = REASONS.get(error.code, "failed")
        remedy = "roll back to the former release, and see the model server's log"
        if reason == NOT_LOADED:
            remedy = self._load_again(number)
        elif reason != "failed":
            remedy = self._start_again()
        return StageError(model, reason, str(error), remedy)

    def _start_again(self) -> str:
        return f"start the model server at {self._models.address}, or see its log"

    def _load_again(self, number: int) -> str:
        return f"load it: python -m serving.rollout --home {self._settings.home} load {number}"

    def _current(self) -> Routing:
        try:
            current = self._routing.current()
        except RoutingError as error:
            raise UnavailableError(str(error), "promote a release again") from error
        if current.champion is None:
            raise UnavailableError("no release is live", "train a candidate and approve its release")
        self._releases.follow(current)
        return current

    def _held(self, number: int) -> Held:
        try:
            return self._releases.get(number)
        except ReleaseError as error:
            raise UnavailableError(str(error), "restore it, or roll back to the former release") from error

    def _service(self, held: Held) -> str:
        """The feature service that answers of a release are made of: the rank model's, which has all of recall's.

        One reading for both models: both see the same of the user.
        """
        services = held.manifest["feature_services"]
        for model, service in services.items():
            if service not in SERVICES:
                raise StageError(
                    "features",
                    "unfit",
                    f"{model} of release {held.number} reads the feature service {service}, which there is no more:"
                    f" there are {', '.join(SERVICES)}",
                    "train a candidate and approve its release",
                )
        return str(services["rank"])


def _joined(ids: np.ndarray, scores: np.ndarray, alike: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """What recall found and, behind it, what look-alike found besides, with recall's scores: NaN of the latter."""
    more = np.array([item for item in alike if item not in set(ids.tolist())], np.int64)
    return np.concatenate([ids, more]), np.concatenate([scores, np.full(len(more), np.nan)])


def _explored(best: np.ndarray, found_alike: np.ndarray, count: int) -> np.ndarray:
    """A slate in which `count` places, evenly spread, are held by items that look-alike alone has found.

    Args:
        best: rows of candidates, best first.
        found_alike: which of the candidates are such items, the likest first; those in `best` count.
    """
    rest = np.setdiff1d(np.flatnonzero(found_alike), best)
    lacking = min(count - int(found_alike[best].sum()), len(rest), len(best))
    if lacking <= 0:
        return best
    kept = best.tolist()
    # the last that recall found make room
    for row in [row for row in reversed(kept) if not found_alike[row]][:lacking]:
        kept.remove(row)
    for place, row in enumerate(rest[:lacking].tolist(), 1):
        kept.insert(place * len(best) // lacking - 1, row)
    return np.array(kept, np.int64)


def _places(scores: np.ndarray) -> np.ndarray:
    """The place of each score in their order, from 0."""
    place = np.empty(len(scores), np.int64)
    place[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return place


_FILL = "fill it by a run of the prepare DAG"
_SLOW = "see what is slow, or raise PENSTOCK_DEADLINE_MS"


@contextmanager
def _reading() -> Iterator[None]:
    """Turns what the feature store raises into the stage that is left out for it."""
    try:
        yield
    except Exception as error:  # Feast and its stores raise anything; none of it may become a 500
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StageError("features", "away", f"the feature store does not answer: {reason}", _FILL) from error


def is_known(user: Columns) -> bool:
    """Whether anything is known of a user of some features."""
    return any(_says_anything(user[name]) for name in KNOWN_OF_USER if name in user)


def _says_anything(column: Column) -> bool:
    return bool(column.lengths.any() if isinstance(column, Ragged) else column.any())


def as_input(column: Column, spec: Input, rows: int) -> np.ndarray:
    """A column of one row or `rows`, in the dtype and rank of an input: lists are padded with -1."""
    if isinstance(column, Ragged):
        array = np.full((len(column), max(1, *column.lengths)), PADDING, spec.dtype)
        array[np.arange(array.shape[1]) < column.lengths[:, None]] = column.values
    else:
        array = column.astype(spec.dtype, copy=False)
    # repeated at once: a broadcast view costs more than the copy, which the message needs anyway
    return array if spec.rank == 0 or len(array) == rows else array.repeat(rows, axis=0)
