"""Candidates as they go wrong: each kind spoils a good one, and names the checks of the gate that must say so."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import polars as pl

from penstock import candidate, export, fusion, training
from penstock.catalogue import Catalogue
from penstock.events import LABELS
from penstock.examples import FEATURES, Feature, Schema, fit_schema, read_slice
from penstock.gate import Verdict, judge_candidate
from penstock.retrieval import Retrieval, Towers
from penstock.scoring import score_rows
from serving.rehearsal import rehearse

RANK_MODEL = "shared_bottom"
RECALL_MODEL = "youtube_dnn"


Spoil = Callable[[pl.DataFrame], pl.DataFrame]
"""What a fault makes of rows."""


@dataclass
class Stage:
    """A candidate with its examples and the champion, on disk; `policy` is the gate's."""

    root: Path
    champion: Path
    policy: dict[str, Any] = field(default_factory=dict)

    @property
    def examples(self) -> Path:
        return self.root / "examples"

    @property
    def recall(self) -> Path:
        return self.root / "recall"

    @property
    def rank(self) -> Path:
        return self.root / "rank"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def rehearsal(self) -> Path:
        return self.root / "rehearsal"

    def judge(self) -> Verdict:
        """What the gate says."""
        return judge_candidate(
            self.examples,
            self.recall,
            self.rank,
            self.weights,
            self.rehearsal,
            str(self.champion),
            self.root / "verdict",
            self.policy,
        )

    def predictions(self, part: str = "test") -> Path:
        """Where the predictions on a slice are."""
        return self.rank / "predictions" / f"{part}.parquet"

    def change(self, *paths: Path, **columns: Any) -> None:
        """Replaces columns of Parquet files."""
        for path in paths:
            pl.read_parquet(path).with_columns(**columns).write_parquet(path)

    def put(self, path: Path, **values: Any) -> None:
        """Replaces values of a JSON object."""
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def search(self) -> None:
        """The weights again, from the validation slice."""
        fusion.search_predictions(self.rank, self.weights)

    def rehearse(self) -> None:
        """The rehearsal again."""
        rehearse(self.examples, self.recall, self.rank, self.rehearsal, requests=40)

    def predict(self, spoil: Spoil) -> None:
        """The predictions again, of rows that a fault in the features has spoilt."""
        for part in ("validation", "test"):
            scores = score_rows(self.rank / "saved_model", spoil(read_slice(self.examples, part)))
            self.change(self.predictions(part), **{f"p_{label}": pl.Series(scores[label]) for label in LABELS})
        self.search()

    def train(self, spoil: Spoil, *parts: str, extra: tuple[Feature, ...] = ()) -> None:
        """The rank model again, from examples of which a fault has spoilt the slices `parts`."""
        for part in parts:
            spoil(read_slice(self.examples, part)).write_parquet(self.examples / f"{part}.parquet")
        fit_schema(read_slice(self.examples, "train"), (*FEATURES, *extra)).save(self.examples / "schema")
        shutil.rmtree(self.rank)
        make_rank(self.examples, self.rank, 1)
        self.search()
        self.rehearse()


def make_recall(examples: Path, out: Path, seed: int, **overrides: Any) -> None:
    """Trains and exports a recall model."""
    keras.backend.clear_session()
    training.train_recall(examples, RECALL_MODEL, overrides, seed, out.with_name(f"{out.name}_weights"))
    candidate.write_recall(examples, out.with_name(f"{out.name}_weights"), out)


def make_rank(examples: Path, out: Path, seed: int, **overrides: Any) -> None:
    """Trains and exports a rank model."""
    keras.backend.clear_session()
    training.train_rank(examples, RANK_MODEL, overrides, seed, out.with_name(f"{out.name}_weights"))
    candidate.write_rank(examples, out.with_name(f"{out.name}_weights"), out)


@dataclass(frozen=True)
class Kind:
    """A way to go wrong, and the checks of which at least one must fail: the right reason."""

    name: str
    reasons: tuple[str, ...]
    spoil: Callable[[Stage], None]


