"""Look-alike on items that are new: beside other ways to score them, with an audience, and how fast.

`make bench-ralm DATA=path/to/KuaiRand-Pure` prints the tables and writes build/bench/ralm.json and ralm-k.png; QUICK=1
is a smaller form of it, on a simulated log, SEEDS=1 leaves the other seeds out. What was measured of a seed stays in
benchmarks/figures/ralm: a run that was stopped goes on, and AGAIN=1 measures what is of former code again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from scipy import stats
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import penstock
from benchmarks import ralm_live
from benchmarks.kept import FIGURES, once, say_former, window
from benchmarks.recall import make_examples
from benchmarks.side_by_side import each
from benchmarks.table import BUILD, Comparison, machine, show, show_columns, write
from penstock import metrics, training
from penstock.datasets import simulator
from penstock.events import DAY_MS, ITEMS, read_table
from penstock.examples import FIRST, Schema, encode_ids, read_slice, write_examples
from penstock.look_alike import LEAST_SEEDS, Content, Scorer, Table, cluster, item_of
from penstock.look_alike_training import Config, Liked, train
from penstock.retrieval import Retrieval
from penstock.seeds import LIKED

YOUNG = 1 / 3
"""The share of the items, those that appeared last, that are asked for."""
DEPTHS = (10, 50)
CLUSTERS = (1, 2, 5, 10, 20, 30, 50)
WAYS = {
    "RALM without local": Config(alpha=1.0, beta=0.0),
    "RALM without global": Config(alpha=0.0, beta=1.0),
    "RALM": Config(),
}
TOWERS = ("ralm_user", "youtube_dnn")
MODULES = (
    "benchmarks.ralm",
    "penstock.training",
    "penstock.look_alike_training",
    *(f"penstock.recall.{name}" for name in TOWERS),
)
MEASURES = ("auc", *(f"prec@{k}" for k in DEPTHS))


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        seeds: trainings of each way.
        epochs: of the towers, at most.
        ways: names in `WAYS`.
        world: of the simulator's audience, which makes `requests` in a day.
        repeats: of what is timed.
        clustered: seeds of k-means.
    """

    seeds: tuple[int, ...]
    epochs: int
    ways: tuple[str, ...]
    world: simulator.Config
    requests: int
    repeats: int
    clustered: int
    live: ralm_live.Size


FULL = Size(
    (1, 2, 3, 4, 5),
    12,
    tuple(WAYS),
    simulator.Config(users=3000, items=1000, items_per_day=60, days=14),
    20_000,
    300,
    100_000,
    ralm_live.FULL,
)
QUICK = Size(
    (1,),
    2,
    ("RALM",),
    simulator.Config(users=400, items=200, items_per_day=15, days=8),
    300,
    10,
    20_000,
    ralm_live.QUICK,
)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a KuaiRand-Pure directory, as its authors publish it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before the code changed")
    parser.add_argument("--seeds", type=int, choices=range(1, len(FULL.seeds) + 1), metavar="1-5")
    arguments = parser.parse_args()
    if not arguments.quick and arguments.data is None:
        sys.exit("Say where the data is: make bench-ralm DATA=path/to/KuaiRand-Pure (see the README)")
    print(machine(), flush=True)
    quick, again = arguments.quick, arguments.quick or arguments.again
    size = QUICK if quick else FULL
    folder = BUILD / ("ralm-quick" if quick else "ralm")
    figures = folder if quick else FIGURES / "ralm"
    simulated = make_examples(folder / "simulated", None, size.world)
    examples = simulated if quick else make_examples(folder / "examples", arguments.data)
    seeds = size.seeds[: arguments.seeds]
    calls = [(examples, figures, seed, size.epochs, size.ways, again) for seed in seeds]
    # a single one is of this process: the audience asks for the same tower
    found = [offline(*calls[0])] if quick else each(offline, calls, [f"seed {seed}" for seed in seeds])
    rows = of_new_items(found, most_seeds(examples), goals=not quick)
    days = [(simulated, figures, size.world, seed, size.epochs, size.requests, again) for seed in seeds]
    shown = [audience(*days[0])] if quick else each(audience, days, [f"audience, seed {seed}" for seed in seeds])
    rows += with_audience(shown, goals=not quick)
    rows += speed(size.repeats, size.clustered)
    rows += at_work(ralm_live.live(folder, size.live), size.live.items)
    show("Look-alike", rows)
    say_former([*found, *shown])
    print(f"written: {write('ralm-quick' if quick else 'ralm', rows)}, {elbow(found, folder)}")


