"""The evidence of a canary: what users did with champion and challenger, from the feedback log, at every look so far.

The experiment is followed record by record, and looked at on a schedule that only the records decide: first when both
variants have some users, then whenever there are a few per cent more requests. So the same log gives the same verdict,
whoever asks how often, and asking costs nothing: confidence sequences and p-values hold at all looks at once
(`penstock.sequential`).

Three measures are compared, each a ratio of sums over users: clicks and long views an impression, and watch time a
request. Their intervals hold together with the stated confidence, each at (1 − confidence) / 3 (Bonferroni), and a
p-value is three times that of its measure alone: an interval without 0 and a p below 1 − confidence are one thing.

Guardrails are one-sided tests of their own: whether the challenger's rate less (1 − margin) times the champion's is
below 0, and the champion's share of degraded answers, plus a margin, less the challenger's. One is breached when its
always-valid p-value times the number of guardrails is below 1 − confidence. Degraded answers count in every measure as
the others do: users got them.

The split is tested at each user that comes (`SplitTest`). No user may meet both releases.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from penstock import routing
from penstock.feedback import FeedbackReader
from penstock.routing import Routing
from penstock.sequential import Array, Difference, SplitTest, Sums

Action = Literal["wait", "ask", "withdraw", "fail"]
"""Go on; ask a person; a guardrail is breached; the evidence is broken."""

VARIANTS = ("champion", "challenger")
COLUMNS = ("requests", "impressions", "click", "long_view", "watch_ms", "degraded")
SETTLE_MS = 2000
"""After a change of the routing document: gateways notice within a second, and finish what they had begun."""
OUTCOME_MS = 24 * 60 * 60 * 1000
"""An outcome counts if it arrives so soon after its impression: slates are kept so long, two kilobytes each."""
CLOCKS_MS = 500
"""How far the clocks of gateways may be from the one here."""


@dataclass(frozen=True)
class Measure:
    """`column` / `per`, summed over users; `scale` makes it the unit that people read."""

    name: str
    says: str
    column: str
    per: str
    scale: float
    unit: str

    def words(self, value: float, sign: str = "") -> str:
        """A value, or with sign "+" a difference of values."""
        unit = "points" if sign and self.unit == "%" else self.unit
        return f"{value * self.scale:{sign}.2f} {unit}"


MEASURES = (
    Measure("click", "clicks an impression", "click", "impressions", 100.0, "%"),
    Measure("long_view", "long views an impression", "long_view", "impressions", 100.0, "%"),
    Measure("watch_time", "watch time a request", "watch_ms", "requests", 0.001, "s"),
)
NAMES = tuple(measure.name for measure in MEASURES)


@dataclass(frozen=True)
class Config:
    """How a canary is judged.

    Attributes:
        confidence: of all intervals together, and of all guardrails together.
        effect: the difference that the sequences are tuned to, relative to the champion at the first look: τ of the
            mixture. Smaller differences take longer to find, larger ones hardly less long.
        guardrails: by measure, how much worse than the champion the challenger may be, relative to it; worse than
            that with confidence ends the canary.
        degraded: the same for the share of degraded and empty answers, in points.
        mismatch: the level of the test of the split: below it the experiment is broken.
        first_users: of either variant, before the first look.
        spacing: how many times the requests of a look the next one has.
    """

    confidence: float = 0.95
    effect: float = 0.05
    guardrails: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.02))
    degraded: float = 0.02
    mismatch: float = 0.001
    first_users: int = 30
    spacing: float = 1.02

    def faults(self) -> list[str]:
        """What makes no sense, in words; a configuration with faults judges nothing."""
        found = [
            f"guardrails has {name!r}; there are {', '.join(NAMES)}" for name in self.guardrails.keys() - set(NAMES)
        ]
        for name, margin in self.guardrails.items():
            if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
                found.append(f"guardrails of {name} is {margin!r}, not a margin from 0 to below 1")
        for name in ("confidence", "mismatch", "effect"):
            value = getattr(self, name)
            found += [] if 0 < value < 1 else [f"{name} is {value}, not between 0 and 1"]
        if not 0 <= self.degraded < 1:
            found.append(f"degraded is {self.degraded}, not from 0 to below 1")
        if self.first_users < 10:
            found.append(f"first_users is {self.first_users}: the intervals mean something from about 10 users on")
        if not 1 <= self.spacing <= 2:
            found.append(f"spacing is {self.spacing}, not from 1 to 2")
        return sorted(found)


@dataclass(frozen=True)
class Split:
    """Which releases are compared, by records that arrived at `since_ms` or later and after number `after`.

    A share that is changed by hand moves users from one release to the other: it begins another split.
    """

    champion: int
    challenger: int
    share: float
    since_ms: int
    after: int = 0

    @staticmethod
    def of(routing: Routing, after: int = 0) -> Split | None:
        """That of a routing document, from its last change on; None if it has no pair."""
        if routing.champion is None or routing.challenger is None:
            return None
        changed_ms = int(datetime.fromisoformat(routing.updated_at).timestamp() * 1000) if routing.updated_at else 0
        return Split(routing.champion, routing.challenger, routing.share, changed_ms + SETTLE_MS, after)

    def now(self, routing: Routing) -> Split | None:
        """This split, or what a change of the share has made of it; None if the pair is no longer routed."""
        current = Split.of(routing, self.after)
        if current is None or (current.champion, current.challenger) != (self.champion, self.challenger):
            return None
        return self if current.share == self.share else current


@dataclass(frozen=True)
class Minimum:
    """When a person is asked: as soon as the challenger has so much, or after so many minutes."""

    impressions: int = 200
    users: int = 30
    wait_minutes: float = 60.0


@dataclass(frozen=True)
class Point:
    """A measure at a look. `low`, `high` and both p-values are of all looks so far; infinite or 1 if nothing is known.

    Attributes:
        p_value: of no difference.
        guard: of no harm beyond the guardrail's margin; 1 without a guardrail.
    """

    champion: float
    challenger: float
    low: float
    high: float
    p_value: float
    guard: float

    @property
    def difference(self) -> float:
        return self.challenger - self.champion

    @property
    def steady(self) -> bool:
        """Whether the intervals of all looks have something in common."""
        return self.low <= self.high

    @property
    def result(self) -> str:
        if not self.steady:
            return "not steady"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"


@dataclass(frozen=True)
class Look:
    """All measures after so many requests of both variants; of degraded answers the guardrail's p-value."""

    requests: int
    impressions: int
    at_ms: int
    points: Mapping[str, Point]
    degraded: float


