"""Whether the gate can be fooled: bad candidates of many kinds, the same model under other seeds, true improvements.

`make gate-trials` prints for each kind of bad candidate whether it was rejected and for the right reason; how often a
model is promoted over itself under another seed; and how often improvements of a known size are. It writes
build/bench/gate_trials.json; QUICK=1 is a smaller form, in two minutes. What was measured stays in
build/bench/gate-trials.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import polars as pl
from scipy.special import expit, logit
from scipy.stats import beta

from benchmarks.bad_candidates import KINDS, RANK_MODEL, Kind, Stage, make_rank, make_recall
from benchmarks.kept import once
from benchmarks.recall import SMALL, make_examples
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from penstock import evidence, fusion, gate, training
from penstock.datasets import simulator
from penstock.evaluation import predict
from penstock.events import LABELS
from penstock.examples import read_slice
from penstock.export import export_rank
from penstock.policy import Config as Policy

FEED = simulator.Config(users=1500, items=800, items_per_day=30, days=10)
LOGS, SEEDS = 12, 6
GAINS = (0.001, 0.002, 0.005, 0.01, 0.02)
"""Of the mean AUC: improvements whose detection is counted."""

MODULES = ("penstock.training", f"penstock.rank.{RANK_MODEL}", "penstock.datasets.simulator", "penstock.evaluation")
QUICK_KINDS = ("constant scores", "probabilities squared", "the challenger compared with itself", "half of the items")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    print(machine(), flush=True)
    folder = BUILD / ("gate-trials-quick" if quick else "gate-trials")
    feed = SMALL if quick else FEED
    kinds = [kind for kind in KINDS if not quick or kind.name in QUICK_KINDS]
    rows = bad(folder, feed, kinds, quick)
    logs = [dataclasses.replace(feed, seed=seed) for seed in range(1, 2 if quick else LOGS + 1)]
    settings = {"epochs": 1} if quick else {}
    calls = [(config, folder, 2 if quick else SEEDS, settings) for config in logs]
    found = each(pairs, calls, [f"log {config.seed}" for config in logs])
    rows += chance(found, goal=not quick)
    rows += power(found)
    show("The gate", rows)
    print(f"written to {write('gate_trials', rows)}")


def bad(folder: Path, feed: simulator.Config, kinds: Sequence[Kind], quick: bool) -> list[Comparison]:
    """Every kind of bad candidate before the gate; and the good one that they are made of, which it must approve."""
    good = prepared(folder, feed, {"epochs": 1} if quick else {})
    verdict = good.judge()
    if not (verdict.approved or quick):  # an epoch on a small log makes no good candidate
        raise SystemExit(f"the good candidate is not approved, so no rejection means anything: {verdict.sentence}")
    print(f"the good candidate: {verdict.sentence}", flush=True)
    said: dict[str, Sequence[str | float]] = {"kind": [], "rejected": [], "for": [], "says": []}
    rejected = right = 0
    for number, kind in enumerate(kinds, 1):
        with tempfile.TemporaryDirectory() as place:
            stage = Stage(shutil.copytree(good.root, Path(place) / "candidate"), good.champion)
            kind.spoil(stage)
            verdict = stage.judge()
        failed = [check.name for check in verdict.checks if not check.passed]
        reason = next((name for name in failed if name in kind.reasons), "")
        outcome = "APPROVED" if verdict.approved else f"rejected: {reason}" if reason else "rejected for ANOTHER REASON"
        print(f"{number} of {len(kinds)}: {kind.name}: {outcome}", flush=True)
        rejected += not verdict.approved
        right += bool(reason)
        cells = (kind.name, "no" if verdict.approved else "yes", reason or f"ANOTHER REASON: {', '.join(failed)}")
        for name, cell in zip(said, (*cells, verdict.sentence[:90]), strict=True):
            said[name] = [*said[name], cell]
    show_columns("Bad candidates", said)
    count = len(kinds)
    return [
        Comparison("bad candidates rejected", rejected, count, "kinds", "", at_least=1.0),
        Comparison("bad candidates rejected for the right reason", right, count, "kinds", "", at_least=1.0),
    ]


def prepared(folder: Path, feed: simulator.Config, overrides: Mapping[str, Any]) -> Stage:
    """A good candidate, and the champion that it is to replace: the same models with half of the days to learn from."""
    root, champion = folder / "candidate", folder / "champion" / "1"
    if not (root / "rehearsal" / "rehearsal.json").exists():
        for path in (root, champion.parent):
            shutil.rmtree(path, ignore_errors=True)
        make_examples(root / "examples", None, feed)
        older = shutil.copytree(root / "examples", folder / "older", dirs_exist_ok=True)
        train = read_slice(older, "train")
        train.head(train.height // 3).write_parquet(older / "train.parquet")
        champion.mkdir(parents=True)
        for name, make in (("recall", make_recall), ("rank", make_rank)):
            make(older, champion.parent / name, 1, **overrides)
            make(root / "examples", root / name, 1, **overrides)
            shutil.copytree(champion.parent / name / "saved_model", champion / name)
        fusion.search_predictions(champion.parent / "rank", champion)
        (champion / "manifest.json").write_text(json.dumps({"release": 1}))
        stage = Stage(root, champion)
        stage.search()
        stage.rehearse()
    return Stage(root, champion)


def pairs(config: simulator.Config, folder: Path, seeds: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Of one log: the gate on every ordered pair of trainings of one model, and on improvements of known size."""
    place = folder / f"log-{config.seed}"

    def measured() -> dict[str, Any]:
        shutil.rmtree(place, ignore_errors=True)
        examples = make_examples(place / "examples", None, config)
        for seed in range(1, seeds + 1):
            one_training(examples, place / str(seed), seed, overrides)
        return {"trained": seeds}

    spec = {"simulated": dataclasses.asdict(config), "seeds": seeds, "overrides": dict(overrides)}
    once(folder, place.name, spec, MODULES, measured)
    trained = [place / str(seed) for seed in range(1, seeds + 1)]
    judged = Judge(place / "examples", trained, simulator.Truth(config))
    same = [judged.between(*pair) for pair in itertools.permutations(range(seeds), 2)]
    return {"same": same, "better": list(judged.improvements())}


