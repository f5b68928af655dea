from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from penstock import export, index, training
from penstock.catalogue import Catalogue
from penstock.evaluation import retrieve
from penstock.examples import FEATURES, Schema, read_slice
from penstock.retrieval import EXAMPLE_AGE
from penstock.scoring import feed, score_rows


@pytest.fixture(scope="module")
def recall(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("recall")
    training.train_recall(examples, "youtube_dnn", {"epochs": 1, "sample": 32}, 7, out / "trained")
    model, schema = training.load_recall(examples, out / "trained")
    export.export_recall(model, schema, Catalogue.read(examples, schema), out)
    return model, schema, out


@pytest.fixture(scope="module")
def rank(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("rank")
    training.train_rank(examples, "mmoe", {"epochs": 1}, 7, out / "trained")
    model, schema = training.load_rank(examples, out / "trained")
    export.export_rank(model, schema, out)
    return model, schema, out


def _raw(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with what serving meets: ids never seen, lists longer than the model reads, nothing at all."""
    long = {"items": range(0, 400, 5), "times": range(10**12, 10**12 + 80), "sessions": [*range(70), *[-1] * 10]}
    return rows.head(40).with_columns(
        item_id=pl.when(pl.int_range(pl.len()) % 5 == 0).then(123_456_789).otherwise("item_id"),
        **{
            f"history_{name}": pl.when(pl.int_range(pl.len()) % 3 == 0)
            .then(pl.lit([*values], dtype=pl.List(pl.Int64)))
            .otherwise(f"history_{name}")
            for name, values in long.items()
        },
    )


def test_the_graph_encodes_as_the_schema_does(examples):
    schema = Schema.load(examples / "schema")
    rows = _raw(read_slice(examples, "test"))
    encoder = export._Encoder(FEATURES, schema)
    raw = {
        name: tf.constant(feed(rows, name, spec.dtype.as_numpy_dtype, len(spec.shape)))
        for name, spec in encoder.specs().items()
    }
    encoded = encoder(raw)
    for name, expected in schema.encode_rows(rows).items():
        np.testing.assert_allclose(encoded[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_number_that_is_not_finite_is_taken_as_the_mean(examples):
    schema = Schema.load(examples / "schema")
    feature = next(feature for feature in FEATURES if feature.name == "user_click_rate_7d")
    encoded = export._Encoder((feature,), schema)({feature.name: tf.constant([np.nan, np.inf])})
    np.testing.assert_array_equal(encoded[feature.name], [0.0, 0.0])


def test_the_score_is_the_inner_product_in_the_graph_and_outside(recall, examples):
    model, schema, out = recall
    rows = read_slice(examples, "test").head(20)
    encoded = schema.encode_rows(rows, "user") | {EXAMPLE_AGE: np.zeros(20, np.float32)}
    queries = np.asarray(model.query_tower({tensor.name: encoded[tensor.name] for tensor in model.query_tower.inputs}))
    items = pl.read_parquet(out / "items.parquet")
    vectors = np.stack(items["vector"].to_numpy())
    signature = tf.saved_model.load(str(out / "saved_model")).signatures["recommend"]
    inputs = {
        name: tf.constant(feed(rows, name, spec.dtype.as_numpy_dtype, len(spec.shape)))
        for name, spec in signature.structured_input_signature[1].items()
        if name not in ("k", "exclude")
    }
    answer = signature(**inputs, k=tf.constant(5), exclude=tf.constant(np.full((20, 1), -1)))
    best = index.exact(queries, vectors, 5)
    np.testing.assert_array_equal(answer["ids"], items["item_id"].to_numpy()[best])
    np.testing.assert_allclose(
        answer["scores"], np.take_along_axis(queries @ vectors.T, best, axis=1), rtol=1e-4, atol=1e-5
    )


def test_what_is_excluded_is_not_answered_and_a_large_k_ends_in_padding(recall, examples):
    _, schema, out = recall
    rows = read_slice(examples, "test").head(10)
    signature = tf.saved_model.load(str(out / "saved_model")).signatures["recommend"]
    known = schema.vocabularies["item_id"]
    answers = retrieve(signature, rows, len(known) + 7)
    for answer, history in zip(answers, rows["history_items"].to_list(), strict=True):
        left = set(known.tolist()) - set(history)
        assert set(answer[: len(left)].tolist()) == left
        assert (answer[len(left) :] == -1).all()


def test_the_exported_rank_model_scores_as_the_trained_one(rank, examples):
    model, schema, out = rank
    rows = _raw(read_slice(examples, "test"))
    encoded = schema.encode_rows(rows)
    expected = model.scores({tensor.name: encoded[tensor.name] for tensor in model.shared.inputs})
    for name, scores in score_rows(out / "saved_model", rows, batch=17).items():
        np.testing.assert_allclose(scores, expected[name], rtol=1e-4, atol=1e-6)


def test_rows_that_lack_an_input_are_named(rank, examples):
    with pytest.raises(ValueError, match="reads traits"):
        score_rows(rank[2] / "saved_model", read_slice(examples, "test").drop("traits"))


@pytest.mark.parametrize(("kind", "rows"), [("recall", 1), ("rank", export.WARM_UP_ITEMS)])
def test_warm_up_requests_are_what_serving_asks(kind, rows, request):
    out = request.getfixturevalue(kind)[-1] / "saved_model"
    signature = tf.saved_model.load(str(out)).signatures["serving_default"]
    file = out / export.WARM_UP
    assert file.stat().st_size < 40_000
    sent = [PredictionLog.FromString(record) for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()]
    assert len(sent) == 2
    for log in sent:
        inputs = {name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in log.predict_log.request.inputs.items()}
        answer = signature(**inputs)
        assert {len(tensor) for tensor in answer.values()} == {rows}
    longest = max(tensor.shape[1] for tensor in inputs.values() if tensor.shape.rank == 2)
    assert longest == export.LONGEST


@pytest.mark.parametrize("kind", ["recall", "rank"])
def test_a_session_answers_what_the_signature_does(kind, request):
    """TF Serving runs a model in a session, which finds and restores the variables in another way."""
    out = str(request.getfixturevalue(kind)[-1] / "saved_model")
    signature = tf.saved_model.load(out).signatures["serving_default"]
    random = np.random.default_rng(3)
    inputs = {}
    for name, spec in signature.structured_input_signature[1].items():
        shape = [3] * spec.shape.rank
        values = random.integers(0, 40, shape) * 10 if spec.dtype.is_integer else random.random(shape)
        inputs[name] = np.asarray(5 if name == "k" else values, spec.dtype.as_numpy_dtype)
    wanted = signature(**{name: tf.constant(array) for name, array in inputs.items()})
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        described = tf.compat.v1.saved_model.load(session, ["serve"], out).signature_def["serving_default"]
        feeds = {described.inputs[name].name: array for name, array in inputs.items()}
        found = session.run({name: info.name for name, info in described.outputs.items()}, feeds)
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name].numpy(), err_msg=name)