@dataclass(frozen=True)
class Check:
    """A condition and what was found; `otherwise` is what is done if it does not hold."""

    name: str
    passed: bool
    reason: str
    otherwise: Action


@dataclass(frozen=True)
class Verdict:
    """What the evidence says now.

    Attributes:
        document: all of it, as JSON.
    """

    action: Action
    sentence: str
    checks: tuple[Check, ...]
    document: Mapping[str, Any]


class _Variant:
    """What each user of a variant adds up to: a row a user, a list a column."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.columns = {name: array("d") for name in COLUMNS}

    def row(self, user: int) -> int:
        """The user's, a new one if it was not there before."""
        row = self.rows.setdefault(user, len(self.rows))
        if row == len(self.columns["requests"]):
            for column in self.columns.values():
                column.append(0.0)
        return row

    def column(self, name: str) -> Array:
        return np.array(self.columns[name])

    def total(self, name: str) -> int:
        return int(self.column(name).sum())

    def sums(self, measure: Measure) -> Sums:
        return Sums.of(self.column(measure.column), self.column(measure.per))

    def degraded(self) -> Sums:
        """With two made-up users, one of whom got a degraded answer: else a variance of 0 would tell nothing."""
        top, below = (np.append(self.column(name), end) for name, end in (("degraded", (1, 0)), ("requests", (1, 1))))
        return Sums.of(top, below)


@dataclass(slots=True)
class _Shown:
    """A slate that was shown: whose it is, and click, long view and watch time of each item so far."""

    arrived_ms: int
    columns: Mapping[str, array[float]]
    row: int
    told: dict[int, tuple[int, int, int]]