@dataclass(frozen=True)
class Split:
    """What was known at the cut, the end of the training slice, and what came after it.

    Attributes:
        users: raw ids in order; a user's number is his place.
        before, at: the last row of each user before the cut, and the first after it of those who came.
        seeds: who liked what before it, items by their index in the schema.
        young: indices of the items that appeared last, of those that have two seeds or more.
    """

    users: np.ndarray
    before: pl.DataFrame
    at: pl.DataFrame
    seeds: Liked
    young: np.ndarray
    later: pl.DataFrame

    @staticmethod
    def of(examples: Path, schema: Schema) -> Split:
        """That of an examples directory."""
        rows = read_slice(examples, "train")
        later = pl.concat([read_slice(examples, part) for part in ("validation", "test")])
        before = rows.unique("user_id", keep="last", maintain_order=True).sort("user_id")
        users = before["user_id"].to_numpy()
        later = later.filter(pl.col("user_id").is_in(users.tolist()))
        liked = rows.filter(pl.col(LIKED) == 1)
        seeds = Liked.of(np.searchsorted(users, liked["user_id"].to_numpy()), _indices(liked, schema))
        first = rows.group_by("item_id").agg(pl.col("event_time").min()).sort("event_time", "item_id")
        last = _indices(first.tail(int(first.height * YOUNG)), schema)
        several = np.bincount(seeds.items, minlength=schema.size("item_id")) >= 2
        at = later.unique("user_id", keep="first", maintain_order=True)
        return Split(users, before, at, seeds, np.sort(last[several[last]]), later)

    def liked_later(self, schema: Schema) -> Liked:
        """Who liked which of the known items after the cut."""
        known = pl.col("item_id").is_in(schema.vocabularies["item_id"].tolist())
        rows = self.later.filter((pl.col(LIKED) == 1) & known)
        return Liked.of(np.searchsorted(self.users, rows["user_id"].to_numpy()), _indices(rows, schema))


def _indices(rows: pl.DataFrame, schema: Schema) -> np.ndarray:
    return encode_ids(rows["item_id"].to_numpy(), schema.vocabularies["item_id"])


class Known(NamedTuple):
    """What there is of an examples directory before any way to score: a tower, and users' vectors by it at the cut."""

    schema: Schema
    split: Split
    tower: Retrieval
    vectors: np.ndarray


@cache
def known(examples: Path, seed: int, epochs: int) -> Known:
    """With the tower of RALM."""
    schema = Schema.load(examples / "schema")
    split = Split.of(examples, schema)
    tower = _trained(examples, "ralm_user", seed, epochs)
    return Known(schema, split, tower, training.query_vectors(tower, split.before, schema))


def configs(epochs: int) -> dict[str, Any]:
    """What each model is trained with, whatever else of it changes by default one day."""
    towers = {name: penstock.config(penstock.module("recall", name), {"epochs": epochs}) for name in TOWERS}
    heads = {way: _settings(config, epochs) for way, config in WAYS.items()}
    return {name: asdict(config) for name, config in {**towers, **heads}.items()}


def _settings(config: Config, epochs: int) -> Config:
    return replace(config, epochs=min(epochs, config.epochs))


def _trained(examples: Path, name: str, seed: int, epochs: int) -> Retrieval:
    with tempfile.TemporaryDirectory() as place:
        training.train_recall(examples, name, {"epochs": epochs}, seed, Path(place) / name)
        return training.load_recall(examples, Path(place) / name)[0]


