from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.diversity import NOBODY, rerank


def oracle(
    scores: np.ndarray, k: int, trade_off: float, vectors: np.ndarray, cap: int, authors: np.ndarray
) -> list[int]:
    """The definition, item by item."""
    span = max(scores) - min(scores)
    relevance = [(score - min(scores)) / (span if span > 0 else 1.0) for score in scores]

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        norms = float(np.linalg.norm(one) * np.linalg.norm(other))
        return float(one @ other) / norms if norms > 0 else 0.0

    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        left = [item for item in range(len(scores)) if item not in chosen]
        had = Counter(int(authors[item]) for item in chosen)
        free = [item for item in left if not cap or authors[item] <= NOBODY or had[int(authors[item])] < cap]

        def value(item: int) -> float:
            alike = max((cosine(vectors[item], vectors[other]) for other in chosen), default=0.0)
            return trade_off * relevance[item] - (1 - trade_off) * (alike if chosen else 0.0)

        chosen.append(max(free or left, key=lambda item: (round(value(item), 9), -item)))
    return chosen


def made_up(seed: int, items: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "scores": random.normal(size=items),
        "vectors": random.normal(size=(items, 4)),
        "authors": random.integers(0, 4, items),
    }


def test_the_second_of_two_that_are_alike_gives_way() -> None:
    """λ = 1/2: after item 0, item 1 is worth 0.45 − 0.5 · 1, item 2 0.2 − 0.5 · 0, and item 3 0 + 0.5 · 1."""
    scores = np.array([1.0, 0.9, 0.4, 0.0])
    vectors = np.array([[1.0, 0], [2, 0], [0, 1], [-1, 0]])
    assert rerank(scores, 3, trade_off=0.5, vectors=vectors).tolist() == [0, 3, 2]
    assert rerank(scores, 3, trade_off=0.7, vectors=vectors).tolist() == [0, 1, 3]
    assert rerank(scores, 3, trade_off=0.6, vectors=vectors).tolist() == [0, 3, 2]


def test_of_an_author_no_more_than_the_cap_while_there_are_others() -> None:
    scores = np.array([6.0, 5, 4, 3, 2, 1])
    authors = np.array([7, 7, 7, 8, 7, 9])
    assert rerank(scores, 4, cap=1, authors=authors).tolist() == [0, 3, 5, 1]
    assert rerank(scores, 4, cap=2, authors=authors).tolist() == [0, 1, 3, 5]
    assert rerank(scores, 9, cap=1, authors=authors).tolist() == [0, 3, 5, 1, 2, 4]
    unknown = np.array([0, 0, 0, 8, 8, 9])
    assert rerank(scores, 5, cap=1, authors=unknown).tolist() == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("trade_off", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("cap", [0, 1, 3])
@pytest.mark.parametrize(("items", "k"), [(1, 1), (7, 3), (12, 12), (20, 8), (5, 9)])
def test_it_is_the_definition(trade_off: float, cap: int, items: int, k: int) -> None:
    for seed in range(4):
        of = made_up(seed, items)
        found = rerank(of["scores"], k, trade_off=trade_off, vectors=of["vectors"], cap=cap, authors=of["authors"])
        assert found.tolist() == oracle(of["scores"], k, trade_off, of["vectors"], cap, of["authors"])


def test_limits() -> None:
    of = made_up(5, 30)
    by_score = np.argsort(-of["scores"], kind="stable")
    assert rerank(of["scores"], 30).tolist() == by_score.tolist()
    assert rerank(of["scores"], 30, trade_off=1.0, vectors=of["vectors"]).tolist() == by_score.tolist()
    assert rerank(of["scores"], 30, cap=30, authors=of["authors"]).tolist() == by_score.tolist()
    # of items that are like no other, λ changes nothing
    alone = np.eye(30)
    assert rerank(of["scores"], 30, trade_off=0.2, vectors=alone).tolist() == by_score.tolist()
    assert rerank(of["scores"], 30, trade_off=0.2, vectors=np.zeros((30, 3))).tolist() == by_score.tolist()
    assert rerank(np.empty(0), 5, trade_off=0.5, vectors=np.empty((0, 3)), cap=1, authors=np.empty(0)).tolist() == []
    # scores that are all equal: the first, then what is least like it
    assert rerank(np.ones(3), 2, trade_off=0.5, vectors=np.array([[1.0, 0], [1, 0.1], [0, 1]])).tolist() == [0, 2]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 40),
    st.integers(0, 50),
    st.floats(0, 1),
    st.integers(0, 4),
    st.floats(-5, 5),
    st.floats(0.1, 10),
)
def test_a_slate_is_whole_and_the_unit_of_the_scores_does_not_count(
    seed: int, items: int, k: int, trade_off: float, cap: int, shift: float, unit: float
) -> None:
    of = made_up(seed, items)
    options = {"trade_off": trade_off, "vectors": of["vectors"], "cap": cap, "authors": of["authors"]}
    found = rerank(of["scores"], k, **options)
    assert len(found) == len(set(found.tolist())) == min(k, items)
    capped = Counter(of["authors"][found].tolist())
    others = items - sum(min(n, cap) if a > NOBODY else n for a, n in Counter(of["authors"].tolist()).items())
    if cap and items - others >= k:
        assert all(count <= cap for author, count in capped.items() if author > NOBODY)
    if k:
        assert found[:1].tolist() == ([int(np.argmax(of["scores"]))] if items and trade_off > 0 else found[:1].tolist())
    if trade_off in (0.0, 1.0) or 0.01 < trade_off < 0.99:
        again = rerank(of["scores"] * unit + shift, k, **options)
        assert again.tolist() == found.tolist()


@pytest.mark.parametrize("options", [{"trade_off": 1.1}, {"trade_off": -0.1}, {"trade_off": np.nan}, {"cap": -1}])
def test_what_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not"):
        rerank(np.ones(2), 2, vectors=np.ones((2, 2)), authors=np.ones(2), **options)