class Experiment:
    """A canary as it goes on; each `read` takes what was logged since.

    Attributes:
        looks: all so far.
        mixed: users who met both releases.
        others: requests since the beginning that another release answered.

    Raises:
        ValueError: the configuration has faults.
    """

    def __init__(self, feedback: Path, split: Split, config: Config) -> None:
        if faults := config.faults():
            raise ValueError("; ".join(faults))
        self.split, self.config = split, config
        self.looks: list[Look] = []
        self.mixed: set[int] = set()
        self.others = 0
        self._reader = FeedbackReader(feedback, after=split.after)
        self._variants = (_Variant(), _Variant())
        self._arms = {("champion", split.champion): 0, ("challenger", split.challenger): 1}
        self._arm_of: dict[int, int] = {}
        self._shown: OrderedDict[int, _Shown] = OrderedDict()
        self._requests = 0
        self._split_test = SplitTest(split.share) if split.share < 1 else None
        self._scales: dict[str, float] = {}
        self._next_look = 0
        self._held: list[dict[str, Any]] = []

    def read(self, until_ms: int | None = None) -> None:
        """Takes the records that were not there before; those from `until_ms` on, if it is given, are left for later.

        Raises:
            LineError: the feedback log cannot be read.
        """
        records = chain(self._held, self._reader.read())
        self._held = []
        for record in records:
            if until_ms is not None and record["arrived_ms"] >= until_ms:
                self._held = [record]
                return
            if record.get("kind") == "impressions":
                self._impressions(record)
            elif record.get("kind") == "outcomes":
                self._outcomes(record)

    def _impressions(self, record: Mapping[str, Any]) -> None:
        request, user, items = record["request_id"], record["user_id"], record["items"]
        arrived = record["arrived_ms"]
        if arrived < self.split.since_ms or request in self._shown:
            return
        arm = self._arms.get((record["variant"], record["release"]))
        if arm is None:
            self.others += 1
            return
        if user not in self._arm_of:
            self._arm_of[user] = arm
            if self._split_test:
                self._split_test.add(arm == 1)
        elif self._arm_of[user] != arm:
            self.mixed.add(user)
        variant = self._variants[arm]
        row, columns = variant.row(user), variant.columns
        columns["requests"][row] += 1
        columns["impressions"][row] += len(items)
        columns["degraded"][row] += bool(record.get("degraded")) or not items
        self._shown[request] = _Shown(arrived, columns, row, dict.fromkeys(items, (0, 0, 0)))
        while next(iter(self._shown.values())).arrived_ms < arrived - OUTCOME_MS:
            self._shown.popitem(last=False)
        self._requests += 1
        users = min(len(one.rows) for one in self._variants)
        if self._requests >= self._next_look and users >= self.config.first_users:
            self._next_look = math.ceil(self._requests * self.config.spacing)
            self._look(arrived)

    def _outcomes(self, record: Mapping[str, Any]) -> None:
        """What is told twice counts once: of labels and watch time the largest, as in `penstock.feedback`."""
        shown = self._shown.get(record["request_id"])
        if shown is None or record["arrived_ms"] > shown.arrived_ms + OUTCOME_MS:
            return
        told, columns, row = shown.told, shown.columns, shown.row
        for event in record["events"]:
            before = told.get(event["item_id"])
            if before is None:
                continue
            clicked, viewed, watched = before
            click = max(clicked, event.get("click") or 0)
            long_view = max(viewed, event.get("long_view") or 0)
            watch_ms = max(watched, event.get("watch_time_ms") or 0)
            told[event["item_id"]] = (click, long_view, watch_ms)
            columns["click"][row] += click - clicked
            columns["long_view"][row] += long_view - viewed
            columns["watch_ms"][row] += watch_ms - watched

    def _look(self, at_ms: int) -> None:
        champion, challenger = self._variants
        before = self.looks[-1] if self.looks else None
        points = {}
        for measure in MEASURES:
            sums = champion.sums(measure), challenger.sums(measure)
            theirs, ours = (float(one.ratio) for one in sums)
            if theirs > 0:  # fixed from then on
                self._scales.setdefault(measure.name, self.config.effect * theirs)
            scale = self._scales.get(measure.name, 0.0)
            plain = Difference.between(sums[1], sums[0])
            low, high, p_value = self._sequence(plain, scale)
            guard = 1.0
            if (margin := self.config.guardrails.get(measure.name)) is not None:
                guard = self._harm(Difference.between(sums[1], sums[0], 1 - margin), scale)
            if before:
                last = before.points[measure.name]
                low, high = max(low, last.low), min(high, last.high)
                p_value, guard = min(p_value, last.p_value), min(guard, last.guard)
            points[measure.name] = Point(theirs, ours, low, high, p_value, guard)
        worse = Difference.between(champion.degraded(), challenger.degraded())
        margin = self.config.degraded
        guard = self._harm(Difference(worse.value + margin, worse.variance), max(margin, 0.01))
        self.looks.append(
            Look(
                requests=self._requests,
                impressions=sum(one.total("impressions") for one in self._variants),
                at_ms=at_ms,
                points=points,
                degraded=min(guard, before.degraded) if before else guard,
            )
        )

    def _harm(self, difference: Difference, scale: float) -> float:
        """A guardrail's p-value at one look, adjusted for all guardrails."""
        return min(1.0, (len(self.config.guardrails) + 1) * float(difference.p_value_below(scale)))

    def _sequence(self, difference: Difference, scale: float) -> tuple[float, float, float]:
        """Interval and p-value of one look, adjusted for all measures."""
        half = float(difference.half_width(scale, (1 - self.config.confidence) / len(MEASURES)))
        p_value = min(1.0, len(MEASURES) * float(difference.p_value(scale)))
        value = float(difference.value) if math.isfinite(half) else 0.0
        return value - half, value + half, p_value

    def verdict(self, minimum: Minimum, now_ms: int) -> Verdict:
        """What is to be done at a time, ms since 1970: broken evidence first, then a guardrail, then the minimum."""
        checks = [*self._integrity(), *self._guardrails(), *self._steady()]
        action, sentence = self._decide(checks, minimum, now_ms)
        return Verdict(action, sentence, tuple(checks), self._document(action, sentence, checks, minimum))

    def _integrity(self) -> list[Check]:
        split = self.split
        found = f"{len(self.mixed):,} of {len(self._arm_of):,} users met both releases"
        if some := sorted(self.mixed)[:3]:
            found += f", user {', '.join(map(str, some))} among them"
        checks = [Check("no user meets both releases", not self.mixed, f"{found}.", "fail")]
        if test := self._split_test:
            users = test.challenger + test.champion
            got = f"{test.challenger:,} of {users:,} users got release {split.challenger}"
            share = f" ({test.challenger / users:.1%})" if users else ""
            reason = f"{got}{share}; the share is {split.share:.1%}, p = {test.p_value:.2g}."
            right = test.p_value >= self.config.mismatch
            checks.append(Check("users fall to the releases as the share says", right, reason, "fail"))
        return checks

    def _guardrails(self) -> list[Check]:
        checks = []
        last = self.looks[-1] if self.looks else None
        for measure in MEASURES:
            if (margin := self.config.guardrails.get(measure.name)) is None:
                continue
            breached, reason = False, "Too early to say."
            if last:
                point = last.points[measure.name]
                breached = self._breached(point.guard)
                against = f"{measure.words(point.challenger)} against {measure.words(point.champion)}"
                shown = "with confidence" if breached else "is not shown"
                reason = f"{against}: worse by more than {margin:.1%} of it {shown}."
            checks.append(Check(f"{measure.says}, guarded", not breached, reason, "withdraw"))
        rates = [one.total("degraded") / max(1, one.total("requests")) for one in self._variants]
        breached = last is not None and self._breached(last.degraded)
        shown = "with confidence" if breached else "is not shown"
        more = f"more by over {100 * self.config.degraded:g} points {shown}"
        reason = f"{rates[1]:.2%} against {rates[0]:.2%}: {more}."
        checks.append(Check("degraded answers, guarded", not breached, reason, "withdraw"))
        return checks

    def _breached(self, p_value: float) -> bool:
        return p_value <= 1 - self.config.confidence

    def _steady(self) -> list[Check]:
        if not self.looks:
            return []
        moved = [measure.says for measure in MEASURES if not self.looks[-1].points[measure.name].steady]
        reason = f"That of {', '.join(moved)} has changed." if moved else "The intervals of all looks agree."
        return [Check("differences stay what they are", not moved, reason, "ask")]

    def _decide(self, checks: list[Check], minimum: Minimum, now_ms: int) -> tuple[Action, str]:
        pair = self.split
        for check in checks:
            if not check.passed and check.otherwise == "fail":
                return "fail", f"The evidence on release {pair.challenger} is broken: {check.reason}"
        for check in checks:
            if not check.passed and check.otherwise == "withdraw":
                what = check.name.removesuffix(", guarded")
                return "withdraw", f"Release {pair.challenger} harms users: {what}, {check.reason}"
        shown, users = self._variants[1].total("impressions"), len(self._variants[1].rows)
        enough = shown >= minimum.impressions and users >= minimum.users
        waited = now_ms >= pair.since_ms + minimum.wait_minutes * 60_000
        if not (enough or waited):
            wanted = f"{minimum.impressions:,} impressions of {minimum.users:,} users are wanted"
            return "wait", f"Release {pair.challenger} has had {shown:,} impressions of {users:,} users; {wanted}."
        if pair.share >= 1:
            return "ask", f"Everybody gets release {pair.challenger}: there is nothing to hold it against."
        if not self.looks:
            few = f"one of them has had less than {self.config.first_users} users"
            return "ask", f"Too early to hold release {pair.challenger} against {pair.champion}: {few}."
        said = "; ".join(self._result(measure) for measure in MEASURES)
        return "ask", f"Release {pair.challenger} against {pair.champion}: {said}. No guardrail is breached."

    def _result(self, measure: Measure) -> str:
        point = self.looks[-1].points[measure.name]
        by = f"{point.difference / point.champion:+.1%}" if point.champion else measure.words(point.difference, "+")
        return f"{measure.says} {point.result} ({by})"

    def _document(self, action: Action, sentence: str, checks: list[Check], minimum: Minimum) -> dict[str, Any]:
        last = self.looks[-1] if self.looks else None
        measures = {}
        for measure in MEASURES if last else ():
            assert last is not None
            point = last.points[measure.name]
            found = {**dataclasses.asdict(point), "difference": point.difference}
            numbers = {name: value if math.isfinite(value) else None for name, value in found.items()}
            measures[measure.name] = {**numbers, "result": point.result}
        return {
            "action": action,
            "sentence": sentence,
            "split": dataclasses.asdict(self.split),
            "variants": {
                name: {"release": number, "users": len(one.rows)} | {column: one.total(column) for column in COLUMNS}
                for name, number, one in zip(
                    VARIANTS, (self.split.champion, self.split.challenger), self._variants, strict=True
                )
            },
            "measures": measures,
            "split_p_value": self._split_test.p_value if self._split_test else None,
            "mixed_users": len(self.mixed),
            "other_requests": self.others,
            "looks": len(self.looks),
            "checks": [dataclasses.asdict(check) for check in checks],
            "minimum": dataclasses.asdict(minimum),
            "config": dataclasses.asdict(self.config),
        }


