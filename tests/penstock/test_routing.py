from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import routing
from penstock.routing import Routing, RoutingError

LIVE = Routing(champion=3, previous=(1, 2))
PAIR = routing.canary(LIVE, 4, 0.2)


def test_units_are_uniform_and_independent_between_salts() -> None:
    first = np.array([routing.unit(user, "1:2") for user in range(20_000)])
    second = np.array([routing.unit(user, "2:3") for user in range(20_000)])
    assert first.min() >= 0
    assert first.max() < 1
    counts, _ = np.histogram(first, bins=20, range=(0, 1))
    # chi-square with 19 degrees of freedom: 43.8 is its 0.999 quantile
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_units_never_change() -> None:
    # from `printf 1:2:42 | b2sum -l 64`: the split of live traffic must survive every edit
    assert routing.unit(42, "1:2") == (0xF76C44C2029A6C46 >> 11) / 2**53


@given(st.integers(0, 2**63 - 1), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_share_only_adds_users_to_the_challenger(user: int, one: float, other: float) -> None:
    small, large = sorted((one, other))
    before = routing.variant(routing.canary(LIVE, 4, small), user)
    after = routing.variant(routing.canary(LIVE, 4, large), user)
    assert before == after or (before, after) == ("champion", "challenger")


@given(st.integers(0, 2**63 - 1), st.floats(0.01, 1), st.text(max_size=9))
def test_nobody_changes_sides_while_a_pair_lasts(user: int, share: float, text: str) -> None:
    """Whatever else happens to the document: stamped anew, the canary told again, former champions forgotten."""
    pair = routing.canary(LIVE, 4, share)
    others = (
        routing.stamp(pair, text, text),
        routing.canary(pair, 4, share),
        routing.without(pair, (1, 2)),
        routing.canary(routing.withdraw(pair), 4, share),  # and if it comes back
    )
    assert {routing.variant(one, user) for one in others} == {routing.variant(pair, user)}


def test_the_share_of_users_is_the_share() -> None:
    answered = [routing.variant(PAIR, user) for user in range(10_000)]
    assert abs(answered.count("challenger") / 10_000 - 0.2) < 0.015
    assert {routing.variant(LIVE, user) for user in range(100)} == {"champion"}
    assert {routing.variant(routing.canary(LIVE, 4, 1.0), user) for user in range(100)} == {"challenger"}


def test_promotion_of_the_challenger_ends_the_canary_and_keeps_the_former_champion() -> None:
    after = routing.promote(PAIR, 4)
    assert (after.champion, after.challenger, after.share, after.previous) == (4, None, 0.0, (1, 2, 3))
    assert routing.promote(after, 4) == after
    assert routing.promote(Routing(), 1) == Routing(champion=1)


def test_rollback_returns_to_the_former_champion_and_stops_at_the_first() -> None:
    back = routing.rollback(PAIR)
    assert (back.champion, back.challenger, back.previous) == (2, None, (1,))
    with pytest.raises(RoutingError, match="no former release to roll back to: release 1 is the first"):
        routing.rollback(routing.rollback(back))
    with pytest.raises(RoutingError, match="no release is live"):
        routing.rollback(Routing())


def test_withdraw_leaves_the_champion_alone() -> None:
    assert routing.withdraw(PAIR) == LIVE
    assert routing.withdraw(LIVE) == LIVE


def test_a_canary_needs_a_champion_and_a_share() -> None:
    with pytest.raises(RoutingError, match="promote it instead"):
        routing.canary(Routing(), 1, 0.1)
    with pytest.raises(RoutingError, match="both champion and challenger"):
        routing.canary(LIVE, 3, 0.1)
    for share in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(RoutingError, match="share"):
            routing.canary(LIVE, 4, share)


def test_what_must_stay_loaded() -> None:
    assert Routing().releases == ()
    assert PAIR.releases == (3, 4, 2)


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    assert routing.read(path) == Routing()
    stamped = routing.stamp(PAIR, "a person", "a reason")
    routing.write(path, stamped)
    assert routing.read(path) == stamped
    assert json.loads(path.read_text())["previous"] == [1, 2]
    assert sorted(left.name for left in tmp_path.iterdir()) == ["routing.json", "routing.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ("[]", "JSON object"),
        ('{"champion": 1, "chalenger": 2}', "unknown key chalenger"),
        ('{"champion": 1, "share": 7}', "share is a part of the users"),
        ('{"champion": 1, "share": "x"}', "promote again"),
    ],
)
def test_a_document_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "routing.json"
    path.write_text(text)
    with pytest.raises(RoutingError, match=message):
        routing.read(path)


@pytest.mark.parametrize("damaged", ["", '{"champion": 3, "chal'])
def test_a_damaged_document_is_taken_from_the_journal(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "routing.json"
    for document in (LIVE, PAIR):
        routing.write(path, document)
    path.write_text(damaged)
    assert routing.read(path) == PAIR
    with path.with_suffix(".jsonl").open("a") as journal:
        journal.write('\n{"champion": 9')  # its writer was killed
    assert routing.read(path) == PAIR
    routing.write(path, LIVE)
    assert [document["challenger"] for document in routing.history(path)] == [None, 4, None]
    path.write_text(damaged)
    assert routing.read(path) == LIVE


def test_a_rollback_of_what_is_left_already_changes_nothing() -> None:
    once = routing.rollback(LIVE, leaving=3)
    assert once.champion == 2
    assert routing.rollback(once, leaving=3) == once
    assert routing.rollback(once, leaving=2).champion == 1


def test_former_champions_that_are_gone_are_forgotten() -> None:
    assert routing.without(PAIR, {1, 7}).previous == (2,)


@settings(max_examples=50)
@given(
    pair=st.tuples(st.integers(1, 99), st.integers(100, 199)),
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    users=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20),
)
def test_a_user_never_changes_back_within_a_pair(pair: tuple[int, int], shares: list[float], users: list[int]) -> None:
    champion, challenger = pair
    live = Routing(champion=champion)
    for user in users:
        seen = [routing.variant(routing.canary(live, challenger, share), user) for share in sorted(shares)]
        assert seen == sorted(seen, reverse=True)  # "challenger" stays once it is reached
        assert routing.variant(routing.canary(live, challenger, 1.0), user) == "challenger"


def test_changes_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"

    def promote_next() -> None:
        for _ in range(10):
            with routing.changing(path) as before:
                routing.write(path, routing.promote(before, (before.champion or 0) + 1))

    threads = [threading.Thread(target=promote_next) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = routing.read(path)
    assert after.champion == 30
    assert after.previous == tuple(range(1, 30))
