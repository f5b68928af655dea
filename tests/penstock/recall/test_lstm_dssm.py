from __future__ import annotations

import keras
import numpy as np

from penstock.recall import lstm_dssm
from penstock.tokens import Texts
from tests.penstock.recall import small_texts


def _query():
    keras.utils.set_random_seed(1)
    config = lstm_dssm.Config(dim=8, width=5)
    return lstm_dssm.build(config, small_texts.schema(), small_texts.catalogue()).query


def _read(query, *texts):
    return np.asarray(query.get_layer("text").read(Texts.of(small_texts.catalogue()).encode(texts)))


def test_order_matters_at_any_distance():
    found = _read(_query(), "night train the dog sleeps", "train night the dog sleeps", "night train the sleeps dog")
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(found[first] - found[second]).max() > 1e-4


def test_a_history_is_read_as_one_text_the_latest_item_last():
    query = _query()
    joined = np.asarray(query(small_texts.histories([3, 2], [2, 3]))) / 10.0
    typed = _read(query, "night train the harbour at night", "the harbour at night night train")
    np.testing.assert_allclose(joined, typed, rtol=1e-4, atol=1e-6)
    assert np.abs(typed[0] - typed[1]).max() > 1e-3


def test_the_vector_is_the_state_after_the_last_word():
    query = _query()
    reader = query.get_layer("text")
    texts = Texts.of(small_texts.catalogue())
    parts = texts.encode(["night train the harbour"])
    cell = reader.encoder.cell
    states = [np.zeros((1, 8), np.float32)] * 2
    for word in range(parts.shape[1]):
        _, states = cell(reader.hashing(parts[:, word]), states)
    output = np.asarray(states[0])
    np.testing.assert_allclose(reader.read(parts), output / np.linalg.norm(output), rtol=1e-4, atol=1e-6)


def test_the_peepholes_of_both_sides_are_trained():
    keras.utils.set_random_seed(1)
    towers = lstm_dssm.build(lstm_dssm.Config(dim=8, width=5), small_texts.schema(), small_texts.catalogue())
    towers.item(np.arange(8))
    for tower in (towers.query, towers.item):
        names = [weight.path.split("/")[-1] for weight in tower.trainable_variables]
        assert {"peephole_before", "peephole_after"} <= set(names)
