"""Every rank model on KuaiRand-Pure beside gradient-boosted trees on the same features, five seeds each.

`make bench-rank DATA=path/to/KuaiRand-Pure` prints the tables and writes build/bench/rank.json; QUICK=1 is a smaller
form of it. What was measured stays in benchmarks/figures/rank: a run that was stopped goes on, and AGAIN=1 measures
what is of former code again.
KuaiRand tells no place on the screen: there the position tower learns one bias for all rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import polars as pl
from scipy.stats import t as students

from benchmarks.kept import FIGURES, FORMER, once, say_former, window
from benchmarks.rank_columns import SLICES, columns
from benchmarks.recall import Trial, make_examples, spread
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from penstock import calibration, candidate, metrics, training
from penstock.evaluation import rank_metrics
from penstock.examples import read_slice
from penstock.ranking import BINARY

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "build" / "peers" / "rank" / "bin" / "python"
SEEDS = (1, 2, 3, 4, 5)
TREES = "LightGBM"
MARGIN = 0.005
"""So much of an AUC a multi-task net may at most be below the single-task nets by chance between seeds."""

RARE = 0.25
"""Rare are the items with the fewest impressions in training, so many of them, and those it has not seen."""

RARE_POSITIVES = 50
"""Rows of rare items with fewer positives of a task have no AUC of it in the table."""

SHARED = {"own": False, "experts": 5}
"""MMoE as it was published. Where each task has experts of its own there is nothing that weights could share out."""
TRIALS = (
    Trial("single_task", "single_task", {}),
    Trial("shared_bottom", "shared_bottom", {}),
    Trial("mmoe", "mmoe", {}),
    Trial("mmoe, position tower", "mmoe", {"position_bias": "logit"}),
    Trial("sparse_moe", "sparse_moe", {}),
    Trial("youtube_ranking", "youtube_ranking", {}),
    Trial("bst", "bst", {}),
    Trial("shared_bottom, uncertainty", "shared_bottom", {"weighting": "uncertainty"}),
    Trial("mmoe, all shared", "mmoe", SHARED),
    Trial("mmoe, all shared, uncertainty", "mmoe", {**SHARED, "weighting": "uncertainty"}),
    Trial("mmoe, all shared, pareto", "mmoe", {**SHARED, "weighting": "pareto"}),
    Trial("shared_bottom, item2vec", "shared_bottom", {"pretrained": "item2vec"}),
    Trial("shared_bottom, item2vec frozen", "shared_bottom", {"pretrained": "item2vec", "frozen": True}),
    Trial("shared_bottom, graph", "shared_bottom", {"pretrained": "graph"}),
    Trial("shared_bottom, graph frozen", "shared_bottom", {"pretrained": "graph", "frozen": True}),
)
QUICK = (Trial("mmoe", "mmoe", {"epochs": 1}),)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a KuaiRand-Pure directory, as its authors publish it")
    parser.add_argument("--examples", type=Path, help="examples that were made of it already")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before the code changed")
    arguments = parser.parse_args()
    if not arguments.quick and arguments.data is None and arguments.examples is None:
        sys.exit("Say where the data is: make bench-rank DATA=path/to/KuaiRand-Pure (see the README)")
    print(machine(), flush=True)
    folder = BUILD / ("rank-quick" if arguments.quick else "rank")
    folder.mkdir(parents=True, exist_ok=True)
    examples = arguments.examples or make_examples(folder / "examples", None if arguments.quick else arguments.data)
    seeds, asked = (SEEDS[:1], QUICK) if arguments.quick else (SEEDS, TRIALS)

    kept, again = (folder, True) if arguments.quick else (FIGURES / "rank", arguments.again)
    measured = {TREES: trees(examples, kept, seeds, arguments.quick, again)}
    pairs = [(trial, seed) for seed in seeds for trial in asked]
    calls = [(trial, seed, examples, kept, again) for trial, seed in pairs]
    found = each(measure, calls, [f"{trial.name}, seed {seed}" for trial, seed in pairs])
    for (trial, _), of_trial in zip(pairs, found, strict=True):
        measured.setdefault(trial.name, []).append(of_trial)
    report(measured, goals=not arguments.quick)


def measure(trial: Trial, seed: int, examples: Path, folder: Path, again: bool) -> dict[str, Any]:
    """Figures of one training by slice, from the exported model, and its seconds; taken from `folder` if there."""

    def measured() -> dict[str, Any]:
        keras.backend.clear_session()
        with tempfile.TemporaryDirectory() as place:
            trained, out = Path(place) / "trained", Path(place) / "out"
            started = time.monotonic()
            training.train_rank(examples, trial.model, trial.overrides, seed, trained)
            seconds = time.monotonic() - started
            candidate.write_rank(examples, trained, out)
            found: dict[str, Any] = {"seconds": seconds}
            found["epochs"] = len(json.loads((trained / "history.json").read_text()))
            for part in SLICES:
                predicted = pl.read_parquet(out / "predictions" / f"{part}.parquet")
                found[part] = figures(predicted, frequent_items(examples))
        return found

    return once(folder, trial.model, trial.spec("rank", seed, examples), modules(trial), measured, again)


def modules(trial: Trial) -> list[str]:
    """The modules of the library that a trial's figures depend on."""
    found = ["penstock.training", "penstock.candidate", f"penstock.rank.{trial.model}"]
    if "pretrained" in trial.overrides:
        found.append(f"penstock.pretraining.{trial.overrides['pretrained']}")
    return found


