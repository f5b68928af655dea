"""Replay: were requests served the features that training is given for the same entity and time? Bit for bit.

A *vector* is all that a rank model is given for one (request, item): the request's part, which its items share, and the
item's own. It is equal if every feature in it is, floating point by its bits.

Two questions are kept apart. *Inconsistent* is a value that differs from the offline one as the answer could know it:
materialised features at the snapshot the answer was made of, pushed ones at the request's own time. *Stale* is an
offline value at that snapshot that differs from the one at the request's own time: the price of the snapshots, paid
alike by training rows and by requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from penstock.events import EVENTS, HISTORIES, TIME, event_files, read_table, write_events
from penstock.features import default, log_end, on_demand_of, pushed_end, view, views_of
from penstock.feedback import FeedbackReader, read_feedback, read_sequence

ACTIVITY = view("user_activity")

PROVENANCE = frozenset({"feedback_sequence"})
"""Stored features that say where the others come from: no model reads them, and offline they are the log's."""

EXAMPLES = 3
"""Examples of a feature's differences that are kept."""

REQUEST = {
    "request_id": pl.Int64(),
    "user_id": pl.Int64(),
    "scenario": pl.Int64(),
    "event_time": TIME,
    "features_time": TIME,
}
"""What is known of a request beside its features: who, where, when, and the cutoff of the materialisation it met."""

ITEM = {"request_id": pl.Int64(), "item_id": pl.Int64()}


class ReplayError(ValueError):
    """Vectors that cannot be held against each other; the message says which feature."""


@dataclass(frozen=True)
class Vectors:
    """Features by name of requests, and of the items of each.

    Attributes:
        requests: a row a request: `REQUEST` and the features that its items share.
        items: a row a (request, item), in the order of `requests`: `ITEM` and the features of the item.
    """

    requests: pl.DataFrame
    items: pl.DataFrame

    def of(self, kept: pl.Series) -> Vectors:
        """Those of some requests; `kept` is true for them."""
        requests = self.requests.filter(kept)
        return Vectors(requests, self.items.join(requests, on="request_id", how="semi", maintain_order="left"))


@dataclass(frozen=True)
class Example:
    """One value that differs; `item_id` is null where all items of the request share the feature."""

    request_id: int
    user_id: int
    item_id: int | None
    time: str
    served: str
    offline: str