def one_training(examples: Path, out: Path, seed: int, overrides: Mapping[str, Any]) -> None:
    """A rank model's predictions, and the weights for them."""
    keras.backend.clear_session()
    with tempfile.TemporaryDirectory() as name:
        training.train_rank(examples, RANK_MODEL, overrides, seed, Path(name) / "weights")
        export_rank(*training.load_rank(examples, Path(name) / "weights"), Path(name))
        (out / "predictions").mkdir(parents=True)
        for part in ("validation", "test"):
            said = predict(examples, Path(name) / "saved_model", part)
            said.write_parquet(out / "predictions" / f"{part}.parquet")
    fusion.search_predictions(out, out / "weights")


class Judge:
    """The statistical half of the gate on rank models of one log: what else it asks for is as it should be."""

    def __init__(self, examples: Path, trained: Sequence[Path], truth: simulator.Truth) -> None:
        self._test = read_slice(examples, "test")
        keys = ["event_id", "event_time"]
        self._seen = pl.concat(read_slice(examples, part).select(keys) for part in ("train", "validation"))
        self._predictions = [pl.read_parquet(path / "predictions" / "test.parquet") for path in trained]
        self._weights = [json.loads((path / "weights" / "weights.json").read_text())["weights"] for path in trained]
        columns = (self._test[name].to_numpy() for name in ("user_id", "item_id", "time_ms", "scenario"))
        examined = truth.examination(self._test["position"].to_numpy(), self._test["device"].to_numpy())
        relevance = truth.probabilities(*columns)
        self._relevance = {label: relevance[label] for label in LABELS}
        self._chances = {label: relevance[label] * examined for label in LABELS}
        self._policy = Policy(baselines={}, guardrails={"gauc_click": 0.01})

    def between(self, candidate: int, champion: int) -> dict[str, Any]:
        """The verdict on one training against another."""
        return self._judged(self._heads(candidate), candidate, champion)

    def improvements(self) -> Iterator[dict[str, Any]]:
        """The verdict on each training when it is by each of GAINS better than another, in the expectation of labels.

        It is made so by moving its logits towards the true ones, or away.
        """
        for champion in range(len(self._predictions)):
            candidate = (champion + 1) % len(self._predictions)
            base = self._expected(self._heads(champion), champion)
            for gain in GAINS:
                low, high = -1.0, 1.0
                for _ in range(14):
                    share = (low + high) / 2
                    enough = self._expected(self._moved(candidate, share), candidate) - base >= gain
                    low, high = (low, share) if enough else (share, high)
                yield self._judged(self._moved(candidate, high), candidate, champion) | {"asked": gain}

    def _heads(self, number: int) -> dict[str, np.ndarray]:
        return {label: self._predictions[number][f"p_{label}"].to_numpy() for label in LABELS}

    def _moved(self, number: int, share: float) -> dict[str, np.ndarray]:
        return {
            label: expit((1 - share) * logit(own) + share * logit(self._relevance[label]))
            for label, own in self._heads(number).items()
        }

    def _expected(self, heads: Mapping[str, np.ndarray], number: int) -> float:
        """The mean AUC over all labels that the rows might have had, each row being as likely positive as it was."""
        score = fusion.fuse(heads, self._weights[number])
        return statistics.mean(expected_auc(score, chances) for chances in self._chances.values())

    def _judged(self, heads: Mapping[str, np.ndarray], candidate: int, champion: int) -> dict[str, Any]:
        weights = self._weights[candidate]
        theirs = self._heads(champion)
        shown = np.zeros((1, evidence.RECALL_DEPTH), np.int64)
        verdict = gate.judge(
            evidence.Evidence(
                predictions=self._predictions[champion].with_columns(
                    **{f"p_{label}": pl.Series(values) for label, values in heads.items()}
                ),
                score=fusion.fuse(heads, weights),
                test=self._test.select("event_id", "event_time", *LABELS),
                seen=self._seen,
                single_head="click",
                users=np.zeros(1, np.int64),
                relevant=[np.zeros(1, np.int64)],
                answers={"candidate": shown},
                items=np.zeros(1, np.int64),
                indexed=np.zeros(1, np.int64),
                trained_on={},
                window={},
                rehearsal={"requests": 1, "finite": True, "largest_difference": 0.0, "p99_ms": 1.0},
                champion=evidence.Champion(
                    1, theirs, fusion.fuse(theirs, self._weights[champion]), shown, {"release": 1}
                ),
            ),
            self._policy,
        )
        failed = [check.name for check in verdict.checks if not check.passed]
        difference = verdict.primary.get("difference", {})
        true = self._expected(heads, candidate) - self._expected(theirs, champion)
        return {"approved": verdict.approved, "difference": difference.get("value"), "true": true, "failed": failed}


