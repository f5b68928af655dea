"""The gate: may this candidate replace the champion? Each check is a row in words; no verdict is a rejection.

The primary metric is the mean over the labels of the AUC of the fused score, on test rows that neither training nor
the weight search has seen. Differences are paired on the same rows, with percentile intervals of a bootstrap that draws
whole users. The first release, with no champion to beat, is held against its own best single head; every candidate is
held against popularity.
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

from penstock import fusion, metrics, scoring
from penstock.events import LABELS
from penstock.metrics import Array, Interval, MetricError

RECALL = "recall@50"
_RECALL_DEPTH = 50


@dataclass(frozen=True)
class Policy:
    """What a candidate must show.

    Attributes:
        confidence: of every interval, two-sided.
        replicates: bootstrap draws; `seed` makes them the same each time.
        margin: the low end of (candidate - champion), and of (candidate - popularity), must be above this.
        single_head_margin: a first release may be this much worse than its best single head, at the low end.
        head_margin: a head's AUC may be this much worse than the champion's, at the low end. With 600 positives the
            interval of a paired difference is some ±0.017 wide: a smaller margin rejects for want of data.
        minimum_rows, minimum_cases: test rows; positives, and negatives, of each label.
        slice_rows, slice_cases: the same for a slice to be judged; smaller slices are only named.
        recall_above_chance: the recall model must find this many times what a random list finds.
    """

    confidence: float = 0.95
    replicates: int = 500
    seed: int = 20
    margin: float = 0.0
    single_head_margin: float = 0.002
    head_margin: float = 0.02
    minimum_rows: int = 1000
    minimum_cases: int = 50
    slice_rows: int = 500
    slice_cases: int = 30
    recall_above_chance: float = 1.0


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
class Champion:
    """What is live, scored on the candidate's test rows."""

    number: int
    heads: Mapping[str, Array]
    weights: Mapping[str, float]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """All that is judged.

    Attributes:
        predictions: the rank model's predictions on the test rows.
        test: event_id, event_time and labels of the test rows, as the examples have them.
        seen: event_id and event_time of the training and validation rows.
        single_head: the head that alone was best on validation.
        recall: the recall model's figures on the test slice, and `items`, how many it can retrieve.
        champion: None if nothing is live; a sentence if there is a champion that could not be scored.
    """

    predictions: pl.DataFrame
    test: pl.DataFrame
    seen: pl.DataFrame
    weights: Mapping[str, float]
    single_head: str
    recall: Mapping[str, float]
    champion: Champion | str | None


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and by what figures.

    Attributes:
        fused: AUC of the fused score, per label and their mean: the candidate's with its interval, and those it is
            held against.
        heads: per label the AUC of its own head with DeLong's interval, the champion's and popularity's, and the
            difference to the champion's with the bootstrap's interval.
        slices: the fused AUC where the product is most easily hurt.
    """

    approved: bool
    sentence: str
    checks: tuple[Check, ...]
    champion: int | None = None
    rows: int = 0
    users: int = 0
    fused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)
    slices: tuple[Mapping[str, Any], ...] = ()
    policy: Policy = dataclasses.field(default_factory=Policy)


def judge(evidence: Evidence, policy: Policy | None = None) -> Verdict:
    """The verdict on `evidence`; a figure that is not defined is a rejection, never an error."""
    policy = policy or Policy()
    champion = evidence.champion if isinstance(evidence.champion, Champion) else None
    checks = [*_sound(evidence, policy), _recall(evidence, policy)]
    if isinstance(evidence.champion, str):
        checks.append(Check("champion can be scored", False, evidence.champion))
    if not all(check.passed for check in checks):
        return _verdict(checks, evidence, policy)
    try:
        return _weigh(checks, evidence, champion, policy)
    except MetricError as error:
        undefined = Check("figures are defined", False, f"A figure is not defined: {error}.")
        return _verdict([*checks, undefined], evidence, policy)


def _verdict(checks: Sequence[Check], evidence: Evidence | None, policy: Policy, **figures: Any) -> Verdict:
    failed = [check for check in checks if not check.passed]
    champion = evidence.champion if evidence else None
    more = len(failed) - 1
    rest = f"; {more} more check{'s' if more > 1 else ''} failed" if more > 0 else ""
    # an approval is told by its first comparison: the champion's, or popularity's
    told = failed[0] if failed else next(check for check in checks if check.name.startswith("better than"))
    reason = told.reason[0].lower() + told.reason[1:].rstrip(".")
    sentence = f"{'Rejected' if failed else 'Approved'}: {reason}{rest}."
    return Verdict(
        approved=not failed,
        sentence=sentence,
        checks=tuple(checks),
        champion=champion.number if isinstance(champion, Champion) else None,
        rows=evidence.predictions.height if evidence else 0,
        users=evidence.predictions["user_id"].n_unique() if evidence else 0,
        policy=policy,
        **figures,
    )


def _sound(evidence: Evidence, policy: Policy) -> list[Check]:
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

    reason = f"There are {test.height:,} test rows; {policy.minimum_rows:,} are asked for."
    if not test.height:
        reason = "The test slice is empty: there is nothing to judge by."
    checks.append(_least("enough test rows", test.height, policy.minimum_rows, reason))
    for label in LABELS:
        positives = int(test[label].sum() or 0)
        fewer = min(positives, test.height - positives)
        reason = (
            f"There are {positives:,} positives and {test.height - positives:,} negatives of {label}; "
            f"{policy.minimum_cases} of each are asked for."
        )
        checks.append(_least(f"enough cases of {label}", fewer, policy.minimum_cases, reason))
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


def _recall(evidence: Evidence, policy: Policy) -> Check:
    """Whether the recall model finds more than chance would: an index of shuffled ids does not."""
    name = f"{RECALL} above chance"
    value, items = evidence.recall.get(RECALL), evidence.recall.get("items")
    if value is None or not items or not np.isfinite(value):
        return Check(name, False, f"The recall model has no finite {RECALL} on the test slice, or no items.")
    bound = policy.recall_above_chance * min(1.0, _RECALL_DEPTH / items)
    reason = f"The recall model finds {value:.1%} of what users long-viewed; a random list finds {bound:.1%}."
    return Check(name, value > bound or items <= _RECALL_DEPTH, reason, value=value, bound=bound)


class _Ranking:
    """Scores under the same bootstrap draws: interval of any linear combination of their AUCs."""

    def __init__(self, rows: pl.DataFrame, policy: Policy) -> None:
        self._labels = {label: rows[label].to_numpy() for label in LABELS}
        self._users = rows["user_id"].to_numpy()
        self._policy = policy
        self._cases: dict[tuple[str, str], Array] = {}
        self.values: dict[tuple[str, str], float] = {}
        self._drawn: dict[tuple[str, str], Array] = {}

    def add(self, name: str, scores: Array, labels: Sequence[str] = LABELS) -> None:
        for label in labels:
            self._cases[name, label] = scores
            self.values[name, label] = metrics.auc(self._labels[label], scores)

    def draw(self) -> None:
        cases = [(self._labels[label], scores) for (_, label), scores in self._cases.items()]
        drawn = metrics.bootstrap_auc(cases, self._users, replicates=self._policy.replicates, seed=self._policy.seed)
        self._drawn = dict(zip(self._cases, drawn.T, strict=True))

    def mean(self, name: str, labels: Sequence[str] = LABELS) -> Interval:
        values = float(np.mean([self.values[name, label] for label in labels]))
        return self._interval(values, np.mean([self._drawn[name, label] for label in labels], axis=0))

    def difference(self, first: str, second: str, labels: Sequence[str] = LABELS) -> Interval:
        """Of the means over `labels`, first - second."""
        value = float(np.mean([self.values[first, label] - self.values[second, label] for label in labels]))
        drawn = [self._drawn[first, label] - self._drawn[second, label] for label in labels]
        return self._interval(value, np.mean(drawn, axis=0))

    def _interval(self, value: float, drawn: Array) -> Interval:
        return metrics.percentile_interval(value, drawn, confidence=self._policy.confidence)


def _above(name: str, found: Interval, bound: float, reason: str) -> Check:
    return Check(name, found.low > bound, reason, found.value, found.low, found.high, bound)


def _weigh(checks: list[Check], evidence: Evidence, champion: Champion | None, policy: Policy) -> Verdict:
    """The statistical checks, on evidence that is sound."""
    rows = evidence.predictions
    heads = {label: rows[f"p_{label}"].cast(pl.Float64).to_numpy() for label in LABELS}
    fused = fusion.fuse(heads, evidence.weights)
    opponents: dict[str, Array] = {}
    if champion:
        opponents["champion"] = fusion.fuse(champion.heads, champion.weights)
        differs = _differs(fused, opponents["champion"], champion)
        checks.append(differs)
        if not differs.passed:
            return _verdict(checks, evidence, policy)
    else:
        opponents["single head"] = heads[evidence.single_head]
    ranking = _Ranking(rows, policy)
    for name, scores in {"candidate": fused, **opponents}.items():
        ranking.add(name, scores)
    for label in LABELS:
        ranking.add("head", heads[label], [label])
        # each label's own rate: the hardest bar that knows nothing of the user
        ranking.add("popularity", rows[f"popularity_{label}"].cast(pl.Float64).to_numpy(), [label])
        if champion:
            ranking.add("champion head", champion.heads[label], [label])
    ranking.draw()

    checks += _comparisons(ranking, evidence, champion, policy)
    table = {}
    for label in LABELS:
        own = metrics.delong_interval(rows[label].to_numpy(), heads[label], confidence=policy.confidence)
        reason = f"The {label} head ranks {label} with an AUC of {own.value:.4f} ({_ends(own, policy)}); 0.5 is chance."
        checks.append(_above(f"{label} head above chance", own, 0.5, reason))
        table[label] = _head(label, own, ranking, champion)
    slices = _slices(rows, fused, opponents.get("champion"), policy)
    checks += [_harmless(found, policy) for found in slices if found["difference"] is not None]
    return _verdict(
        checks,
        evidence,
        policy,
        fused={
            name: {label: ranking.values[name, label] for label in LABELS} | dataclasses.asdict(ranking.mean(name))
            for name in ("candidate", *opponents, "popularity")
        },
        heads=table,
        slices=tuple(slices),
    )


def _differs(fused: Array, champion_fused: Array, champion: Champion) -> Check:
    name = "differs from the champion"
    if np.array_equal(metrics.midranks(fused), metrics.midranks(champion_fused)):
        reason = f"The candidate ranks every test row exactly as champion {champion.number} does: nothing is new in it."
        return Check(name, False, reason)
    return Check(name, True, f"Candidate and champion {champion.number} rank the test rows differently.")


def _ends(found: Interval, policy: Policy) -> str:
    return f"{policy.confidence:.0%} interval {found.low:.4f} to {found.high:.4f}"


def _change(found: Interval, policy: Policy) -> str:
    return f"{found.value:+.4f}, {policy.confidence:.0%} interval {found.low:+.4f} to {found.high:+.4f}"


def _comparisons(ranking: _Ranking, evidence: Evidence, champion: Champion | None, policy: Policy) -> Iterator[Check]:
    """The candidate against the champion, popularity, and for a first release its best single head."""
    rows = evidence.predictions.height
    where = f"On {rows:,} test rows the mean AUC of the fused score is {ranking.mean('candidate').value:.4f}"

    def against(name: str, whose: str, margin: float) -> tuple[Interval, str]:
        found = ranking.difference("candidate", name)
        theirs = ranking.mean(name).value
        allowed = f"; above {margin:+.4f} is asked for" if margin else ""
        return found, f"{where}, {whose} is {theirs:.4f} (difference {_change(found, policy)}{allowed})."

    if champion:
        found, reason = against("champion", f"champion {champion.number}'s", policy.margin)
        yield _above("better than the champion", found, policy.margin, reason)
        for label in LABELS:
            found = ranking.difference("head", "champion head", [label])
            reason = (
                f"The AUC of the {label} head differs from champion {champion.number}'s by {_change(found, policy)}; "
                f"above {-policy.head_margin:+.4f} is asked for."
            )
            yield _above(f"{label} head not worse than the champion's", found, -policy.head_margin, reason)
    found, reason = against("popularity", "popularity's", policy.margin)
    yield _above("better than popularity", found, policy.margin, reason)
    if not champion:
        whose = f"that of the {evidence.single_head} head alone"
        found, reason = against("single head", whose, -policy.single_head_margin)
        yield _above("not worse than the best single head", found, -policy.single_head_margin, reason)


def _head(label: str, own: Interval, ranking: _Ranking, champion: Champion | None) -> dict[str, float | None]:
    against = ranking.difference("head", "champion head", [label]) if champion else None
    return {
        "auc": own.value,
        "low": own.low,
        "high": own.high,
        "champion": ranking.values["champion head", label] if champion else None,
        "difference": against.value if against else None,
        "difference_low": against.low if against else None,
        "difference_high": against.high if against else None,
        "popularity": ranking.values["popularity", label],
    }


def _slices(rows: pl.DataFrame, fused: Array, champion: Array | None, policy: Policy) -> list[dict[str, Any]]:
    """Fused AUC for new users, new items and each scenario, over the labels with enough cases there."""
    masks = {"new users": rows["new_user"], "known users": ~rows["new_user"], "new items": rows["new_item"]}
    masks |= {f"scenario {value}": rows["scenario"] == value for value in rows["scenario"].unique().sort()}
    return [
        _slice(name, rows.filter(mask), fused[inside], champion[inside] if champion is not None else None, policy)
        for name, mask in masks.items()
        for inside in [mask.to_numpy()]
    ]


def _slice(name: str, rows: pl.DataFrame, fused: Array, champion: Array | None, policy: Policy) -> dict[str, Any]:
    cases = {label: int(rows[label].sum()) for label in LABELS}
    labels = [
        label for label, positives in cases.items() if min(positives, rows.height - positives) >= policy.slice_cases
    ]
    figures = ("auc", "low", "high", "champion", "difference", "difference_low", "difference_high")
    found: dict[str, Any] = {"name": name, "rows": rows.height, "labels": labels, **dict.fromkeys(figures)}
    if rows.height < policy.slice_rows or rows["user_id"].n_unique() < policy.slice_cases or not labels:
        return found
    ranking = _Ranking(rows, policy)
    ranking.add("candidate", fused, labels)
    if champion is not None:
        ranking.add("champion", champion, labels)
    try:
        ranking.draw()
    except MetricError:
        return found  # its positives come from a handful of users: too few to say anything
    own = ranking.mean("candidate", labels)
    found |= {"auc": own.value, "low": own.low, "high": own.high}
    if champion is not None:
        difference = ranking.difference("candidate", "champion", labels)
        found["champion"] = ranking.mean("champion", labels).value
        found |= {"difference": difference.value, "difference_low": difference.low, "difference_high": difference.high}
    return found


def _harmless(found: Mapping[str, Any], policy: Policy) -> Check:
    """Fails if the candidate is shown to be worse in a slice: the whole interval below nought."""
    difference = Interval(found["difference"], found["difference_low"], found["difference_high"])
    reason = (
        f"For {found['name']} ({found['rows']:,} rows) the fused AUC differs from the champion's by "
        f"{_change(difference, policy)}; an interval wholly below 0 is harm."
    )
    name = f"no harm to {found['name']}"
    return Check(name, difference.high >= 0, reason, difference.value, difference.low, difference.high, 0.0)


def gather(examples: Path, recall: Path, rank: Path, weights: Path, champion: Path | None) -> Evidence:
    """Reads what is to be judged, and scores the champion (a release directory) on the candidate's test rows.

    Raises:
        OSError, ValueError, KeyError: an artifact of the candidate is missing or not as it should be.
    """
    keys = ["event_id", "event_time"]
    test = pl.read_parquet(examples / "test.parquet")
    seen = pl.concat(pl.read_parquet(examples / f"{part}.parquet", columns=keys) for part in ("train", "validation"))
    document = json.loads((weights / "weights.json").read_text())
    grid = pl.read_parquet(weights / "grid.parquet")
    figures = json.loads((recall / "metrics.json").read_text())["test"]
    items = pl.scan_parquet(recall / "items.parquet").select(pl.len()).collect().item()
    predictions = pl.read_parquet(rank / "predictions" / "test.parquet")
    needed = {"event_id", "user_id", "scenario", "new_user", "new_item", *LABELS}
    needed |= {f"popularity_{label}" for label in LABELS}
    needed |= {f"p_{label}" for label in LABELS}
    missing = sorted(needed - set(predictions.columns))
    if missing:
        raise ValueError(f"the predictions lack the column {', '.join(missing)}")
    return Evidence(
        predictions=predictions,
        test=test.select(*keys, *LABELS),
        seen=seen,
        weights=document["weights"],
        single_head=fusion.best_single_head(grid),
        recall={**figures, "items": items},
        champion=_champion(champion, test) if champion else None,
    )


def _champion(release: Path, test: pl.DataFrame) -> Champion | str:
    try:
        manifest = json.loads((release / "manifest.json").read_text())
        weights = json.loads((release / "weights.json").read_text())["weights"]
        heads = scoring.score_rows(release / "rank", test)
        fused = fusion.fuse(heads, weights)
        missing = [label for label in LABELS if label not in heads]
        if missing or not np.isfinite(fused).all() or not all(np.isfinite(heads[label]).all() for label in LABELS):
            return f"The champion's scores on the test rows are not finite, or a head is missing ({release.name})."
        return Champion(int(manifest["release"]), heads, weights, manifest)
    except Exception as error:  # whatever TensorFlow or a broken file raises: no champion, no comparison
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"Champion {release.name} cannot be loaded and scored on the test rows: {reason[0]}."


def judge_candidate(
    examples: Path, recall: Path, rank: Path, weights: Path, champion: str, out: Path, policy: Policy | None = None
) -> Verdict:
    """Judges a candidate's artifacts and writes `verdict.json`, and `champion.parquet` if there is a champion.

    `verdict.json` holds the Verdict, `first_release`, the candidate's `data_window` and, so that a report can say what
    changed, the `champion_manifest` (with the `data_window` of the champion's own verdict).

    Args:
        champion: the champion's release directory; "" if nothing is live.
    """
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"first_release": not champion}
    try:
        evidence = gather(examples, recall, rank, weights, Path(champion) if champion else None)
        document["data_window"] = json.loads((examples / "window.json").read_text())
        verdict = judge(evidence, policy)
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        said = (str(error).splitlines() or [""])[0]
        reason = f"The candidate's artifacts cannot be judged: {type(error).__name__}: {said}."
        verdict = _verdict([Check("artifacts are complete", False, reason)], None, policy or Policy())
    else:
        if isinstance(evidence.champion, Champion):
            document["champion_manifest"] = _manifest(Path(champion), evidence.champion)
            _champion_scores(evidence, evidence.champion).write_parquet(out / "champion.parquet")
    document = dataclasses.asdict(verdict) | document
    (out / "verdict.json").write_text(json.dumps(document, indent=2) + "\n")
    return verdict


def _manifest(release: Path, champion: Champion) -> dict[str, Any]:
    manifest = {name: value for name, value in champion.manifest.items() if name != "files"}
    verdict = release / "verdict.json"
    if verdict.is_file():
        manifest["data_window"] = json.loads(verdict.read_text()).get("data_window", manifest.get("data_window"))
    return manifest


def _champion_scores(evidence: Evidence, champion: Champion) -> pl.DataFrame:
    heads = {f"p_{label}": champion.heads[label] for label in LABELS}
    score = fusion.fuse(champion.heads, champion.weights)
    return evidence.test.select("event_id").with_columns(score=score, **heads)
