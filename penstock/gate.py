"""The gate: may this candidate replace the champion? Each check is a row in words; no verdict is a rejection.

The primary figure is one of the fused score, on test rows that neither training nor the weight search has seen.
Differences are paired on the same rows, users being what is independent. A first release, with no champion to beat, is
held against its own best single head; every candidate is held against the baselines. The thresholds are data:
`penstock.policy`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import penstock
from penstock import intervals, metrics, policy
from penstock.events import LABELS
from penstock.evidence import Champion, Evidence, gather
from penstock.fusion import OBJECTIVE
from penstock.intervals import Estimate, Figure, Interval, Resampled
from penstock.metrics import Array, MetricError
from penstock.policy import Config as Policy
from penstock.policy import measure_in_words

RECALL = "recall@50"
REHEARSED = ("a fresh server answers", "served scores are the training graph's", "answers in time")
"""The checks of a rehearsal, by name."""


@dataclass(frozen=True)
class Check:
    """One row of the verdict: `value` with its interval must be on the right side of `bound`."""

    name: str
    passed: bool
    reason: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and by what figures.

    Attributes:
        fused: AUC of the fused score, per label and their mean: the candidate's with its interval, and those it is
            held against.
        primary: the policy's figure: the candidate's, the opponent's, and the difference with interval and p-value.
        heads: per label the AUC of its own head with its interval, the champion's and popularity's, the difference to
            the champion's with its interval, and how well it is calibrated.
        recall: by name (candidate, champion, baselines), the figures of the recall model with the interval of RECALL.
        slices: the primary figure where the product is most easily hurt.
    """

    approved: bool
    sentence: str
    checks: tuple[Check, ...]
    champion: int | None = None
    rows: int = 0
    users: int = 0
    fused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    primary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)
    recall: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    slices: tuple[Mapping[str, Any], ...] = ()
    policy: Policy = dataclasses.field(default_factory=Policy)


def judge(evidence: Evidence, by: Policy | None = None) -> Verdict:
    """The verdict on `evidence`; a figure that is not defined is a rejection, never an error."""
    by = by or Policy()
    faults = by.faults()
    if faults:
        reason = f"The policy cannot be judged by: {'; '.join(faults)}."
        return _verdict([Check("policy is complete", False, reason)], evidence, by)
    checks = [*_sound(evidence, by), *_models(evidence), *_rehearsed(evidence.rehearsal, by)]
    if isinstance(evidence.champion, str):
        checks.append(Check("champion can be scored", False, evidence.champion))
    if not all(check.passed for check in checks):
        return _verdict(checks, evidence, by)
    try:
        return _weigh(checks, evidence, by)
    except MetricError as error:
        undefined = Check("figures are defined", False, f"A figure is not defined: {error}.")
        return _verdict([*checks, undefined], evidence, by)


def _verdict(checks: Sequence[Check], evidence: Evidence | None, by: Policy, **figures: Any) -> Verdict:
    failed = [check for check in checks if not check.passed]
    champion = evidence.champion if evidence else None
    more = len(failed) - 1
    rest = f"; {more} more check{'s' if more > 1 else ''} failed" if more > 0 else ""
    # an approval is told by its first comparison: the champion's, or popularity's
    told = failed[0] if failed else next(check for check in checks if check.name.startswith(("better", "not worse")))
    reason = told.reason[0].lower() + told.reason[1:].rstrip(".")
    sentence = f"{'Rejected' if failed else 'Approved'}: {reason}{rest}."
    return Verdict(
        approved=not failed,
        sentence=sentence,
        checks=tuple(checks),
        champion=champion.number if isinstance(champion, Champion) else None,
        rows=evidence.predictions.height if evidence else 0,
        users=evidence.predictions["user_id"].n_unique() if evidence else 0,
        policy=by,
        **figures,
    )