@dataclass(frozen=True)
class Compared:
    """How often one feature was compared, and how often it was different."""

    feature: str
    view: str
    compared: int
    different: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What came of holding vectors against each other.

    Attributes:
        vectors, equal: (request, item) pairs, and those whose every feature is equal.
    """

    requests: int
    vectors: int
    equal: int
    features: tuple[Compared, ...]

    @property
    def share(self) -> float | None:
        """Equal vectors among all; None if there are none."""
        return self.equal / self.vectors if self.vectors else None

    @property
    def worst(self) -> list[Compared]:
        """The features that differ, most often first."""
        return sorted((one for one in self.features if one.different), key=lambda one: -one.different)


def features_of(service: str) -> dict[str, str]:
    """Feature → its view, of all that a model of the service could be given."""
    stored, computed = views_of(service), on_demand_of(service)
    names = [(feature.name, part.name) for part in stored for feature in part.features]
    names += [(feature.name, part.name) for part in computed for feature in part.features]
    return {name: where for name, where in names if name not in PROVENANCE}


def of_items(service: str) -> set[str]:
    """The features of a service that differ from item to item of a request."""
    stored = {feature.name for part in views_of(service) if part.entity == "item" for feature in part.features}
    computed = {
        feature.name
        for on_demand in on_demand_of(service)
        if stored & set(on_demand.inputs)
        for feature in on_demand.features
    }
    return stored | computed


def compare(served: Vectors, offline: Vectors, features: Mapping[str, str]) -> Comparison:
    """Holds the served vectors against the offline ones of the same requests and items, row by row.

    Args:
        features: name → view; each must be a column of requests or items on both sides.

    Raises:
        ReplayError: the rows are not the same, or a feature is missing on a side or of another dtype there.
    """
    for name, keys in (("requests", REQUEST), ("items", ITEM)):
        left, right = (getattr(side, name).select(*keys) for side in (served, offline))
        if not left.equals(right):
            raise ReplayError(f"the {name} of both sides are not the same rows")
    numbers = dict(zip(served.requests["request_id"], range(served.requests.height), strict=True))
    request_of = np.array([numbers[request] for request in served.items["request_id"]], np.int64)
    unequal_request = np.zeros(served.requests.height, bool)
    unequal_item = np.zeros(served.items.height, bool)
    found = []
    for name, whence in features.items():
        of_item = name in served.items.columns
        left, right = ((side.items if of_item else side.requests) for side in (served, offline))
        missing = [where for where, side in (("served", left), ("offline", right)) if name not in side.columns]
        if missing:
            raise ReplayError(f"feature {name} is not among the {' and '.join(missing)} ones")
        rows = differing(left[name], right[name])
        unequal = unequal_item if of_item else unequal_request
        unequal |= rows
        examples = tuple(
            _example(served.requests, int(request_of[row]) if of_item else row, left, row, right, name)
            for row in np.flatnonzero(rows)[:EXAMPLES].tolist()
        )
        found.append(Compared(name, whence, len(rows), int(rows.sum()), examples))
    equal = int((~(unequal_item | unequal_request[request_of])).sum())
    return Comparison(served.requests.height, served.items.height, equal, tuple(found))


def differing(left: pl.Series, right: pl.Series) -> np.ndarray:
    """Which values [rows] are not the same: floating point by its bits, so 0 is not -0 and a NaN is itself.

    Raises:
        ReplayError: the dtypes are not the same.
    """
    if left.dtype != right.dtype:
        raise ReplayError(f"feature {left.name} is {left.dtype} when served and {right.dtype} offline")
    if not left.dtype.is_float():
        return left.ne_missing(right).to_numpy()
    bits = np.uint32 if left.dtype == pl.Float32 else np.uint64
    values = left.to_numpy().view(bits) != right.to_numpy().view(bits)
    nulls = left.is_null().to_numpy(), right.is_null().to_numpy()
    return (nulls[0] != nulls[1]) | (~nulls[0] & ~nulls[1] & values)


def _example(
    requests: pl.DataFrame, request: int, left: pl.DataFrame, row: int, right: pl.DataFrame, name: str
) -> Example:
    served, offline = shown(left[name], right[name], row)
    return Example(
        request_id=requests["request_id"][request],
        user_id=requests["user_id"][request],
        item_id=left["item_id"][row] if "item_id" in left.columns else None,
        time=requests["event_time"][request].isoformat(),
        served=served,
        offline=offline,
    )


def shown(left: pl.Series, right: pl.Series, row: int) -> tuple[str, str]:
    """Both values of a row, for people: a long list from the first place that differs."""
    values = left[row], right[row]
    if any(value is None for value in values):
        return str(values[0]), str(values[1])
    if isinstance(left.dtype, pl.List):
        lists = [list(value) for value in values]
        unequal = (n for n, pair in enumerate(zip(*lists, strict=False)) if pair[0] != pair[1])
        start = next(unequal, min(map(len, lists)))
        return _list(lists[0], start), _list(lists[1], start)
    if left.dtype.is_float():
        bits = "u4" if left.dtype == pl.Float32 else "u8"
        raw = [int(series.to_numpy()[row : row + 1].view(bits)[0]) for series in (left, right)]
        return _float(values[0], raw[0]), _float(values[1], raw[1])
    return str(values[0]), str(values[1])


def _float(value: float, bits: int) -> str:
    return f"{value:.9g} (0x{bits:x})"


def _list(values: list[int], start: int) -> str:
    before, after = ("… " if start else ""), (" …" if start + 4 < len(values) else "")
    return f"[{before}{', '.join(map(str, values[start : start + 4]))}{after}] of {len(values)}"


# Which requests, and the log they are replayed from


def log_of_now(log: Path, feedback: Path, out: Path) -> Path:
    """A log in `out`: that of `log` and the feedback since; files are linked where they need no change.

    Of a request that more was told of since, the rows in `log` are replaced; those that validation left out of it stay
    out.

    Raises:
        LogError, LineError: the log or the feedback cannot be read.
    """
    reached = read_sequence(log)
    before, since = set(), set()
    for record in FeedbackReader(feedback).read():
        if record["sequence"] > reached:
            since.add(record["request_id"])
        elif record["kind"] == "impressions":
            before.add(record["request_id"])
    changed = pl.Series(sorted(since), dtype=pl.Int64).implode()
    rows = read_feedback(feedback).filter(pl.col("request_id").is_in(changed))
    held = [pl.Series("event_id", [], pl.Int64)]
    for path in event_files(log):
        target = out / path.relative_to(log)
        target.parent.mkdir(parents=True, exist_ok=True)
        frame = read_table(path, EVENTS)
        replaced = frame["event_id"].is_in(rows["event_id"].implode())
        if not replaced.any():
            target.symlink_to(path.resolve())
            continue
        held.append(frame["event_id"].filter(replaced))
        frame.filter(~replaced).write_parquet(target)
    known = pl.col("request_id").is_in(pl.Series(sorted(before), dtype=pl.Int64).implode())
    left_out = known & ~pl.col("event_id").is_in(pl.concat(held).implode())
    write_events(rows.filter(~left_out), out, "since")
    for name in ("users", "items", "histories"):
        if (log / f"{name}.parquet").exists():
            (out / f"{name}.parquet").symlink_to((log / f"{name}.parquet").resolve())
    return out


def replayable(requests: pl.DataFrame, log: Path, now: Path) -> tuple[pl.Series, dict[str, int]]:
    """Which of `requests` (REQUEST) the log can tell the truth about, and how many others there are, by reason.

    Args:
        log: the log that was materialised.
        now: that log and the feedback since.
    """
    end = log_end(log)
    told = _told(now, requests)
    asked = requests.with_row_index("row").sort("event_time")
    asked = asked.join_asof(told, left_on="event_time", right_on="told", by="user_id", check_sortedness=False).sort(
        "row"
    )
    last, pushed = (pl.lit(us).cast(TIME) for us in (end, pushed_end(log, end)))
    # of this log's own features the pushed ones hold all of it, of an older log's what it can hold at the least
    held = (
        pl.when(pl.col("features_time") == last, pl.col("event_time") >= pushed).then(pushed).otherwise("features_time")
    )
    conditions = {
        "served from the features of a later log": pl.col("features_time") > last,
        "of a time before the snapshot that it was served from": pl.col("event_time") < pl.col("features_time"),
        "of a user of whom the log has since brought what never went through the gateway": pl.col("told") > held,
    }
    kept = pl.repeat(True, requests.height, dtype=pl.Boolean(), eager=True)
    left_out = {}
    for reason, condition in conditions.items():
        leaves = kept & asked.select(condition.fill_null(False)).to_series()
        left_out[reason] = int(leaves.sum())
        kept &= ~leaves
    return kept, {reason: count for reason, count in left_out.items() if count}


def _told(log: Path, requests: pl.DataFrame) -> pl.DataFrame:
    """user_id and told, in order: when something became visible of a user of the requests past the gateway."""
    of_them = pl.col("user_id").is_in(requests["user_id"].implode())
    parts = [pl.DataFrame(schema={"user_id": pl.Int64(), "told": TIME})]
    for path in event_files(log):
        rows = read_table(path, EVENTS).filter(of_them, pl.col("release").is_null())
        arrivals = (pl.col("created_time"), pl.col("outcome_time").fill_null(pl.col("created_time")))
        parts += [rows.select("user_id", told=pl.max_horizontal("event_time", arrived)) for arrived in arrivals]
    if (log / "histories.parquet").exists():
        rows = read_table(log / "histories.parquet", HISTORIES).filter(of_them)
        parts.append(rows.select("user_id", told=pl.max_horizontal("event_time", "created_time")))
    return pl.concat(parts).unique().with_columns(pl.col("told") + pl.duration(microseconds=1)).sort("told")


@dataclass(frozen=True)
class Behind:
    """Requests whose pushed features differ, and how many of them were served an earlier state of the same user.

    Attributes:
        seconds: how long what those lacked had been visible, at most, by the requests' clock.
    """

    requests: int
    earlier: int
    seconds: float


def behind(served: Vectors, offline: Vectors, table: pl.DataFrame) -> Behind:
    """Looks for what the differing requests were served among the earlier rows of user_activity's table."""
    names = [feature.name for feature in ACTIVITY.features if feature.name not in PROVENANCE]
    unequal = np.zeros(served.requests.height, bool)
    for name in names:
        unequal |= differing(served.requests[name], offline.requests[name])
    earlier, seconds = 0, 0.0
    users = table.filter(pl.col("user_id").is_in(served.requests.filter(unequal)["user_id"].implode()))
    for request in served.requests.filter(unequal).select(*REQUEST, *names).iter_rows(named=True):
        states = users.filter(
            pl.col("user_id") == request["user_id"], pl.col("event_timestamp") <= request["event_time"]
        ).sort("event_timestamp")
        rows = [{name: default(ACTIVITY.schema[name]) for name in names}, *states.select(names).iter_rows(named=True)]
        asked = {name: request[name] for name in names}
        matches = [place for place, row in enumerate(rows[:-1]) if row == asked]
        if matches:
            earlier += 1
            lacked = request["event_time"] - states["event_timestamp"][matches[-1]]
            seconds = max(seconds, lacked.total_seconds())
    return Behind(int(unequal.sum()), earlier, seconds)


