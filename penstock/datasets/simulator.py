"""A feed with a known truth: users, items and what they do with each other, from a seed.

Every random number is a hash of (seed, what it is for, user, item, day, …), so nothing depends on the order or the size
of the work: day d is the same however many days are written, and one user's answer can be had without the others'.

Items have a topic, an author (four in five of whose items share a topic) and one to three tags of the topic; users have
two tastes, between which their interest swings with a period P_u of 20 to 90 days. With unit(·) of length 1, dim = 16:

    v_i    = unit(topic + 0.5 mean(tags) + 0.3 author + 0.2 own)
    a_u    = unit(topic + 0.6 second topic + 0.3 own), b_u likewise; two in three first topics follow age and gender
    z_u(t) = unit(cos θ a_u + sin θ b_u),  θ = π/4 (1 + sin(2π t / P_u + φ_u))              the interest, drifting
    x_uit  = 9 ⟨z_u(t), v_i⟩ + 0.5 cos(2π (hour − h_topic) / 24)                            the affinity

An item shown at a position is examined or not; what is not examined is not acted on (the examination hypothesis of
Richardson, Dominowska & Ragno, WWW 2007; the power of the rank as in Joachims, Swaminathan & Schnabel, WSDM 2017):

    examination(p, device) = (1 + p)^−η,  η = 0.15, 0.22, 0.35 on device 1, 2, 3; 0.22 if it is unknown (0)
    relevance(u, i, t)     = σ(c + x + appeal_i + openness_u + 0.5 e^(−age_i / 2 days) + scenario) = P(click | examined)
    P(click)               = examination · relevance
    watch time             = L_i exp(m + 0.16 (x + depth_i) + 0.7 ε), at most 3 durations; L_i = min(duration, 18 s)
    long view              = a click whose watch time reaches L_i
    P(like | click)        = σ(l + 0.4 (x + depth_i) + fondness_u)
    P(profile | click)     = σ(p + 0.3 x + charm_author)

`appeal` (what makes one click) and `depth` (what makes one stay) are independent: the heads differ. c, m, l and p are
set so that the default log has KuaiRand's rates (click .449, long view .316, profile .0189, like .0174).

The log is what a logging policy showed, so it is biased: the policy draws candidates by popularity and freshness and
orders them by popularity, a noisy guess of the affinity, and noise. What is worth more stands higher, so that position
misleads nobody about the order of items; with `favour` the shown are ordered by favour · f_author besides, f normal,
on which nothing else depends. Four requests in a hundred arrive late, by up to 6 hours; a log holds what had arrived by
its end.
"""

from __future__ import annotations

import datetime
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, ndtr, ndtri, pdtr

from penstock.events import DAY_MS, EVENTS, ITEMS, TIME, USERS, conform, write_events

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SLATE = 10
_HOUR_MS = 60 * 60 * 1000
_DIM = 16
_CANDIDATES = 60
_REQUESTS_AT_ONCE = 4096  # whose candidates are held in memory
_REQUESTS_PER_FILE = 50_000
_MAX_SESSIONS = 8
_MAX_REQUESTS = 8

_TOPICS = {
    "cooking": ("bread", "soup", "noodles", "grill", "cake", "spices", "knife", "breakfast"),
    "football": ("goal", "derby", "keeper", "penalty", "transfer", "tactics", "stadium", "cup"),
    "travel": ("island", "train", "desert", "market", "hostel", "harbour", "summit", "passport"),
    "music": ("guitar", "piano", "choir", "remix", "concert", "drums", "ballad", "vinyl"),
    "gaming": ("speedrun", "quest", "arena", "sandbox", "racing", "puzzle", "boss", "retro"),
    "pets": ("kitten", "puppy", "parrot", "rabbit", "aquarium", "hamster", "rescue", "training"),
    "fitness": ("squat", "yoga", "marathon", "stretch", "boxing", "swim", "cycling", "plank"),
    "fashion": ("sneakers", "denim", "linen", "jacket", "vintage", "jewels", "haircut", "runway"),
    "gadgets": ("phone", "camera", "drone", "keyboard", "headset", "laptop", "battery", "robot"),
    "gardens": ("roses", "tomatoes", "compost", "bonsai", "orchard", "herbs", "lawn", "pond"),
    "comedy": ("prank", "sketch", "standup", "parody", "office", "family", "accent", "blooper"),
    "science": ("planets", "volcano", "atoms", "fossils", "ocean", "vaccines", "magnets", "weather"),
    "crafts": ("knitting", "pottery", "woodwork", "origami", "paint", "leather", "beads", "candles"),
    "cars": ("engine", "rally", "tuning", "electric", "classic", "garage", "offroad", "drift"),
    "news": ("election", "economy", "city", "court", "border", "housing", "schools", "energy"),
    "dance": ("salsa", "ballet", "hiphop", "tango", "flashmob", "tap", "waltz", "street"),
}
_N_TOPICS = len(_TOPICS)
_TAGS_PER_TOPIC = 8
_WORDS = tuple(word for words in _TOPICS.values() for word in words)
_OPENINGS = ("my", "the best", "how to:", "a day of", "five minutes of", "first", "secret", "slow", "why", "again:")
_ENDINGS = (
    "at home",
    "in the rain",
    "for beginners",
    "explained",
    "with friends",
    "gone wrong",
    "at night",
    "on a budget",
)

