"""What is kept up event by event is what `feature_tables` makes of the whole log, whatever the order of arrival."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.activity import HISTORY_LENGTH, KINDS, Action, Activity, LongView, kinds_of
from penstock.features import feature_tables, view
from tests.penstock.test_features import did, ms, outcome_seen, read_items, row_seen
from tests.small_log import HOUR, START, Row, a_log, write_log

HOUR_MS = 3_600_000
STORED = [feature.name for feature in view("user_activity").features]
NO_TAGS = (-1, -1, -1)


def initial(histories: list[Row], user: int) -> Activity:
    views = [
        LongView(ms(row["event_time"]), item) for row in histories if row["user_id"] == user for item in row["items"]
    ]
    return Activity(history=views[-HISTORY_LENGTH:])


def show(activity: Activity, row: Row) -> None:
    activity.show(ms(row["event_time"]), row["scenario"])


def parts(rng: random.Random, row: Row) -> Iterator[tuple[int, int]]:
    """What was done by a row, told in parts that may tell a thing twice: kinds before and after each."""
    before = 0
    while before != did(row):
        after = before | did(row) & rng.randrange(16)
        yield before, after
        before = after


def act(activity: Activity, row: Row, items: dict[int, Row], before: int, after: int) -> None:
    item = items[row["item_id"]]
    action = Action(ms(row["event_time"]), row["item_id"], after, item["author_id"], tuple(item["tags"]))
    activity.act(action, row["scenario"], before, -1 if row["session_id"] is None else row["session_id"])


def some_log(seed: int) -> tuple[list[Row], list[Row]]:
    """A log whose histories were there before it began."""
    events, histories = a_log(seed)
    for row in histories:
        row["event_time"] = row["created_time"] = START - HOUR
    return events, histories


@pytest.mark.parametrize("batch", range(10))
def test_each_instant_is_what_the_whole_log_gives(batch: int, tmp_path: Path) -> None:
    for seed in range(12 * batch, 12 * batch + 12):
        rng = random.Random(seed)
        events, histories = some_log(seed)
        log = write_log(tmp_path / str(seed), events, histories)
        items = read_items(log)
        activities = {row["user_id"]: initial(histories, row["user_id"]) for row in [*events, *histories]}
        for expected in feature_tables(log)["user_activity"].sort("event_timestamp").iter_rows(named=True):
            user, at = expected["user_id"], expected["event_timestamp"]
            activity = Activity.of(activities[user].stored())
            own = [row for row in events if row["user_id"] == user]
            for row in own:
                if row_seen(row) == at:
                    show(activity, row)
            for row in own:
                if outcome_seen(row) == at:
                    for before, after in parts(rng, row):
                        act(activity, row, items, before, after)
            assert activity.stored() == {name: expected[name] for name in STORED}, (seed, user, at)
            activities[user] = activity


@pytest.mark.parametrize("batch", range(5))
def test_the_order_of_arrival_changes_nothing(batch: int, tmp_path: Path) -> None:
    for seed in range(15 * batch, 15 * batch + 15):
        rng = random.Random(seed)
        events, histories = some_log(seed)
        log = write_log(tmp_path / str(seed), events, histories)
        items = read_items(log)
        activities = {row["user_id"]: initial(histories, row["user_id"]) for row in [*events, *histories]}
        waiting = [(row, [None, *parts(rng, row)]) for row in events]
        while waiting:
            row, steps = rng.choice(waiting)
            if step := steps.pop(0):
                act(activities[row["user_id"]], row, items, *step)
            else:
                show(activities[row["user_id"]], row)
            waiting = [(row, steps) for row, steps in waiting if steps]
        table = feature_tables(log)["user_activity"].sort("event_timestamp").unique("user_id", keep="last")
        assert {row["user_id"]: {name: row[name] for name in STORED} for row in table.iter_rows(named=True)} == {
            user: activity.stored() for user, activity in activities.items() if activity != Activity()
        }, seed


def an_action(time_ms: int, item: int, *labels: str) -> Action:
    return Action(time_ms, item, kinds_of(dict.fromkeys(labels, 1)), 5, NO_TAGS)


def test_a_label_counts_once_and_its_parts_are_one_action() -> None:
    activity = Activity()
    activity.show(HOUR_MS, 2, impressions=3)
    activity.act(an_action(HOUR_MS, 7, "click"), 2)
    activity.act(an_action(HOUR_MS, 7, "click", "long_view"), 2, before=KINDS["click"])
    activity.act(an_action(HOUR_MS, 7, "click", "long_view"), 2, before=KINDS["click"] | KINDS["long_view"])
    activity.act(an_action(HOUR_MS, 9, "profile_enter"), 2)
    assert activity.hours == {(1, 2): [3, 1, 1, 0]}
    assert activity.history == [(HOUR_MS, 7, -1)]
    assert activity.actions == [(HOUR_MS, 7, 3, 5, NO_TAGS), (HOUR_MS, 9, 8, 5, NO_TAGS)]


def test_tags_are_three_places() -> None:
    activity = Activity()
    for item, tags in enumerate([(), (4,), (4, 5, 6, 7)]):
        activity.act(an_action(item, item, "click")._replace(tags=tags), 0)
    assert [action.tags for action in activity.actions] == [NO_TAGS, (4, -1, -1), (4, 5, 6)]
    assert activity.stored()["action_tags"] == [-1, -1, -1, 4, -1, -1, 4, 5, 6]


def test_the_oldest_goes_and_comes_back_by_no_late_part() -> None:
    activity = Activity()
    for time in range(1, HISTORY_LENGTH + 2):
        activity.act(an_action(time, 10, "click", "long_view"), 0)
    kept = list(range(2, HISTORY_LENGTH + 2))
    assert [view.time_ms for view in activity.history] == [action.time_ms for action in activity.actions] == kept
    # more of what was pushed out, and something older still
    activity.act(an_action(1, 10, "click", "long_view", "like"), 0, before=3)
    activity.act(an_action(0, 11, "click", "long_view"), 0)
    assert [view.time_ms for view in activity.history] == [action.time_ms for action in activity.actions] == kept
    # a late one takes the place of the oldest
    activity.act(an_action(30, 4, "click", "long_view"), 0)
    assert activity.actions[27:29] == [an_action(30, 4, "click", "long_view"), an_action(30, 10, "click", "long_view")]
    assert activity.history[0].time_ms == activity.actions[0].time_ms == 3


def test_two_requests_of_one_instant_are_told_apart_by_what_was_told_of_them() -> None:
    activity = Activity()
    activity.act(an_action(1, 7, "click"), 0)
    activity.act(an_action(1, 7, "like"), 0)
    activity.act(an_action(1, 7, "like", "profile_enter"), 0, before=KINDS["like"])
    assert [action.kinds for action in activity.actions] == [1, 12]


def test_hours_leave_a_window_of_seven_days_and_late_ones_below_it_do_not_enter() -> None:
    activity = Activity()
    activity.show(5 * HOUR_MS, 0)
    activity.show((5 + 168) * HOUR_MS, 1)
    assert sorted(activity.hours) == [(5, 0), (173, 1)]
    activity.show((5 + 169) * HOUR_MS, 1)
    assert sorted(activity.hours) == [(173, 1), (174, 1)]
    activity.show(5 * HOUR_MS + 1, 0)
    activity.act(an_action(5 * HOUR_MS, 7, "click"), 0)
    assert sorted(activity.hours) == [(173, 1), (174, 1)]
    assert activity.actions == [an_action(5 * HOUR_MS, 7, "click")]
    activity.show(6 * HOUR_MS, 0, impressions=2)
    assert activity.hours[6, 0] == [2, 0, 0, 0]


def test_nothing_new_changes_nothing() -> None:
    activity = Activity()
    activity.act(an_action(1, 7), 0)
    assert activity == Activity()


def test_stored_features_come_back() -> None:
    stored: dict[str, Any] = {name: [] for name in STORED} | {"feedback_sequence": 12}
    assert Activity.of(stored) == Activity(sequence=12)
    assert Activity.of(stored).stored() == stored