def _sound(evidence: Evidence, by: Policy) -> list[Check]:
    """Whether the evidence can be judged at all."""
    found, test = evidence.predictions, evidence.test
    same = found["event_id"].equals(test["event_id"]) and all(found[label].equals(test[label]) for label in LABELS)
    reason = f"The {test.height:,} test rows are predicted, each once, with the labels of the log."
    if not same:
        reason = "The predictions are not of the test rows: their events or labels differ from the examples'."
    checks = [Check("predictions are of the test rows", same, reason), _unseen(evidence)]

    names = [f"p_{label}" for label in LABELS]
    broken = {
        name: int((~np.isfinite(values) | (values < 0) | (values > 1)).sum())
        for name in names
        for values in [found[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()]
    }
    wrong = [f"{count:,} of {name}" for name, count in broken.items() if count]
    reason = "Every prediction is a probability."
    if wrong:
        reason = f"Predictions are NaN, infinite or outside 0 to 1: {', '.join(wrong)}."
    checks.append(Check("predictions are probabilities", not wrong, reason))

    constant = [name for name in names if not broken[name] and found[name].n_unique() < 2 <= found.height]
    reason = "Every head tells rows apart."
    if constant:
        reason = f"The scores of {', '.join(constant)} are the same for every row: the head ranks nothing."
    checks.append(Check("no head is constant", not constant, reason))

    reason = f"There are {test.height:,} test rows; {by.minimum_rows:,} are asked for."
    if not test.height:
        reason = "The test slice is empty: there is nothing to judge by."
    checks.append(_least("enough test rows", test.height, by.minimum_rows, reason))
    users = found["user_id"].n_unique()
    reason = f"The test rows are of {users:,} users; {by.minimum_users:,} are asked for."
    checks.append(_least("enough test users", users, by.minimum_users, reason))
    for label in LABELS:
        positives = int(test[label].sum() or 0)
        fewer = min(positives, test.height - positives)
        reason = (
            f"There are {positives:,} positives and {test.height - positives:,} negatives of {label}; "
            f"{by.minimum_cases} of each are asked for."
        )
        checks.append(_least(f"enough cases of {label}", fewer, by.minimum_cases, reason))
    return checks


def _least(name: str, value: float, bound: float, reason: str) -> Check:
    return Check(name, value >= bound, reason, value=value, bound=bound)


def _unseen(evidence: Evidence) -> Check:
    """Whether the test rows lie after everything that training and the weight search saw."""
    name = "test rows are unseen"
    seen, test = evidence.seen, evidence.test
    shared = test.join(seen, "event_id", how="semi").height
    if shared:
        return Check(name, False, f"{shared:,} test rows are also training or validation rows.", value=shared, bound=0)
    early = test.filter(pl.col("event_time") <= seen["event_time"].max())
    end, start = _minute(seen.select(pl.max("event_time"))), _minute(test.select(pl.min("event_time")))
    if early.height:
        reason = f"{early.height:,} test rows are not later than the training window, which ends {end}: they overlap."
        return Check(name, False, reason, value=early.height, bound=0)
    return Check(name, True, f"Training and validation end at {end}, before the first test row, at {start}.")


def _minute(time: pl.DataFrame) -> str:
    return str(time.to_series().dt.strftime("%Y-%m-%d %H:%M UTC").item())


def _models(evidence: Evidence) -> Iterator[Check]:
    """Whether the two models are of these examples, and the index of these items."""
    others = [name for name, window in evidence.trained_on.items() if window != evidence.window]
    reason = "Both models were trained on the training slice of these examples."
    if others:
        reason = (
            f"The {' and '.join(others)} model was trained on other examples than the test rows are of: "
            "it may have seen them."
        )
    yield Check("models are of these examples", not others, reason)

    missing = np.setdiff1d(evidence.items, evidence.indexed).size
    reason = f"All {evidence.items.size:,} items of the training slice can be retrieved."
    if missing:
        reason = f"{missing:,} of the {evidence.items.size:,} items of the training slice are not in the index."
    yield Check("index holds the items", not missing, reason, value=float(missing), bound=0)

    answered = evidence.answers["candidate"]
    strange = np.setdiff1d(answered[answered >= 0], evidence.indexed).size
    reason = "The recall model answers items of its own index."
    if strange:
        reason = f"The recall model answers {strange:,} items that items.parquet does not have: another index is in it."
    yield Check("recall answers its own items", not strange, reason, value=float(strange), bound=0)


def _rehearsed(found: Mapping[str, Any] | None, by: Policy) -> Iterator[Check]:
    """Whether a fresh server answers logged requests with the training graph's scores, in time."""
    name, same, in_time = REHEARSED
    if not found:
        yield Check(name, False, "The candidate was not loaded in a fresh server.")
        return
    if found.get("error"):
        yield Check(name, False, f"A fresh server could not answer with the candidate: {found['error']}.")
        return
    try:
        requests, finite = int(found["requests"]), bool(found["finite"])
        difference, latency = float(found["largest_difference"]), float(found["p99_ms"])
    except (KeyError, TypeError, ValueError) as error:
        yield Check(name, False, f"The rehearsal does not say what it found: {type(error).__name__}: {error}.")
        return
    reason = f"A fresh server answered {requests:,} logged requests with finite scores."
    if not requests or not finite:
        reason = "A fresh server answered no request." if not requests else "A fresh server answered NaN or infinity."
    yield Check(name, bool(requests and finite), reason, value=float(requests))
    reason = (
        f"Served scores differ from the training graph's by at most {difference:.2g}; "
        f"{by.score_tolerance:.2g} is allowed."
    )
    yield Check(same, difference <= by.score_tolerance, reason, value=difference, bound=by.score_tolerance)
    reason = f"99 of 100 rehearsed requests took at most {latency:.1f} ms; {by.latency_ms:g} ms are allowed."
    yield Check(in_time, latency <= by.latency_ms, reason, value=latency, bound=by.latency_ms)


class _Rows:
    """Figures of scores on the same rows."""

    def __init__(self, rows: pl.DataFrame, by: Policy) -> None:
        self.labels = {label: rows[label].to_numpy() for label in LABELS}
        self._users = rows["user_id"].to_numpy()
        self._sessions = rows["session"].to_numpy()
        self._drawn = {"replicates": by.replicates, "seed": by.seed}

    def auc(self, label: str, scores: Array) -> Estimate:
        return intervals.auc(self.labels[label], scores, self._users)

    def calibration_ratio(self, label: str, scores: Array) -> Estimate:
        return intervals.calibration_ratio(self.labels[label], scores, self._users)

    def calibration_slope(self, label: str, scores: Array) -> Estimate:
        return intervals.calibration_slope(self.labels[label], scores, self._users)

    def mean_auc(self, scores: Array, labels: Sequence[str] = LABELS) -> Estimate:
        return intervals.mean_estimate([self.auc(label, scores) for label in labels])

    def figure(self, measure: str, scores: Array) -> Figure:
        """A figure of a fused score, by its name in a policy."""
        if measure == OBJECTIVE:
            return self.mean_auc(scores)
        kind, label = measure.split("_", 1)
        if kind == "auc":
            return self.auc(label, scores)
        labels = self.labels[label]
        if kind == "gauc":
            return intervals.gauc(labels, scores, self._users, **self._drawn)
        k = int(kind.removeprefix("ndcg@"))
        return intervals.ndcg(labels, scores, self._sessions, self._users, k=k, **self._drawn)


def _above(name: str, found: Interval, bound: float, reason: str) -> Check:
    return Check(name, found.low > bound, reason, found.value, found.low, found.high, bound)


def _weigh(checks: list[Check], evidence: Evidence, by: Policy) -> Verdict:
    """The statistical checks, on evidence that is sound."""
    champion = evidence.champion if isinstance(evidence.champion, Champion) else None
    rows = evidence.predictions
    heads = {label: rows[f"p_{label}"].cast(pl.Float64).to_numpy() for label in LABELS}
    popularity = {label: rows[f"popularity_{label}"].cast(pl.Float64).to_numpy() for label in LABELS}
    if champion:
        differs = _differs(evidence, champion)
        checks.append(differs)
        if not differs.passed:
            return _verdict(checks, evidence, by)
        opponent, other = "champion", champion.score
    else:
        opponent, other = "single head", heads[evidence.single_head]
    on = _Rows(rows, by)
    # each label's own rate: the hardest bar that knows nothing of the user
    alone = {label: on.auc(label, popularity[label]) for label in LABELS}
    checks += _comparisons(on, evidence, champion, alone, by)
    table = {}
    for label in LABELS:
        table[label], of_head = _head(on, label, heads[label], champion, alone[label], by)
        checks += of_head
    recall, of_recall = _recalls(evidence, champion, by)
    checks += of_recall
    slices = _slices(rows, evidence.score, champion.score if champion else None, by)
    checks += [_harmless(found, by) for found in slices if found["difference"] is not None]
    fused: dict[str, dict[str, float]] = {}
    for name, scores in (("candidate", evidence.score), (opponent, other)):
        mean = on.mean_auc(scores).interval(by.confidence)
        fused[name] = {label: on.auc(label, scores).value for label in LABELS} | dataclasses.asdict(mean)
    mean = intervals.mean_estimate(list(alone.values())).interval(by.confidence)
    fused["popularity"] = {label: found.value for label, found in alone.items()} | dataclasses.asdict(mean)
    own, theirs = (on.figure(by.primary, scores) for scores in (evidence.score, other))
    difference = own - theirs
    primary = {
        "measure": by.primary,
        "candidate": own.value,
        "opponent": opponent,
        "opponent_value": theirs.value,
        "difference": dataclasses.asdict(difference.interval(by.confidence)),
        "p_value": difference.p_value if isinstance(difference, Estimate) else None,
    }
    return _verdict(
        checks, evidence, by, fused=fused, primary=primary, heads=table, recall=recall, slices=tuple(slices)
    )


def _differs(evidence: Evidence, champion: Champion) -> Check:
    name = "differs from the champion"
    if np.array_equal(metrics.midranks(evidence.score), metrics.midranks(champion.score)):
        reason = f"The candidate ranks every test row exactly as champion {champion.number} does: nothing is new in it."
        return Check(name, False, reason)
    return Check(name, True, f"Candidate and champion {champion.number} rank the test rows differently.")


def _ends(found: Interval, by: Policy) -> str:
    return f"{by.confidence:.0%} interval {found.low:.4f} to {found.high:.4f}"


def _change(found: Interval, by: Policy) -> str:
    return f"{found.value:+.4f}, {by.confidence:.0%} interval {found.low:+.4f} to {found.high:+.4f}"


def _comparisons(
    on: _Rows, evidence: Evidence, champion: Champion | None, popularity: Mapping[str, Estimate], by: Policy
) -> Iterator[Check]:
    """The fused score against the champion's, popularity's, and for a first release its best single head's."""
    rows = evidence.predictions

    def against(measure: str, other: Array, whose: str, bound: float) -> tuple[Interval, str]:
        own, theirs = (on.figure(measure, scores) for scores in (evidence.score, other))
        found = (own - theirs).interval(by.confidence)
        allowed = f"; above {bound:+.4f} is asked for" if bound else ""
        return found, (
            f"On {rows.height:,} test rows the {measure_in_words(measure)} of the fused score is {own.value:.4f}, "
            f"{whose} is {theirs.value:.4f} (difference {_change(found, by)}{allowed})."
        )

    if champion:
        found, reason = against(by.primary, champion.score, f"champion {champion.number}'s", by.margin)
        yield _above("better than the champion", found, by.margin, reason)
        name = "gain is plausible"
        reason = f"A gain of {found.value:+.4f} is one that a model can have; {by.highest_gain:+.4f} would be too much."
        if found.value > by.highest_gain:
            reason = (
                f"A gain of {found.value:+.4f} over champion {champion.number} is more than {by.highest_gain:+.4f}: "
                "look for a feature that knows the label."
            )
        yield Check(name, found.value <= by.highest_gain, reason, value=found.value, bound=by.highest_gain)
        for measure, margin in by.guardrails.items():
            if policy.fused_measure(measure):
                found, reason = against(measure, champion.score, f"champion {champion.number}'s", -margin)
                yield _above(f"{measure_in_words(measure)} not worse than the champion's", found, -margin, reason)
    if "popularity" in by.baselines:
        bound = by.baselines["popularity"]
        own = on.mean_auc(evidence.score)
        theirs = intervals.mean_estimate(list(popularity.values()))
        found = (own - theirs).interval(by.confidence)
        reason = (
            f"On {rows.height:,} test rows the mean AUC of the fused score is {own.value:.4f}, popularity's is "
            f"{theirs.value:.4f} (difference {_change(found, by)})."
        )
        yield _above("better than popularity", found, bound, reason)
    if not champion:
        whose = f"that of the {evidence.single_head} head alone"
        head = rows[f"p_{evidence.single_head}"].cast(pl.Float64).to_numpy()
        found, reason = against(by.primary, head, whose, -by.single_head_margin)
        yield _above("not worse than the best single head", found, -by.single_head_margin, reason)


def _head(
    on: _Rows, label: str, scores: Array, champion: Champion | None, popularity: Estimate, by: Policy
) -> tuple[dict[str, float | None], list[Check]]:
    """The figures of a head, and whether it is worth having."""
    estimate = on.auc(label, scores)
    own = estimate.interval(by.confidence)
    reason = f"The {label} head ranks {label} with an AUC of {own.value:.4f} ({_ends(own, by)}); 0.5 is chance."
    checks = [_above(f"{label} head above chance", own, 0.5, reason)]
    reason = f"An AUC of {own.value:.4f} of the {label} head is not above {by.highest_auc:g}."
    if own.value > by.highest_auc:
        reason = (
            f"An AUC of {own.value:.4f} of the {label} head is above {by.highest_auc:g}: "
            "look for a feature that knows the label."
        )
    plausible = own.value <= by.highest_auc
    checks.append(Check(f"{label} head is plausible", plausible, reason, value=own.value, bound=by.highest_auc))
    figures: dict[str, float | None] = {
        **{"auc": own.value, "low": own.low, "high": own.high},
        **dict.fromkeys(("champion", "difference", "difference_low", "difference_high")),
        "popularity": popularity.value,
    }
    if champion:
        theirs = on.auc(label, champion.heads[label])
        against = (estimate - theirs).interval(by.confidence)
        reason = (
            f"The AUC of the {label} head differs from champion {champion.number}'s by {_change(against, by)}; "
            f"above {-by.heads[label]:+.4f} is asked for."
        )
        checks.append(_above(f"{label} head not worse than the champion's", against, -by.heads[label], reason))
        figures |= {"champion": theirs.value, "difference": against.value}
        figures |= {"difference_low": against.low, "difference_high": against.high}
    for name, found, bound, called in (
        (
            "ratio",
            on.calibration_ratio(label, scores),
            by.calibration_ratio,
            "what the head predicts over what happened",
        ),
        ("slope", on.calibration_slope(label, scores), by.calibration_slope, "the slope of what happened over that"),
    ):
        ends = found.interval(by.confidence)
        reason = (
            f"For {label}, {called} is {found.value:.3f} ({_ends(ends, by)}); an interval wholly outside "
            f"{1 / bound:.3f} to {bound:.3f} is too far off."
        )
        shown = ends.low > bound or ends.high < 1 / bound
        called_check = f"{label} head is calibrated ({name})"
        checks.append(Check(called_check, not shown, reason, ends.value, ends.low, ends.high, bound))
        figures |= {f"calibration_{name}": ends.value}
        figures |= {f"calibration_{name}_low": ends.low, f"calibration_{name}_high": ends.high}
    return figures, checks


def _recalls(
    evidence: Evidence, champion: Champion | None, by: Policy
) -> tuple[dict[str, dict[str, float]], list[Check]]:
    """The recall model against the champion's and the baselines, user by user."""
    answers = dict(evidence.answers) | ({"champion": champion.answers} if champion else {})
    drawn = {"replicates": by.replicates, "seed": by.seed}

    def by_user(name: str, measure: str) -> Resampled:
        kind, k = measure.split("@")
        of = {"recall": metrics.recall_by_user, "ndcg": metrics.ndcg_by_user}[kind]
        return intervals.average(of(answers[name][:, : int(k)], evidence.relevant), **drawn)

    table = {}
    for name in answers:
        found = by_user(name, RECALL).interval(by.confidence)
        table[name] = {measure: by_user(name, measure).value for measure in policy.RECALL_MEASURES}
        table[name] |= {"low": found.low, "high": found.high}
    checks = []
    own = table["candidate"][RECALL]
    for name, margin in by.baselines.items():
        found = (by_user("candidate", RECALL) - by_user(name, RECALL)).interval(by.confidence)
        called = {"popularity": "the most popular items", "item_item_cf": "item-item CF"}[name]
        reason = (
            f"The recall model finds {own:.1%} of what users long-viewed, {called} {table[name][RECALL]:.1%} "
            f"({RECALL}; difference {_change(found, by)})."
        )
        checks.append(_above(f"recall better than {called}", found, margin, reason))
    for measure, margin in by.guardrails.items():
        if champion and measure in policy.RECALL_MEASURES:
            found = (by_user("candidate", measure) - by_user("champion", measure)).interval(by.confidence)
            reason = (
                f"The {measure} of the recall model differs from champion {champion.number}'s by {_change(found, by)}; "
                f"above {-margin:+.4f} is asked for."
            )
            checks.append(_above(f"{measure} not worse than the champion's", found, -margin, reason))
    return table, checks


def _slices(rows: pl.DataFrame, score: Array, champion: Array | None, by: Policy) -> list[dict[str, Any]]:
    """The fused AUC in the policy's slices, over the labels with enough cases there."""
    columns = {
        "new users": rows["new_user"],
        "known users": ~rows["new_user"],
        "new items": rows["new_item"],
        "tail items": rows["tail_item"],
    }
    masks = {name: columns[name] for name in by.slices if name in columns}
    if "scenarios" in by.slices:
        masks |= {f"scenario {value}": rows["scenario"] == value for value in rows["scenario"].unique().sort()}
    return [
        _slice(name, rows.filter(mask), score[inside], champion[inside] if champion is not None else None, by)
        for name, mask in masks.items()
        for inside in [mask.to_numpy()]
    ]


def _slice(name: str, rows: pl.DataFrame, score: Array, champion: Array | None, by: Policy) -> dict[str, Any]:
    labels = [label for label in LABELS if _enough(rows, label, by.slice_cases)]
    figures = ("auc", "low", "high", "champion", "difference", "difference_low", "difference_high")
    found: dict[str, Any] = {"name": name, "rows": rows.height, "labels": labels, **dict.fromkeys(figures)}
    if rows.height < by.slice_rows or not labels:
        return found
    on = _Rows(rows, by)
    own = on.mean_auc(score, labels)
    interval = own.interval(by.confidence)
    found |= {"auc": own.value, "low": interval.low, "high": interval.high}
    if champion is not None:
        theirs = on.mean_auc(champion, labels)
        difference = (own - theirs).interval(by.confidence)
        found["champion"] = theirs.value
        found |= {"difference": difference.value, "difference_low": difference.low, "difference_high": difference.high}
    return found


def _enough(rows: pl.DataFrame, label: str, cases: int) -> bool:
    """Whether positives and negatives are so many, and of so many users: a handful of users says nothing."""
    return all(
        part.height >= cases and part["user_id"].n_unique() >= cases
        for part in (rows.filter(pl.col(label) == 1), rows.filter(pl.col(label) == 0))
    )


def _harmless(found: Mapping[str, Any], by: Policy) -> Check:
    """Fails if the candidate is shown to be worse in a slice: the whole interval below nought."""
    difference = Interval(found["difference"], found["difference_low"], found["difference_high"])
    reason = (
        f"For {found['name']} ({found['rows']:,} rows) the fused AUC differs from the champion's by "
        f"{_change(difference, by)}; an interval wholly below 0 is harm."
    )
    name = f"no harm to {found['name']}"
    return Check(name, difference.high >= 0, reason, difference.value, difference.low, difference.high, 0.0)


def judge_candidate(
    examples: Path,
    recall: Path,
    rank: Path,
    weights: Path,
    rehearsal: Path | None,
    champion: str,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
) -> Verdict:
    """Judges a candidate's artifacts and writes `verdict.json`, and `champion.parquet` if there is a champion.

    `verdict.json` holds the Verdict, `first_release`, the candidate's `data_window` and, so that a report can say what
    changed, the `champion_manifest` (with the `data_window` of the champion's own verdict).

    Args:
        rehearsal: the directory of `rehearsal.json`; without it the candidate is rejected.
        champion: the champion's release directory; "" if nothing is live.
        overrides: of the policy, as they come from JSON.
    """
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"first_release": not champion}
    if Path(champion).name.isdecimal():  # also of one that cannot be loaded: what it was to be held against
        document["champion"] = int(Path(champion).name)
    try:
        by = penstock.config(policy, overrides or {})
    except ValueError as error:
        verdict = _verdict([Check("policy is complete", False, f"The policy: {error}.")], None, Policy())
        return _written(verdict, document, out)
    try:
        evidence = gather(examples, recall, rank, weights, rehearsal, Path(champion) if champion else None)
        document["data_window"] = evidence.window
        verdict = judge(evidence, by)
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        said = (str(error).splitlines() or [""])[0]
        reason = f"The candidate's artifacts cannot be judged: {type(error).__name__}: {said}."
        verdict = _verdict([Check("artifacts are complete", False, reason)], None, by)
    else:
        if isinstance(evidence.champion, Champion):
            document["champion_manifest"] = _manifest(Path(champion), evidence.champion)
            _champion_scores(evidence, evidence.champion).write_parquet(out / "champion.parquet")
    return _written(verdict, document, out)


def _written(verdict: Verdict, document: Mapping[str, Any], out: Path) -> Verdict:
    (out / "verdict.json").write_text(json.dumps({**dataclasses.asdict(verdict), **document}, indent=2) + "\n")
    return verdict


def _manifest(release: Path, champion: Champion) -> dict[str, Any]:
    manifest = {name: value for name, value in champion.manifest.items() if name != "files"}
    verdict = release / "verdict.json"
    if verdict.is_file():
        manifest["data_window"] = json.loads(verdict.read_text()).get("data_window", manifest.get("data_window"))
    return manifest


def _champion_scores(evidence: Evidence, champion: Champion) -> pl.DataFrame:
    heads = {f"p_{label}": champion.heads[label] for label in LABELS}
    return evidence.test.select("event_id").with_columns(score=champion.score, **heads)
