"""The trees get the features that our models get, rare items are those that they are said to be, and goals are fair."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_ind

from benchmarks.kept import parts
from benchmarks.rank import (
    BINARY,
    RARE_POSITIVES,
    TRIALS,
    Trial,
    chance,
    figures,
    frequent_items,
    modules,
)
from benchmarks.rank_columns import TOKENS, columns
from penstock import config, module
from penstock.examples import Schema, read_slice, write_examples
from penstock.ranking import SIDES
from tests.penstock.conftest import catalogue, joined_rows


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    rows = joined_rows(rows=600, users=12)
    # the second trait is not known of all
    traits = [[TOKENS + user, 2 * TOKENS + user % 3][: 1 + user % 2] for user in rows["user_id"]]
    out = tmp_path_factory.mktemp("examples")
    write_examples(rows.with_columns(traits=pl.Series(traits)), catalogue(), out)
    return out


def test_the_trees_read_every_feature_of_the_models(examples):
    given = columns(examples)
    schema = Schema.load(examples / "schema")
    names = given["names"].tolist()
    lists = {"traits", "tags", "history_items"}
    assert {feature.name for feature in schema.of(*SIDES)} - lists <= set(names)
    assert {"trait 1", "trait 2", "tag 0", "tag 1", "history"} <= set(names)
    for part in ("train", "validation", "test"):
        rows = read_slice(examples, part)
        table = dict(zip(names, given[f"{part}_columns"].T, strict=True))
        assert np.array_equal(given[f"{part}_labels"], rows.select(BINARY).to_numpy())
        for place, row in enumerate(rows.iter_rows(named=True)):
            user, tags = row["user_id"], row["tags"]
            assert table["trait 1"][place] == user
            assert table["trait 2"][place] == user % 3 if user % 2 else np.isnan(table["trait 2"][place])
            assert table["history"][place] == len(row["history_items"])
            assert table["item_id"][place] == schema.encode(schema.of("item")[0], pl.Series([row["item_id"]]))[0]
            assert table["register_days"][place] == row["register_days"]
            assert (table["tag 0"][place] > 0) == (len(tags) > 0)


def test_categories_are_small_or_large_by_their_values_in_training(examples, monkeypatch):
    monkeypatch.setattr("benchmarks.rank_columns.LARGE", 15)
    given = columns(examples)
    names = given["names"].tolist()
    categories = [names[place] for place in np.concatenate([given["small"], given["large"]])]
    schema = Schema.load(examples / "schema")
    ids = {feature.name for feature in schema.of(*SIDES) if feature.kind == "id"}
    assert set(categories) == ids | {"trait 1", "trait 2", "tag 0", "tag 1"}
    assert [names[place] for place in given["large"]] == ["item_id"]  # 40 of them, and 12 users


def test_rare_items_are_the_quarter_with_the_fewest_impressions_and_those_not_seen(examples):
    train = read_slice(examples, "train")
    counts = {item: train.filter(pl.col("item_id") == item).height for item in train["item_id"].unique()}
    least = sorted(counts.values())[round((len(counts) - 1) * 0.25)]
    frequent = frequent_items(examples)
    assert sorted(frequent) == sorted(item for item, count in counts.items() if count > least)

    n = 4 * RARE_POSITIVES
    rows = pl.DataFrame(
        {
            "user_id": [0] * n,
            "item_id": [frequent[0], -5] * (n // 2),  # -5 was never seen
            "watch_time_ms": [1000] * n,
            **{task: [0, 0, 1, 1] * (n // 4) for task in BINARY},
            # of the frequent item all are in order, of the other none
            **{f"p_{task}": [0.1, 0.9, 0.8, 0.2] * (n // 4) for task in BINARY},
        }
    )
    found = figures(rows, frequent)
    assert found["rare_rows"] == n // 2
    assert found["rare_auc_click"] == 0.0
    assert found["auc_click"] == 0.5
    assert "rare_auc_like" not in figures(rows.head(n - 4), frequent)


def test_chance_is_where_the_one_sided_test_of_welch_says_five_percent():
    a, b = [0.71, 0.72, 0.715, 0.74, 0.70], [0.705, 0.706, 0.7055, 0.704, 0.7051]
    apart = chance(a, b)
    shifted = [value - np.mean(a) + np.mean(b) + apart for value in a]
    assert ttest_ind(shifted, b, equal_var=False, alternative="greater").pvalue == pytest.approx(0.05)
    assert chance([0.7, 0.7], [0.8, 0.8]) == 0.0


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_every_trial_is_of_a_model_and_of_parameters_that_there_are(trial):
    config(module("rank", trial.model), trial.overrides)


def test_a_trial_depends_on_its_model_and_on_what_that_imports():
    names = {module.rpartition(".")[2] for module, _ in parts(modules(Trial("", "mmoe", {})))}
    assert {"mmoe", "ranking", "experts", "fitting", "optimizers", "export", "tensorflow"} <= names
    assert not {"single_task", "sdm", "gate", "kuairand"} & names
