"""Every recall model and every loss on KuaiRand-Pure, beside popularity, item-item CF and iALS.

`make bench-recall DATA=path/to/KuaiRand-Pure` prints the table and writes build/bench/recall.json; QUICK=1 is a smaller
form of it, SEEDS=1 leaves the other seeds out. What was measured stays in benchmarks/figures/recall: a run that was
stopped goes on, and AGAIN=1 measures what is of former code again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import penstock
from benchmarks.kept import FIGURES, FORMER, once, say_former, window
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from feature_repo.store import historical, refresh
from penstock import baselines, candidate, training
from penstock.datasets import kuairand, simulator
from penstock.evaluation import DEPTHS, Kinds, Queries, ranking_metrics
from penstock.events import ITEMS, read_events, read_table
from penstock.examples import FIRST, Schema, encode_ids, write_examples

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "build" / "peers" / "recall" / "bin" / "python"
SEEDS = (1, 2, 3)
BASELINES = ("item-item CF", "iALS")
SLICES = ("validation", "test")


@dataclass(frozen=True)
class Trial:
    """A model with some parameters; the name says what it is in the table."""

    name: str
    model: str
    overrides: Mapping[str, Any]

    def spec(self, kind: str, seed: int, examples: Path) -> dict[str, Any]:
        """What the figures of a training depend on besides the code; `kind` is the model's package."""
        config = dataclasses.asdict(penstock.config(penstock.module(kind, self.model), self.overrides))
        return {"model": self.model, "config": config, "seed": seed, "window": window(examples)}


def trials(losses: Sequence[Mapping[str, Any]], models: Sequence[str], variants: Sequence[Trial]) -> list[Trial]:
    """Each model with its own loss, the first model with every loss, and variants."""
    of_losses = [
        Trial(f"{models[0]}, " + " ".join(str(value) for value in loss.values()), models[0], loss) for loss in losses
    ]
    return [*(Trial(model, model, {}) for model in models), *of_losses, *variants]


MODELS = (
    "youtube_dnn",
    "sdm",
    "dssm",
    "cnn_dssm",
    "lstm_dssm",
    "sasrec",
    "gru4rec",
    "bert4rec",
    "narm",
    "attrec",
    "shan",
    "transrec",
    "binn",
)
SAMPLE = 1024
"""Of a sampled softmax: where the models' own sample is as large as this catalogue, they take the whole softmax."""

LOSSES: tuple[dict[str, Any], ...] = (
    {"loss": "sampled_softmax", "sampler": "uniform", "sample": SAMPLE},
    {"loss": "sampled_softmax", "sampler": "unigram", "sample": SAMPLE},
    {"loss": "sampled_softmax", "sampler": "log_uniform", "sample": SAMPLE},
    {"loss": "in_batch"},
    {"loss": "nce"},
    {"loss": "binary"},
    {"loss": "tapas"},
    {"loss": "sagram"},
    {"loss": "sogram"},
    {"loss": "bpr"},
    {"loss": "bpr_max"},
    {"loss": "top1_max"},
    {"loss": "hinge"},
)
UNCORRECTED = {"loss": "sampled_softmax", "sampler": "unigram", "sample": SAMPLE, "log_q": False}
VARIANTS = (
    Trial("youtube_dnn, sampled_softmax unigram 1024 without logQ", "youtube_dnn", UNCORRECTED),
    Trial("sdm, 1 head", "sdm", {"heads": 1}),
    Trial("sdm, no gate", "sdm", {"gate": False}),
    Trial("sdm, 50 of 60 days", "sdm", {"long": 50, "long_days": 60.0}),
)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a KuaiRand-Pure directory, as its authors publish it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before the code changed")
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS), metavar="1-3")
    arguments = parser.parse_args()
    if not arguments.quick and arguments.data is None:
        sys.exit("Say where the data is: make bench-recall DATA=path/to/KuaiRand-Pure (see the README)")
    print(machine(), flush=True)
    folder = BUILD / ("recall-quick" if arguments.quick else "recall")
    examples = make_examples(folder / "examples", None if arguments.quick else arguments.data)
    figures, again = (folder, True) if arguments.quick else (FIGURES / "recall", arguments.again)
    seeds = SEEDS[: 1 if arguments.quick else arguments.seeds]
    asked = (
        [Trial("youtube_dnn", "youtube_dnn", {"epochs": 1})] if arguments.quick else trials(LOSSES, MODELS, VARIANTS)
    )

    measured: dict[str, list[dict[str, Any]]] = peers(examples, figures, again)
    pairs = [(trial, seed) for seed in seeds for trial in asked]
    calls = [(trial, seed, examples, figures, again) for trial, seed in pairs]
    found = each(measure, calls, [f"{trial.name}, seed {seed}" for trial, seed in pairs])
    for (trial, _), of_trial in zip(pairs, found, strict=True):
        measured.setdefault(trial.name, []).append(of_trial)
    report(measured, [trial.name for trial in asked], goal=None if arguments.quick else 1.0)


SMALL = simulator.Config(users=600, items=300, items_per_day=20, days=8)


def make_examples(out: Path, data: Path | None, simulated: simulator.Config = SMALL) -> Path:
    """Examples of KuaiRand-Pure, or of a simulated log, made as the pipeline makes them; kept in `out`."""
    if (out / "window.json").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as place:
        log, home = Path(place) / "log", Path(place) / "home"
        log.mkdir()
        if data is None:
            simulator.write_log(simulated, log)
        else:
            kuairand.write_log(kuairand.Config(path=str(data)), log)
        refresh(home, log, Path(place) / "features")
        joined = historical(home, read_events(log), "rank_v3")
        write_examples(joined, read_table(log / "items.parquet", ITEMS), out)
    return out