@cache
def scorer_of(examples: Path, seed: int, epochs: int, config: Config) -> Scorer:
    """A look-alike model on that tower; young items, which will be asked for, help no one to stop in time."""
    schema, split, _, vectors = known(examples, seed, epochs)
    later = split.liked_later(schema)
    old = ~np.isin(later.items, split.young)
    return train(vectors, split.seeds, Liked(*(part[old] for part in later)), _settings(config, epochs), seed)[0]


def offline(examples: Path, folder: Path, seed: int, epochs: int, ways: tuple[str, ...], again: bool) -> dict[str, Any]:
    """The figures of each way to score young items after the cut, by name; and the elbow of k."""

    def measured() -> dict[str, Any]:
        schema, split, tower, vectors = known(examples, seed, epochs)
        youtube = _trained(examples, "youtube_dnn", seed, epochs)
        scores = {"logistic regression": _regression(examples, schema, split)}
        items = training.item_vectors(youtube, split.young)
        scores["YouTubeDNN"] = training.query_vectors(youtube, split.at, schema) @ items.T
        scores["YouTubeDNN of the day before"] = _of_the_day_before(examples, split, seed, epochs)
        asked = training.query_vectors(tower, split.at, schema)
        of_item = {item: split.seeds.users[split.seeds.items == item] for item in split.young.tolist()}
        sums = np.array([vectors[users].sum(axis=0) for users in of_item.values()])
        for name, prior in (("mean of seeds", 0.0), ("mean of seeds and the mean user", Config().prior)):
            scores[name] = _unit(asked) @ _unit(sums + prior * vectors.mean(axis=0)).T
        for name in ways:
            scorer = scorer_of(examples, seed, epochs, WAYS[name])
            table = Table.of(1, "", 1, 0, scorer, {i: item_of(vectors[u], len(u), scorer) for i, u in of_item.items()})
            scores[name] = np.array([scorer.score(user, table.seeds, table.counts, table.summaries) for user in asked])
        figures = {name: judge(of, split, schema) for name, of in scores.items()}
        return {"figures": figures, "elbow": _inertia(vectors, [users for users in of_item.values() if len(users) > 5])}

    spec = {"seed": seed, "ways": ways, "configs": configs(epochs), "window": window(examples)}
    return once(folder, "offline", spec, MODULES, measured, again)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _of_the_day_before(examples: Path, split: Split, seed: int, epochs: int) -> np.ndarray:
    """What YouTubeDNN that was trained a day before the cut says at the cut: `[users who came, young items]`.

    The day that it does not learn from tells it when to stop. What it does not know scores lowest.
    """
    joined = pl.concat([read_slice(examples, part) for part in ("train", "validation")])
    with tempfile.TemporaryDirectory() as place:
        earlier = Path(place) / "examples"
        write_examples(joined, read_table(examples / "items.parquet", ITEMS), earlier, validation_days=1)
        model = _trained(earlier, "youtube_dnn", seed, epochs)
        schema = Schema.load(earlier / "schema")
    ids = Schema.load(examples / "schema").vocabularies["item_id"][split.young - FIRST]
    places = encode_ids(ids, schema.vocabularies["item_id"])
    scores = training.query_vectors(model, split.at, schema) @ training.item_vectors(model, places).T
    return np.where(places >= FIRST, scores, scores.min() - 1.0)