_ETA = np.array([0.22, 0.15, 0.22, 0.35])
_SCENARIO = np.array([0.0, 0.25, -0.35])
_SCENARIO_SHARE = np.array([0.6, 0.25, 0.15])
# requests by hour of day (UTC): quiet nights, a noon hill, an evening peak
_HOURS = np.array([3, 2, 1, 1, 1, 2, 4, 6, 7, 7, 7, 8, 10, 9, 7, 7, 8, 9, 11, 13, 14, 13, 10, 6], dtype=np.float64)

_AFFINITY = 9.0
_CLICK_BIAS = -2.9
_WATCH_BIAS = -0.16
_WATCH_SLOPE = 0.16
_WATCH_NOISE = 0.7
_LIKE_BIAS = -5.5
_PROFILE_BIAS = -4.8


@dataclass(frozen=True)
class Config:
    """The size and seed of a feed; the defaults make 250,000 impressions.

    Raises:
        ValueError: a size out of range.

    Args:
        users: all who ever use it; one in twenty registers during its first 60 days.
        items: those uploaded in the 30 days before it begins.
        items_per_day: uploaded on each later day.
        sessions_per_day: of a mean user; a session is 1.8 requests of `SLATE` items on the average.
        first_day: YYYY-MM-DD (UTC).
        users_per_part: users worked on together; memory grows with it, the events written do not depend on it.
        favour: how much the order of a slate follows what the policy prefers of authors, whatever they are worth.
    """

    seed: int = 7
    users: int = 5_000
    items: int = 2_000
    items_per_day: int = 60
    days: int = 14
    sessions_per_day: float = 0.21
    first_day: str = "2026-01-05"
    users_per_part: int = 50_000
    favour: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("seed", 0, 2**63 - 1),
            ("users", 1, 2**31 - 1),
            ("items", 100, 2**31),
            ("items_per_day", 0, 2**24),
            ("days", 1, 2**12 - 1),
            ("sessions_per_day", 0.0, 4.0),
            ("users_per_part", 1, 2**24),
            ("favour", 0.0, 100.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"simulator: {name} is {value}; it goes from {low} to {high}")
        try:
            datetime.date.fromisoformat(self.first_day)
        except ValueError as error:
            raise ValueError(f"simulator: first_day is {self.first_day!r}, not a date YYYY-MM-DD") from error

    @property
    def start_ms(self) -> int:
        """When the first day begins, ms since the epoch."""
        day = datetime.datetime.fromisoformat(self.first_day).replace(tzinfo=datetime.UTC)
        return int(day.timestamp() * 1000)

    def items_by(self, day: int) -> int:
        """How many items are uploaded by the end of day `day` (0 = the first); their ids are 0, 1, 2, …"""
        return self.items + (day + 1) * self.items_per_day


