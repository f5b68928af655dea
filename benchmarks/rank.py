"""Every rank model on KuaiRand-Pure beside gradient-boosted trees on the same features, five seeds each.

`make bench-rank DATA=path/to/KuaiRand-Pure` prints the tables and writes build/bench/rank.json; QUICK=1 is a smaller
form of it. What was measured stays in benchmarks/figures/rank: a run that was stopped goes on, and AGAIN=1 measures
what is of former code again.
KuaiRand tells no place on the screen: there the position tower learns one bias for all rows.
"""

from __future__ import annotations

import argparse
import hashlib
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

from benchmarks.kept import FIGURES, code, once, say_former, window
from benchmarks.recall import Trial, make_examples, spread
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from penstock import calibration, candidate, metrics, training
from penstock.evaluation import rank_metrics
from penstock.examples import Schema, read_slice
from penstock.ranking import BINARY, SIDES

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "build" / "peers" / "rank" / "bin" / "python"
SEEDS = (1, 2, 3, 4, 5)
SLICES = ("validation", "test")
TREES = "LightGBM"
LARGE = 100
"""Whether the trees read categories with more values than this, the validation slice says."""

MARGIN = 0.005
"""So much of an AUC a multi-task net may at most be below the single-task nets by chance between seeds."""

RARE = 0.25
"""Rare are the items with the fewest impressions in training, so many of them, and those it has not seen."""

RARE_POSITIVES = 50
"""Rows of rare items with fewer positives of a task have no AUC of it in the table."""

TOKENS = 10_000
"""A trait is `(feature + 1) · TOKENS + value`: the trees get a column a feature."""


SHARED = {"own": False, "experts": 5}
"""MMoE as it was published. Where each task has experts of its own there is nothing that weights could share out."""
TRIALS = (
    Trial("single_task", "single_task", {}),
    Trial("shared_bottom", "shared_bottom", {}),
    Trial("mmoe", "mmoe", {}),
    Trial("mmoe, position tower", "mmoe", {"position_bias": True}),
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

    measured = {TREES: trees(examples, folder, seeds, arguments.quick)}
    pairs = [(trial, seed) for seed in seeds for trial in asked]
    kept = folder if arguments.quick else FIGURES / "rank"
    calls = [(trial, seed, examples, kept, arguments.quick or arguments.again) for trial, seed in pairs]
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


def trees(examples: Path, folder: Path, seeds: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """The same figures of LightGBM, which has an environment of its own; calibrated as our models are."""
    script = ROOT / "benchmarks" / "lightgbm_peer.py"
    spec = [list(seeds), quick, window(examples), code([script, Path(__file__)])]
    kept = folder / f"lightgbm-{hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]}.npz"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as place:
            source, target = Path(place) / "in.npz", Path(place) / "out.npz"
            np.savez(source, allow_pickle=False, **columns(examples))
            options = ["--quick"] if quick else []
            subprocess.run([PEERS, "-W", "ignore", script, source, target, *map(str, seeds), *options], check=True)
            target.replace(kept)
    rows = {part: read_slice(examples, part) for part in SLICES}
    frequent = frequent_items(examples)
    runs: list[dict[str, Any]] = []
    with np.load(kept) as answers:
        for task in BINARY:
            print(f"{TREES}, {task}: {answers[f'{task}/setting']}", flush=True)
        for run in range(len(seeds)):
            predicted: dict[str, dict[str, np.ndarray]] = {part: {} for part in SLICES}
            for task in BINARY:
                logits = {part: answers[f"{task}/{part}"][run] for part in SLICES}
                fitted = calibration.fit("temperature", rows["validation"][task].to_numpy(), logits["validation"])
                for part in SLICES:
                    predicted[part][f"p_{task}"] = fitted(logits[part])
            runs.append({part: figures(rows[part].with_columns(**predicted[part]), frequent) for part in SLICES})
    return runs


def columns(examples: Path) -> dict[str, np.ndarray]:
    """What `lightgbm_peer` reads: the features that our models read, as trees take them.

    Numbers are as the log has them, ids their indices, a trait is a column a feature; of an item's tags the first two
    are columns, of a history its length.
    """
    schema = Schema.load(examples / "schema")
    rows = {part: read_slice(examples, part) for part in ("train", *SLICES)}
    traits = (rows["train"]["traits"].explode(empty_as_null=False) // TOKENS).unique().sort().to_list()
    found: dict[str, np.ndarray] = {"tasks": np.array(BINARY)}
    for part, of_part in rows.items():
        categories, numbers = _categories(of_part, schema, traits), _numbers(of_part, schema)
        table = np.column_stack([values.astype(np.float32) for values in (*categories.values(), *numbers.values())])
        found |= {f"{part}_columns": table, f"{part}_labels": of_part.select(BINARY).to_numpy()}
    kinds = np.array([len(np.unique(column)) for column in found["train_columns"][:, : len(categories)].T])
    return found | {
        "names": np.array([*categories, *numbers]),
        "small": np.flatnonzero(kinds <= LARGE),
        "large": np.flatnonzero(kinds > LARGE),
    }


def _categories(rows: pl.DataFrame, schema: Schema, traits: Sequence[int]) -> dict[str, np.ndarray]:
    """Columns of indices, NaN where there is none, `[rows]` by name."""
    found = {}
    for feature in schema.of(*SIDES):
        if feature.kind == "id":
            found[feature.name] = schema.encode(feature, rows[feature.name])
        elif feature.name == "tags":
            found |= {f"tag {place}": tags for place, tags in enumerate(schema.encode(feature, rows["tags"]).T[:2])}
    tokens = rows.select("traits").with_row_index("row").explode("traits", empty_as_null=False)
    for trait in traits:
        values = np.full(rows.height, np.nan)
        own = tokens.filter(pl.col("traits") // TOKENS == trait)
        values[own["row"].to_numpy()] = own["traits"].to_numpy() % TOKENS
        found[f"trait {trait}"] = values
    return found


def _numbers(rows: pl.DataFrame, schema: Schema) -> dict[str, np.ndarray]:
    """Columns of numbers, NaN where there is none, `[rows]` by name."""
    numbers = [feature.name for feature in schema.of(*SIDES) if feature.kind in ("count", "number")]
    found = {name: rows[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in numbers}
    return found | {"history": rows["history_items"].list.len().to_numpy()}


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
    say_former(run for name in names if name != TREES for run in measured[name])
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