# What came of it


@dataclass(frozen=True)
class Replay:
    """A replay for a release.

    Attributes:
        log: the log that the release was trained on, and `log_end` its end, UTC.
        served: logged requests; `left_out` those that could not be replayed, by reason.
        probe: users and items drawn from the store and read as the gateway reads them; if there is none, `no_probe`
            says why.
        stale: offline values at the snapshots against those at the requests' own times.
        goal: the share of equal vectors that is asked for.
    """

    release: int
    service: str
    log: str
    log_end: str
    goal: float
    served: Comparison
    left_out: Mapping[str, int]
    behind: Behind
    probe: Comparison | None
    no_probe: str
    stale: Comparison

    @property
    def share(self) -> float | None:
        """The share of equal vectors, the lower one of served and probed; None if nothing was compared."""
        return min((one.share for one in self._compared), default=None)  # type: ignore[type-var]

    @property
    def reached(self) -> bool:
        """Whether something was compared, and enough of it is equal."""
        return self.share is not None and self.share >= self.goal

    @property
    def worst(self) -> list[tuple[str, int]]:
        """The features that differ and how often, most often first."""
        counts: dict[str, int] = {}
        for one in self._compared:
            for feature in one.worst:
                counts[feature.feature] = counts.get(feature.feature, 0) + feature.different
        return sorted(counts.items(), key=lambda pair: -pair[1])

    @property
    def sentence(self) -> str:
        """What there is to say, in one line."""
        if self.share is None:
            without = sum(self.left_out.values())
            return (
                f"Nothing could be replayed: there is no logged request{f' but {without:,} left out' * bool(without)}, "
                f"and no probe: {self.no_probe}."
            )
        parts = [
            f"{one.equal:,} of {one.vectors:,} vectors of {one.requests:,} {what}"
            for one, what in ((self.served, "logged requests"), (self.probe, "probed users"))
            if one is not None and one.vectors
        ]
        worst = ", ".join(f"{name} ({count:,})" for name, count in self.worst[:3])
        return (
            f"Online {'equals' if self.share == 1 else 'against'} offline: {' and '.join(parts)} are equal bit for bit "
            f"({percent(self.share)}; goal {percent(self.goal)}){f'; most often different: {worst}' * bool(worst)}."
        )

    @property
    def _compared(self) -> list[Comparison]:
        return [one for one in (self.served, self.probe) if one is not None and one.vectors]

    @property
    def metrics(self) -> dict[str, float]:
        """What a tracker keeps: figures by name."""
        found: dict[str, float] = {"requests": self.served.requests, "vectors": self.served.vectors}
        found |= {"different": self.served.vectors - self.served.equal, "left_out": sum(self.left_out.values())}
        shares = {
            "equal_share": self.share,
            "served_equal_share": self.served.share,
            "probe_equal_share": self.probe.share if self.probe else None,
            "fresh_share": self.stale.share,
        }
        found |= {name: share for name, share in shares.items() if share is not None}
        found |= {f"different_{name}": count for name, count in self.worst}
        return {f"replay/{name}": value for name, value in found.items()}

    @property
    def document(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        found = asdict(self)
        for name in ("served", "probe", "stale"):
            part = getattr(self, name)
            if part is not None:
                found[name]["share"] = part.share
        return found | {"share": self.share, "reached": self.reached, "sentence": self.sentence}


def percent(share: float) -> str:
    """A share in per cent, rounded down: only all of it is 100 %."""
    return f"{math.floor(share * 1e6) / 1e4:.4f}".rstrip("0").rstrip(".") + " %"
