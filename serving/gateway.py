"""The HTTP API: recommendations, and what users did with them.

    python -m serving.gateway --home HOME --port 8000

/docs shows the API, /openapi.json describes it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from feature_repo.online import Request as FeatureRequest
from penstock.events import DAY_MS
from penstock.feedback import FeedbackError, FeedbackLog, new_request_id
from penstock.json_lines import LineError
from penstock.served import ServedLog
from serving.pusher import Pusher
from serving.recommender import Recommender, UnavailableError, as_json
from serving.settings import Settings, SettingsError, from_environment

MAX_ID = 2**63 - 1
MAX_TIME_MS = 4_102_444_800_000  # the year 2100
MAX_EVENTS = 1000
VISIBLE_SECONDS = 0.25
"""How long an answer to feedback waits for it to be in the online store, where the next request finds it."""

Label = Annotated[int, Field(ge=0, le=1)]


class _Body(BaseModel):
    """A number is a number: no text, no truth value, and no key that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid")


class RequestContext(_Body):
    """Where and when; `time_ms` is in ms since 1970 (UTC) and set to replay another time than now."""

    scenario: int = Field(default=0, ge=0, le=1000)
    device: int = Field(default=0, ge=0, le=1000)
    time_ms: int | None = Field(default=None, ge=0, le=MAX_TIME_MS)


class RecommendRequest(_Body):
    """`preview` asks without being logged: what is shown to nobody is no impression."""

    user_id: int = Field(ge=0, le=MAX_ID)
    k: int = Field(default=10, ge=1, le=100)
    context: RequestContext = RequestContext()
    preview: bool = False


class Item(BaseModel):
    """One item of a slate; `heads` are the rank model's probabilities, `score` their weighted sum."""

    item_id: int
    position: int
    score: float
    heads: dict[str, float]


class RecommendResponse(BaseModel):
    """A slate, best first, and who chose it; `cold_start` says that nothing was known of the user."""

    request_id: int
    user_id: int
    release: int
    variant: Literal["champion", "challenger"]
    cold_start: bool
    items: list[Item]


class Outcome(_Body):
    """What the user did with one item of a request.

    A long view needs its watch time, here or in a later part: the log's validation puts one without aside.
    """

    item_id: int = Field(ge=0, le=MAX_ID)
    click: Label = 0
    long_view: Label = 0
    like: Label = 0
    profile_enter: Label = 0
    watch_time_ms: int = Field(default=0, ge=0, le=DAY_MS)


class FeedbackRequest(_Body):
    """Outcomes of one request; they may come in several parts, in any order."""

    request_id: int = Field(ge=0, lt=2**53)
    events: list[Outcome] = Field(max_length=MAX_EVENTS)


class FeedbackResponse(BaseModel):
    """How many outcomes were kept."""

    accepted: int


class StatusResponse(BaseModel):
    """How far the online store is behind the feedback, of which nothing is lost: `waiting` of the `records` that there
    are; while the store does not take them, since when (ms since 1970), and why."""

    records: int
    waiting: int
    away_since_ms: int | None
    reason: str | None


class Failure(BaseModel):
    """Why a request failed; `remedy` is what to do, `field` and `bound` are where a value is out of range."""

    error: str
    remedy: str | None = None
    field: str | None = None
    bound: dict[str, Any] | None = None


_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "not JSON"},
    422: {"model": Failure, "description": "a value is out of range"},
    503: {"model": Failure, "description": "no release is live, or what it needs is away"},
}


