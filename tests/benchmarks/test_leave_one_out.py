"""The split gives nothing away, and the figures are those of a sort by hand."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from benchmarks.leave_one_out import BASELINES, figures, of_baseline, of_model, ranks, read, write
from benchmarks.sequence import PUBLISHED, TRIALS, report
from penstock import objectives, training
from penstock.catalogue import Catalogue
from penstock.examples import Schema, read_slice
from penstock.recall import sasrec
from penstock.retrieval import Retrieval

SEQUENCES = [np.array(items) for items in ([3, 1, 2, 5, 4], [1, 2, 3, 1], [7, 3], [9, 3, 8], [2, 4, *range(10, 80)])]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    out = tmp_path_factory.mktemp("beauty") / "examples"
    write(SEQUENCES, out)
    return out


def test_a_file_of_users_and_items_is_read_in_its_order(tmp_path):
    path = tmp_path / "beauty.txt"
    path.write_text("1 5\n1 2\n2 5\n1 5\n")
    assert [items.tolist() for items in read(path)] == [[5, 2, 5], [5]]


def test_the_last_item_is_test_and_the_one_before_it_validation(examples):
    expected = {"train": [], "validation": [], "test": []}
    for user, items in enumerate(SEQUENCES):
        items = items.tolist()
        learnt = items[:-2] if len(items) >= 3 else items
        expected["train"] += [(user, learnt[:place], learnt[place]) for place in range(len(learnt))]
        if len(items) >= 3:
            expected["validation"].append((user, items[:-2], items[-2]))
            expected["test"].append((user, items[:-1], items[-1]))
    for part, rows in expected.items():
        found = read_slice(examples, part).select("user_id", "history_items", "item_id").rows()
        assert sorted((user, list(items), item) for user, items, item in found) == sorted(rows)
    known = Schema.load(examples / "schema").vocabularies["item_id"]
    np.testing.assert_array_equal(known, np.unique(np.concatenate(SEQUENCES)))


def test_of_a_user_one_row_stands_for_fifty(examples):
    schema = Schema.load(examples / "schema")
    rows = training._positives(examples, "train", schema)
    kept = training._one_for_all(rows, 50).filter(pl.col("user_id") == 4)
    learnt = SEQUENCES[4][:-2].tolist()
    taught = [[*row["history_items"][-50:], row["item_id"]] for row in kept.iter_rows(named=True)]
    assert taught == [learnt[:20], learnt[19:]]  # the twentieth once as what came next, once as what came first


def _by_hand(scores, wanted, seen):
    """Ranks by a sort of what is left, HitRate@10 and NDCG@10."""
    found = []
    for row, own, had in zip(scores, wanted, seen, strict=True):
        left = [item for item in range(len(row)) if item not in set(had.tolist())]
        order = sorted(left, key=lambda item: (-row[item], item == own))  # ties to its disadvantage
        found.append(order.index(own) + 1 if own in left else len(row))
    gains = [1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in found]
    return found, sum(rank <= 10 for rank in found) / len(found), sum(gains) / len(gains)


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_of_a_sort_by_hand(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 12, (40, 30)).astype(np.float32)  # with ties
    wanted = random.integers(0, 30, 40)
    seen = [random.integers(0, 30, random.integers(0, 8)) for _ in range(40)]  # some had what is wanted
    before = scores.copy()
    found = ranks(scores, wanted, seen)
    expected, hit_rate, ndcg = _by_hand(scores, wanted, seen)
    assert found.tolist() == expected
    assert figures(found) == pytest.approx((hit_rate, ndcg))
    np.testing.assert_array_equal(scores, before)


def test_a_model_is_asked_by_what_serving_asks_and_all_items_compete(examples):
    schema = Schema.load(examples / "schema")
    config = sasrec.Config(dim=8, blocks=1, loss="softmax")
    towers = sasrec.build(config, schema, Catalogue.read(examples, schema))
    model = Retrieval(towers, objectives.build(config, np.ones(schema.size("item_id")), 0))
    model.build()
    known = schema.vocabularies["item_id"].tolist()
    rows = read_slice(examples, "test")
    scores = training.query_vectors(model, rows, schema) @ np.asarray(model.item_tower(np.arange(2, len(known) + 2))).T
    wanted = [known.index(item) for item in rows["item_id"].to_list()]
    seen = [np.array([known.index(item) for item in items]) for items in rows["history_items"].to_list()]
    _, hit_rate, ndcg = _by_hand(scores, wanted, seen)
    assert of_model(model, schema, examples, "test") == pytest.approx((hit_rate, ndcg))


def test_popularity_finds_what_most_had_and_the_user_had_not(examples):
    counts = {}
    for items in SEQUENCES:
        for item in (items[:-2] if len(items) >= 3 else items).tolist():
            counts[item] = counts.get(item, 0) + 1
    rows = read_slice(examples, "validation")
    found = []
    for row in rows.iter_rows(named=True):
        best = sorted(counts, key=lambda item: (-counts[item], item))
        left = [item for item in best if item not in row["history_items"][-50:]]
        found.append(left.index(row["item_id"]) + 1 if row["item_id"] in left[:10] else 11)
    assert of_baseline(BASELINES["popularity"], examples, "validation") == pytest.approx(figures(np.array(found)))


def test_the_best_is_held_against_the_best_and_others_against_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.table.BUILD", tmp_path)
    run = {part: {"hit_rate": 0.05, "ndcg": 0.02} for part in ("validation", "test")} | {"epochs": 1, "seconds": 1.0}
    measured = {name: [run] for name in (*BASELINES, *(trial.name for trial in TRIALS))}
    report(measured, "narm", PUBLISHED, 1.0)
    rows = pl.read_json(tmp_path / "sequence.json")
    held = {(row["measure"], row["peer_name"]): row["holds"] for row in rows.iter_rows(named=True)}
    assert held["HitRate@10, test: narm", "published: sasrec"] is False
    assert held["NDCG@10, test: bert4rec", "published: bert4rec"] is True
    assert held["NDCG@10, test: narm", "popularity"] is True
    assert set(PUBLISHED) <= {trial.name for trial in TRIALS}