WORSE = ("better than the champion",)
HEADS = tuple(f"{label} head not worse than the champion's" for label in LABELS)
P = [f"p_{label}" for label in LABELS]
USER_SIDE = [feature.name for feature in FEATURES if feature.side in ("user", "sequence")]
NUMBERS = [feature.name for feature in FEATURES if feature.kind in ("count", "number")]


def _shuffled(names: list[str], seed: int = 0) -> Spoil:
    """Rows whose columns `names` are those of other rows."""

    def spoil(rows: pl.DataFrame) -> pl.DataFrame:
        order = np.random.default_rng(seed).permutation(rows.height)
        return rows.with_columns(rows.select(names)[order])

    return spoil


def _swap_all(rows: pl.DataFrame) -> pl.DataFrame:
    """Every number under the name of the next of its type."""
    by_type: dict[Any, list[str]] = {}
    for name in NUMBERS:
        by_type.setdefault(rows.schema[name], []).append(name)
    moved = {
        name: pl.col(names[(place + 1) % len(names)]) for names in by_type.values() for place, name in enumerate(names)
    }
    return rows.with_columns(**moved)


def _stale(rows: pl.DataFrame) -> pl.DataFrame:
    """Every number as a store says that has not been filled for weeks: 0."""
    return rows.with_columns(**{name: pl.lit(0).cast(rows.schema[name]) for name in NUMBERS})


def _every_p(change: Callable[[pl.Expr], pl.Expr], where: pl.Expr | None = None) -> dict[str, pl.Expr]:
    """A change of all heads, or of their rows `where`."""
    if where is None:
        return {name: change(pl.col(name)) for name in P}
    return {name: pl.when(where).then(change(pl.col(name))).otherwise(pl.col(name)) for name in P}


def _logit(p: pl.Expr, times: float) -> pl.Expr:
    return 1 / (1 + (-(times * (p / (1 - p)).log())).exp())


def _noise(seed: int) -> pl.Expr:
    return pl.int_range(pl.len()).hash(seed).cast(pl.Float64) / 2.0**64


def _other_weights(stage: Stage) -> None:
    """A SavedModel of another training than the one whose scores are told."""
    make_rank(stage.examples, stage.root / "another", 99, epochs=1)
    shutil.rmtree(stage.rank / "saved_model")
    shutil.copytree(stage.root / "another" / "saved_model", stage.rank / "saved_model")
    stage.rehearse()


def _other_index(stage: Stage) -> None:
    """The item vectors of another training under this one's query tower."""
    make_recall(stage.examples, stage.root / "another", 99)
    model, schema = training.load_recall(stage.examples, stage.root / "recall_weights")
    another, _ = training.load_recall(stage.examples, stage.root / "another_weights")
    mixed = Retrieval(Towers(model.query_tower, another.item_tower, another.by_content), another.objective)
    _export(stage, mixed, schema, Catalogue.read(stage.examples, schema))


def _shuffled_index(stage: Stage) -> None:
    """Item vectors under the ids of other items."""
    model, schema = training.load_recall(stage.examples, stage.root / "recall_weights")
    catalogue = Catalogue.read(stage.examples, schema)
    order = np.random.default_rng(0).permutation(catalogue.known)
    ids = np.concatenate([catalogue.ids[: catalogue.known][order], catalogue.ids[catalogue.known :]])
    _export(stage, model, schema, dataclasses.replace(catalogue, ids=ids))


def _truncated_index(stage: Stage) -> None:
    """Half of the items are gone."""
    model, schema = training.load_recall(stage.examples, stage.root / "recall_weights")
    catalogue = Catalogue.read(stage.examples, schema)
    half = catalogue.known // 2
    _export(stage, model, schema, dataclasses.replace(catalogue, ids=catalogue.ids[:half], known=half))


def _untrained_tower(stage: Stage) -> None:
    """A query tower whose weights were never loaded."""
    model, schema = training.load_recall(stage.examples, stage.root / "recall_weights")
    generator = np.random.default_rng(0)
    for weight in model.query_tower.trainable_variables:
        weight.assign(generator.normal(0.0, 0.1, weight.shape))
    _export(stage, model, schema, Catalogue.read(stage.examples, schema))


