from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.feedback import FeedbackLog
from penstock.seeds import Config, SeedBuffer


def shown(sequence, user, request):
    return {"sequence": sequence, "kind": "impressions", "arrived_ms": 1, "request_id": request, "user_id": user}


def told(sequence, request, *items, long_view=1):
    events = [{"item_id": item, "click": 1, "long_view": long_view} for item in items]
    return {"sequence": sequence, "kind": "outcomes", "arrived_ms": 1, "request_id": request, "events": events}


def likes(pairs, start=1):
    """Records of (user, item), a request each."""
    numbers = count(start)
    records = []
    for user, item in pairs:
        request = next(numbers)
        records += [shown(request, user, request), told(next(numbers), request, item)]
    return records


@pytest.fixture
def buffer(tmp_path):
    with SeedBuffer(tmp_path / "seeds.sqlite", Config(per_item=3, per_user=4)) as opened:
        yield opened


def test_who_long_views_is_a_seed_and_who_clicks_is_none(buffer):
    buffer.take([shown(1, 7, 70), told(2, 70, 5), told(3, 70, 6, long_view=0), told(4, 99, 5)])
    assert buffer.counts() == {5: 1}
    assert buffer.users(5).tolist() == [7]
    assert buffer.users(6).tolist() == []
    assert buffer.sequence == 4


def test_a_flood_of_one_user_is_one_seed_and_drives_nobody_out(buffer):
    buffer.take(likes([(1, 5), (2, 5)] + [(3, 5)] * 50))
    assert buffer.users(5).tolist() == [3, 2, 1]


def test_one_who_likes_everything_is_a_seed_of_the_last_items_alone(buffer):
    buffer.take(likes([(1, item) for item in range(10)]))
    assert buffer.counts() == dict.fromkeys(range(6, 10), 1)
    assert buffer.changed(18) == [5, 9]


def test_the_latest_stay(buffer):
    buffer.take(likes([(user, 5) for user in range(1, 6)]))
    assert buffer.users(5).tolist() == [5, 4, 3]
    buffer.take(likes([(3, 5), (9, 5)], start=100))
    assert buffer.users(5).tolist() == [9, 3, 5]


def test_a_reservoir_is_a_uniform_sample(tmp_path):
    held = np.zeros(40)
    with SeedBuffer(tmp_path / "seeds.sqlite", Config(per_item=10, keep="reservoir")) as buffer:
        for item in range(150):
            buffer.take(likes([(user, item) for user in range(40)], start=1 + 80 * item))
            assert buffer.counts()[item] == 10
            held[buffer.users(item)] += 1
    # 150 draws of probability 1/4: a deviation of 5.3, where the first and last users of a broken one are 4 away
    assert abs(held[:20].sum() - held[20:].sum()) < 4 * np.sqrt(40 * 150 * 3 / 16)
    assert held.min() > 150 / 4 - 4.5 * 5.3


def test_what_changed_since_a_record_is_said(buffer):
    buffer.take(likes([(1, 5), (1, 6)]))
    assert buffer.changed(0) == [5, 6]
    assert buffer.changed(2) == [6]
    assert buffer.changed(buffer.sequence) == []


def test_a_batch_that_fails_leaves_nothing_and_is_taken_again(buffer):
    records = likes([(1, 5), (2, 5)])
    with pytest.raises(KeyError):
        buffer.take([*records, {"sequence": 9, "kind": "outcomes"}])
    assert (buffer.counts(), buffer.sequence) == ({}, 0)
    buffer.take(records)
    assert buffer.counts() == {5: 2}


def test_the_log_is_followed_from_where_it_was_left_also_a_new_one(tmp_path):
    with SeedBuffer(tmp_path / "seeds.sqlite") as buffer:
        with FeedbackLog(tmp_path / "feedback") as log:
            context = {"time_ms": 1, "scenario": 0, "device": 0, "release": 1, "variant": "champion"}
            log.impressions(70, 7, [5, 6], features_us=None, **context)
            log.outcomes(70, [{"item_id": 5, "long_view": 1}])
            assert buffer.follow(log.directory) == 2
            log.outcomes(70, [{"item_id": 6, "long_view": 1}])
            assert buffer.follow(log.directory) == 3
            assert buffer.follow(log.directory) == 3
        assert buffer.counts() == {5: 1, 6: 1}
        with FeedbackLog(tmp_path / "another") as log:
            log.impressions(71, 8, [5], features_us=None, **context)
            log.outcomes(71, [{"item_id": 5, "long_view": 1}])
            assert buffer.follow(log.directory) == 5
            assert buffer.follow(log.directory) == 5
        assert buffer.users(5).tolist() == [8, 7]
        assert buffer.changed(3) == [5]


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40))
def test_no_more_than_is_said_and_only_who_liked_it(tmp_path_factory, pairs):
    with SeedBuffer(tmp_path_factory.mktemp("seeds") / "seeds.sqlite", Config(per_item=3, per_user=2)) as buffer:
        buffer.take(likes(pairs))
        counts = buffer.counts()
        users = {item: buffer.users(item).tolist() for item in range(7)}
    assert counts == {item: len(of) for item, of in users.items() if of}
    assert all((user, item) in pairs for item, of in users.items() for user in of)
    assert all(len(set(of)) == len(of) <= 3 for of in users.values())
    assert all(sum(user in of for of in users.values()) <= 2 for user in range(7))


def test_a_buffer_that_keeps_nothing_is_refused(tmp_path):
    for config in (Config(per_item=0), Config(per_user=0), Config(keep="newest")):
        with pytest.raises(ValueError, match="a buffer keeps one seed or more"):
            SeedBuffer(tmp_path / "seeds.sqlite", config)
