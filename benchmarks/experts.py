"""How many gates of a mixture of experts collapse, with gate dropout and without, over twenty seeds.

Of both mixtures: where each task teaches an expert of its own, as is the default, and where all share five.

`make expert-trials` trains on a simulated log, counts the tasks whose gate leaves most experts unused or has next to
all of its share on one, prints a table and writes build/bench/gates.json; QUICK=1 is a smaller form of it. What was
measured stays in build/bench/experts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.kept import once, window
from benchmarks.rank import SHARED
from benchmarks.recall import SMALL, make_examples
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from penstock import training
from penstock.datasets import simulator
from penstock.examples import read_slice
from penstock.layers.experts import polarised, utilisation

FEED = simulator.Config(users=1500, items=800, items_per_day=30, days=10)
MIXTURES: dict[str, dict[str, Any]] = {"own experts": {"own": True}, "all shared": SHARED}
DROPOUTS = {"gate dropout": 0.1, "without": 0.0}
WAYS = {
    f"{mixture}, {way}": {**overrides, "gate_dropout": dropout}
    for mixture, overrides in MIXTURES.items()
    for way, dropout in DROPOUTS.items()
}
MODULES = ("penstock.training", "penstock.rank.mmoe", "penstock.datasets.simulator")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    print(machine(), flush=True)
    folder = BUILD / ("experts-quick" if quick else "experts")
    examples = make_examples(folder / "examples", None, SMALL if quick else FEED)
    seeds = range(1, 2) if quick else range(1, 21)
    less = {"epochs": 1} if quick else {}
    pairs = [(way, seed) for seed in seeds for way in WAYS]
    calls = [(examples, seed, way, WAYS[way] | less, folder) for way, seed in pairs]
    found: dict[str, list[dict[str, list[float]]]] = {}
    trials = each(trial, calls, [f"{way}, seed {seed}" for way, seed in pairs])
    for (way, _), shares in zip(pairs, trials, strict=True):
        found.setdefault(way, []).append(shares)
    report(found, goal=not quick)


def trial(examples: Path, seed: int, way: str, overrides: Mapping[str, Any], folder: Path) -> dict[str, list[float]]:
    """The mean share of each expert on the validation slice, by task; kept in `folder`."""

    def measured() -> dict[str, list[float]]:
        keras.backend.clear_session()
        with tempfile.TemporaryDirectory() as name:
            training.train_rank(examples, "mmoe", overrides, seed, Path(name))
            model, schema = training.load_rank(examples, Path(name))
            gates = training.gates(model, read_slice(examples, "validation"), schema)
        return {task: utilisation(shares).tolist() for task, shares in gates.items()}

    spec = {"overrides": dict(overrides), "seed": seed, "window": window(examples)}
    return once(folder, way.replace(",", "").replace(" ", "-"), spec, MODULES, measured)


def report(found: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], goal: bool) -> None:
    """How many gates collapsed, and how even the others are."""
    gates = {way: [shares for one in runs for shares in one.values()] for way, runs in found.items()}
    collapsed = {way: sum(polarised(np.array(shares)) for shares in of_way) for way, of_way in gates.items()}
    least = {way: [min(shares) for shares in of_way] for way, of_way in gates.items()}
    show_columns(
        "Gates",
        {
            "": list(gates),
            "gates": [str(len(of_way)) for of_way in gates.values()],
            "collapsed": [str(count) for count in collapsed.values()],
            "least share of an expert, mean": [f"{statistics.mean(values):.3f}" for values in least.values()],
            "lowest": [f"{min(values):.3f}" for values in least.values()],
        },
    )
    sound = {way: 1.0 - number / len(gates[way]) for way, number in collapsed.items()}
    rows = []
    for mixture in MIXTURES:
        kept, without = (sound[f"{mixture}, {way}"] for way in DROPOUTS)
        what = f"gates that did not collapse, {mixture}"
        rows += [
            Comparison(f"{what}, gate dropout", kept, 1.0, "all", "", at_least=1.0 if goal else None),
            Comparison(what, kept, without, "without", ""),
        ]
    show("Gate dropout", rows)
    print(f"written to {write('gates', rows)}")


if __name__ == "__main__":
    main()
