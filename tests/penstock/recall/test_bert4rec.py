from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.recall.bert4rec import Cloze, Config, build, with_next
from tests.penstock.recall.histories import CATALOGUE, ITEMS, LENGTH, SCHEMA, history


@pytest.fixture(scope="module")
def towers():
    keras.utils.set_random_seed(1)
    found = build(Config(dim=4, blocks=2), SCHEMA, CATALOGUE)
    random = np.random.default_rng(0)
    for variable in found.query.trainable_variables:  # that start so small that nothing would be seen
        variable.assign(variable + random.normal(size=variable.shape, scale=0.5))
    return found


def _states(towers, items, hidden):
    places = np.isin(np.arange(len(items)), hidden)[None]
    return np.asarray(towers.pairs.encoder(np.array([items], np.int32), places))[0]


def test_a_hidden_item_is_told_from_both_sides_and_not_from_itself(towers):
    items = [2, 3, 4, 5, 6]
    state = _states(towers, items, [2])[2]
    for place in range(5):
        changed = list(items)
        changed[place] = 8
        found = _states(towers, changed, [2])[2]
        if place == 2:
            np.testing.assert_array_equal(found, state)
        else:
            assert np.abs(found - state).max() > 1e-4


def test_serving_asks_by_a_mask_behind_the_last_item(towers):
    for known in ([], [7], [2, 3, 4, 5, 6, 7]):
        state = _states(towers, [*known, 8], [len(known)])[-1]
        np.testing.assert_allclose(towers.query(history(*known))[0], state, rtol=1e-4, atol=1e-6)


class Told(keras.layers.Layer):
    """In the place of the encoder: which places are hidden."""

    def call(self, items, hidden, training=None):
        self.items, self.hidden = items, hidden
        return keras.ops.cast(hidden, "float32")[..., None]


@pytest.mark.parametrize(("masked", "last"), [(0.4, 0.0), (0.4, 0.5), (1.0, 0.0)])
def test_what_is_hidden_is_what_is_asked_for(masked, last):
    keras.utils.set_random_seed(3)
    told = Told()
    histories = np.tile(history(2, 3, 1, 4, 4)["history_items"], (2000, 1))
    positives = np.full(2000, 5, np.int32)
    queries, asked, _ = Cloze(told, masked, last)({"history_items": histories}, positives, training=True)
    told.items, told.hidden = np.asarray(told.items), np.asarray(told.hidden)
    assert told.items.shape == (2000, 6)
    np.testing.assert_array_equal(asked, told.items[told.hidden])
    assert np.asarray(queries).all()
    assert not told.hidden[:, 2].any()  # what the unknown is cannot be told
    assert told.hidden.any(axis=1).all()
    alone = told.hidden[:, 5] & (told.hidden.sum(axis=1) == 1)
    by_chance = (1 - masked) ** 4 * (masked + (1 - masked))
    assert alone.mean() == pytest.approx(last + (1 - last) * by_chance, abs=0.04)
    assert told.hidden[:, 0].mean() == pytest.approx((1 - last) * masked, abs=0.04)


def test_a_cut_ends_at_any_item_but_the_first_and_asks_for_it_alone():
    keras.utils.set_random_seed(5)
    told = Told()
    histories = np.tile(history(2, 3, 1, 4, 6)["history_items"], (2000, 1))
    histories[::2] = 0
    cloze = Cloze(told, 0.4, 0.1, cuts=2)
    queries, asked, _ = cloze({"history_items": histories}, np.full(2000, 5, np.int32), training=True)
    items, hidden = np.asarray(told.items), np.asarray(told.hidden)
    assert items.shape == (6000, 6)
    np.testing.assert_array_equal(asked, items[hidden])
    assert len(queries) == len(asked)
    of_one, of_six = (np.repeat(np.arange(2000) % 2 == odd, 2) for odd in (0, 1))
    np.testing.assert_array_equal(items[2000:][of_one], np.tile([5, 0, 0, 0, 0, 0], (2000, 1)))
    np.testing.assert_array_equal(hidden[2000:][of_one], np.tile([True] + 5 * [False], (2000, 1)))
    cut, hidden = items[2000:][of_six], hidden[2000:][of_six]
    ends = (cut != 0).sum(axis=1) - 1
    np.testing.assert_array_equal(cut, np.where(np.arange(6) <= ends[:, None], [2, 3, 1, 4, 6, 5], 0))
    np.testing.assert_allclose(np.bincount(ends, minlength=6) / 2000, [0, 0.2, 0.2, 0.2, 0.2, 0.2], atol=0.04)
    wanted = (np.arange(6) == ends[:, None]) & (cut != 1)  # what the unknown is cannot be told
    np.testing.assert_array_equal(hidden, wanted)


def test_a_sequence_is_the_history_and_the_positive():
    items, lengths = with_next(np.array([[2, 3, 0], [0, 0, 0]], np.int32), np.array([7, 8]))
    np.testing.assert_array_equal(items, [[2, 3, 7], [8, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 1])


def test_a_full_history_has_a_place_for_the_mask(towers):
    assert towers.pairs.encoder.encoder.places.size == LENGTH + 1


def test_shares_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"masked above 0, not 0\.0"):
        build(Config(masked=0.0), SCHEMA, CATALOGUE)
    with pytest.raises(ValueError, match="cuts are 0 or more, not -1"):
        build(Config(cuts=-1), SCHEMA, CATALOGUE)


def test_an_item_starts_as_a_small_vector_and_no_bias():
    keras.utils.set_random_seed(4)
    items = np.asarray(build(Config(), SCHEMA, CATALOGUE).item(np.arange(ITEMS)))
    assert items.shape == (ITEMS, Config().dim + 1)
    assert 0.01 < items[:, :-1].std() < 0.03
    assert not items[:, -1].any()


def test_before_any_training_a_mask_leans_to_the_item_that_is_there():
    keras.utils.set_random_seed(6)
    towers = build(Config(), SCHEMA, CATALOGUE)
    known = np.arange(2, ITEMS)
    scores = np.concatenate([towers.query(history(item)) for item in known]) @ np.asarray(towers.item(known)).T
    np.testing.assert_array_equal(known[scores.argmax(axis=0)], known)  # no other history asks for it as much
