from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock import objectives
from penstock.recall.gru4rec import Config, build
from penstock.retrieval import Retrieval
from tests.penstock.recall.histories import CATALOGUE, ITEMS, SCHEMA, history


@pytest.fixture(scope="module", params=[(1, True), (2, False)])
def towers(request):
    keras.utils.set_random_seed(1)
    layers, tied = request.param
    return build(Config(dim=4, units=5, layers=layers, tied=tied), SCHEMA, CATALOGUE)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _gru(layer, inputs):
    kernel, recurrent, (bias, of_state) = map(np.asarray, layer.cell.weights)
    state, found = np.zeros(layer.units), []
    for x in inputs:
        update, reset, new = np.split(x @ kernel + bias, 3)
        z, r, n = np.split(state @ recurrent + of_state, 3)
        gate = _sigmoid(update + z)
        state = gate * state + (1 - gate) * np.tanh(new + _sigmoid(reset + r) * n)
        found.append(state)
    return found


def test_equals_the_loops(towers):
    encoder = towers.pairs.encoder.encoder
    vectors = [np.asarray(encoder.items(np.array([item])))[0, :4] for item in (1, 4, 2, 2)]
    for gru in encoder.recurrent:
        vectors = _gru(gru, vectors)
    kernel, bias = map(np.asarray, encoder.projection.weights)
    expected = np.append(vectors[-1] @ kernel + bias, 1.0)
    np.testing.assert_allclose(towers.query(history(4, 2, 2))[0], expected, rtol=1e-4, atol=1e-6)


def test_one_reading_takes_the_steps_that_sessions_in_parallel_take(towers):
    """The state after each item, which the paper gets by a step for each, with all that was before it."""
    queries, positives, _ = towers.pairs(history(4, 2, 3, 8), np.array([5], np.int32))
    assert np.asarray(positives).tolist() == [4, 2, 3, 8, 5]
    for known, query in enumerate(np.asarray(queries)):
        np.testing.assert_allclose(towers.query(history(*[4, 2, 3, 8][:known]))[0], query, rtol=1e-5, atol=1e-6)


def test_an_item_of_the_history_has_the_vector_it_is_scored_by_if_it_is_to(towers):
    assert (towers.pairs.encoder.encoder.items is towers.item) == (len(towers.pairs.encoder.encoder.recurrent) == 1)


def test_a_ranking_loss_puts_the_next_item_first():
    keras.utils.set_random_seed(2)
    config = Config(dim=8, units=8, dropout=0.0, loss="bpr_max", sample=6, regularization=0.1)
    model = Retrieval(build(config, SCHEMA, CATALOGUE), objectives.build(config, np.ones(ITEMS), 1))
    model.build()
    model.compile(keras.optimizers.Adam(0.03), jit_compile=False)
    rows = {"history_items": np.repeat(history(2, 3, 4, 5, 6, 7)["history_items"], 64, axis=0)}
    model.fit(rows, np.full(64, 8, np.int32), batch_size=1, epochs=3, verbose=0)
    items = np.asarray(model.item_tower(np.arange(2, ITEMS)))
    for known in (1, 3, 6):
        query = np.asarray(model.query_tower(history(*range(2, 2 + known))))[0]
        assert int(np.argmax(items @ query)) == known
