"""The HTTP API: recommendations, and what users did with them.

    python -m serving.gateway --home HOME --port 8000

/docs shows the API, /openapi.json describes it; docs/gateway.md tells of settings, budgets and degraded answers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from feature_repo.online import Request as FeatureRequest
from penstock.features import Column, Ragged
from penstock.feedback import FeedbackError, FeedbackLog, new_request_id
from penstock.json_lines import LineError
from penstock.served import ServedLog
from serving.api import (
    Failure,
    FeedbackRequest,
    FeedbackResponse,
    HealthResponse,
    ReadyResponse,
    RecommendRequest,
    RecommendResponse,
    StatusResponse,
)
from serving.front import BEGAN, VARIANT, BusyError, Front, Turns, is_open
from serving.metrics import Metrics
from serving.pusher import Pusher
from serving.recommender import Recommender, Slate, UnavailableError
from serving.settings import Settings, SettingsError, from_environment

VISIBLE_SECONDS = 0.25
"""How long an answer to feedback waits for it to be in the online store, where the next request finds it."""
FEEDBACK_THREADS = 8
PROBE_THREADS = 2
OPEN_SECONDS = 10.0
"""How long a start waits for the feature store and the model server, before it answers without them."""
RETRY_SECONDS = 1
KEEP_ALIVE_SECONDS = 75
"""Longer than the minute after which load balancers drop a connection: where the gateway is first, a request fails."""

_UNAUTHORIZED = {
    "model": Failure,
    "description": "the gateway has a token, and the request brings no or another one",
    "headers": {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}},
}
_UNAVAILABLE: dict[str, Any] = {
    "model": Failure,
    "description": "no release is live, or nothing that it needs can be asked; or too many requests wait already,"
    " then with Retry-After",
    "headers": {"Retry-After": {"description": "seconds", "required": False, "schema": {"type": "integer"}}},
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "the body is not JSON"},
    401: _UNAUTHORIZED,
    413: {"model": Failure, "description": "the body is too large"},
    415: {"model": Failure, "description": "the body is not called application/json"},
    422: {"model": Failure, "description": "a value is out of range, or a key is not known"},
    503: _UNAVAILABLE,
}


class JsonRoute(APIRoute):
    """A route whose body pydantic reads from the bytes, once, and whose answer is made of bytes as well."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request, without what FastAPI does for other kinds of bodies and answers."""
        if self.body_field is None:
            return super().get_route_handler()
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            raw = await request.body()
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if raw and kind != "application/json":
                raise HTTPException(415, "the body's Content-Type is application/json")
            try:
                body = model.model_validate_json(raw)
            except ValidationError as error:
                raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None
            answer: Response = await endpoint(body, request)
            return answer

        return handle


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
    metrics = Metrics()
    turns = {
        "/recommend": Turns("recommend", settings.concurrency, settings.queue),
        "/feedback": Turns("feedback", FEEDBACK_THREADS, settings.queue),
        "/ready": Turns("ready", PROBE_THREADS, PROBE_THREADS),
    }
    for path, of in turns.items():
        metrics.running.labels(path).set_function(partial(getattr, of, "running"))
        metrics.waiting.labels(path).set_function(partial(getattr, of, "waiting"))
    metrics.feedback.set_function(lambda: pusher.status().waiting)
    for variant in ("champion", "challenger"):
        metrics.release.labels(variant).set_function(partial(recommender.release, variant))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pusher.start()
        await asyncio.to_thread(recommender.open, OPEN_SECONDS)
        yield
        for of in turns.values():
            of.close()
        pusher.close()
        recommender.close()
        served.close()
        log.close()

    # its page of the API needs no script from elsewhere
    app = FastAPIOffline(
        title="Penstock",
        summary="Recommendations, and what users did with them",
        description="Every answer is of one release, which it names. What had to be left out of it is in `degraded`.",
        version="1",
        lifespan=lifespan,
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(UnavailableError, _unavailable)
    app.add_exception_handler(BusyError, _busy)
    json_routes = APIRouter(route_class=JsonRoute)

    def answer(asked: RecommendRequest, began: float) -> tuple[str, bytes]:
        """The variant, and the JSON of the answer."""
        context = asked.context
        time_ms = time.time_ns() // 1_000_000 if context.time_ms is None else context.time_ms
        of = FeatureRequest(time_ms, context.scenario, context.device)
        slate = recommender.recommend(asked.user_id, asked.k, of, began)
        request_id = new_request_id()
        if not asked.preview:
            with _writing(), slate.timed("log"):
                _keep(log, served, request_id, asked.user_id, of, slate)
        metrics.stages(slate.seconds)
        metrics.degraded(slate.degraded, slate.why)
        return slate.variant, _as_json(request_id, asked, slate)

    @json_routes.post("/recommend", responses=_FAILURES, response_model=RecommendResponse)
    async def recommend(body: RecommendRequest, request: Request) -> Response:
        """The best items for a user; they are logged as impressions unless it is a preview.

        A part that does not answer in time is left out: without the user's activity he is taken for a new user,
        without recall popular items are answered, without the rank model recall's order stands. `degraded` says so.
        """
        variant, content = await turns["/recommend"].run(answer, body, request.scope[BEGAN])
        request.scope[VARIANT] = variant
        return Response(content, media_type="application/json")

    def told(asked: FeedbackRequest) -> None:
        with _writing():
            sequence = log.outcomes(asked.request_id, [event.model_dump() for event in asked.events])
        pusher.wait(sequence, VISIBLE_SECONDS)

    @json_routes.post("/feedback", responses=_FAILURES, response_model=FeedbackResponse)
    async def feedback(body: FeedbackRequest, request: Request) -> Response:
        """What the user did with the items of a request; the next request of the user is answered by it."""
        await turns["/feedback"].run(told, body)
        return Response(b'{"accepted":%d}' % len(body.events), media_type="application/json")

    @app.get("/health")
    async def health() -> HealthResponse:
        """The gateway runs."""
        return HealthResponse()

    @app.get("/ready", responses={503: _UNAVAILABLE})
    async def ready() -> ReadyResponse:
        """The gateway can answer: which releases it does that with, and what their answers are without."""
        current, degraded = await turns["/ready"].run(recommender.ready)
        return ReadyResponse.model_validate(
            {
                "champion": current.champion,
                "challenger": current.challenger,
                "share": current.share,
                "degraded": degraded,
            }
        )

    @app.get("/status", responses={401: _UNAUTHORIZED})
    def status() -> StatusResponse:
        """How far what users did is visible to the next request."""
        return StatusResponse(**asdict(pusher.status()))

    @app.get("/metrics", responses={401: _UNAUTHORIZED}, response_class=PlainTextResponse)
    def prometheus() -> Response:
        """What the gateway counts and times, in Prometheus' text format."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(json_routes)
    _describe(app, with_token=bool(settings.token))
    app.add_middleware(
        Front,
        token=settings.token,
        body_bytes=settings.body_bytes,
        routes=frozenset(app.openapi()["paths"]),
        metrics=metrics,
    )
    return app


def _describe(app: FastAPI, *, with_token: bool) -> None:
    """Has the page of the API say which paths want a token."""
    document = app.openapi()
    if with_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if not is_open(path):
                for operation in operations.values():
                    operation["security"] = [{"token": []}]


def _keep(
    log: FeedbackLog, served: ServedLog, request_id: int, user_id: int, request: FeatureRequest, slate: Slate
) -> None:
    """Logs what is about to be shown; and of the share that is asked for the vectors, unless something was left out."""
    vectors = slate.vectors
    where = {"time_ms": request.time_ms, "scenario": request.scenario, "device": request.device}
    if vectors is not None and not slate.degraded and served.wants(request_id):
        served.keep(
            request_id,
            user_id,
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
        user_id,
        slate.items,
        **where,
        release=slate.release,
        variant=slate.variant,
        features_us=None if vectors is None else vectors.features_us,
        degraded=list(slate.degraded),
    )


def _as_json(request_id: int, asked: RecommendRequest, slate: Slate) -> bytes:
    """A slate as `RecommendResponse`; not through pydantic, which would check each value again."""
    ranked = zip(slate.items, slate.scores, slate.heads, strict=True)
    answer: dict[str, Any] = {
        "request_id": request_id,
        "user_id": asked.user_id,
        "release": slate.release,
        "variant": slate.variant,
        "cold_start": slate.cold_start,
        "degraded": list(slate.degraded),
        "items": [
            {"item_id": item, "position": position, "score": score, "heads": heads}
            for position, (item, score, heads) in enumerate(ranked)
        ],
    }
    if asked.explain:
        answer["explanation"] = _explained(slate)
    return json.dumps(answer, separators=(",", ":")).encode()


def _explained(slate: Slate) -> dict[str, Any]:
    vectors = slate.vectors
    of_items = {name: _values(column) for name, column in vectors.of_items.items()} if vectors else {}
    recalled = slate.recalled or [(None, None)] * len(slate.items)
    alike = slate.alike or [None] * len(slate.items)
    return {
        "release": slate.release,
        "variant": slate.variant,
        "feature_service": vectors.service if vectors else None,
        "features_time_us": vectors.features_us if vectors else None,
        "stages_ms": {stage: round(seconds * 1000, 3) for stage, seconds in slate.seconds.items()},
        "degraded": slate.degraded,
        "why": slate.why,
        "user": {name: _values(column)[0] for name, column in vectors.user.items()} if vectors else {},
        "items": [
            {
                "item_id": item,
                "recall_score": recall_score,
                "recall_rank": recall_rank,
                "look_alike_score": alike_score,
                "rank": place,
                "features": {name: values[row] for name, values in of_items.items()},
            }
            for row, (item, place, (recall_score, recall_rank), alike_score) in enumerate(
                zip(slate.items, slate.places, recalled, alike, strict=True)
            )
        ],
    }


def _values(column: Column) -> list[Any]:
    """A column in JSON's types; what is not finite is null there."""
    if isinstance(column, Ragged):
        return [row.tolist() for row in column.lists()]
    return [None if isinstance(value, float) and not isfinite(value) else value for value in column.tolist()]


@contextmanager
def _writing() -> Iterator[None]:
    """Turns a failure to write into the answer that says so."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"feedback cannot be kept: {error}", "make room on the disk") from error


def _failed(status: int, failure: Failure, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(failure.model_dump(exclude_none=True), status_code=status, headers=headers)


def _unavailable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UnavailableError)
    return _failed(503, Failure(error=error.why, remedy=error.remedy))


def _busy(_: Request, error: Exception) -> JSONResponse:
    return _failed(503, Failure(error=str(error), remedy="ask again later"), {"Retry-After": str(RETRY_SECONDS)})


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _failed(error.status_code, Failure(error=str(error.detail)), dict(error.headers or {}))


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    context = first.get("ctx", {})
    if first["type"] == "json_invalid":
        return _failed(400, Failure(error=f"the body is not JSON: {context.get('error', first['msg'])}"))
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    bound = {name: context[name] for name in ("gt", "ge", "lt", "le", "min_length", "max_length") if name in context}
    return _failed(422, Failure(error=f"{field}: {first['msg']}", field=field, bound=bound or None))


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m serving.gateway", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--home", type=Path, help="default: PENSTOCK_HOME")
    parser.add_argument("--host", help="default: PENSTOCK_GATEWAY_HOST, or 127.0.0.1")
    parser.add_argument("--port", type=int, help="default: PENSTOCK_GATEWAY_PORT")
    parser.add_argument("--model-server", help="host:port; default: PENSTOCK_MODEL_SERVER")
    arguments = parser.parse_args()
    try:
        settings = from_environment(os.environ, arguments.host)
        settings = replace(
            settings,
            home=arguments.home.resolve() if arguments.home else settings.home,
            gateway_port=settings.gateway_port if arguments.port is None else arguments.port,
            model_server=arguments.model_server or settings.model_server,
        )
        with _listen(settings.host, settings.gateway_port) as listener, suppress(KeyboardInterrupt):
            app = create_app(settings)
            gc.collect()
            gc.freeze()  # as in the model server: no request waits for what stays to be gone through
            print(f"gateway: http://{settings.host}:{listener.getsockname()[1]}", flush=True)
            config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS)
            uvicorn.Server(config).run(sockets=[listener])
    except (SettingsError, FeedbackError, LineError, OSError) as error:
        sys.exit(f"gateway: {error}")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"port {port} of {host}: {error.strerror}; stop what listens there or set another") from None
    return listener


if __name__ == "__main__":
    main()