def trees(examples: Path, folder: Path, seeds: Sequence[int], quick: bool, again: bool) -> list[dict[str, Any]]:
    """The same figures of LightGBM, which has an environment of its own; calibrated as our models are."""

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            source, target = Path(place) / "in.npz", Path(place) / "out.npz"
            np.savez(source, allow_pickle=False, **columns(examples))
            script, options = ROOT / "benchmarks" / "lightgbm_peer.py", ["--quick"] if quick else []
            subprocess.run([PEERS, "-W", "ignore", script, source, target, *map(str, seeds), *options], check=True)
            return of_trees(examples, target, len(seeds))

    spec = {"seeds": list(seeds), "quick": quick, "window": window(examples)}
    found = once(
        folder,
        "lightgbm",
        spec,
        ("benchmarks.lightgbm_peer", "benchmarks.rank_columns", "penstock.calibration"),
        measured,
        again,
    )
    for task in BINARY:
        print(f"{TREES}, {task}: {found['settings'][task]}", flush=True)
    return [run | {FORMER: True} if FORMER in found else run for run in found["runs"]]


def of_trees(examples: Path, answers: Path, seeds: int) -> dict[str, Any]:
    """What `lightgbm_peer` answered: its `settings` by task, and the figures of each seed, `runs`."""
    rows = {part: read_slice(examples, part) for part in SLICES}
    frequent = frequent_items(examples)
    runs: list[dict[str, Any]] = []
    with np.load(answers) as answer:
        for run in range(seeds):
            predicted: dict[str, dict[str, np.ndarray]] = {part: {} for part in SLICES}
            for task in BINARY:
                logits = {part: answer[f"{task}/{part}"][run] for part in SLICES}
                fitted = calibration.fit("temperature", rows["validation"][task].to_numpy(), logits["validation"])
                for part in SLICES:
                    predicted[part][f"p_{task}"] = fitted(logits[part])
            runs.append({part: figures(rows[part].with_columns(**predicted[part]), frequent) for part in SLICES})
        return {"settings": {task: str(answer[f"{task}/setting"]) for task in BINARY}, "runs": runs}


def frequent_items(examples: Path) -> pl.Series:
    """The ids of the items that are not rare: those with more impressions in training than the first `RARE` have."""
    shown = read_slice(examples, "train")["item_id"].value_counts()
    return shown.filter(pl.col("count") > pl.col("count").quantile(RARE))["item_id"]


def figures(predictions: pl.DataFrame, frequent: pl.Series) -> dict[str, float]:
    """`rank_metrics`, and `rare_auc_TASK` on the rows of the items that are not `frequent`."""
    found = rank_metrics(predictions)
    rows = predictions.filter(~pl.col("item_id").is_in(frequent.implode()))
    found["rare_rows"] = rows.height
    for task in BINARY:
        if rows[task].sum() >= RARE_POSITIVES:
            found[f"rare_auc_{task}"] = metrics.auc(rows[task].to_numpy(), rows[f"p_{task}"].to_numpy())
    return found


def report(measured: Mapping[str, Sequence[Mapping[str, Any]]], goals: bool) -> None:
    """A table a task, the rare items' table, and MMoE beside the trees and the single-task nets."""
    names = list(measured)

    def values(name: str, figure: str, part: str = "test") -> list[float]:
        return [run[part][figure] for run in measured[name]]

    for task in BINARY:
        columns: dict[str, Sequence[str | float]] = {task: names}
        columns["validation AUC"] = [spread(values(name, f"auc_{task}", "validation")) for name in names]
        for title, figure in (("AUC", "auc"), ("GAUC", "gauc"), ("log loss", "log_loss")):
            columns[title] = [spread(values(name, f"{figure}_{task}")) for name in names]
        columns["calibration error"] = [spread(values(name, f"calibration_error_{task}")) for name in names]
        columns["seeds"] = [str(len(measured[name])) for name in names]
        columns["seconds"] = ["" if name == TREES else _seconds(measured[name]) for name in names]
        show_columns(f"{task}: mean ± deviation over seeds, test slice unless it is said otherwise", columns)

    first = measured[TREES][0]["test"]
    tasks = [task for task in BINARY if f"rare_auc_{task}" in first]
    if tasks:
        rare = {task: [spread(values(name, f"rare_auc_{task}")) for name in names] for task in tasks}
        show_columns(f"AUC on the {first['rare_rows']:,} test rows of rare items", {"": names, **rare})

    rows: list[Comparison] = []
    for task in BINARY:
        ours = values("mmoe", f"auc_{task}")
        for peer in [peer for peer in (TREES, "single_task") if peer in measured]:
            theirs = values(peer, f"auc_{task}")
            least = None
            if goals:
                least = 1.0 if peer == TREES else 1.0 - min(chance(ours, theirs) / statistics.mean(theirs), MARGIN)
            pair = statistics.mean(ours), statistics.mean(theirs)
            rows.append(Comparison(f"AUC of {task}, test: mmoe", *pair, peer, "", at_least=least))
    show("MMoE on the test slice; single-task nets may be ahead by what chance between seeds explains", rows)
    say_former(run for runs in measured.values() for run in runs)
    print(f"written to {write('rank', rows)}")


def _seconds(runs: Sequence[Mapping[str, Any]]) -> str:
    return f"{statistics.mean(run['seconds'] for run in runs):.0f}"


def chance(a: Sequence[float], b: Sequence[float]) -> float:
    """How far two means may be apart if what is behind them is equal, one-sided at 95 %.

    `t_{0.95, ν} √(s_a²/n_a + s_b²/n_b)` with the degrees of freedom ν of Welch 1947, eq. 25 ff.
    """
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    if not sum(parts):
        return 0.0
    free = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return float(students.ppf(0.95, free)) * math.sqrt(sum(parts))


if __name__ == "__main__":
    main()