def _export(stage: Stage, model: Any, schema: Schema, catalogue: Catalogue) -> None:
    shutil.rmtree(stage.recall / "saved_model")
    export.export_recall(model, schema, catalogue, stage.recall)
    stage.rehearse()


def _other_items(stage: Stage) -> None:
    """items.parquet of another release, whose ids are not the index's."""
    stage.change(stage.recall / "items.parquet", item_id=pl.col("item_id") + 1)
    stage.rehearse()


def _other_vectors(stage: Stage) -> None:
    """items.parquet with the index's ids and another release's vectors."""
    stage.change(stage.recall / "items.parquet", vector=pl.col("vector").shuffle(0))
    stage.rehearse()


def _label_as_feature(stage: Stage) -> None:
    stage.train(lambda rows: rows, "train", extra=(Feature("watch_time_ms", "context", "count"),))


def _label_in_a_rate(stage: Stage) -> None:
    """A click rate that has counted the click it is to predict."""
    rate = pl.col("item_click_rate_7d")
    leak = (0.8 * rate + 0.2 * pl.col("click")).cast(pl.Float32)
    stage.train(lambda rows: rows.with_columns(item_click_rate_7d=leak), "train", "validation", "test")


def _label_in_an_id(stage: Stage) -> None:
    """Some like is known by the item's type."""
    leak = pl.when(pl.col("like") == 1).then(77).otherwise(pl.col("item_type"))
    stage.train(lambda rows: rows.with_columns(item_type=leak), "train", "validation", "test")


def _shuffled_labels(stage: Stage) -> None:
    """Trained on labels of other rows."""
    stage.train(_shuffled([*LABELS, "profile_enter", "watch_time_ms"]), "train")


def _shuffled_ids(stage: Stage) -> None:
    """Trained on rows whose user and item sides were joined by another order."""
    stage.train(_shuffled(USER_SIDE), "train", "validation")


def _trained_on_the_test_days(stage: Stage) -> None:
    """Examples whose training slice reaches to the end, for the rank model alone."""
    own = stage.root / "longer"
    shutil.copytree(stage.examples, own)
    longer = pl.concat([read_slice(own, "train"), read_slice(own, "test")])
    longer.write_parquet(own / "train.parquet")
    window = json.loads((own / "window.json").read_text())
    stage.put(own / "window.json", train_end=window["test_end"], digests=window["digests"] | {"train": "longer"})
    shutil.rmtree(stage.rank)
    make_rank(own, stage.rank, 1)
    stage.search()
    stage.rehearse()


def _test_rows_in_training(stage: Stage) -> None:
    rows = pl.concat([read_slice(stage.examples, "train"), read_slice(stage.examples, "test").head(50)])
    rows.write_parquet(stage.examples / "train.parquet")


def _champion_again(stage: Stage) -> None:
    """What is live is handed in as a candidate."""
    for part in ("validation", "test"):
        scores = score_rows(stage.champion / "rank", read_slice(stage.examples, part))
        stage.change(stage.predictions(part), **{f"p_{label}": pl.Series(scores[label]) for label in LABELS})
    shutil.copyfile(stage.champion / "weights.json", stage.weights / "weights.json")


def _itself_as_champion(stage: Stage) -> None:
    """The challenger compared with itself."""
    release = stage.root / "1"
    release.mkdir()
    for name in ("recall", "rank"):
        shutil.copytree(stage.root / name / "saved_model", release / name)
    shutil.copyfile(stage.weights / "weights.json", release / "weights.json")
    (release / "manifest.json").write_text('{"release": 1}')
    stage.champion = release


def _broken_champion(stage: Stage) -> None:
    release = shutil.copytree(stage.champion, stage.root / "1")
    (release / "rank" / "saved_model.pb").write_bytes(b"no graph")
    stage.champion = release


def _broken_model(stage: Stage) -> None:
    (stage.rank / "saved_model" / "saved_model.pb").write_bytes(b"no graph")
    stage.rehearse()


