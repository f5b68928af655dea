"""All ways are asked for the same items by what was known at the cut, and judged by what came after it."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from benchmarks.ralm import Split, judge
from penstock.examples import FIRST, Schema, encode_ids, read_slice, write_examples
from penstock.look_alike_training import Liked
from penstock.seeds import LIKED
from tests.penstock.conftest import catalogue, joined_rows


def test_seeds_and_young_items_are_of_before_the_cut(tmp_path):
    write_examples(joined_rows(rows=800, users=12), catalogue(), tmp_path)
    schema = Schema.load(tmp_path / "schema")
    split = Split.of(tmp_path, schema)
    rows = {part: read_slice(tmp_path, part) for part in ("train", "validation", "test")}

    liked = rows["train"].filter(pl.col(LIKED) == 1)
    expected = set(zip(liked["user_id"].to_list(), liked["item_id"].to_list(), strict=True))
    items = schema.vocabularies["item_id"][split.seeds.items - FIRST]
    assert set(zip(split.users[split.seeds.users].tolist(), items.tolist(), strict=True)) == expected

    first = rows["train"].group_by("item_id").agg(pl.col("event_time").min())
    indices = encode_ids(first["item_id"].to_numpy(), schema.vocabularies["item_id"])
    when = dict(zip(indices.tolist(), first["event_time"], strict=True))
    young = set(split.young.tolist())
    assert young
    assert min(when[item] for item in young) >= sorted(when.values())[first.height - int(first.height / 3)]
    assert all((split.seeds.items == item).sum() >= 2 for item in young)

    assert split.before["event_time"].max() <= rows["validation"]["event_time"].min() <= split.at["event_time"].min()
    assert set(split.at["user_id"]) == set(split.later["user_id"]) <= set(split.users)


def test_items_are_judged_by_what_is_liked_later_without_those_liked_already():
    """12 young items; user 1 likes the 2nd and the 12th by score, user 2 the 1st of what he has not liked already."""
    ids = np.arange(100, 112)
    young = np.arange(12) + FIRST
    schema = Schema((), {"item_id": ids}, {})
    later = pl.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 2, 3],
            "item_id": [101, 111, 100, 103, 104, 105],
            LIKED: [1, 1, 0, 1, 0, 0],
        }
    )
    at = pl.DataFrame({"user_id": [1, 2, 3]})
    seeds = Liked(np.array([1, 1, 1]), FIRST + np.array([0, 1, 2]))  # of the second of the users, who is user 2
    split = Split(np.array([1, 2, 3]), at, at, seeds, young, later)
    scores = np.tile(np.linspace(1.0, 0.0, 12), (3, 1))
    found = judge(scores, split, schema)
    assert found["prec@10"] == pytest.approx((1 / 10 + 1 / 10) / 2)  # user 3 likes nothing and does not count
    assert found["prec@50"] == pytest.approx((2 / 50 + 1 / 50) / 2)
    # liked: .909, 0 and .727; not liked: 1, .636 and .545
    assert found["auc"] == pytest.approx((2 + 0 + 2) / 9)
    best = scores.copy()
    best[1, 3] = -1.0  # behind the three that he has liked already there are eight others before it
    assert judge(best, split, schema)["prec@10"] == pytest.approx((1 / 10 + 1 / 10) / 2)
    best[1, :3] = -2.0
    assert judge(best, split, schema) == judge(np.where(best == -2.0, 9.0, best), split, schema)