@dataclass(frozen=True)
class Users:
    """Some users as they are: all arrays [n], `tastes` [n, 2, dim]."""

    ids: Ints
    tastes: Floats
    period_ms: Floats
    phase: Floats
    openness: Floats
    fondness: Floats
    activity: Floats
    device: Ints
    registered_day: Ints
    age: Ints
    gender: Ints
    region: Ints

    def interest(self, of: Ints, since_start_ms: Ints) -> Floats:
        """z_u(t) of the users at the places `of` [n], [n, dim]."""
        swing = np.sin(2 * np.pi * since_start_ms / self.period_ms[of] + self.phase[of])
        angle = np.pi / 4 * (1 + swing)[:, None]
        return _unit(np.cos(angle) * self.tastes[of, 0] + np.sin(angle) * self.tastes[of, 1])


@dataclass(frozen=True)
class Items:
    """Some items as they are: all arrays [n], `tags` and `tagged` [n, 3], `vectors` [n, dim]."""

    ids: Ints
    topic: Ints
    author: Ints
    tags: Ints
    tagged: NDArray[np.bool_]
    vectors: Floats
    appeal: Floats
    depth: Floats
    charm: Floats
    favoured: Floats
    peak_hour: Floats
    duration_ms: Ints
    upload_ms: Ints


@dataclass(frozen=True)
class Answer:
    """What each of n impressions would lead to if it were examined: all arrays [n].

    `click` is P(click | examined); `log_watch` the mean of ln(watch time / enough_ms), `like` and `profile`
    probabilities, all after a click.
    """

    click: Floats
    log_watch: Floats
    like: Floats
    profile: Floats
    enough_ms: Ints
    most_ms: Ints


@dataclass(frozen=True)
class _Requests:
    """Requests of one day: all arrays [n]; `user` is a place in the table of users."""

    request: Ints
    user: Ints
    time_ms: Ints
    device: Ints
    scenario: Ints

    def take(self, which: slice) -> _Requests:
        return _Requests(
            self.request[which], self.user[which], self.time_ms[which], self.device[which], self.scenario[which]
        )


