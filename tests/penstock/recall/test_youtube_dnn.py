from __future__ import annotations

import keras
import numpy as np
import polars as pl
import pytest

from penstock import objectives, training
from penstock.catalogue import Catalogue
from penstock.examples import Feature, Schema, read_slice
from penstock.recall.youtube_dnn import Config, build
from penstock.retrieval import EXAMPLE_AGE, Retrieval

ITEMS, LENGTH, DIM = 9, 4, 3
SCHEMA = Schema(
    (
        Feature("user_id", "user", "id", vocabulary="user_id"),
        Feature("history_items", "user", "ids", vocabulary="item_id", length=LENGTH),
        Feature("city", "user", "id", vocabulary="city"),
        Feature("followers", "user", "number"),
        Feature("hour", "context", "number"),
    ),
    {"item_id": np.arange(ITEMS - 2), "user_id": np.arange(3), "city": np.arange(2)},
    {},
)
CATALOGUE = Catalogue(np.arange(ITEMS - 2), ITEMS - 2, {}, ())
INPUTS = {
    "history_items": np.array([[2, 5, 5, 0], [8, 0, 0, 0], [0, 0, 0, 0]], np.int32),
    "city": np.array([2, 3, 1], np.int32),
    "followers": np.array([0.5, -1.0, 2.0], np.float32),
    EXAMPLE_AGE: np.array([3.0, 0.0, 1.5], np.float32),
}


def _towers(**settings):
    keras.utils.set_random_seed(4)
    return build(Config(dim=DIM, hidden=(7, 5), **settings), SCHEMA, CATALOGUE)


def _table(tower, vocabulary):
    (found,) = (layer for layer in tower.layers if getattr(layer, "vocabulary", None) == vocabulary)
    return np.asarray(found.table, np.float64)


@pytest.mark.parametrize(
    ("activation", "by_hand"),
    [("relu", lambda x: np.maximum(x, 0.0)), ("tanh", np.tanh), ("leaky_relu", lambda x: np.where(x > 0, x, 0.2 * x))],
)
def test_the_user_is_what_an_mlp_makes_of_the_mean_history_the_profile_and_the_age(activation, by_hand):
    tower = _towers(activation=activation, dropout=0.5).query
    assert {tensor.name for tensor in tower.inputs} == set(INPUTS)  # neither who it is nor what the request is
    found = np.asarray(tower(INPUTS))
    items, cities = _table(tower, "item_id"), _table(tower, "city")
    layers = [layer for layer in tower.layers if isinstance(layer, keras.layers.Dense)]
    for row, history in enumerate(INPUTS["history_items"]):
        watched = [items[item] for item in history if item]
        parts = [
            np.mean(watched, axis=0) if watched else np.zeros(DIM),
            cities[INPUTS["city"][row]],
            [INPUTS["followers"][row]],
            [INPUTS[EXAMPLE_AGE][row]],
        ]
        hidden = np.concatenate(parts)
        for place, layer in enumerate(layers):
            kernel, bias = (np.asarray(weight, np.float64) for weight in layer.weights)
            hidden = hidden @ kernel + bias
            hidden = hidden if place == len(layers) - 1 else by_hand(hidden)
        np.testing.assert_allclose(found[row], [*hidden, 1.0], rtol=1e-4, atol=1e-6)


def test_an_item_is_its_column_of_the_output_layer_and_its_bias():
    towers = _towers()
    towers.item(np.arange(ITEMS))
    table = np.random.default_rng(0).normal(size=(ITEMS, DIM + 1))
    towers.item.set_weights([table])
    output = keras.layers.Dense(ITEMS)
    output.build((None, DIM))
    output.set_weights([table[:, :DIM].T, table[:, DIM]])
    query = np.asarray(towers.query(INPUTS))
    scores = query @ np.asarray(towers.item(np.arange(ITEMS))).T
    np.testing.assert_allclose(scores, output(query[:, :DIM]), rtol=1e-5, atol=1e-6)


def test_the_order_of_a_history_does_not_count_and_what_is_in_it_does():
    tower = _towers().query

    def query(*history):
        return np.asarray(tower({**INPUTS, "history_items": np.array([history] * 3, np.int32)}))

    np.testing.assert_allclose(query(2, 5, 7, 0), query(7, 2, 5, 0), rtol=1e-5, atol=1e-7)
    assert not np.allclose(query(2, 5, 7, 0), query(2, 5, 6, 0))


def _rows(ages):
    rows = len(ages)
    same = {"history_items": np.zeros((rows, LENGTH), np.int32), "city": np.ones(rows, np.int32)}
    return {**same, "followers": np.zeros(rows, np.float32), EXAMPLE_AGE: np.asarray(ages, np.float32)}


@pytest.mark.parametrize("aged", [True, False])
def test_with_the_age_it_serves_what_is_watched_now_and_without_it_what_was_on_the_whole(aged):
    """Covington et al., section 3.3: item 3 was watched three times as often, and is over; item 5 is watched now."""
    towers = _towers(dropout=0.0, example_age=aged)
    model = Retrieval(towers, objectives.build(Config(loss="softmax"), np.ones(ITEMS), 0))
    model.compile(keras.optimizers.Adam(0.05))
    ages = np.tile([4.0, 3.0, 2.5, 0.0], 16)
    positives = np.where(ages > 0, 3, 5).astype(np.int32)
    inputs, now = _rows(ages), _rows([0.0])
    if not aged:
        inputs, now = ({name: one for name, one in given.items() if name != EXAMPLE_AGE} for given in (inputs, now))
    model.fit(inputs, positives, epochs=60, batch_size=64, verbose=0)
    scores = np.asarray(towers.query(now)) @ np.asarray(towers.item(np.arange(ITEMS))).T
    assert scores[0].argmax() == (5 if aged else 3)
    chances = np.exp(scores[0]) / np.exp(scores[0, 2:]).sum()
    assert chances[3] < 0.1 if aged else chances[3] == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("most", [1, 3])
def test_a_user_has_no_more_examples_than_others_and_all_of_them_are_its_own(examples, most):
    schema = Schema.load(examples / "schema")
    rows = training._positives(examples, "train", schema)
    whole = training._with_prefixes(rows, examples, Config(prefixes=5), 0)
    kept = training._with_prefixes(rows, examples, Config(prefixes=5, examples_per_user=most), 0)
    counts = dict(whole["user_id"].value_counts().iter_rows())
    assert max(counts.values()) > 3
    assert dict(kept["user_id"].value_counts().iter_rows()) == {
        user: min(count, most) for user, count in counts.items()
    }
    assert kept.join(whole, on=whole.columns, how="anti", nulls_equal=True).is_empty()
    other = training._with_prefixes(rows, examples, Config(prefixes=5, examples_per_user=most), 1)
    assert not kept.equals(other)  # drawn by the seed


def test_what_is_asked_for_comes_after_all_that_is_known_of_the_user(examples):
    """Section 3.4: the label is the next watch, not one from the middle of what is told."""
    schema = Schema.load(examples / "schema")
    rows = training._positives(examples, "train", schema)
    found = training._with_prefixes(rows, examples, Config(prefixes=9), 0)
    assert found.height > rows.height
    told = found.filter(pl.col("history_times").list.len() > 0)
    assert (told["history_times"].list.max() < told["time_ms"]).all()
    assert read_slice(examples, "validation")["event_time"].min() >= rows["event_time"].max()
