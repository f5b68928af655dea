from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from penstock import training
from penstock.recall import ralm_user
from penstock.recall.ralm_user import DomainHistory
from tests.penstock.recall import small_texts


def _towers(**settings):
    keras.utils.set_random_seed(1)
    schema = small_texts.schema()
    vocabularies = {**schema.vocabularies, "author_id": np.array([5, 6]), "tags": np.array([1, 2, 3])}
    schema = type(schema)(schema.features, vocabularies, {})
    config = ralm_user.Config(dim=8, hidden=(16,), example_age=False, **settings)
    return ralm_user.build(config, schema, small_texts.attributes_alone())


def test_the_attributes_of_a_history_are_those_of_its_items():
    tags = np.array([[0, 0], [0, 0], [2, 3], [3, 0]], np.int32)
    found = DomainHistory(tags)(np.array([[3, 2, 0], [1, 0, 0]]))
    np.testing.assert_array_equal(found, [[3, 0, 2, 3, 0, 0], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(DomainHistory(tags[:, 0])(np.array([[2, 3]])), [[2, 3]])


def test_each_domain_is_a_field_more():
    for domains in ((), ("tags",), ("author_id", "tags")):
        merge = _towers(domains=domains).query.get_layer("merge")
        assert merge.input.shape[1:] == (1 + len(domains), 8)


def test_a_domain_tells_histories_apart_that_differ_in_it():
    histories = small_texts.histories([2, 3], [4, 3])
    towers = _towers(domains=("tags",))
    tables = [layer for layer in towers.query.layers if getattr(layer, "vocabulary", "") == "item_id"]
    tables[0].table.assign(np.zeros(tables[0].table.shape))
    found = np.asarray(towers.query(histories))
    assert np.abs(found[0] - found[1]).max() > 1e-6


def test_a_domain_that_items_do_not_have_is_named():
    with pytest.raises(ValueError, match="the domain 'composer': there are author_id, tags"):
        _towers(domains=("composer",))


def test_items_start_within_two_deviations():
    towers = _towers()
    towers.item(np.arange(6))
    table = np.asarray(towers.item.table)
    assert 0.5 < table.std() / 8**-0.5 < 1.2
    assert np.abs(table).max() <= 2 * 8**-0.5 + 1e-6


def test_a_unit_is_dead_if_it_is_nothing_to_anybody():
    vectors = np.array([[0, 0, 1, 0], [0, 2, 0, 0]])
    assert training.dead_units(vectors) == 0.5
    assert training.dead_units(np.zeros((3, 2))) == 1.0
    assert training.dead_units(np.ones((3, 2))) == 0.0


def test_dead_units_are_reported_each_epoch_and_warned_of(examples, tmp_path, monkeypatch, capsys):
    """A bias far below 0 leaves no unit alive."""
    ways = {"epochs": 1, "dim": 4, "hidden": [4], "prefixes": 0, "batch_size": 256}
    relu = keras.layers.Dense

    def dense(units, activation=None, **settings):
        return relu(units, activation, bias_initializer=keras.initializers.Constant(-9.0), **settings)

    monkeypatch.setattr(ralm_user.keras.layers, "Dense", dense)
    training.train_recall(examples, "ralm_user", ways, 3, tmp_path)
    (row,) = json.loads((tmp_path / "history.json").read_text())
    assert row["dead_units"] == 1.0
    assert "warning: 100% of the units of a user's vector are 0 for everybody" in capsys.readouterr().out
