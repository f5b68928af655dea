from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from penstock import baselines, evaluation
from penstock.baselines import item_item, long_views, popular
from penstock.examples import read_slice


def by_loops(seen: dict[int, set[int]], asked: list[list[int]], k: int) -> list[list[int]]:
    """The items by summed cosine to what was asked for, best first, ties by id; those without a cosine left out."""
    items = sorted({item for of_user in seen.values() for item in of_user})
    users_of = {item: {user for user, of_user in seen.items() if item in of_user} for item in items}

    def cosine(one: int, other: int) -> float:
        return len(users_of[one] & users_of[other]) / np.sqrt(len(users_of[one]) * len(users_of[other]))

    found = []
    for history in asked:
        known = set(history) & set(items)
        scores = {item: sum(cosine(item, other) for other in known) for item in items if item not in known}
        ranked = sorted((item for item in scores if scores[item] > 1e-9), key=lambda item: (-scores[item], item))
        found.append(ranked[:k])
    return found


def scores_of(seen: dict[int, set[int]], history: list[int], ranked: list[int]) -> list[float]:
    users_of = {item: {user for user, of_user in seen.items() if item in of_user} for item in ranked + history}
    return [
        sum(
            len(users_of[item] & users_of[other]) / np.sqrt(len(users_of[item]) * len(users_of[other]))
            for other in set(history)
            if users_of[other]
        )
        for item in ranked
    ]


def test_items_are_ranked_as_loops_rank_them(examples: Path) -> None:
    pairs = long_views(examples)
    seen: dict[int, set[int]] = {}
    for user, item in pairs.iter_rows():
        seen.setdefault(user, set()).add(item)
    queries = evaluation.Queries.of(examples, "test").rows
    asked = queries["history_items"].to_list()
    found = item_item(examples, queries, 7)
    expected = by_loops(seen, asked, 7)
    assert found.shape == (queries.height, 7)
    for ours, theirs, history in zip(found.tolist(), expected, asked, strict=True):
        ours = [item for item in ours if item >= 0]
        # equal scores may stand in any order: float32 sums
        np.testing.assert_allclose(scores_of(seen, history, ours), scores_of(seen, history, theirs), rtol=1e-5)
        assert not set(ours) & set(history)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4))
def test_odd_histories_are_answered(tmp_path_factory: pytest.TempPathFactory, histories: list[list[int]]) -> None:
    out = tmp_path_factory.mktemp("odd")
    log = {1: [1, 2, 3], 2: [2, 3], 3: [3, 4]}
    rows = [(user, item) for user, items in log.items() for item in items]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")
    frame.with_columns(history_items=pl.lit([], dtype=pl.List(pl.Int64)), long_view=pl.lit(1, pl.Int8)).write_parquet(
        out / "train.parquet"
    )
    queries = pl.DataFrame({"history_items": pl.Series(histories, dtype=pl.List(pl.Int64))})
    found = item_item(out, queries, 5)
    for ours, history in zip(found.tolist(), histories, strict=True):
        answered = [item for item in ours if item >= 0]
        assert len(set(answered)) == len(answered)
        assert set(answered) <= {1, 2, 3, 4} - set(history)
        assert ours == answered + [-1] * (5 - len(answered))
    # who has seen 1 is nearest to what user 1 saw with it
    assert item_item(out, pl.DataFrame({"history_items": [[1]]}), 2).tolist() == [[2, 3]]


def test_what_was_seen_is_all_that_a_model_may_learn_from(examples: Path) -> None:
    train = read_slice(examples, "train")
    pairs = set(long_views(examples).iter_rows())
    during = set(train.filter(pl.col("long_view") == 1).select("user_id", "item_id").iter_rows())
    assert during <= pairs
    first = {
        user: rows["history_items"][0].to_list() for (user,), rows in train.group_by("user_id", maintain_order=True)
    }
    assert pairs - during <= {(user, item) for user, items in first.items() for item in items}


def test_blocks_change_nothing(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = evaluation.Queries.of(examples, "test").rows
    whole = item_item(examples, queries, 10)
    monkeypatch.setattr(baselines, "_CELLS", 90)
    np.testing.assert_array_equal(item_item(examples, queries, 10), whole)


def test_popular_items_are_those_long_viewed_most_without_the_history(examples: Path) -> None:
    queries = evaluation.Queries.of(examples, "test").rows
    counts = read_slice(examples, "train").filter(pl.col("long_view") == 1)["item_id"].value_counts()
    often = dict(counts.iter_rows())
    for ours, history in zip(popular(examples, queries, 5).tolist(), queries["history_items"].to_list(), strict=True):
        left = sorted((item for item in often if item not in history), key=lambda item: (-often[item], item))
        assert ours == left[:5]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 15))
@settings(max_examples=50, deadline=None)
def test_the_largest_are_those_of_a_stable_sort(seed, columns, k):
    values = np.random.default_rng(seed).integers(0, 4, (5, columns)).astype(np.float32)  # many are equal or not there
    held = sparse.csr_matrix(values)
    for row, places in zip(values, baselines._largest(held, k), strict=True):
        order = np.argsort(-row, kind="stable")[:k]
        assert held.indices[places].tolist() == order[row[order] > 0].tolist()