def _policy(**values: Any) -> Callable[[Stage], None]:
    def spoil(stage: Stage) -> None:
        stage.policy = values

    return spoil


def _test(**columns: Any) -> Callable[[Stage], None]:
    """A fault in what is predicted of the test slice."""
    return lambda stage: stage.change(stage.predictions(), **columns)


def _both(**columns: Any) -> Callable[[Stage], None]:
    """A fault in what is predicted, which the search of the weights meets too."""

    def spoil(stage: Stage) -> None:
        stage.change(stage.predictions("validation"), stage.predictions(), **columns)
        stage.search()

    return spoil


def _predicted(spoil: Spoil) -> Callable[[Stage], None]:
    return lambda stage: stage.predict(spoil)


def _weighted(**weights: float) -> Callable[[Stage], None]:
    return lambda stage: stage.put(stage.weights / "weights.json", weights=weights)


def _rows(change: Spoil, *, of_examples: bool = False) -> Callable[[Stage], None]:
    """Other rows in the predictions, and in the test slice itself."""

    def spoil(stage: Stage) -> None:
        paths = [stage.predictions(), *([stage.examples / "test.parquet"] if of_examples else [])]
        for path in paths:
            change(pl.read_parquet(path)).write_parquet(path)

    return spoil


def _rehearsed(**values: Any) -> Callable[[Stage], None]:
    return lambda stage: stage.put(stage.rehearsal / "rehearsal.json", **values)


def _not_rehearsed(stage: Stage) -> None:
    (stage.rehearsal / "rehearsal.json").write_text("null")


IS_PROBABILITY = ("predictions are probabilities",)
SAME_ROWS = ("predictions are of the test rows",)
RATIO = tuple(f"{label} head is calibrated (ratio)" for label in LABELS)
SLOPE = tuple(f"{label} head is calibrated (slope)" for label in LABELS)
RECALL = ("recall better than the most popular items", "recall better than item-item CF")
OWN_ITEMS = ("recall answers its own items",)
SERVER = ("a fresh server answers",)
LEAK = (*(f"{label} head is plausible" for label in LABELS), "gain is plausible")
UNSEEN = ("test rows are unseen",)
NAN = pl.lit(float("nan"), pl.Float64)

