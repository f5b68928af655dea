"""What every model in recall/ and rank/ must do, found by the rule that the product finds them by."""

from __future__ import annotations

import json
import pkgutil
import shutil
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
import tensorflow as tf

import penstock
from penstock import export, fitting, rank, recall, training
from penstock.catalogue import Catalogue
from penstock.examples import FEATURES, Feature, Schema, fit_schema, read_slice, write_examples
from penstock.ranking import TASKS
from penstock.retrieval import EXAMPLE_AGE, Retrieval
from penstock.scoring import feed, score_rows
from tests.penstock.conftest import catalogue, joined_rows

RECALL = [found.name for found in pkgutil.iter_modules(recall.__path__)]
RANK = [found.name for found in pkgutil.iter_modules(rank.__path__)]
TRAIN = {"recall": training.train_recall, "rank": training.train_rank}
MODELS = [("recall", name) for name in RECALL] + [("rank", name) for name in RANK]


@dataclass(frozen=True)
class Trained:
    """A model as it was trained and, of recall, exported."""

    kind: str
    name: str
    examples: Path
    folder: Path

    @property
    def history(self) -> list[dict[str, float]]:
        return json.loads((self.folder / "trained" / "history.json").read_text())

    def weights(self) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        with h5py.File(self.folder / "trained" / "model.weights.h5") as file:
            file.visititems(lambda _, node: found.append(np.array(node)) if isinstance(node, h5py.Dataset) else None)
        return found


def thin(examples: Path) -> Path:
    """The same examples with two features of a kind and side: more add nothing but the time that graphs take."""
    kept: list[Feature] = []
    for feature in FEATURES:
        alike = [other for other in kept if (other.side, other.kind) == (feature.side, feature.kind)]
        if len(alike) < 2 or feature.side in ("context", "sequence"):
            kept.append(feature)
    fit_schema(read_slice(examples, "train"), tuple(kept)).save(examples / "schema")
    return examples


@pytest.fixture(scope="module")
def thinned(examples, tmp_path_factory) -> Path:
    return thin(shutil.copytree(examples, tmp_path_factory.mktemp("thinned") / "examples"))


SETTINGS = {"epochs": 2, "patience": 5, "batch_size": 64}


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def trained(request, examples, thinned, tmp_path_factory) -> Trained:
    kind, name = request.param
    folder = tmp_path_factory.mktemp(name)
    save = fitting.Checkpoint.save

    def save_and_keep_the_first(checkpoint: fitting.Checkpoint, *arguments) -> None:
        save(checkpoint, *arguments)
        if not (folder / "first").exists():
            shutil.copytree(folder / "state", folder / "first")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting.Checkpoint, "save", save_and_keep_the_first)
        learnt = examples if kind == "recall" else thinned
        TRAIN[kind](learnt, name, SETTINGS, 3, folder / "trained", folder / "state")
    return Trained(kind, name, learnt, folder)


def test_the_loss_falls(trained):
    assert trained.history[1]["loss"] < trained.history[0]["loss"]


def test_from_what_it_left_after_an_epoch_a_training_goes_on_to_the_same_model(trained, tmp_path):
    """As it was when the process was killed in the second."""
    again = Trained(trained.kind, trained.name, trained.examples, tmp_path)
    state = shutil.copytree(trained.folder / "first", tmp_path / "state")
    TRAIN[trained.kind](trained.examples, trained.name, SETTINGS, 3, again.folder / "trained", state)
    # threads may sum in any order: the last digit of a float32 is not the seed's
    for row, same in zip(again.history, trained.history, strict=True):
        assert row == pytest.approx(same, rel=1e-5)
    for ours, same in zip(again.weights(), trained.weights(), strict=True):
        np.testing.assert_allclose(ours, same, rtol=1e-3, atol=1e-5)