class Truth:
    """What nobody who reads the log can see."""

    def __init__(self, config: Config) -> None:
        self.config = config
        dims = np.arange(_DIM)
        self._topics = _unit(_normal(config.seed, "topic", np.arange(_N_TOPICS)[:, None], dims))
        self._tags = _unit(_normal(config.seed, "tag", np.arange(_N_TOPICS * _TAGS_PER_TOPIC)[:, None], dims))

    def relevance(self, users: ArrayLike, items: ArrayLike, times_ms: ArrayLike, scenario: ArrayLike = 0) -> Floats:
        """P(click | examined), [n]; arguments as in `probabilities`."""
        return self.probabilities(users, items, times_ms, scenario)["click"]

    def examination(self, position: ArrayLike, device: ArrayLike) -> Floats:
        """P(the user looks) at `position` (from 0) of a slate; a device not known counts as 0."""
        device = np.asarray(device, dtype=np.int64)
        eta = _ETA[np.where((device >= 0) & (device < _ETA.size), device, 0)]
        return np.asarray((1.0 + np.asarray(position, dtype=np.float64)) ** -eta)

    def probabilities(
        self, users: ArrayLike, items: ArrayLike, times_ms: ArrayLike, scenario: ArrayLike = 0
    ) -> dict[str, Floats]:
        """P(label | examined) of click, long_view, like and profile_enter, each [n].

        Args:
            users, items, times_ms, scenario: arrays [n], or scalars that hold for all.

        Raises:
            ValueError: a negative item id.
        """
        user_ids, item_ids, times, scenarios = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(values, dtype=np.int64)) for values in (users, items, times_ms, scenario))
        )
        unique_users, user_of = np.unique(user_ids, return_inverse=True)
        unique_items, item_of = np.unique(item_ids, return_inverse=True)
        answer = self.answer(self.users(unique_users), user_of, self.items(unique_items), item_of, times, scenarios)
        return {
            "click": answer.click,
            "long_view": answer.click * ndtr(answer.log_watch / _WATCH_NOISE),
            "like": answer.click * answer.like,
            "profile_enter": answer.click * answer.profile,
        }

    def users(self, ids: Ints) -> Users:
        """The users `ids` [n]; every id that is not negative has one."""
        seed = self.config.seed
        age = _choice(seed, "age", 6, ids)
        gender = _choice(seed, "gender", 3, ids)
        # two of three like first what is liked at their age and gender: a stranger's traits tell something
        typical = _choice(seed, "typical topic", _N_TOPICS, age, gender, _choice(seed, "which typical", 3, ids))
        favourite = _choice(seed, "favourite", _N_TOPICS, ids)
        is_typical = _uniform(seed, "is typical", ids) < 2 / 3
        is_new = _uniform(seed, "is new", ids) < 0.05
        registered = _uniform(seed, "registered", ids)
        return Users(
            ids=ids,
            tastes=np.stack(
                [
                    self._taste("first taste", ids, np.where(is_typical, typical, favourite)),
                    self._taste("other taste", ids, _choice(seed, "other favourite", _N_TOPICS, ids)),
                ],
                axis=1,
            ),
            period_ms=DAY_MS * (20 + 70 * _uniform(seed, "period", ids)),
            phase=2 * np.pi * _uniform(seed, "phase", ids),
            openness=0.6 * _normal(seed, "openness", ids),
            fondness=0.8 * _normal(seed, "fondness", ids),
            # lognormal of mean 1: a few visit often, many seldom
            activity=np.exp(0.8 * _normal(seed, "activity", ids) - 0.32),
            device=1 + np.searchsorted([0.8, 0.92], _uniform(seed, "device", ids)),
            registered_day=np.where(is_new, np.floor(60 * registered), np.floor(600 * np.log(registered))).astype(
                np.int64
            ),
            age=age,
            gender=gender,
            region=_choice(seed, "region", 30, ids),
        )

    def _taste(self, name: str, ids: Ints, topic: Ints) -> Floats:
        seed = self.config.seed
        second = _choice(seed, f"{name}: second topic", _N_TOPICS, ids)
        own = _unit(_normal(seed, f"{name}: own", ids[:, None], np.arange(_DIM)))
        return _unit(self._topics[topic] + 0.6 * self._topics[second] + 0.3 * own)

    def items(self, ids: Ints) -> Items:
        """The items `ids` [n]; every id that is not negative has one, uploaded before the feed or on some day of it.

        Raises:
            ValueError: a negative id.
        """
        if ids.size and ids.min() < 0:
            raise ValueError(f"simulator: there is no item {ids.min()}; ids begin at 0")
        config, seed = self.config, self.config.seed
        author = _choice(seed, "author", max(config.items // 8, 1), ids)
        usual = _choice(seed, "author's topic", _N_TOPICS, author)
        topic = np.where(_uniform(seed, "is usual", ids) < 0.8, usual, _choice(seed, "item's topic", _N_TOPICS, ids))
        slot = np.arange(3)
        first_tag = _choice(seed, "first tag", _TAGS_PER_TOPIC, ids)[:, None]
        tags = topic[:, None] * _TAGS_PER_TOPIC + (first_tag + slot) % _TAGS_PER_TOPIC
        tagged = slot < 1 + _choice(seed, "number of tags", 3, ids)[:, None]
        dims = np.arange(_DIM)
        before = np.floor(30 * DAY_MS * _uniform(seed, "uploaded", ids)).astype(np.int64)
        day = (ids - config.items) // max(config.items_per_day, 1)
        return Items(
            ids=ids,
            topic=topic,
            author=author,
            tags=tags,
            tagged=tagged,
            vectors=_unit(
                self._topics[topic]
                + 0.5 * (self._tags[tags] * tagged[:, :, None]).sum(axis=1) / tagged.sum(axis=1)[:, None]
                + 0.3 * _unit(_normal(seed, "author's own", author[:, None], dims))
                + 0.2 * _unit(_normal(seed, "item's own", ids[:, None], dims))
            ),
            appeal=_normal(seed, "appeal", ids),
            depth=1.5 * _normal(seed, "depth", ids),
            charm=0.8 * _normal(seed, "charm", author),
            favoured=_normal(seed, "favoured", author),
            peak_hour=24 * _uniform(seed, "peak hour", topic),
            duration_ms=np.clip(np.exp(10.6 + 0.9 * _normal(seed, "duration", ids)), 5_000, 1_200_000).astype(np.int64),
            upload_ms=config.start_ms + np.where(ids < config.items, -1 - before, day * DAY_MS + before // 30),
        )

    def answer(
        self, users: Users, user_of: Ints, items: Items, item_of: Ints, times_ms: Ints, scenario: Ints
    ) -> Answer:
        """What the impressions of items at the places `item_of` [n] would lead to with users at `user_of` [n]."""
        interest = users.interest(user_of, times_ms - self.config.start_ms)
        hour = times_ms % DAY_MS / _HOUR_MS
        affinity = _AFFINITY * (interest * items.vectors[item_of]).sum(axis=1)
        affinity += 0.5 * np.cos(2 * np.pi * (hour - items.peak_hour[item_of]) / 24)
        age_days = np.maximum(times_ms - items.upload_ms[item_of], 0) / DAY_MS
        place = np.where((scenario >= 0) & (scenario < _SCENARIO.size), scenario, 0)
        appeal = items.appeal[item_of] + 0.5 * np.exp(-age_days / 2)
        stay = affinity + items.depth[item_of]
        return Answer(
            click=expit(_CLICK_BIAS + affinity + appeal + users.openness[user_of] + _SCENARIO[place]),
            log_watch=_WATCH_BIAS + _WATCH_SLOPE * stay,
            like=expit(_LIKE_BIAS + 0.4 * stay + users.fondness[user_of]),
            profile=expit(_PROFILE_BIAS + 0.3 * affinity + items.charm[item_of]),
            enough_ms=np.minimum(items.duration_ms[item_of], 18_000),
            most_ms=3 * items.duration_ms[item_of],
        )

    def respond(self, answer: Answer, examination: Floats, request: Ints, item: Ints) -> dict[str, Ints]:
        """Draws the label columns [n] of items shown in requests: the one source of behaviour, of log and audience."""
        seed = self.config.seed
        examined = _uniform(seed, "examined", request, item) < examination
        click = examined & (_uniform(seed, "click", request, item) < answer.click)
        noise = _normal(seed, "watch", request, item)
        watched = np.minimum(answer.enough_ms * np.exp(answer.log_watch + _WATCH_NOISE * noise), answer.most_ms)
        glance = np.minimum(800 * np.exp(0.8 * noise), 0.5 * answer.enough_ms)
        watch_time = np.where(click, watched, np.where(examined, glance, 0)).astype(np.int64)
        return {
            "click": click.astype(np.int64),
            "long_view": (click & (watched >= answer.enough_ms)).astype(np.int64),
            "like": (click & (_uniform(seed, "like", request, item) < answer.like)).astype(np.int64),
            "profile_enter": (click & (_uniform(seed, "profile", request, item) < answer.profile)).astype(np.int64),
            "watch_time_ms": watch_time,
        }


class Audience:
    """The users of a feed, shown something else than what the logging policy chose. Day 0 is `config.first_day`."""

    def __init__(self, config: Config) -> None:
        self.truth = Truth(config)

    def respond(
        self, user_id: int, item_ids: ArrayLike, *, time_ms: int, device: int, scenario: int, request_id: int
    ) -> list[dict[str, int]]:
        """The label columns of EVENTS for each item of a slate, in displayed order; the same for the same request.

        Raises:
            ValueError: a negative item id.
        """
        truth = self.truth
        shown = np.atleast_1d(np.asarray(item_ids, dtype=np.int64))
        same = np.ones(shown.size, dtype=np.int64)
        user = truth.users(np.array([user_id], dtype=np.int64))
        answer = truth.answer(
            user, 0 * same, truth.items(shown), np.arange(shown.size), time_ms * same, scenario * same
        )
        labels = truth.respond(answer, truth.examination(np.arange(shown.size), device), request_id * same, shown)
        return [{name: int(values[place]) for name, values in labels.items()} for place in range(shown.size)]

    def requests(self, day: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """`count` visits on day `day` as (user_id, time_ms, device, scenario), in order of time.

        Who comes how often, when and with what is as in the log; the visits themselves are others than the log's.
        """
        config = self.truth.config
        tables = [self.truth.users(ids) for ids in _parts(config)]
        rates = np.cumsum(np.concatenate([_rates(config, users, day) for users in tables]))
        devices = np.concatenate([users.device for users in tables])
        visit = np.arange(count)
        drawn = np.searchsorted(rates, rates[-1] * _uniform(config.seed, "visitor", visit, day), side="right")
        times = config.start_ms + day * DAY_MS + _time_of_day(_uniform(config.seed, "visited at", visit, day))
        scenario = _scenario(_uniform(config.seed, "visited scenario", visit, day))
        for place in np.argsort(times, kind="stable"):
            user = int(drawn[place])
            yield user, int(times[place]), int(devices[user]), int(scenario[place])


def write_log(config: Config, log: Path) -> None:
    """Writes `config.days` days to the directory `log`, in files of a day and a part of the users.

    The log is what had arrived when the last day ended: what comes later is in the log of more days.
    Needs memory for one part and for the items, whatever the number of users and days.
    """
    started = told = time.monotonic()
    truth = Truth(config)
    items = truth.items(np.arange(config.items_by(config.days - 1)))
    end = pl.lit(config.start_ms + config.days * DAY_MS).cast(pl.Datetime("ms", "UTC"))
    rows = 0
    for day in range(config.days):
        candidates = _Candidates(config, items, day)
        for part, ids in enumerate(_parts(config)):
            users = truth.users(ids)
            requests = _requests(config, users, day)
            for file, begin in enumerate(range(0, requests.request.size, _REQUESTS_PER_FILE)):
                shown = requests.take(slice(begin, begin + _REQUESTS_PER_FILE))
                events = _events(truth, users, items, candidates, shown).filter(pl.col("created_time") < end)
                write_events(events, log, f"part-{part:05d}-{file:03d}")
                rows += events.height
            if time.monotonic() - told > 2:
                told = time.monotonic()
                print(
                    f"simulator: day {day + 1} of {config.days}, {rows:,} impressions, {told - started:.0f} s",
                    flush=True,
                )
    log.mkdir(parents=True, exist_ok=True)
    _write_users(truth, log / "users.parquet")
    _item_table(config, items).write_parquet(log / "items.parquet")
    print(f"simulator: {rows:,} impressions in {time.monotonic() - started:.1f} s", flush=True)


class _Candidates:
    """What the logging policy draws from on a day: popular and fresh items more often."""

    def __init__(self, config: Config, items: Items, day: int) -> None:
        count = config.items_by(day)
        noise = 0.4 * _normal(config.seed, "popularity", items.ids[:count])
        self.popularity = items.appeal[:count] + noise
        noon = config.start_ms + day * DAY_MS + DAY_MS // 2
        age_days = np.maximum(noon - items.upload_ms[:count], 0) / DAY_MS
        self._cumulated = np.cumsum(np.exp(self.popularity) * (np.exp(-age_days / 4) + 0.3))

    def draw(self, uniform: Floats) -> Ints:
        """Places of items, in the shape of `uniform`."""
        places = np.searchsorted(self._cumulated, uniform * self._cumulated[-1], side="right")
        return np.minimum(places, self._cumulated.size - 1)


def _requests(config: Config, users: Users, day: int) -> _Requests:
    """The requests that these users make on a day, by user and time."""
    seed = config.seed
    rate = _rates(config, users, day)
    uniform = _uniform(seed, "sessions", users.ids, day)
    sessions = sum((uniform > pdtr(number, rate)).astype(np.int64) for number in range(_MAX_SESSIONS))
    user, session = _spread(sessions)
    ids = users.ids[user]
    more = np.log(_uniform(seed, "length", ids, day, session)) / np.log(0.45)
    of, number = _spread(1 + np.minimum(more, _MAX_REQUESTS - 1).astype(np.int64))
    start = _time_of_day(_uniform(seed, "session at", ids, day, session))
    pause = 40_000 + 200_000 * _uniform(seed, "pause", ids, day, session)
    time_of_day = (start[of] + number * pause[of]).astype(np.int64)
    other = _uniform(seed, "other device", ids, day, session) < 0.15
    device = np.where(other, 1 + _choice(seed, "which device", 3, ids, day, session), users.device[user])
    scenario = _scenario(_uniform(seed, "scenario", ids, day, session))
    # day, user, session, number: 12 + 31 + 3 + 3 bits; with 4 for the position an event id is a safe integer in JSON
    request = (((day << 31 | ids[of]) << 3 | session[of]) << 3) | number
    # a session ends at midnight, so that every day is a file of its own
    return _Requests(
        *(
            values[time_of_day < DAY_MS]
            for values in (
                request,
                user[of],
                config.start_ms + day * DAY_MS + time_of_day,
                device[of],
                scenario[of],
            )
        )
    )


def _events(truth: Truth, users: Users, items: Items, candidates: _Candidates, requests: _Requests) -> pl.DataFrame:
    """What was shown in the requests, and what came of it."""
    slates = [
        _slates(truth.config, users, items, candidates, requests.take(slice(begin, begin + _REQUESTS_AT_ONCE)))
        for begin in range(0, requests.request.size, _REQUESTS_AT_ONCE)
    ]
    slate = np.concatenate(slates)
    of, position = np.nonzero(slate >= 0)
    item = slate[of, position]
    request, event_ms = requests.request[of], requests.time_ms[of]
    answer = truth.answer(users, requests.user[of], items, item, event_ms, requests.scenario[of])
    examination = truth.examination(position, requests.device[of])
    seed = truth.config.seed
    wait = -np.log(_uniform(seed, "delay", requests.request))
    late = _uniform(seed, "is late", requests.request) < 0.04
    delay_ms = np.where(late, np.minimum(1.5 * _HOUR_MS * wait, 6 * _HOUR_MS), 1_000 + 3_000 * wait).astype(np.int64)
    labels = truth.respond(answer, examination, request, items.ids[item])
    frame = pl.DataFrame(
        {
            "event_id": request << 4 | position,
            "request_id": request,
            "user_id": users.ids[requests.user[of]],
            "item_id": items.ids[item],
            "event_time": event_ms,
            "created_time": event_ms + delay_ms[of],
            "session_id": request >> 3,
            "scenario": requests.scenario[of],
            "device": requests.device[of],
            "position": position,
            **labels,
        }
    ).with_columns(
        *(_time(name) for name in ("event_time", "created_time")),
        outcome_time=None,
        release=None,
        variant=None,
        features_time=None,
    )
    return conform(frame.select(list(EVENTS.schema)), EVENTS, "simulator")


def _slates(config: Config, users: Users, items: Items, candidates: _Candidates, requests: _Requests) -> Ints:
    """The logging policy: places of items [n, SLATE] in displayed order, -1 where there were too few."""
    slot = np.arange(_CANDIDATES)
    request = requests.request[:, None]
    drawn = candidates.draw(_uniform(config.seed, "candidate", request, slot))
    drawn.sort(axis=1)
    interest = users.interest(requests.user, requests.time_ms - config.start_ms)
    affinity = _AFFINITY * np.einsum("nd,ncd->nc", interest, items.vectors[drawn])
    guess = affinity + 3.0 * _normal(config.seed, "guess", request, slot)
    score = 0.5 * candidates.popularity[drawn] + 0.12 * guess + 0.5 * _normal(config.seed, "whim", request, slot)
    score[items.upload_ms[drawn] > requests.time_ms[:, None]] = -np.inf
    score[:, 1:][drawn[:, 1:] == drawn[:, :-1]] = -np.inf
    order = np.argsort(-score, axis=1)[:, :SLATE]
    if config.favour:
        favoured = score + config.favour * items.favoured[drawn]
        again = np.argsort(-np.take_along_axis(favoured, order, axis=1), axis=1)
        order = np.take_along_axis(order, again, axis=1)
    chosen = np.take_along_axis(drawn, order, axis=1)
    return np.where(np.isfinite(np.take_along_axis(score, order, axis=1)), chosen, -1)


def _write_users(truth: Truth, path: Path) -> None:
    """The users who have registered by the last day, a row group a part."""
    writer = None
    for ids in _parts(truth.config):
        rows = _user_table(truth.config, truth.users(ids)).to_arrow()
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
    if writer is not None:
        writer.close()


def _user_table(config: Config, users: Users) -> pl.DataFrame:
    seed, ids = config.seed, users.ids
    follows = np.exp(4.0 + 1.2 * _normal(seed, "follows", ids)).astype(np.int64)
    registered_ms = config.start_ms + np.maximum(users.registered_day, 0) * DAY_MS
    tokens = np.stack([1 + users.age, 101 + users.gender, 201 + users.region], axis=1)
    frame = pl.DataFrame(
        {
            "user_id": ids,
            "event_time": registered_ms,
            "created_time": registered_ms,
            "activity_level": 1 + np.searchsorted([0.25, 0.5, 1.0, 2.0], users.activity),
            "register_days": np.maximum(-users.registered_day, 0),
            "follow_count": follows,
            "fans_count": np.exp(3.0 + 1.8 * _normal(seed, "fans", ids)).astype(np.int64),
            "friend_count": (follows * 0.5 * _uniform(seed, "friends", ids)).astype(np.int64),
            "is_creator": (_uniform(seed, "creator", ids) < 0.3).astype(np.int64),
            "traits": pl.Series(tokens).arr.to_list(),
        }
    ).with_columns(_time("event_time"), _time("created_time"))
    return conform(frame.filter(pl.Series(users.registered_day < config.days)), USERS, "simulator")


def _item_table(config: Config, items: Items) -> pl.DataFrame:
    seed, ids = config.seed, items.ids
    tags = [[int(tag) for tag in row[held]] for row, held in zip(items.tags, items.tagged, strict=True)]
    openings = _choice(seed, "opening", len(_OPENINGS), ids)
    endings = _choice(seed, "ending", len(_ENDINGS), ids)
    frame = pl.DataFrame(
        {
            "item_id": ids,
            "event_time": items.upload_ms,
            "created_time": items.upload_ms,
            "author_id": items.author + 1,
            "category": items.topic + 1,
            "tags": [[tag + 1 for tag in row] for row in tags],
            "music_id": _choice(seed, "music", 400, ids),
            "item_type": 1 + _choice(seed, "item type", 3, ids),
            "duration_ms": items.duration_ms,
            "title": [
                " ".join([_OPENINGS[opening], *(_WORDS[tag] for tag in row), _ENDINGS[ending]])
                for opening, row, ending in zip(openings, tags, endings, strict=True)
            ],
        },
        schema_overrides={"tags": pl.List(pl.Int64)},
    ).with_columns(_time("event_time"), _time("created_time"))
    return conform(frame, ITEMS, "simulator")


def _parts(config: Config) -> Iterator[Ints]:
    """Ids of the users of each part."""
    for first in range(0, config.users, config.users_per_part):
        yield np.arange(first, min(first + config.users_per_part, config.users))


def _rates(config: Config, users: Users, day: int) -> Floats:
    """Sessions that each user is expected to have on a day, [n]."""
    return np.where(users.registered_day <= day, config.sessions_per_day * users.activity, 0.0)


def _time_of_day(uniform: Floats) -> Ints:
    """ms since midnight, by the hours' shares."""
    shares = np.concatenate([[0.0], np.cumsum(_HOURS) / _HOURS.sum()])
    return (np.interp(uniform, shares, np.arange(25)) * _HOUR_MS).astype(np.int64)


def _scenario(uniform: Floats) -> Ints:
    return np.searchsorted(np.cumsum(_SCENARIO_SHARE)[:-1], uniform)


def _spread(counts: Ints) -> tuple[Ints, Ints]:
    """For each of sum(counts) rows: the place in `counts` it belongs to, and its number there from 0."""
    of = np.repeat(np.arange(counts.size), counts)
    return of, np.arange(of.size) - np.repeat(np.cumsum(counts) - counts, counts)


def _time(name: str) -> pl.Expr:
    return pl.from_epoch(pl.col(name), time_unit="ms").dt.replace_time_zone("UTC").cast(TIME)


def _unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _uniform(seed: int, purpose: str, *keys: ArrayLike) -> Floats:
    """Uniform in (0, 1): a hash of the seed, the purpose and the keys, which broadcast against each other."""
    bits = np.array([seed << 32 ^ zlib.crc32(purpose.encode())], dtype=object) & (2**64 - 1)
    mixed = _mix(bits.astype(np.uint64))
    for key in keys:
        step = np.atleast_1d(np.asarray(key, dtype=np.int64)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = _mix((mixed ^ step) + np.uint64(0x9E3779B97F4A7C15))
    return ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _normal(seed: int, purpose: str, *keys: ArrayLike) -> Floats:
    """Standard normal, by the inverse of its distribution function."""
    return np.asarray(ndtri(_uniform(seed, purpose, *keys)))


def _choice(seed: int, purpose: str, count: int, *keys: ArrayLike) -> Ints:
    """Uniform among 0 … count - 1."""
    return (count * _uniform(seed, purpose, *keys)).astype(np.int64)