def expected_auc(scores: np.ndarray, chances: np.ndarray) -> float:
    """Σ_ij p_i (1 − p_j) [s_i > s_j] / Σ_ij p_i (1 − p_j): the AUC of labels that are 1 with the chances p `[rows]`."""
    positive = chances[np.argsort(scores)]
    below = np.cumsum(1 - positive) - (1 - positive)
    return float(positive @ below) / float(positive.sum() * (1 - positive).sum())


def chance(found: Sequence[Mapping[str, Any]], goal: bool) -> list[Comparison]:
    """How often a model is promoted over itself under another seed, with a 95 % interval over logs and over trials."""
    trials = [one for of_log in found for one in of_log["same"]]
    promoted = sum(one["approved"] for one in trials)
    better = sum("better than the champion" not in one["failed"] for one in trials)
    differences = [one["difference"] for one in trials if one["difference"] is not None]
    shares = [statistics.mean(one["approved"] for one in of_log["same"]) for of_log in found]
    generator = np.random.default_rng(0)
    drawn = [np.mean(generator.choice(shares, len(shares))) for _ in range(10_000)]
    low = float(beta.ppf(0.025, promoted, len(trials) - promoted + 1)) if promoted else 0.0
    high = float(beta.ppf(0.975, promoted + 1, len(trials) - promoted))
    show_columns(
        "The same model, another seed",
        {
            "trials": [str(len(trials))],
            "promoted": [str(promoted)],
            "share": [f"{promoted / len(trials):.3f}"],
            "95 % interval, trials (Clopper-Pearson)": [f"{low:.3f} to {high:.3f}"],
            "95 % interval, logs drawn again": [f"{np.quantile(drawn, 0.025):.3f} to {np.quantile(drawn, 0.975):.3f}"],
            "better by the primary figure": [f"{better / len(trials):.3f}"],
            "of the promoted, truly better": [f"{sum(one['approved'] and one['true'] > 0 for one in trials)}"],
            "deviation of the difference": [f"{statistics.pstdev(differences):.4f}"],
        },
    )
    most = 1.0 if goal else None
    return [Comparison("promoted over the same model", promoted / len(trials), 0.05, "5 %", "", at_most=most)]


def power(found: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """How often an improvement of each size is promoted."""
    rows = [one for of_log in found for one in of_log["better"]]
    sizes = {gain: [one for one in rows if one["asked"] == gain] for gain in GAINS}
    approved = {gain: statistics.mean(one["approved"] for one in of_size) for gain, of_size in sizes.items()}
    show_columns(
        "True improvements",
        {
            "mean AUC": [f"+{gain:g}" for gain in GAINS],
            "trials": [str(len(of_size)) for of_size in sizes.values()],
            "measured": [f"{statistics.mean(one['difference'] for one in of_size):+.4f}" for of_size in sizes.values()],
            "promoted": [f"{share:.2f}" for share in approved.values()],
        },
    )
    return [Comparison(f"promoted, true gain +{gain:g}", share, 1.0, "all", "") for gain, share in approved.items()]


if __name__ == "__main__":
    main()