def measure(trial: Trial, seed: int, examples: Path, folder: Path, again: bool) -> dict[str, Any]:
    """Figures of one training by slice, from the exported model, and its seconds; taken from `folder` if there."""

    def measured() -> dict[str, Any]:
        keras.backend.clear_session()
        with tempfile.TemporaryDirectory() as place:
            trained, out = Path(place) / "trained", Path(place) / "out"
            started = time.monotonic()
            training.train_recall(examples, trial.model, trial.overrides, seed, trained)
            seconds = time.monotonic() - started
            candidate.write_recall(examples, trained, out)
            figures = json.loads((out / "metrics.json").read_text())
            epochs = len(json.loads((trained / "history.json").read_text()))
        return {part: figures[part] for part in SLICES} | {"seconds": seconds, "epochs": epochs}

    modules = ("penstock.training", "penstock.candidate", f"penstock.recall.{trial.model}")
    return once(folder, trial.model, trial.spec("recall", seed, examples), modules, measured, again)


def peers(examples: Path, folder: Path, again: bool) -> dict[str, list[dict[str, Any]]]:
    """Popularity, and what `implicit` finds in an environment of its own, its parameters by the validation slice."""
    queries = {part: Queries.of(examples, part) for part in SLICES}
    kinds = Kinds.of(examples)

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            source, target = Path(place) / "in.npz", Path(place) / "out.npz"
            np.savez(source, allow_pickle=False, **interactions(examples, queries))
            script = ROOT / "benchmarks" / "implicit_peer.py"
            subprocess.run([PEERS, script, source, target], check=True, env={"OPENBLAS_NUM_THREADS": "1"})
            return of_implicit(examples, target, queries, kinds)

    modules = ("benchmarks.implicit_peer", "penstock.baselines", "penstock.evaluation")
    found = once(folder, "implicit", {"window": window(examples)}, modules, measured, again)
    former = {FORMER: True} if FORMER in found else {}
    k = max(DEPTHS)
    runs: dict[str, list[dict[str, Any]]] = {"popularity": [{}]}
    for part, asked in queries.items():
        runs["popularity"][0][part] = ranking_metrics(baselines.popular(examples, asked.rows, k), asked, kinds)
    for method in BASELINES:
        print(f"{method}: {found[method]['setting']}", flush=True)
        runs[method] = [{part: found[method][part] for part in SLICES} | former]
    return runs


def of_implicit(
    examples: Path, answers: Path, queries: Mapping[str, Queries], kinds: Kinds
) -> dict[str, dict[str, Any]]:
    """What `implicit_peer` answered: the setting of each method, and its figures by slice."""
    ids = np.append(Schema.load(examples / "schema").vocabularies["item_id"], -1)
    found: dict[str, dict[str, Any]] = {}
    with np.load(answers) as answer:
        for method in BASELINES:
            found[method] = {"setting": str(answer[f"{method}/setting"])}
            for part in SLICES:
                found[method][part] = ranking_metrics(ids[answer[f"{method}/{part}"]], queries[part], kinds)
    return found


def interactions(examples: Path, queries: Mapping[str, Queries]) -> dict[str, np.ndarray]:
    """What `implicit_peer` reads: all that the models may learn from, users × items, and the queries of both slices."""
    vocabulary = Schema.load(examples / "schema").vocabularies["item_id"]
    pairs = baselines.long_views(examples)
    items = encode_ids(pairs["item_id"].to_numpy(), vocabulary) - FIRST
    users = np.unique(pairs["user_id"].to_numpy(), return_inverse=True)[1]
    found = {
        "items": np.array(len(vocabulary)),
        "k": np.array(max(DEPTHS)),
        "train_users": users[items >= 0],
        "train_items": items[items >= 0],
    }
    for part, asked in queries.items():
        found[f"{part}_count"] = np.array(asked.rows.height)
        for name, lists in (("", asked.rows["history_items"].to_list()), ("relevant_", asked.relevant)):
            rows = np.repeat(np.arange(len(lists)), [len(row) for row in lists])
            place = encode_ids(np.concatenate([np.empty(0, np.int64), *map(np.asarray, lists)]), vocabulary) - FIRST
            found[f"{part}_{name}rows"], found[f"{part}_{name}items"] = rows[place >= 0], place[place >= 0]
    return found


def report(measured: Mapping[str, Sequence[Mapping[str, Any]]], ours: Sequence[str], goal: float | None) -> None:
    """The tables, and the best of ours by the validation slice beside each baseline, as good as which is the goal."""
    names = list(measured)
    for part in SLICES:
        figures = list(measured["popularity"][0][part])
        columns: dict[str, Sequence[str | float]] = {"": names}
        for figure in figures:
            columns[figure] = [spread([run[part][figure] for run in measured[name]]) for name in names]
        columns["seeds"] = [str(len(measured[name])) for name in names]
        columns["seconds"] = [
            f"{statistics.mean(run['seconds'] for run in measured[name]):.0f}" if name in ours else "" for name in names
        ]
        show_columns(f"{part} slice: mean ± deviation over seeds", columns)

    def value(name: str, part: str, figure: str) -> float:
        return statistics.mean(run[part][figure] for run in measured[name])

    best = max(ours, key=lambda name: value(name, "validation", "recall@50"))
    rows = [
        Comparison(
            f"{figure}, test: {best}", value(best, "test", figure), value(peer, "test", figure), peer, "", at_least=goal
        )
        for figure in ("recall@50", "recall@200", "ndcg@50")
        for peer in ("popularity", *BASELINES)
    ]
    show("The best by validation recall@50, on the test slice", rows)
    say_former(run for runs in measured.values() for run in runs)
    print(f"written to {write('recall', rows)}")


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    main()
