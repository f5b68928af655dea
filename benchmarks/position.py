"""Position bias on the simulator, which knows what users would click if they looked at every place alike.

`make position-trials` trains the same model four ways on the logs of ten seeds: on the clicks as they are, with the
position tower, with the position as a feature, and on clicks that no position has touched (the oracle). It prints how
well each orders the test rows by their true relevance, and writes build/bench/position.json and
docs/images/position_bias.png; QUICK=1 is a smaller form of it. What was measured stays in build/bench/position.

The policy of these logs favours authors whatever they are worth: where what is worth more stands higher anyway, as in
the default log, position misleads nobody about the order. The oracle's users look as often as those of the log, at all
places alike, so that it has as many clicks to learn from.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from scipy.special import expit, logit
from scipy.stats import spearmanr

from benchmarks.kept import once
from benchmarks.recall import SMALL, make_examples
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from penstock import training
from penstock.datasets import simulator
from penstock.examples import FEATURES, Feature, Schema, encode_ids, fit_schema, read_slice

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "images" / "position_bias.png"
MODEL = "shared_bottom"
MODULES = ("penstock.training", f"penstock.rank.{MODEL}", "penstock.datasets.simulator")
FAVOUR = 3.0
"""Of the policy: an author's place in a slate is next to all that decides an item's."""

DEVICES = (1, 2, 3)
GOAL = 0.8
"""The share of the oracle's gain that the tower is to have."""

ENOUGH = 0.9
"""In so many of the seeds."""

WAYS: dict[str, dict[str, Any]] = {
    "as shown": {},
    "tower": {"position_bias": True, "positions": simulator.SLATE},
    "feature": {},
    "oracle": {},
}


def main() -> None:
    """Measures, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    print(machine(), flush=True)
    folder = BUILD / ("position-quick" if quick else "position")
    seeds = range(1, 2) if quick else range(1, 11)
    size = SMALL if quick else simulator.Config()
    overrides = {"epochs": 1} if quick else {}
    calls = [(dataclasses.replace(size, seed=seed, favour=FAVOUR), folder, overrides) for seed in seeds]
    found = each(trial, calls, [f"seed {seed}" for seed in seeds])
    report(found, goal=not quick)
    draw(found, folder / "position_bias.png" if quick else FIGURE)


def trial(config: simulator.Config, folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Rank correlations with the true relevance by way, and the tower's curves by device; kept in `folder`."""

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            examples = make_examples(Path(name) / "examples", None, config)
            truth = simulator.Truth(config)
            found: dict[str, Any] = {"seed": config.seed, "correlation": {}}
            for way, own in WAYS.items():
                keras.backend.clear_session()
                of_way = prepared(examples, way, truth, Path(name) / way)
                training.train_rank(of_way, MODEL, {**overrides, **own}, config.seed, Path(name) / "trained")
                model, schema = training.load_rank(of_way, Path(name) / "trained")
                found["correlation"][way] = correlation(model, schema, read_slice(of_way, "test"), truth)
                if way == "tower":
                    found["curves"] = curves(model, schema, read_slice(of_way, "train"), truth)
        return found

    spec = {"simulated": dataclasses.asdict(config), "overrides": dict(overrides)}
    return once(folder, str(config.seed), spec, (*MODULES, "benchmarks.position"), measured)


def prepared(examples: Path, way: str, truth: simulator.Truth, out: Path) -> Path:
    """The examples as a way learns from them."""
    if way not in ("feature", "oracle"):
        return examples
    shutil.copytree(examples, out)
    if way == "feature":
        features = (*FEATURES, Feature("position", "context", "id", vocabulary="position"))
        fit_schema(read_slice(examples, "train"), features).save(out / "schema")
        # a slate is ordered by the answer: all rows are asked at the first place
        test = read_slice(examples, "test").with_columns(position=pl.lit(0, pl.Int64))
        test.write_parquet(out / "test.parquet")
        return out
    for part in ("train", "validation"):
        rows = read_slice(examples, part)
        unbiased(rows, truth).write_parquet(out / f"{part}.parquet")
    return out


def unbiased(rows: pl.DataFrame, truth: simulator.Truth) -> pl.DataFrame:
    """The rows with what users would have done who look at all places alike; the features stay as they were."""
    users, of = np.unique(rows["user_id"].to_numpy(), return_inverse=True)
    ids, shown = np.unique(rows["item_id"].to_numpy(), return_inverse=True)
    times, scenarios = rows["time_ms"].to_numpy(), rows["scenario"].to_numpy()
    answer = truth.answer(truth.users(users), of, truth.items(ids), shown, times, scenarios)
    often = truth.examination(rows["position"].to_numpy(), rows["device"].to_numpy()).mean()
    looked = np.full(rows.height, often)
    labels = truth.respond(answer, looked, rows["request_id"].to_numpy(), rows["item_id"].to_numpy())
    return rows.with_columns(**{name: pl.Series(values).cast(rows.schema[name]) for name, values in labels.items()})


