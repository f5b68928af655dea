from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.sessions import split

MINUTE = 60_000
DAY = 24 * 60 * MINUTE
NOW = 1_700_000_000_000


def _oracle(history, now, short, long, days=7.0):
    """Walks back from the last action: (item, time, session) in order → items of the session, items before it."""
    history = list(history)
    last = history.pop() if history else None
    current = [last] if last else []
    while history and len(current) < short:
        (_, time, session), (_, next_time, next_session) = history[-1], current[0]
        known = session >= 0 and next_session >= 0
        if session != next_session if known else abs(next_time - time) >= 10 * MINUTE:
            break
        current.insert(0, history.pop())
    before = [action for action in history[-long:] if now - action[1] <= days * DAY]
    return [item for item, _, _ in current], [item for item, _, _ in before]


def _split(histories, now, short, long, length=None, **limits):
    """The same of padded lists, without the places that hold nothing."""
    length = max([1, *map(len, histories)]) if length is None else length
    items, times, sessions = np.zeros((len(histories), length), np.int32), *np.full((2, len(histories), length), -1)
    for row, history in enumerate(histories):
        for place, (item, time, session) in enumerate(history):
            items[row, place], times[row, place], sessions[row, place] = item, time, session
    found = split(items, times, sessions, np.array(now), short, long, **limits)
    assert [part.shape for part in found] == [(len(histories), short), (len(histories), long)]
    return [[[item for item in row if item] for row in np.asarray(part).tolist()] for part in found]


def _history(*actions):
    return [(item + 2, time, session) for item, (time, session) in enumerate(actions)]


def test_gaps_end_sessions_where_the_log_says_nothing():
    just_less, exactly = NOW - 20 * MINUTE + 1, NOW - 10 * MINUTE
    history = _history((NOW - 20 * MINUTE, -1), (just_less, -1), (exactly, -1), (NOW, -1))
    assert _split([history], [NOW], 5, 5) == [[[5]], [[2, 3, 4]]]
    assert _split([history[:3]], [NOW], 5, 5) == [[[2, 3, 4]], [[]]]


def test_the_logs_own_sessions_count_more_than_gaps():
    apart = _history((NOW - 5 * 60 * MINUTE, 7), (NOW - 2 * 60 * MINUTE, 7), (NOW, 7))
    close = _history((NOW - 2, 6), (NOW - 1, 7), (NOW, 7))
    unknown = _history((NOW - 2, 6), (NOW - 1, -1), (NOW, 7))
    assert _split([apart, close, unknown], [NOW] * 3, 5, 5) == [[[2, 3, 4], [3, 4], [2, 3, 4]], [[], [2], []]]


def test_what_a_session_cannot_hold_is_of_the_one_before():
    history = _history(*[(NOW + place, -1) for place in range(9)])
    assert _split([history], [NOW], 3, 4) == [[[8, 9, 10]], [[4, 5, 6, 7]]]


def test_the_long_term_is_a_week_and_so_many_actions():
    week = NOW - 7 * DAY
    history = _history((week - 1, -1), (week, -1), (NOW - DAY, -1), (NOW, -1))
    assert _split([history, history], [NOW, NOW + 1], 3, 3) == [[[5], [5]], [[3, 4], [4]]]
    assert _split([history], [NOW], 3, 1) == [[[5]], [[4]]]
    assert _split([history], [NOW], 3, 3, days=0.5) == [[[5]], [[]]]
    assert _split([history], [NOW], 3, 3, days=1000.0) == [[[5]], [[2, 3, 4]]]


def test_no_history_and_the_shortest():
    assert _split([[], _history((NOW, -1))], [NOW, NOW], 3, 2) == [[[], [2]], [[], []]]


def test_a_clock_that_went_back_ends_a_session_by_the_same_gap():
    history = _history((NOW, -1), (NOW - 10 * MINUTE, -1), (NOW - 15 * MINUTE, -1))
    assert _split([history], [NOW - 15 * MINUTE], 3, 3) == [[[3, 4]], [[2]]]


action = st.tuples(
    st.integers(1, 9),
    st.sampled_from([0, 0, 1, MINUTE, 10 * MINUTE - 1, 10 * MINUTE, 10 * MINUTE + 1, DAY, 7 * DAY, -MINUTE, -DAY]),
    st.sampled_from([-1, -1, 0, 1]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(action, max_size=12), st.sampled_from([0, 1, MINUTE, 7 * DAY, -DAY])), max_size=6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from([0.25, 7.0, 30.0]),
)
def test_equals_the_loops(drawn, short, long, more, days):
    histories, now = [[]], [NOW]
    for steps, after in drawn:
        times = NOW - 9 * DAY + np.cumsum([0, *(step for _, step, _ in steps)])[1:]
        histories.append([(item, int(time), session) for (item, _, session), time in zip(steps, times, strict=True)])
        now.append(int(times[-1] if len(times) else NOW) + after)
    expected = [_oracle(history, at, short, long, days) for history, at in zip(histories, now, strict=True)]
    # the list may be shorter than what is asked for, and have more padding than it needs
    found = _split(histories, now, short, long, max(map(len, histories)) + 1 + more, days=days)
    assert found == [[current for current, _ in expected], [before for _, before in expected]]


@pytest.mark.parametrize("seed", range(3))
def test_long_histories_equal_the_loops(seed):
    random = np.random.default_rng(seed)
    histories, now = [], []
    for _ in range(300):
        count = random.integers(0, 51)
        steps = random.choice(
            [0, MINUTE, 9 * MINUTE, 10 * MINUTE, 3 * 60 * MINUTE, DAY], count, p=[0.2, 0.6, *[0.05] * 4]
        )
        times = NOW + np.cumsum(steps)
        sessions = np.where(random.random(count) < 0.5, -1, np.arange(count) // 12)
        items = random.integers(1, 1000, count)
        histories.append(list(zip(items.tolist(), times.tolist(), sessions.tolist(), strict=True)))
        now.append(int(times[-1] if count else NOW) + int(random.integers(0, DAY)))
    expected = [_oracle(history, at, 50, 20) for history, at in zip(histories, now, strict=True)]
    assert _split(histories, now, 50, 20, 50) == [[one for one, _ in expected], [one for _, one in expected]]