class Watch:
    """A canary, followed as long as it is routed.

    Attributes:
        experiment: as it was when the canary was last seen to be routed; another one after a change of the share.
    """

    def __init__(self, home: Path, split: Split, config: Config, minimum: Minimum) -> None:
        self._home, self._config, self._minimum = home, config, minimum
        self.experiment = Experiment(home / "feedback", split, config)

    def look(self, now_ms: int) -> Verdict | None:
        """The verdict by what had arrived at a time that is now, ms since 1970; None if the pair is no longer routed.

        Records are taken up to then only: those of after the canary's end are not of it.

        Raises:
            LineError: the feedback log cannot be read.
            RoutingError: the routing document cannot be.
        """
        split = self.experiment.split.now(routing.read(self._home / "routing.json"))
        if split is None:
            return None
        if split != self.experiment.split:
            self.experiment = Experiment(self._home / "feedback", split, self._config)
        self.experiment.read(now_ms - CLOCKS_MS)
        return self.verdict(now_ms)

    def verdict(self, now_ms: int) -> Verdict:
        """By what was read so far."""
        return self.experiment.verdict(self._minimum, now_ms)


def metrics(document: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a verdict's document under flat names; what is not known is left out."""
    found = {
        f"ab/{name}/{key}": value
        for name, measure in document["measures"].items()
        for key, value in measure.items()
        if isinstance(value, float)
    }
    for name, variant in document["variants"].items():
        found |= {f"ab/{name}/{key}": float(variant[key]) for key in ("users", "requests", "impressions")}
    return found
