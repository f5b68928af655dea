"""Every sequence model on Amazon Beauty, leave-one-out, beside popularity, item-item CF and a published table.

`make bench-sequence DATA=path/to/beauty.txt` prints the table and writes build/bench/sequence.json; QUICK=1 is a
smaller form of it on simulated histories. What was measured stays in benchmarks/figures/sequence: a run that was
stopped goes on, and AGAIN=1 measures what is of former code again. Which model is best, the validation items say; it
gets more seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.kept import FIGURES, once, say_former
from benchmarks.leave_one_out import BASELINES, of_baseline, of_model, read, write
from benchmarks.recall import Trial, spread
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns
from benchmarks.table import write as write_rows
from penstock import training

SEEDS, MORE_SEEDS = (1, 2), (3, 4, 5)
SLICES = ("validation", "test")
NEGATIVES = 3000

LONG_FIT = {"epochs": 60, "patience": 5, "prefixes": 0}
"""Every item of a history is a row of its own: there are no others to make of it."""

SLOW_FIT = LONG_FIT | {"epochs": 200, "patience": 20}
"""For those that still find more in the first places when the whole ranking has long got no better."""

FALLING_FIT = LONG_FIT | {"epochs": 20, "patience": 20, "last_rate": 0.02}
"""For what finds most when its steps grow small: a stop by patience would end it before they are."""

SAMPLED = {"loss": "sampled_softmax", "sampler": "uniform", "sample": NEGATIVES}
MANY = {"loss": "sampled_softmax", "sampler": "unigram", "sample": 16000}

TRIALS = (
    Trial("sasrec", "sasrec", {**FALLING_FIT, **MANY, "dropout": 0.5}),
    Trial(f"sasrec, {NEGATIVES} negatives", "sasrec", {**LONG_FIT, **SAMPLED, "dropout": 0.5, "patience": 10}),
    Trial("sasrec, one negative", "sasrec", {**SLOW_FIT, "loss": "binary", "sampler": "uniform", "dropout": 0.2}),
    Trial("gru4rec", "gru4rec", {**LONG_FIT, **SAMPLED, "dropout": 0.5}),
    Trial("gru4rec, bpr_max", "gru4rec", {**LONG_FIT, "loss": "bpr_max", "sample": 2048, "dropout": 0.5}),
    Trial("narm", "narm", {**LONG_FIT, **SAMPLED}),
    Trial("bert4rec", "bert4rec", {**FALLING_FIT, "epochs": 25, **MANY, "dropout": 0.2, "cuts": 1, "last": 0.0}),
    Trial("attrec", "attrec", {**LONG_FIT, "patience": 15}),
    Trial("shan", "shan", LONG_FIT),
    Trial("transrec", "transrec", LONG_FIT),
    Trial("binn", "binn", LONG_FIT),
)
SMALL = {"epochs": 15, "patience": 15, "prefixes": 0, "dim": 32, "blocks": 1, "loss": "softmax", "batch_size": 32}
QUICK = (Trial("sasrec", "sasrec", SMALL),)

PUBLISHED = {
    "sasrec": (0.0533, 0.0327),
    f"sasrec, {NEGATIVES} negatives": (0.0490, 0.0295),
    "sasrec, one negative": (0.0246, 0.0126),
    "bert4rec": (0.0338, 0.0187),
}
"""HitRate@10 and NDCG@10 of Klenitskiy & Vasilev, RecSys 2023, table 3.

