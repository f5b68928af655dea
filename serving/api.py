"""What the gateway is asked and answers: the bodies of its API, as its page describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from penstock.events import DAY_MS

MAX_ID = 2**63 - 1
MAX_TIME_MS = 4_102_444_800_000  # the year 2100
MAX_EVENTS = 1000
MAX_K = 100

Stage = Literal["features", "recall", "look_alike", "rank", "diversity"]


def _whole(value: Any) -> Any:
    """7.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]
Label = Annotated[Integer, Field(ge=0, le=1)]


class Body(BaseModel):
    """A number is a number: no text, no truth value, and no key that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RequestContext(Body):
    """Where and when."""

    scenario: Integer = Field(default=0, ge=0, le=1000, description="surface of the product (tab, page)")
    device: Integer = Field(default=0, ge=0, le=1000, description="device class; 0 = unknown")
    time_ms: Integer | None = Field(
        default=None, ge=0, le=MAX_TIME_MS, description="ms since 1970 (UTC), to replay another time than now"
    )


class RecommendRequest(Body):
    """Whom to recommend to, and how much."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": 7, "k": 5, "context": {"scenario": 1}},
                {"user_id": 7, "k": 5, "explain": True, "preview": True},
            ]
        }
    )

    user_id: Integer = Field(ge=0, le=MAX_ID, description="the user; one that nothing is known of is answered too")
    k: Integer = Field(default=10, ge=1, le=MAX_K, description="how many items")
    context: RequestContext = Field(default=RequestContext(), description="where and when")
    preview: bool = Field(default=False, description="asks without being logged: what nobody sees is no impression")
    explain: bool = Field(default=False, description="adds how the slate came about")


class Item(BaseModel):
    """One item of a slate."""

    item_id: int
    position: int = Field(ge=0, description="place in the slate, from 0")
    score: float = Field(
        description="what the items were ordered by, before any re-ranking: the fused score; without the rank model"
        " recall's; of popular items 1 / (1 + position)"
    )
    heads: dict[str, float] = Field(description="what the rank model says; empty without it")


class ExplainedItem(BaseModel):
    """How one item came into the slate."""

    item_id: int
    recall_score: float | None = Field(description="null of an item that was not recalled")
    recall_rank: int | None = Field(description="place in recall's order, from 0")
    look_alike_score: float | None = Field(description="by those who liked it; null if that did not find the item")
    rank: int = Field(description="place in the order of the scores, before any re-ranking, from 0")
    features: dict[str, Any] = Field(description="what the rank model was given of the item")


class Explanation(BaseModel):
    """How a slate came about."""

    release: int
    variant: Literal["champion", "challenger"]
    feature_service: str | None = Field(description="null without features")
    features_time_us: int | None = Field(description="the cutoff of the materialised features, µs since 1970 (UTC)")
    stages_ms: dict[str, float] = Field(description="what each stage took")
    degraded: dict[str, str] = Field(description="the stages that were left out, with the reason")
    why: str = Field(description="what was wrong, in a sentence; empty if nothing was")
    user: dict[str, Any] = Field(description="what the models were given of the user and the request")
    items: list[ExplainedItem]


class RecommendResponse(BaseModel):
    """A slate, best first, and who chose it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": 6317802218374421,
                    "user_id": 7,
                    "release": 3,
                    "variant": "champion",
                    "cold_start": False,
                    "degraded": [],
                    "items": [
                        {
                            "item_id": 1041,
                            "position": 0,
                            "score": 0.84,
                            "heads": {"click": 0.61, "long_view": 0.42, "like": 0.04},
                        }
                    ],
                }
            ]
        }
    )

    request_id: int = Field(description="to be told with the feedback")
    user_id: int
    release: int = Field(description="the release that all of it is of")
    variant: Literal["champion", "challenger"]
    cold_start: bool = Field(description="nothing was known of the user")
    degraded: list[Stage] = Field(description="the stages that were left out; empty if all had their say")
    items: list[Item]
    explanation: Explanation | None = Field(default=None, description="only if it was asked for")


class Outcome(Body):
    """What the user did with one item of a request.

    A long view needs its watch time, here or in a later part: the log's validation puts one without aside.
    """

    item_id: Integer = Field(ge=0, le=MAX_ID)
    click: Label = 0
    long_view: Label = 0
    like: Label = 0
    profile_enter: Label = 0
    watch_time_ms: Integer = Field(default=0, ge=0, le=DAY_MS, description="time watched, in ms")


class FeedbackRequest(Body):
    """Outcomes of one request; they may come in several parts, in any order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": 6317802218374421,
                    "events": [{"item_id": 1041, "click": 1, "long_view": 1, "watch_time_ms": 9000}],
                }
            ]
        }
    )

    request_id: Integer = Field(ge=0, lt=2**53, description="of the answer that the items were in")
    events: list[Outcome] = Field(max_length=MAX_EVENTS)


class FeedbackResponse(BaseModel):
    """How many outcomes were kept."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"accepted": 1}]})

    accepted: int


class StatusResponse(BaseModel):
    """How far the online store is behind the feedback, of which nothing is lost."""

    records: int = Field(description="all there are")
    waiting: int = Field(description="those that the online store does not have yet")
    away_since_ms: int | None = Field(description="since when the store does not take them, ms since 1970")
    reason: str | None = Field(description="and why")


class HealthResponse(BaseModel):
    """The process runs."""

    status: Literal["ok"] = "ok"


class ReadyResponse(BaseModel):
    """Which releases answer, and what their answers are without."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"champion": 3, "challenger": 4, "share": 0.1, "degraded": {}}]}
    )

    champion: int
    challenger: int | None
    share: float = Field(description="the part of the users that the challenger answers")
    degraded: dict[Stage, str] = Field(description="stages that are left out now, with the reason")


class Failure(BaseModel):
    """Why a request failed."""

    error: str
    remedy: str | None = Field(default=None, description="what to do")
    field: str | None = Field(default=None, description="the value that is out of range")
    bound: dict[str, Any] | None = Field(default=None, description="and its range")