def judge(scores: np.ndarray, split: Split, schema: Schema) -> dict[str, float]:
    """How good scores `[users who came, young items]` are of what these users did later.

    The AUC is of what was shown to them of the young items; prec@k of the first k of all young items that they have not
    liked yet, over the users who liked one.
    """
    row_of = {user: row for row, user in enumerate(split.at["user_id"].to_list())}
    place = {item: column for column, item in enumerate(split.young.tolist())}
    items = _indices(split.later, schema)
    known = np.isin(items, split.young)
    shown = split.later.filter(pl.Series(known))
    rows = np.array([row_of[user] for user in shown["user_id"].to_list()], int)
    columns = np.array([place[item] for item in items[known].tolist()], int)
    labels = shown[LIKED].to_numpy()
    relevant = np.zeros(scores.shape, bool)
    relevant[rows[labels == 1], columns[labels == 1]] = True
    open_ = scores.astype(np.float64).copy()
    number = {user: row for row, user in enumerate(split.users.tolist())}
    numbers = np.array([number[user] for user in split.at["user_id"].to_list()])
    row_by_number = np.full(len(split.users), -1)
    row_by_number[numbers] = np.arange(len(numbers))
    young = np.isin(split.seeds.items, split.young)
    seen_rows = row_by_number[split.seeds.users[young]]
    seen_columns = np.array([place[item] for item in split.seeds.items[young].tolist()], int)
    open_[seen_rows[seen_rows >= 0], seen_columns[seen_rows >= 0]] = -np.inf
    best = np.argsort(-open_, axis=1, kind="stable")
    who = relevant.any(axis=1)
    hits = np.take_along_axis(relevant, best, axis=1)[who]
    found = {f"prec@{k}": float(hits[:, :k].sum(axis=1).mean() / k) for k in DEPTHS}
    return {"auc": metrics.auc(labels, scores[rows, columns]), **found}


def most_seeds(examples: Path) -> dict[str, float]:
    """The figures of young items in the order of how many seeds they have, alike for everybody."""
    schema = Schema.load(examples / "schema")
    split = Split.of(examples, schema)
    counts = np.bincount(split.seeds.items, minlength=schema.size("item_id"))[split.young]
    print(
        f"{len(split.young)} young items with {np.median(counts):.0f} seeds in the median and {counts.max()} at most, "
        f"{split.at.height} users who came after the cut",
        flush=True,
    )
    return judge(np.tile(counts, (split.at.height, 1)), split, schema)


def _regression(examples: Path, schema: Schema, split: Split) -> np.ndarray:
    """Logistic regression on the numbers of user and item, fitted before the cut: `[users who came, young items]`."""
    rows = read_slice(examples, "train")
    # what is of both at once would have to be made for each pair
    alone = [
        feature
        for feature in schema.of("user", "item")
        if feature.kind in ("count", "number") and not feature.name.startswith(("author_a", "tag_a"))
    ]
    sides = {side: [feature for feature in alone if feature.side == side] for side in ("user", "item")}

    def numbers(side: str, of: pl.DataFrame) -> np.ndarray:
        return np.column_stack([schema.encode(feature, of[feature.name]) for feature in sides[side]])

    sample = rows.sample(min(rows.height, 200_000), seed=0)
    inputs = np.concatenate([numbers("user", sample), numbers("item", sample)], axis=1)
    fitted = LogisticRegression(max_iter=200).fit(inputs, sample[LIKED].to_numpy())
    weights, width = fitted.coef_[0], len(sides["user"])
    last = rows.unique("item_id", keep="last", maintain_order=True)
    at = np.searchsorted(np.sort(_indices(last, schema)), split.young)
    of_items = numbers("item", last[np.argsort(_indices(last, schema))[at].tolist()])
    return (numbers("user", split.at) @ weights[:width])[:, None] + (of_items @ weights[width:])[None]