The first is of the whole softmax, and what our best is held against, whatever its loss: our "sasrec" draws negatives.
"""


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="beauty.txt, as the authors of BERT4Rec publish it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before the code changed")
    arguments = parser.parse_args()
    if not arguments.quick and arguments.data is None:
        sys.exit("Say where the data is: make bench-sequence DATA=path/to/beauty.txt (see the README)")
    print(machine(), flush=True)
    folder = BUILD / ("sequence-quick" if arguments.quick else "sequence")
    examples = folder / "examples"
    if not (examples / "window.json").exists():
        shutil.rmtree(examples, ignore_errors=True)
        write(simulated() if arguments.quick else read(arguments.data), examples)
    kept, again = folder if arguments.quick else FIGURES / "sequence", arguments.quick or arguments.again
    asked = QUICK if arguments.quick else TRIALS
    measured: dict[str, list[dict[str, Any]]] = {
        name: [{part: of_baseline(answer, examples, part)._asdict() for part in SLICES}]
        for name, answer in BASELINES.items()
    }
    pairs = [(trial, seed) for seed in SEEDS[: 1 if arguments.quick else None] for trial in asked]
    _measure_all(pairs, examples, kept, again, measured)
    best = max(asked, key=lambda trial: mean(measured[trial.name], "validation", "ndcg"))
    if not arguments.quick:
        _measure_all([(best, seed) for seed in MORE_SEEDS], examples, kept, again, measured)
    report(measured, best.name, {} if arguments.quick else PUBLISHED, goal=None if arguments.quick else 1.0)


def simulated(users: int = 400, items: int = 200, seed: int = 0) -> list[np.ndarray]:
    """Users who go from an item to one of the three behind it, in a ring."""
    random = np.random.default_rng(seed)
    lengths = random.integers(5, 15, users)
    starts = random.integers(0, items, users)
    return [
        1 + (start + np.cumsum(random.integers(1, 4, length))) % items
        for start, length in zip(starts, lengths, strict=True)
    ]


def _measure_all(
    pairs: Sequence[tuple[Trial, int]],
    examples: Path,
    kept: Path,
    again: bool,
    measured: dict[str, list[dict[str, Any]]],
) -> None:
    calls = [(trial, seed, examples, kept, again) for trial, seed in pairs]
    found = each(measure, calls, [f"{trial.name}, seed {seed}" for trial, seed in pairs])
    for (trial, _), figures in zip(pairs, found, strict=True):
        measured.setdefault(trial.name, []).append(figures)


def measure(trial: Trial, seed: int, examples: Path, kept: Path, again: bool) -> dict[str, Any]:
    """Figures of one training by slice, and its seconds; taken from `kept` if they are there."""

    def measured() -> dict[str, Any]:
        keras.backend.clear_session()
        with tempfile.TemporaryDirectory() as place:
            trained = Path(place) / "trained"
            started = time.monotonic()
            training.train_recall(examples, trial.model, trial.overrides, seed, trained)
            seconds = time.monotonic() - started
            model, schema = training.load_recall(examples, trained)
            epochs = len(json.loads((trained / "history.json").read_text()))
        figures = {part: of_model(model, schema, examples, part)._asdict() for part in SLICES}
        return figures | {"seconds": seconds, "epochs": epochs}

    modules = ("penstock.training", f"penstock.recall.{trial.model}")
    return once(kept, trial.model, trial.spec("recall", seed, examples), modules, measured, again)


def mean(runs: Sequence[Mapping[str, Any]], part: str, figure: str) -> float:
    return statistics.mean(run[part][figure] for run in runs)


def report(
    measured: Mapping[str, Sequence[Mapping[str, Any]]],
    best: str,
    published: Mapping[str, tuple[float, float]],
    goal: float | None,
) -> None:
    """The table, and ours beside what is published: the best by the validation items, and those of the same name."""
    names = list(measured)
    columns: dict[str, Sequence[str | float]] = {"": names}
    for part in SLICES:
        for figure, title in (("hit_rate", "HitRate@10"), ("ndcg", "NDCG@10")):
            columns[f"{title}, {part}"] = [spread([run[part][figure] for run in measured[name]]) for name in names]
    columns["seeds"] = [str(len(measured[name])) for name in names]
    for figure in ("epochs", "seconds"):
        columns[figure] = [
            "" if name in BASELINES else f"{statistics.mean(run[figure] for run in measured[name]):.0f}"
            for name in names
        ]
    show_columns("Leave-one-out, whole catalogue: mean ± deviation over seeds", columns)

    rows = []
    for name in [best, *(name for name in published if name != best)]:
        like = "sasrec" if name == best else name  # the best is held against the best
        for place, (figure, title) in enumerate((("hit_rate", "HitRate@10"), ("ndcg", "NDCG@10"))):
            ours = mean(measured[name], "test", figure)
            if like in published:
                peer = f"published: {like}"
                rows.append(Comparison(f"{title}, test: {name}", ours, published[like][place], peer, "", at_least=goal))
            for baseline in BASELINES if name == best else ():
                peer_value = mean(measured[baseline], "test", figure)
                rows.append(Comparison(f"{title}, test: {name}", ours, peer_value, baseline, "", at_least=goal))
    show("The best by validation NDCG@10, and what is published", rows)
    say_former(run for name in names if name not in BASELINES for run in measured[name])
    print(f"written to {write_rows('sequence', rows)}")


if __name__ == "__main__":
    main()
