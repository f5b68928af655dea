from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock import objectives
from penstock.layers.next_item import begun
from penstock.recall.sasrec import Config, build
from penstock.retrieval import Retrieval
from tests.penstock.recall.histories import CATALOGUE, ITEMS, SCHEMA, history

DIM = 4


@pytest.fixture(scope="module")
def towers():
    keras.utils.set_random_seed(1)
    found = build(Config(dim=DIM, heads=2, blocks=2), SCHEMA, CATALOGUE)
    random = np.random.default_rng(0)
    for variable in found.query.trainable_variables:  # that start so small that nothing would be seen
        variable.assign(variable + random.normal(size=variable.shape, scale=0.5))
    return found


def _states(towers, *items):
    return np.asarray(towers.pairs.encoder(begun(history(*items)["history_items"])[0]))[0]


def test_a_later_item_changes_no_earlier_state_and_an_earlier_one_all_later(towers):
    states = _states(towers, 2, 3, 4, 5, 6)
    for place in range(5):
        changed = [2, 3, 4, 5, 6]
        changed[place] = 8
        found = _states(towers, *changed)
        np.testing.assert_array_equal(found[: place + 1], states[: place + 1])  # state 0 is of no item
        assert (np.abs(found[place + 1 :] - states[place + 1 :]).max(axis=1) > 1e-4).all()


def test_before_anything_is_learnt_a_state_is_that_of_its_item():
    keras.utils.set_random_seed(4)
    towers = build(Config(dropout=0.0), SCHEMA, CATALOGUE)
    for items in ([7], [2, 3, 4, 5, 6, 7], [7, 7, 7]):
        vector, state = np.asarray(towers.item(np.array([7])))[0], np.asarray(towers.query(history(*items)))[0]
        assert np.corrcoef(vector, state)[0, 1] > 0.9


def _norm(layer, x):
    scale, shift = np.asarray(layer.gamma), np.asarray(layer.beta)
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * scale + shift


def _block(block, vectors):
    def kernel(layer):
        return np.asarray(layer.kernel)

    normed = [_norm(block.norms[0], x) for x in vectors]
    joined = []
    for place, x in enumerate(normed):
        heads = []
        for part in (slice(0, DIM // 2), slice(DIM // 2, DIM)):
            seen = normed[: place + 1]
            query = (x @ kernel(block.heads.of_queries))[part]
            scores = [np.exp(query @ (key @ kernel(block.heads.of_keys))[part] / np.sqrt(DIM // 2)) for key in seen]
            values = [(value @ kernel(block.heads.of_values))[part] for value in seen]
            heads.append(sum(s / sum(scores) * v for s, v in zip(scores, values, strict=True)))
        joined.append(vectors[place] + np.concatenate(heads) @ kernel(block.heads.joined))
    found = []
    for y in joined:
        hidden = _norm(block.norms[1], y) @ kernel(block.wide) + np.asarray(block.wide.bias)
        found.append(y + np.maximum(hidden, 0) @ kernel(block.narrow) + np.asarray(block.narrow.bias))
    return found


def test_equals_the_loops(towers):
    encoder = towers.pairs.encoder.encoder
    table, places = np.asarray(towers.item.table), np.asarray(encoder.places.table)
    items = [1, 4, 2, 2]
    vectors = [2.0 * table[item] + places[len(places) - 4 + place] for place, item in enumerate(items)]
    for block in encoder.blocks:
        vectors = _block(block, vectors)
    expected = np.array([_norm(encoder.norm, x) for x in vectors])
    np.testing.assert_allclose(_states(towers, 4, 2, 2), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(towers.query(history(4, 2, 2))[0], expected[-1], rtol=1e-3, atol=1e-5)


def test_an_item_is_its_vector_in_the_history(towers):
    assert any(layer is towers.item for layer in (towers.pairs.encoder.encoder.items,))
    assert towers.item(np.arange(ITEMS)).shape == (ITEMS, DIM)


def test_who_else_is_in_the_batch_changes_nothing(towers):
    rows = [history(), history(7), history(2, 3, 4, 5, 6, 7), history(1, 1)]
    together = towers.query({"history_items": np.concatenate([row["history_items"] for row in rows])})
    for row, one in zip(rows, together, strict=True):
        np.testing.assert_allclose(towers.query(row)[0], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_every_place_of_a_row_is_learnt_from(loss):
    """One user whose items go round: each is told from the one before it, in the middle as at the end."""
    keras.utils.set_random_seed(2)
    config = Config(dim=16, blocks=1, dropout=0.0, loss=loss, sampler="uniform", negatives=5, batch_size=8)
    model = Retrieval(build(config, SCHEMA, CATALOGUE), objectives.build(config, np.ones(ITEMS), 1))
    model.build()
    model.compile(keras.optimizers.Adam(0.02), jit_compile=False)
    rows = {"history_items": np.repeat(history(2, 3, 4, 5, 6, 7)["history_items"], 40, axis=0)}
    model.fit(rows, np.full(40, 8, np.int32), batch_size=1, verbose=0)
    items = np.asarray(model.item_tower(np.arange(2, ITEMS)))
    for known in range(7):
        query = model.query_tower(history(*range(2, 2 + known)))
        assert int(np.argmax(items @ np.asarray(query)[0])) == known