def create_app(settings: Settings) -> FastAPI:
    """The gateway on a home directory.

    Raises:
        FeedbackError: another gateway logs to the same home.
        LineError: its feedback cannot be read.
    """
    log = FeedbackLog(settings.home / "feedback")
    served = ServedLog(settings.home / "feedback" / "served", settings.served_share)
    recommender = Recommender(settings)
    pusher = Pusher(settings.home, log, recommender.online)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pusher.start()
        yield
        pusher.close()
        recommender.close()
        served.close()
        log.close()

    # its page of the API needs no script from elsewhere
    app = FastAPIOffline(title="Penstock", summary="Recommendations, and what users did with them", lifespan=lifespan)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(UnavailableError, _unavailable)

    @app.post("/recommend", responses=_FAILURES)
    def recommend(request: RecommendRequest) -> RecommendResponse:
        """The best items for a user; they are logged as impressions unless it is a preview."""
        asked = request.context
        time_ms = time.time_ns() // 1_000_000 if asked.time_ms is None else asked.time_ms
        slate = recommender.recommend(request.user_id, request.k, FeatureRequest(time_ms, asked.scenario, asked.device))
        request_id = new_request_id()
        if not request.preview:
            where = {"time_ms": time_ms, "scenario": asked.scenario, "device": asked.device}
            vectors = slate.vectors
            with _writing():
                if served.wants(request_id):
                    served.keep(
                        request_id,
                        request.user_id,
                        slate.items,
                        **where,
                        release=slate.release,
                        service=vectors.service,
                        features_us=vectors.features_us,
                        user=vectors.user,
                        of_items=vectors.of_items,
                    )
                log.impressions(
                    request_id,
                    request.user_id,
                    slate.items,
                    **where,
                    release=slate.release,
                    variant=slate.variant,
                    features_us=vectors.features_us,
                )
        return RecommendResponse(
            request_id=request_id,
            user_id=request.user_id,
            release=slate.release,
            variant=slate.variant,
            cold_start=slate.cold_start,
            items=[Item(**item) for item in as_json(slate)],
        )

    @app.post("/feedback", responses=_FAILURES)
    def feedback(request: FeedbackRequest) -> FeedbackResponse:
        """What the user did with the items of a request; the next request of the user is answered by it."""
        with _writing():
            sequence = log.outcomes(request.request_id, [event.model_dump() for event in request.events])
        pusher.wait(sequence, VISIBLE_SECONDS)
        return FeedbackResponse(accepted=len(request.events))

    @app.get("/health")
    def health() -> dict[str, str]:
        """The gateway runs."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: _FAILURES[503]})
    def ready() -> dict[str, int | float | None]:
        """The gateway can answer: which releases it does that with."""
        current = recommender.ready()
        return {"champion": current.champion, "challenger": current.challenger, "share": current.share}

    @app.get("/status")
    def status() -> StatusResponse:
        """How far what users did is visible to the next request."""
        return StatusResponse(**asdict(pusher.status()))

    return app


@contextmanager
def _writing() -> Iterator[None]:
    """Turns a failure to write into the answer that says so."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"feedback cannot be kept: {error}", "make room on the disk") from error


def _failed(status: int, failure: Failure) -> JSONResponse:
    return JSONResponse(failure.model_dump(exclude_none=True), status_code=status)


def _unavailable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UnavailableError)
    return _failed(503, Failure(error=error.why, remedy=error.remedy))


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _failed(error.status_code, Failure(error=str(error.detail)))


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    context = first.get("ctx", {})
    if first["type"] == "json_invalid":
        return _failed(400, Failure(error=f"the body is not JSON: {context.get('error', first['msg'])}"))
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    bound = {key: value for key, value in context.items() if isinstance(value, int | float | str)}
    return _failed(422, Failure(error=f"{field}: {first['msg']}", field=field, bound=bound or None))


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--home", type=Path, help="default: PENSTOCK_HOME")
    parser.add_argument("--port", type=int, help="default: PENSTOCK_GATEWAY_PORT")
    parser.add_argument("--model-server", help="host:port; default: PENSTOCK_MODEL_SERVER")
    arguments = parser.parse_args()
    try:
        settings = from_environment(os.environ)
        settings = replace(
            settings,
            home=arguments.home.resolve() if arguments.home else settings.home,
            gateway_port=settings.gateway_port if arguments.port is None else arguments.port,
            model_server=arguments.model_server or settings.model_server,
        )
        with _listen(settings.host, settings.gateway_port) as listener, suppress(KeyboardInterrupt):
            app = create_app(settings)
            print(f"gateway: http://{settings.host}:{listener.getsockname()[1]}", flush=True)
            uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
    except (SettingsError, FeedbackError, LineError, OSError) as error:
        sys.exit(f"gateway: {error}")


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"port {port} of {host}: {error.strerror}; stop what listens there or set another") from None
    return listener


if __name__ == "__main__":
    main()