def correlation(model: Any, schema: Schema, rows: pl.DataFrame, truth: simulator.Truth) -> float:
    """Spearman's rank correlation of the probability of a click and the relevance, over all rows."""
    clicks = training.scores(model, rows, schema)["click"]
    return float(spearmanr(clicks, relevance(rows, truth)).statistic)


def relevance(rows: pl.DataFrame, truth: simulator.Truth) -> np.ndarray:
    """P(click | examined) of each row, `[rows]`."""
    columns = (rows[name].to_numpy() for name in ("user_id", "item_id", "time_ms", "scenario"))
    return truth.relevance(*columns)


def curves(model: Any, schema: Schema, rows: pl.DataFrame, truth: simulator.Truth) -> dict[str, dict[str, list[float]]]:
    """By device, what each place adds to the logit of a click: as learnt, and as it is; both 0 at the first place.

    As it is: b_p with `mean σ(logit relevance + b_p) = mean examination(p) relevance` over the training rows.
    """
    known = relevance(rows, truth)
    logits = logit(np.clip(known, 1e-9, 1 - 1e-9))
    places = np.arange(simulator.SLATE)
    click = model.config.tasks.index("click")
    found = {}
    for device in DEVICES:
        index = int(encode_ids(np.array(device), schema.vocabularies["device"]))
        learnt = model.position_bias.curve(index)[:, click]
        wanted = truth.examination(places, device) * known.mean()
        low, high = np.full(len(places), -8.0), np.zeros(len(places))
        for _ in range(50):
            middle = (low + high) / 2
            above = np.array([expit(logits + shift).mean() for shift in middle]) > wanted
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        found[str(device)] = {"learnt": (learnt - learnt[0]).tolist(), "true": low.tolist()}
    return found


def report(found: Sequence[Mapping[str, Any]], goal: bool) -> None:
    """The correlations by seed, and in how many seeds the goals hold."""
    by_way = {way: [one["correlation"][way] for one in found] for way in WAYS}
    shares = [
        (one["correlation"]["tower"] - one["correlation"]["as shown"])
        / (one["correlation"]["oracle"] - one["correlation"]["as shown"])
        for one in found
    ]
    columns: dict[str, Sequence[Any]] = {"seed": [str(one["seed"]) for one in found]}
    columns |= {way: [f"{value:.4f}" for value in values] for way, values in by_way.items()}
    show_columns(
        "Rank correlation with true relevance", columns | {"of the gain": [f"{share:.2f}" for share in shares]}
    )
    recovered = statistics.mean(share >= GOAL for share in shares)
    beaten = statistics.mean(a > b for a, b in zip(by_way["tower"], by_way["feature"], strict=True))
    rows = [
        Comparison(
            f"seeds with {GOAL:.0%} of the oracle's gain",
            recovered,
            1.0,
            "all seeds",
            "",
            at_least=ENOUGH if goal else None,
        ),
        Comparison("seeds above the position as a feature", beaten, 1.0, "all seeds", ""),
        *(
            Comparison(
                "tower, mean rank correlation", statistics.mean(by_way["tower"]), statistics.mean(values), way, ""
            )
            for way, values in by_way.items()
            if way != "tower"
        ),
    ]
    show("Position tower", rows)
    print(f"written to {write('position', rows)}")


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Learnt curves of every seed over the true one, by device."""
    figure, axes = plt.subplots(1, len(DEVICES), figsize=(10, 3.2), sharey=True, layout="constrained")
    places = np.arange(1, simulator.SLATE + 1)
    for axis, device in zip(axes, DEVICES, strict=True):
        for one in found:
            axis.plot(places, one["curves"][str(device)]["learnt"], color="tab:blue", alpha=0.4, linewidth=1)
        axis.plot(places, found[0]["curves"][str(device)]["true"], color="black", linewidth=2)
        axis.set(title=f"device {device}", xlabel="place in the slate", xticks=places[::3])
    axes[0].set_ylabel("logit of a click, first place 0")
    axes[-1].plot([], [], color="black", linewidth=2, label="true")
    axes[-1].plot([], [], color="tab:blue", label=f"learnt, {len(found)} seed{'s' if len(found) > 1 else ''}")
    axes[-1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