KINDS: tuple[Kind, ...] = (
    Kind("constant scores", ("no head is constant",), _test(**_every_p(lambda _: pl.lit(0.3)))),
    Kind("one constant head", ("no head is constant",), _test(p_like=pl.lit(0.02))),
    Kind("a tower of NaN", IS_PROBABILITY, _test(**_every_p(lambda _: NAN))),
    Kind("one NaN", IS_PROBABILITY, _test(**_every_p(lambda _: NAN, pl.int_range(pl.len()) == 5))),
    Kind("logits for probabilities", IS_PROBABILITY, _test(**_every_p(lambda p: (p / (1 - p)).log()))),
    Kind("an inverted head", ("like head above chance",), _both(p_like=1 - pl.col("p_like"))),
    Kind("random scores", WORSE, _both(**{name: _noise(seed) for seed, name in enumerate(P)})),
    Kind("noise over the scores", WORSE, _both(**_every_p(lambda p: 0.5 * p + 0.5 * p.shuffle(1)))),
    Kind("heads in the wrong order", RATIO, _both(p_click=pl.col("p_like"), p_like=pl.col("p_click"))),
    Kind("popularity in disguise", WORSE, _both(**{f"p_{label}": pl.col(f"popularity_{label}") for label in LABELS})),
    Kind("scores one row late", WORSE, _both(**_every_p(lambda p: p.shift(1).fill_null(0.1)))),
    Kind("predictions of other rows", SAME_ROWS, _rows(lambda rows: rows.reverse())),
    Kind("a part of the predictions", SAME_ROWS, _rows(lambda rows: rows.head(-100))),
    Kind("labels of its own", SAME_ROWS, _test(click=(pl.col("p_click") > 0.5).cast(pl.Int8))),
    Kind("probabilities squared", RATIO, _both(**_every_p(lambda p: p**2))),
    Kind("roots of probabilities", RATIO, _both(**_every_p(lambda p: p**0.5))),
    Kind("probabilities halved", RATIO, _both(**_every_p(lambda p: p / 2))),
    Kind("too sure of itself", SLOPE, _both(**_every_p(lambda p: _logit(p, 2.0)))),
    Kind("not sure of itself", SLOPE, _both(**_every_p(lambda p: _logit(p, 0.5)))),
    Kind(
        "worse for new users alone",
        ("no harm to new users",),
        _both(**_every_p(lambda p: p.shuffle(1), pl.col("new_user"))),
    ),
    Kind(
        "worse for one scenario alone",
        ("no harm to scenario 2",),
        _both(**_every_p(lambda p: p.shuffle(1), pl.col("scenario") == 2)),
    ),
    Kind(
        "worse for new items alone",
        ("no harm to new items",),
        _both(**_every_p(lambda p: p.shuffle(1), pl.col("new_item"))),
    ),
    Kind("stale features", (*WORSE, *HEADS), _predicted(_stale)),
    Kind("features under wrong names", (*WORSE, *HEADS), _predicted(_swap_all)),
    Kind("another user's features and history", (*WORSE, *HEADS), _predicted(_shuffled(USER_SIDE))),
    Kind("other items' features", (*WORSE, *HEADS), _predicted(_shuffled(["item_id", "author_id", *NUMBERS]))),
    Kind("a label as a feature", SERVER, _label_as_feature),
    Kind("a label in a rate", LEAK, _label_in_a_rate),
    Kind("a label in an id", LEAK, _label_in_an_id),
    Kind("trained on other rows' labels", (*WORSE, *HEADS), _shuffled_labels),
    Kind("trained on other users' features", (*WORSE, *HEADS), _shuffled_ids),
    Kind("trained on the test days", ("models are of these examples",), _trained_on_the_test_days),
    Kind("test rows in the training slice", UNSEEN, _test_rows_in_training),
    Kind(
        "test days before the end of training",
        UNSEEN,
        lambda stage: stage.change(
            stage.examples / "validation.parquet", event_time=pl.col("event_time") + pl.duration(hours=20)
        ),
    ),
    Kind("the challenger compared with itself", ("differs from the champion",), _itself_as_champion),
    Kind("the champion handed in again", ("differs from the champion",), _champion_again),
    Kind("a champion that cannot be loaded", ("champion can be scored",), _broken_champion),
    Kind("another release's index", RECALL, _other_index),
    Kind("item vectors under other ids", RECALL, _shuffled_index),
    Kind("a query tower that was never trained", (*RECALL, "served scores are the training graph's"), _untrained_tower),
    Kind("half of the items", ("index holds the items",), _truncated_index),
    Kind("another release's item ids", OWN_ITEMS, _other_items),
    Kind("another release's item vectors", ("served scores are the training graph's",), _other_vectors),
    Kind("another training's graph", ("served scores are the training graph's",), _other_weights),
    Kind("a model that does not load", SERVER, _broken_model),
    Kind("never rehearsed", SERVER, _not_rehearsed),
    Kind("a slow model", ("answers in time",), _rehearsed(p99_ms=2000.0)),
    Kind("weights upside down", WORSE, _weighted(click=-1.0, long_view=-1.0, like=0.0)),
    Kind("weights that are NaN", ("figures are defined",), _weighted(click=float("nan"), long_view=1.0, like=1.0)),
    Kind("weights for the rarest label alone", WORSE, _weighted(click=0.0, long_view=0.0, like=1.0)),
    Kind("no test rows", ("enough test rows",), _rows(lambda rows: rows.clear(), of_examples=True)),
    Kind("a handful of test rows", ("enough test rows",), _rows(lambda rows: rows.head(300), of_examples=True)),
    Kind("a missing threshold", ("policy is complete",), _policy(margin=None)),
    Kind("a threshold that is NaN", ("policy is complete",), _policy(margin=float("nan"))),
)