@dataclass(frozen=True)
class Exported:
    """A recall model with its SavedModel."""

    model: Retrieval
    schema: Schema
    items: pl.DataFrame
    signature: object

    def ask(self, rows: pl.DataFrame, k: int, **other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores `[rows, k]`, nothing left out; `other` inputs instead of those of the rows."""
        inputs = self.signature.structured_input_signature[1]
        fed = {
            name: other[name] if name in other else feed(rows, name, spec.dtype.as_numpy_dtype, len(spec.shape))
            for name, spec in inputs.items()
            if name not in ("k", "exclude")
        }
        nothing = np.full((rows.height, 1), -1)
        answer = self.signature(
            **{name: tf.constant(value) for name, value in fed.items()}, k=tf.constant(k), exclude=tf.constant(nothing)
        )
        return answer["ids"].numpy(), answer["scores"].numpy()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Exported:
    if trained.kind != "recall":
        pytest.skip("of recall models")
    out = tmp_path_factory.mktemp("exported")
    model, schema = training.load_recall(trained.examples, trained.folder / "trained")
    export.export_recall(model, schema, Catalogue.read(trained.examples, schema), out)
    signature = tf.saved_model.load(str(out / "saved_model")).signatures["recommend"]
    return Exported(model, schema, pl.read_parquet(out / "items.parquet"), signature)


def test_the_score_is_the_inner_product_in_the_graph_and_outside(exported, examples):
    rows = read_slice(examples, "test").head(20)
    ids, scores = exported.ask(rows, 5)
    names = {tensor.name for tensor in exported.model.query_tower.inputs}
    encoded = exported.schema.encode_rows(rows, "user", "context", "sequence") | {EXAMPLE_AGE: np.zeros(20, np.float32)}
    queries = np.asarray(exported.model.query_tower({name: encoded[name] for name in names}))
    expected = queries @ np.stack(exported.items["vector"].to_numpy()).T
    best = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    np.testing.assert_allclose(scores, np.take_along_axis(expected, best, axis=1), rtol=1e-4, atol=1e-5)
    known = exported.items["item_id"].to_list()
    places = np.array([[known.index(item) for item in row] for row in ids.tolist()])
    np.testing.assert_allclose(scores, np.take_along_axis(expected, places, axis=1), rtol=1e-4, atol=1e-5)


def test_users_are_told_as_serving_tells_them(exported, examples):
    """What a large catalogue's index is made by."""
    rows = read_slice(examples, "test").head(20)
    queries = training.query_vectors(exported.model, rows, exported.schema)
    _, scores = exported.ask(rows, 1)
    best = (queries @ np.stack(exported.items["vector"].to_numpy()).T).max(axis=1)
    np.testing.assert_allclose(scores[:, 0], best, rtol=1e-4, atol=1e-5)


def test_odd_requests_are_answered(exported, examples):
    """No history; items and attributes never seen; ids below and above all known; numbers that are none."""
    rows = read_slice(examples, "test").head(4)
    inputs = exported.signature.structured_input_signature[1]
    count = exported.items.height
    empty = {name: np.full((4, 1), -1) for name, spec in inputs.items() if len(spec.shape) == 2 and name != "exclude"}
    odd = np.array([[2**62, -(2**62), 7, 123_456_789]] * 4)
    numbers = {name: np.full(4, np.nan, np.float32) for name, spec in inputs.items() if spec.dtype == tf.float32}
    single = {
        name: np.full(4, 2**62)
        for name, spec in inputs.items()
        if len(spec.shape) == 1 and spec.dtype == tf.int64 and name != "time_ms"
    }
    for other in (empty, dict.fromkeys(empty, odd), numbers, single, empty | numbers | single):
        ids, scores = exported.ask(rows, 3, **other)
        assert np.isfinite(scores).all(), other
        assert all(len(set(row)) == min(3, count) for row in ids.tolist()), other


def test_histories_of_any_length_are_answered_each_by_itself(exported, examples):
    """None, one item, repeats, items never seen among known ones, and more than are read: of these the last count."""
    known = exported.items["item_id"].head(3).to_list()
    longer = (known * 20)[:60]
    lists = [[], known[:1], known[:1] * 4, [known[0], 2**40, known[1]], longer, longer[10:]]
    now = 1_714_600_000_000
    rows = pl.concat([read_slice(examples, "test").head(1)] * len(lists)).with_columns(
        pl.Series("history_items", lists, pl.List(pl.Int64)),
        pl.Series("history_times", [[now - 1000 * (len(of) - place) for place in range(len(of))] for of in lists]),
        pl.Series("history_sessions", [[place // 8 for place in range(len(of))][::-1] for of in lists]),
        pl.lit(now).alias("time_ms"),
    )
    ids, scores = exported.ask(rows, 3)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(ids[-1], ids[-2])
    np.testing.assert_allclose(scores[-1], scores[-2], rtol=1e-5, atol=1e-6)
    for row in range(len(lists)):
        _, alone = exported.ask(rows[row : row + 1], 3)
        np.testing.assert_allclose(alone[0], scores[row], rtol=1e-4, atol=1e-5)


def test_more_than_there_is_ends_in_padding(exported, examples):
    count = exported.items.height
    ids, _ = exported.ask(read_slice(examples, "test").head(2), count + 7)
    for row in ids:
        assert sorted(row[:count]) == sorted(exported.items["item_id"])
        assert (row[count:] == -1).all()


@pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`:UserWarning")
@pytest.mark.parametrize("name", RECALL)
def test_a_catalogue_of_one_item_trains_and_answers(name, one_item, tmp_path):
    tf.config.run_functions_eagerly(True)  # a graph takes longer to make than a batch takes without
    try:
        training.train_recall(one_item, name, {"epochs": 1}, 3, tmp_path / "trained")
    finally:
        tf.config.run_functions_eagerly(False)
    model, schema = training.load_recall(one_item, tmp_path / "trained")
    assert np.isfinite(training.item_vectors(model, np.array([2]))).all()
    assert schema.size("item_id") == 3


@pytest.fixture(scope="module")
def one_item(tmp_path_factory) -> Path:
    """Examples of a feed with one item, which some long-view."""
    out = tmp_path_factory.mktemp("one")
    write_examples(joined_rows(rows=400, users=20, items=1), catalogue(1), out)
    return out


@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_unknown_parameters_and_values_of_another_type_are_named(kind, name, examples, tmp_path):
    with pytest.raises(ValueError, match="unknown parameter widht"):
        TRAIN[kind](examples, name, {"widht": 3}, 3, tmp_path)
    with pytest.raises(ValueError, match=r"parameter epochs of .* is a int, not 'two'"):
        TRAIN[kind](examples, name, {"epochs": "two"}, 3, tmp_path)


@pytest.mark.parametrize("name", RANK)
def test_no_rank_model_reads_the_position(name, examples):
    module = penstock.module("rank", name)
    trunk = module.build(module.Config(), Schema.load(examples / "schema"))
    assert "position" not in {tensor.name for tensor in trunk.shared.inputs}


@pytest.mark.parametrize("name", RANK)
def test_every_way_of_training_gives_a_model_that_serves(name, shown, tmp_path):
    """All options of `RankConfig` at once; what is exported says what the trained model does, and asks no position."""
    ways = {
        "epochs": 1,
        "weighting": "uncertainty",
        "position_bias": "examination" if name == "bst" else "logit",
        "latent_cross": True,
        "pretrained": "item2vec" if name == "mmoe" else "none",
        "frozen": True,
        "calibration": "isotonic",
        "positive_weights": {"like": 2.0},
    }
    training.train_rank(shown, name, ways, 3, tmp_path / "trained")
    model, schema = training.load_rank(shown, tmp_path / "trained")
    assert set(model.calibrators) == set(TASKS)
    assert any(np.abs(np.asarray(weight)).max() > 0 for weight in model.position_bias.trainable_variables)
    export.export_rank(model, schema, tmp_path / "out")
    signature = tf.saved_model.load(str(tmp_path / "out" / "saved_model")).signatures["predict"]
    specs = signature.structured_input_signature[1]
    assert "position" not in specs
    rows = read_slice(shown, "test").head(30)
    for shares in training.gates(model, rows, schema).values():
        assert len(shares) == rows.height
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    raw = {
        name: tf.constant(feed(rows, name, spec.dtype.as_numpy_dtype, len(spec.shape))) for name, spec in specs.items()
    }
    served = signature(**raw)
    encoded = schema.encode_rows(rows, "user", "item", "context")
    for task, values in model.scores({tensor.name: encoded[tensor.name] for tensor in model.shared.inputs}).items():
        np.testing.assert_allclose(served[task], values, rtol=1e-4, atol=1e-6)
    odd = {
        name: tf.fill(value.shape, 2**62 if value.dtype == tf.int64 else float("nan")) for name, value in raw.items()
    }
    nothing = {name: value[:0] for name, value in raw.items()}
    assert all(np.isfinite(values).all() for values in signature(**odd).values())
    assert all(len(values) == 0 for values in signature(**nothing).values())


def test_passes_are_served_with_how_uncertain_they_are(shown, tmp_path):
    ways = {"epochs": 1, "weighting": "pareto", "variance": True, "passes": 8}
    training.train_rank(shown, "mmoe", ways, 3, tmp_path / "trained")
    model, schema = training.load_rank(shown, tmp_path / "trained")
    export.export_rank(model, schema, tmp_path / "out")
    scores = score_rows(tmp_path / "out" / "saved_model", read_slice(shown, "test"))
    assert set(scores) == {*TASKS, *(f"{task}_{part}" for task in TASKS for part in ("epistemic", "aleatoric"))}
    assert all(np.isfinite(values).all() for values in scores.values())
    assert all((scores[f"{task}_epistemic"] > 0).all() for task in TASKS)


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """Examples of a log that knows where on the screen an item stood."""
    out = tmp_path_factory.mktemp("shown")
    rows = joined_rows(rows=900)
    write_examples(rows.with_columns(position=pl.int_range(pl.len()) % 10), catalogue(), out)
    return thin(out)


def test_an_unknown_model_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown recall 'word2vec': there are .*youtube_dnn"):
        penstock.module("recall", "word2vec")


def test_labels_of_one_class_and_numbers_that_are_not_finite_are_refused():
    rows = {"x": np.zeros(3, np.float32)}
    with pytest.raises(fitting.TrainingError, match="label like has one class only"):
        fitting.check(rows, {"like": np.zeros(3)})
    with pytest.raises(fitting.TrainingError, match="feature x has values that are not finite"):
        fitting.check({"x": np.array([0, np.nan], np.float32)}, {})
    with pytest.raises(fitting.TrainingError, match="no training rows"):
        fitting.check({"x": np.empty(0, np.float32)}, {})
