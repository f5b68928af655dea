"""Position bias on the simulator, which knows what users would click if they looked at every place alike.

`make position-trials` trains the same model five ways on the logs of ten seeds: on the clicks as they are, with the
position tower in both of its forms, with the position as a feature, and on clicks that no position has touched (the
oracle). It prints how well each orders the test rows by their true relevance, on logs whose policy favours authors
whatever they are worth and on logs as the simulator makes them by default, and writes build/bench/position.json and
docs/images/position_bias.png; QUICK=1 is a smaller form of it. What was measured stays in benchmarks/figures/position:
a run that was stopped goes on, and AGAIN=1 measures what is of former code again.

True relevance is P(click | looked at), so those that know of positions are asked at the first place, at which everybody
looks, on whatever device: at an average place the answer has in it how far down users of a device look. The oracle's
users look as often as those of the log, at all places alike, so that it has as many clicks to learn from.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
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

from benchmarks.kept import FIGURES, once, say_former
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
FAVOURS = {"policy that favours authors": 3.0, "policy as by default": 0.0}
"""Of the policy: at 3 its liking of an author is most of what decides an item's place in a slate."""

DEVICES = (1, 2, 3)
GOAL = 0.8
"""The share of the oracle's gain that the tower is to have."""

ENOUGH = 0.9
"""In so many of the seeds."""

TOWERS = {"logit tower": "logit", "examination tower": "examination"}
WAYS: dict[str, dict[str, Any]] = {
    "as shown": {},
    **{way: {"position_bias": form, "positions": simulator.SLATE} for way, form in TOWERS.items()},
    "feature": {},
    "oracle": {},
}


def main() -> None:
    """Measures, prints, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before the code changed")
    arguments = parser.parse_args()
    quick = arguments.quick
    print(machine(), flush=True)
    folder = BUILD / "position-quick" if quick else FIGURES / "position"
    seeds = range(1, 2) if quick else range(1, 11)
    size = SMALL if quick else simulator.Config()
    overrides = {"epochs": 1} if quick else {}
    asked = [(policy, seed) for policy in FAVOURS for seed in seeds]
    calls = [
        (dataclasses.replace(size, seed=seed, favour=FAVOURS[policy]), folder, overrides, quick or arguments.again)
        for policy, seed in asked
    ]
    found = each(trial, calls, [f"{policy}, seed {seed}" for policy, seed in asked])
    rows: list[Comparison] = []
    for policy in FAVOURS:
        of_policy = [one for one, (asked_of, _) in zip(found, asked, strict=True) if asked_of == policy]
        rows += report(of_policy, policy, goal=not quick)
    say_former(found)
    print(f"written to {write('position', rows)}")
    draw(found[: len(seeds)], folder / "position_bias.png" if quick else FIGURE)


def trial(config: simulator.Config, folder: Path, overrides: Mapping[str, Any], again: bool) -> dict[str, Any]:
    """Rank correlations with the true relevance by way, and the towers' curves by device; kept in `folder`."""

    def measured() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            examples = make_examples(Path(name) / "examples", None, config)
            truth = simulator.Truth(config)
            found: dict[str, Any] = {"seed": config.seed, "correlation": {}, "curves": {}}
            for way, own in WAYS.items():
                keras.backend.clear_session()
                of_way = prepared(examples, way, truth, Path(name) / way)
                training.train_rank(of_way, MODEL, {**overrides, **own}, config.seed, Path(name) / "trained")
                model, schema = training.load_rank(of_way, Path(name) / "trained")
                rows = read_slice(of_way, "test")
                clicks = training.scores(model, rows, schema, 0 if way in TOWERS else None)["click"]
                found["correlation"][way] = float(spearmanr(clicks, relevance(rows, truth)).statistic)
                if way in TOWERS:
                    found["curves"][way] = curves(model, schema)
            found["curves"]["true"] = true_curves(read_slice(examples, "train"), truth)
        return found

    spec = {"simulated": dataclasses.asdict(config), "overrides": dict(overrides), "ways": WAYS}
    return once(folder, f"seed-{config.seed}", spec, (*MODULES, "benchmarks.position"), measured, again)


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


