"""Trained models as SavedModels that take raw features: the encoding, the model and the search in one graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import keras
import numpy as np
import polars as pl
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from penstock import index
from penstock.catalogue import Catalogue
from penstock.examples import FIRST, LIMIT, PADDING, UNKNOWN, Feature, Schema
from penstock.ranking import Ranking
from penstock.retrieval import EXAMPLE_AGE, Retrieval
from penstock.training import item_vectors

if keras.config.backend() != "tensorflow":
    raise ImportError(f"models are exported under KERAS_BACKEND=tensorflow, not {keras.config.backend()}")

WARM_UP = Path("assets.extra") / "tf_serving_warmup_requests"
"""Where in a SavedModel TF Serving looks for requests that it answers before anybody else's."""

WARM_UP_ITEMS = 200
"""So many items a request asks of the recall model, and of the rank model the scores of."""

LONGEST = 50
"""Elements of a list in a request."""


class _Encoder(tf.Module):
    """`Schema.encode` as a graph."""

    def __init__(self, features: tuple[Feature, ...], schema: Schema) -> None:
        super().__init__()
        self.features = features
        self._scales = schema.scales
        self._vocabularies = {
            name: tf.Variable(schema.vocabularies[name], trainable=False)
            for name in {feature.vocabulary for feature in features if feature.vocabulary}
        }

    def specs(self) -> dict[str, tf.TensorSpec]:
        """The raw inputs: int64 `[batch]` or `[batch, any length]`, float32 `[batch]`."""
        return {
            feature.name: tf.TensorSpec(
                [None, None] if feature.length else [None],
                tf.float32 if feature.kind in ("count", "number") else tf.int64,
                feature.name,
            )
            for feature in self.features
        }

    def __call__(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {feature.name: self._encode(feature, raw) for feature in self.features}

    def _encode(self, feature: Feature, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        raw = inputs[feature.name]
        if feature.kind in ("count", "number"):
            mean, deviation = self._scales[feature.name]
            raw = tf.math.log1p(tf.maximum(raw, 0.0)) if feature.kind == "count" else raw
            value = (raw - mean) / deviation
            return tf.clip_by_value(tf.where(tf.math.is_finite(value), value, 0.0), -LIMIT, LIMIT)
        if feature.length:
            raw = _tail(raw, inputs[feature.beside or feature.name], feature.length)
        if feature.kind in ("integer", "integers"):
            return raw
        vocabulary = self._vocabularies[feature.vocabulary]
        unknown = tf.where(raw < 0, PADDING, UNKNOWN)
        if vocabulary.shape[0] == 0:
            return unknown
        flat = tf.searchsorted(vocabulary, tf.reshape(raw, [-1]))
        place = tf.reshape(tf.minimum(flat, vocabulary.shape[0] - 1), tf.shape(raw))
        return tf.where(tf.equal(tf.gather(vocabulary, place), raw), place + FIRST, unknown)


def _tail(raw: tf.Tensor, ids: tf.Tensor, length: int) -> tf.Tensor:
    """The last `length` values that stand beside ids that are not padding, `[batch, length]`, padding behind."""
    counts = tf.reduce_sum(tf.cast(ids >= 0, tf.int32), axis=1, keepdims=True)
    width = tf.shape(raw)[1]
    place = tf.maximum(counts - length, 0) + tf.range(length)[None, :]
    taken = tf.gather(raw, tf.minimum(place, tf.maximum(width - 1, 0)), batch_dims=1)
    return tf.where(place < counts, taken, tf.constant(-1, tf.int64))


class _Recall(tf.Module):
    def __init__(self, tower: keras.Model, encoder: _Encoder, index: tf.Module) -> None:
        super().__init__()
        # a variable that Keras itself tracks is in the saved graph twice, and TF Serving restores the wrong one
        self._state = [variable.value for variable in tower.variables]
        self._query = partial(tower, training=False)
        self._by_age = EXAMPLE_AGE in {tensor.name for tensor in tower.inputs}
        self._encoder = encoder
        self._index = index
        specs = encoder.specs() | {
            "k": tf.TensorSpec([], tf.int32, "k"),
            "exclude": tf.TensorSpec([None, None], tf.int64, "exclude"),
        }
        self.recommend = tf.function(self._recommend, input_signature=[specs], autograph=False)

    def _recommend(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        inputs = self._encoder(raw)
        if self._by_age:
            inputs[EXAMPLE_AGE] = tf.zeros_like(next(iter(inputs.values())), tf.float32)
        query = self._query(inputs)
        ids, scores = self._index.search(query, raw["k"], raw["exclude"])
        return {"ids": ids, "scores": scores, "query": query}


class _Rank(tf.Module):
    def __init__(self, model: Ranking, encoder: _Encoder) -> None:
        super().__init__()
        self._state = [variable.value for variable in model.variables]
        self._scores = model.scores
        self._encoder = encoder
        self.predict = tf.function(self._predict, input_signature=[encoder.specs()], autograph=False)

    def _predict(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return self._scores(self._encoder(raw))


def read_by(model: Retrieval | Ranking, schema: Schema) -> tuple[Feature, ...]:
    """The features that an exported model reads: those of its query tower, or of the trunk of a rank model."""
    tower = model.query_tower if isinstance(model, Retrieval) else model.shared
    names = {tensor.name for tensor in tower.inputs}
    return tuple(feature for feature in schema.features if feature.name in names)


def _save(module: tf.Module, name: str, path: Path, warm_up: list[dict[str, tuple[int, tuple[int, ...]]]]) -> None:
    """Writes the module, and `warm_up`: requests as name → (the value of all its elements, shape)."""
    signature = getattr(module, name)
    tf.saved_model.save(module, str(path), signatures={"serving_default": signature, name: signature})
    (specs,) = signature.input_signature
    (path / WARM_UP).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path / WARM_UP)) as records:
        for request in warm_up:
            log = PredictionLog()
            log.predict_log.request.model_spec.signature_name = "serving_default"
            for input_, (value, shape) in request.items():
                tensor = tf.make_tensor_proto(value, specs[input_].dtype, shape)  # one value, whatever the shape
                log.predict_log.request.inputs[input_].CopyFrom(tensor)
            records.write(log.SerializeToString())


def _filled(features: tuple[Feature, ...], rows: int, width: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """A request of `rows` whose lists have `width` elements, or as many as the model reads if those are fewer."""
    return {
        feature.name: (0, (rows, min(width, feature.length)) if feature.length else (rows,)) for feature in features
    }


def export_recall(
    model: Retrieval, schema: Schema, catalogue: Catalogue, out: Path, queries: np.ndarray | None = None
) -> dict[str, float]:
    """Writes `saved_model/` with the signature `recommend`, and `items.parquet` with the ids and vectors.

    The signature answers with the best items, `ids` and `scores`, and the user's vector, `query`.

    The items are those seen in training; of a model that knows items by their content, the whole catalogue.

    Args:
        queries: vectors of users `[queries, dim]`, by whom a large catalogue's index is made.

    Returns:
        `items`, how many there are, and `recall@200`, the share of the exact answer that the index finds.

    Raises:
        ValueError: a vector is not finite.
    """
    ids = catalogue.ids if model.by_content else catalogue.ids[: catalogue.known]
    vectors = item_vectors(model, np.arange(len(ids)) + FIRST)
    if not np.isfinite(vectors).all():
        raise ValueError("item vectors are not finite")
    encoder = _Encoder(read_by(model, schema), schema)
    search = index.build(vectors, ids, queries=queries)
    module = _Recall(model.query_tower, encoder, search)
    asked = {"k": (WARM_UP_ITEMS, ())}
    requests = [_filled(encoder.features, 1, width) | asked | {"exclude": (0, (1, width))} for width in (1, LONGEST)]
    _save(module, "recommend", out / "saved_model", requests)
    pl.DataFrame({"item_id": ids, "vector": vectors}, schema_overrides={"vector": pl.List(pl.Float32)}).write_parquet(
        out / "items.parquet"
    )
    return {"items": len(ids), "recall@200": search.recall}


def export_rank(model: Ranking, schema: Schema, out: Path) -> None:
    """Writes `saved_model/` with the signature `predict`: `Ranking.scores` of raw features."""
    encoder = _Encoder(read_by(model, schema), schema)
    module = _Rank(model, encoder)
    _save(module, "predict", out / "saved_model", [_filled(encoder.features, WARM_UP_ITEMS, w) for w in (1, LONGEST)])