def _inertia(vectors: np.ndarray, groups: Sequence[np.ndarray]) -> list[float]:
    """How far seeds are from the nearest centroid, squared, by k, as a share of that of one centroid."""
    some = groups[:: max(len(groups) // 50, 1)]
    found = []
    for k in CLUSTERS:
        apart = 0.0
        for users in some:
            of = cluster(vectors[users], k)
            apart += float(np.square(vectors[users] - of.centroids[of.places]).sum())
        found.append(apart)
    return [apart / max(found[0], 1e-12) for apart in found]


def of_new_items(found: Sequence[dict[str, Any]], most: dict[str, float], goals: bool) -> list[Comparison]:
    """Prints the ways beside each other; the rows of the paper's margins."""
    names = list(found[0]["figures"])
    columns: dict[str, Sequence[str | float]] = {"young items": [*names, "most seeds"]}
    for measure in MEASURES:
        values = {name: [one["figures"][name][measure] for one in found] for name in names}
        columns[measure] = [*(statistics.mean(values[name]) for name in names), most[measure]]
        columns[f"± {measure}"] = [*(_margin(values[name]) for name in names), ""]
    show_columns(f"Items that appeared last, after the cut; means of {len(found)} seeds, ± a 95 % interval", columns)

    def against(peer: str, goal: float) -> Comparison:
        ours, theirs = (statistics.mean(one["figures"][name]["prec@10"] for one in found) for name in ("RALM", peer))
        return Comparison("prec@10, young items", ours, theirs, peer, "", at_least=goal if goals else None)

    return [against("YouTubeDNN", 1.064), against("mean of seeds", 1.169)]


def _margin(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t; infinite of one value."""
    if len(values) < 2:
        return float("inf")
    return float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def elbow(found: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Draws how much of the seeds' spread is left by k."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for one in found:
        axes.plot(CLUSTERS, one["elbow"], marker="o", ms=3.5)
    axes.axvline(20, ls=":", color="gray")
    axes.set(xlabel="centroids k", ylabel="squared distance left", ylim=(0, 1.05))
    path = folder.with_name(f"{folder.name}-k.png")
    figure.savefig(path, dpi=120)
    return path


def audience(
    examples: Path, folder: Path, world: simulator.Config, seed: int, epochs: int, requests: int, again: bool
) -> dict[str, dict[str, float]]:
    """The day after the log, lived by the simulator's audience in each of the ways of `LIVED`."""

    def measured() -> dict[str, Any]:
        schema, split, tower, vectors = known(examples, seed, epochs)
        scorer = scorer_of(examples, seed, epochs, Config())
        day = Day(world, split, schema, vectors, training.item_vectors(tower, _all(schema)), scorer)
        return {way: day.live(requests, way, seed) for way in LIVED}

    spec = {"seed": seed, "configs": configs(epochs), "requests": requests, "window": window(examples)}
    return once(folder, "audience", spec, MODULES, measured, again)


def _all(schema: Schema) -> np.ndarray:
    return np.arange(FIRST, schema.size("item_id"))


LIVED = ("recall alone", "explored by chance", "RALM")
EXPLORED = 2
"""Places of a slate of ten that are explored."""
AT_ONCE = 100
"""Requests between two tables."""
RIGHT = 0.2
"""The share of the users to whom an item is most relevant: the right ones."""
ENOUGH = 100


class Day:
    """The day after the log: items of the last days are new, and the two explored places are for them."""

    def __init__(
        self,
        world: simulator.Config,
        split: Split,
        schema: Schema,
        vectors: np.ndarray,
        items: np.ndarray,
        scorer: Scorer,
    ) -> None:
        self.world = replace(world, days=world.days + 1)
        self.audience = simulator.Audience(self.world)
        self.number = {user: row for row, user in enumerate(split.users.tolist())}
        self.users, self.vectors, self.scorer = split.users, vectors, scorer
        self.ids = schema.vocabularies["item_id"]
        self.order = np.argsort(-(vectors @ items.T), axis=1, kind="stable")[:, :200]
        truth = self.audience.truth.items(np.arange(self.world.items_by(world.days)))
        self.topic, self.upload = truth.topic, truth.upload_ms
        self.begins = published = world.start_ms + world.days * DAY_MS
        self.new = np.flatnonzero((self.upload >= published - DAY_MS) & ~np.isin(truth.ids, self.ids))
        liked = np.bincount(split.seeds.items, minlength=schema.size("item_id"))
        fewest = liked[FIRST:].argsort(kind="stable")
        self.tail = set(self.ids[fewest[: len(fewest) // 2]].tolist()) | set(self.new.tolist())
        author = truth.author + 1
        tags = [[int(tag) + 1 for tag in row[held]] for row, held in zip(truth.tags, truth.tagged, strict=True)]
        rows = {"item_id": truth.ids, "author_id": author, "category": truth.topic + 1, "tags": tags}
        self.content = Content.of(pl.DataFrame(rows, schema_overrides={"tags": pl.List(pl.Int64)}))
        relevance = np.stack(
            [self.audience.truth.relevance(self.users, item, published + DAY_MS // 2) for item in self.new]
        )
        self.right = relevance >= np.quantile(relevance, 1 - RIGHT, axis=1, keepdims=True)
        self.of_seeds = {
            int(self.ids[item - FIRST]): split.seeds.users[split.seeds.items == item]
            for item in np.unique(split.seeds.items)
        }

    def live(self, count: int, way: str, seed: int) -> dict[str, float]:
        """What came of `count` requests, what is new explored in a way of `LIVED`."""
        random = np.random.default_rng(seed)
        liked: dict[int, list[int]] = {int(item): [] for item in self.new}
        seen: dict[int, set[int]] = {}
        exposures = np.zeros(len(self.topic), int)
        right, reached = np.zeros(len(self.new), int), np.full(len(self.new), np.nan)
        place = {int(item): row for row, item in enumerate(self.new)}
        clicks, shown, kinds = 0, 0, []
        table = Table.of(1, "", 1, 0, self.scorer, {})
        for number, (user, time_ms, device, scenario) in enumerate(self.audience.requests(self.world.days - 1, count)):
            row = self.number.get(user)
            if row is None:
                continue
            if way == "RALM" and number % AT_ONCE == 0:
                table = self._table(liked)
            had = seen.setdefault(user, set())
            open_ = np.array([i for i in self.new if self.upload[i] <= time_ms and int(i) not in had], int)
            explored: list[int] = []
            if way == "RALM":
                closed = np.setdiff1d(self.new, open_)
                explored = table.best(self.vectors[row], closed, EXPLORED)[0].tolist()
            elif way == "explored by chance":
                explored = random.permutation(open_)[:EXPLORED].tolist()
            base = [int(item) for item in self.ids[self.order[row]] if int(item) not in had]
            slate = base[: simulator.SLATE - len(explored)]
            for at, item in zip((4, 9), explored, strict=False):
                slate.insert(at, item)
            labels = self.audience.respond(
                user, slate, time_ms=time_ms, device=device, scenario=scenario, request_id=number
            )
            had |= set(slate)
            clicks += sum(label["click"] for label in labels)
            shown += len(slate)
            kinds.append(len(set(self.topic[slate].tolist())))
            np.add.at(exposures, slate, 1)
            for item, label in zip(slate, labels, strict=True):
                if item not in place:
                    continue
                if label[LIKED]:
                    liked[item].append(row)
                right[place[item]] += self.right[place[item], row]
                if right[place[item]] == ENOUGH:
                    reached[place[item]] = (time_ms - max(self.upload[item], self.begins)) / 3.6e6
        order = np.sort(exposures[exposures > 0])
        gini = float(2 * (np.arange(1, len(order) + 1) * order).sum() / (len(order) * order.sum()) - 1 - 1 / len(order))
        of_new = exposures[self.new].sum()
        return {
            "click rate": clicks / max(shown, 1),
            "share of exposures in the tail": float(sum(exposures[item] for item in self.tail)) / max(shown, 1),
            "Gini of exposures": gini,
            "categories of a slate": statistics.mean(kinds),
            "right users of new items' exposures": float(right.sum() / max(of_new, 1)),
            f"new items with {ENOUGH} right exposures": float(np.isfinite(reached).mean()),
            # an item that did not get so many on this day counts as one that took all of it
            f"hours to {ENOUGH} right exposures, 24 at most": float(np.median(np.nan_to_num(reached, nan=24.0))),
        }

    def _table(self, liked: dict[int, list[int]]) -> Table:
        """Every new item by its seeds, and by those of items like it while it has few."""
        lenders = np.array([item for item, users in self.of_seeds.items() if len(users) >= 5], np.int64)
        items = {}
        for item, own in liked.items():
            users = list(own)
            for lender in self.content.like(item, lenders)[:10].tolist():
                if len(users) >= LEAST_SEEDS:
                    break
                users += [user for user in self.of_seeds[lender].tolist() if user not in users]
            if users:
                items[item] = item_of(self.vectors[users[: max(LEAST_SEEDS, len(own))]], len(own), self.scorer)
        return Table.of(1, "", 1, 0, self.scorer, items)


def with_audience(found: Sequence[dict[str, dict[str, float]]], goals: bool) -> list[Comparison]:
    """Prints the days beside each other; rows of RALM's beside the others, whose goals are those of recall alone."""
    measures = list(found[0]["RALM"])
    columns: dict[str, Sequence[str | float]] = {"": measures}
    means: dict[str, dict[str, float]] = {}
    for way in LIVED:
        values = {measure: [one[way][measure] for one in found] for measure in measures}
        means[way] = {measure: statistics.mean(of) for measure, of in values.items()}
        columns[way] = list(means[way].values())
        columns[f"± {way}"] = [_margin(of) for of in values.values()]
    show_columns(f"The day after the log; means of {len(found)} seeds, ± a 95 % interval", columns)
    least = {"click rate": 1.0, "share of exposures in the tail": 1.09} if goals else {}
    return [
        Comparison(
            measure, ours, means[peer][measure], peer, "", at_least=least.get(measure) if peer == LIVED[0] else None
        )
        for peer in LIVED[:2]
        for measure, ours in means["RALM"].items()
    ]


def speed(repeats: int, seeds: int) -> list[Comparison]:
    """Scoring 10,000 items on one core beside the product of the matrices, and k-means."""
    random = np.random.default_rng(0)
    items, k, h, dim = 10_000, 20, 32, 32

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    weights = (normal(dim, h), normal(h), normal(h, 32), normal(32), normal(h, h))
    scorer = Scorer(*weights, np.array(0.3), np.array(0.7), normal(h), np.array(30.0))
    table, counts, summaries = normal(items, k, h), np.ones((items, k), np.float32), normal(items, h)
    user, flat, asked = normal(dim), table.reshape(-1, h), normal(h)
    with threadpool_limits(1):
        ours = _p99(lambda: scorer.score(user, table, counts, summaries), repeats)
        product = _p99(lambda: flat @ asked, repeats)
        began = time.perf_counter()
        cluster(normal(seeds, 128), k)
        means = time.perf_counter() - began
    return [
        Comparison("1 user x 10,000 items, p99, one core", 1000 * ours, 1000 * product, "matrix product", "ms"),
        Comparison("the same beside what is allowed", 1000 * ours, 20.0, "20 ms", "ms", at_most=1.0),
        Comparison(f"k-means of {seeds:,} x 128, one core", means, 10.0, "10 s", "s", at_most=1.0),
    ]


def at_work(found: ralm_live.Measured, items: int) -> list[Comparison]:
    """Rows of how soon the table follows; what each part of the way took is printed."""
    parts = {"feedback": found.told, "follow and refresh": found.tasks, "answer": found.answered}
    show_columns("From an item's 100th seed to an answer with it", {"": list(parts), "seconds": list(parts.values())})
    of = {changed: f"refresh, {changed:,} of {items:,} items changed" for changed in found.refreshes}
    one, ten, hundred = found.refreshes
    return [
        Comparison("from the 100th seed to an answer", sum(parts.values()), 60.0, "a minute", "s", at_most=1.0),
        Comparison(of[ten], found.refreshes[ten], found.refreshes[one], f"{one}", "s", at_most=15.0),
        Comparison(of[hundred], found.refreshes[hundred], found.refreshes[ten], f"{ten}", "s", at_most=15.0),
        Comparison(of[ten], found.refreshes[ten], found.of_fewer, f"{ten} of {items // 10:,}", "s", at_most=2.0),
    ]


def _p99(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.quantile(times[3:], 0.99))


if __name__ == "__main__":
    main()