def relevance(rows: pl.DataFrame, truth: simulator.Truth) -> np.ndarray:
    """P(click | examined) of each row, `[rows]`."""
    columns = (rows[name].to_numpy() for name in ("user_id", "item_id", "time_ms", "scenario"))
    return truth.relevance(*columns)


def curves(model: Any, schema: Schema) -> dict[str, list[float]]:
    """By device what a tower has learnt of clicks, by place: a logit that is 0 at the first place, or e."""
    click = model.config.tasks.index("click")
    found = {}
    for device in DEVICES:
        learnt = model.position_bias.curve(int(encode_ids(np.array(device), schema.vocabularies["device"])))
        found[str(device)] = (learnt if learnt.ndim == 1 else learnt[:, click] - learnt[0, click]).tolist()
    return found


def true_curves(rows: pl.DataFrame, truth: simulator.Truth) -> dict[str, dict[str, list[float]]]:
    """By form and device what is true: e, and the term b_p with `mean σ(logit relevance + b_p) = mean e_p relevance`.

    The term is for a model that knows the relevance of each row.
    """
    known = relevance(rows, truth)
    logits = logit(np.clip(known, 1e-9, 1 - 1e-9))
    places = np.arange(simulator.SLATE)
    found: dict[str, dict[str, list[float]]] = {form: {} for form in TOWERS.values()}
    for device in DEVICES:
        looked = truth.examination(places, device)
        low, high = np.full(len(places), -8.0), np.zeros(len(places))
        for _ in range(50):
            middle = (low + high) / 2
            above = np.array([expit(logits + shift).mean() for shift in middle]) > looked * known.mean()
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        found["logit"][str(device)], found["examination"][str(device)] = low.tolist(), looked.tolist()
    return found


def report(found: Sequence[Mapping[str, Any]], title: str, goal: bool) -> list[Comparison]:
    """The correlations by seed, and in how many seeds the goals hold."""
    by_way = {way: np.array([one["correlation"][way] for one in found]) for way in WAYS}
    gain = by_way["oracle"] - by_way["as shown"]
    shares = {way: (by_way[way] - by_way["as shown"]) / gain for way in (*TOWERS, "feature")}
    columns: dict[str, Sequence[Any]] = {"seed": [*(str(one["seed"]) for one in found), "mean"]}
    for way, values in by_way.items():
        columns[way] = [f"{value:.4f}" for value in (*values, values.mean())]
    for way, values in shares.items():
        columns[f"gain of {way}"] = [f"{value:.2f}" for value in (*values, values.mean())]
    show_columns(f"Rank correlation with true relevance, {title}", columns)
    rows = []
    for way in TOWERS:
        recovered, beaten = np.mean(shares[way] >= GOAL), np.mean(by_way[way] > by_way["feature"])
        for name, share in ((f"{GOAL:.0%} of the oracle's gain", recovered), ("more than the feature", beaten)):
            rows.append(
                Comparison(
                    f"{way}: seeds with {name}", float(share), 1.0, "all seeds", "", at_least=ENOUGH if goal else None
                )
            )
    show(f"Position towers, {title}", rows)
    return rows


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Learnt curves of every seed over the true one, by form and device."""
    figure, axes = plt.subplots(
        len(TOWERS), len(DEVICES), figsize=(10, 5.6), sharex=True, sharey="row", layout="constrained"
    )
    places = np.arange(1, simulator.SLATE + 1)
    for (way, form), line in zip(TOWERS.items(), axes, strict=True):
        for axis, device in zip(line, DEVICES, strict=True):
            for one in found:
                axis.plot(places, one["curves"][way][str(device)], color="tab:blue", alpha=0.4, linewidth=1)
            axis.plot(places, found[0]["curves"]["true"][form][str(device)], color="black", linewidth=2)
        line[0].set_ylabel("logit of a click, first place 0" if form == "logit" else "share who look")
    for axis, device in zip(axes[0], DEVICES, strict=True):
        axis.set(title=f"device {device}", xticks=places[::3])
    for axis in axes[-1]:
        axis.set(xlabel="place in the slate")
    axes[-1, -1].plot([], [], color="black", linewidth=2, label="true")
    axes[-1, -1].plot([], [], color="tab:blue", label=f"learnt, {len(found)} seed{'s' if len(found) > 1 else ''}")
    axes[-1, -1].legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
