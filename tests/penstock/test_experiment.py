from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock
from penstock import experiment, routing
from penstock.experiment import (
    CLOCKS_MS,
    MEASURES,
    NAMES,
    OUTCOME_MS,
    SETTLE_MS,
    Config,
    Experiment,
    Minimum,
    Split,
    Watch,
)
from penstock.experiment_page import counts_table, markdown, measures_table, write_experiment
from penstock.feedback import FeedbackLog
from penstock.routing import Routing
from penstock.sequential import Difference, Sums

PAIR = routing.canary(Routing(champion=1), 2, 0.3)
SPLIT = Split(champion=1, challenger=2, share=0.3, since_ms=0)
EAGER = Config(first_users=10)
SOON = Minimum(impressions=0, users=0, wait_minutes=0)
LATER = Minimum(impressions=10**9, users=0, wait_minutes=10**6)


class Feed:
    """A feedback log that is written as the test goes on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._log = FeedbackLog(directory)
        self._requests = 0

    def show(
        self,
        user: int,
        variant: str,
        release: int,
        items: tuple[int, ...] = (10, 11),
        degraded: tuple[str, ...] = (),
    ) -> int:
        self._requests += 1
        where = {"time_ms": 1_000, "scenario": 0, "device": 0, "features_us": 0, "degraded": degraded}
        self._log.impressions(self._requests, user, items, **where, release=release, variant=variant)
        return self._requests

    def tell(self, request: int, **outcome: int) -> None:
        self._log.outcomes(request, [outcome])

    def live(self, requests: int, better: float = 1.0, seed: int = 1, share: float = 0.3, users: int = 400) -> None:
        """Users with rates of their own, who come again; the challenger's clicks are `better` times the champion's."""
        generator = np.random.default_rng(seed)
        taste = generator.beta(4, 4, users)
        pair = replace(PAIR, share=share)
        for user in generator.integers(0, users, requests).tolist():
            variant = routing.variant(pair, user)
            release = pair.release(variant)
            assert release
            items = tuple(range(5))
            request = self.show(user, variant, release, items)
            chance = taste[user] * (better if variant == "challenger" else 1.0)
            clicks = generator.random(len(items)) < chance
            watched = generator.exponential(5000 * chance, len(items)).astype(int)
            events = [
                {"item_id": item, "click": int(click), "long_view": int(click), "watch_time_ms": int(watch)}
                for item, click, watch in zip(items, clicks, watched, strict=True)
            ]
            self._log.outcomes(request, events)

    def close(self) -> None:
        self._log.close()


@pytest.fixture
def feed(tmp_path: Path) -> Any:
    feed = Feed(tmp_path / "feedback")
    yield feed
    feed.close()


def followed(feed: Feed, split: Split = SPLIT, config: Config = EAGER) -> Experiment:
    found = Experiment(feed.directory, split, config)
    found.read()
    return found


def test_what_users_did_is_counted_by_variant(feed: Feed) -> None:
    first = feed.show(7, "champion", 1)
    second = feed.show(8, "challenger", 2, (10,))
    feed.show(9, "challenger", 9)  # of another pair
    feed.show(9, "champion", 1, ())
    feed.tell(first, item_id=10, click=1, watch_time_ms=700)
    feed.tell(first, item_id=10, click=1, long_view=1, watch_time_ms=2000)  # told again: more of the same
    feed.tell(first, item_id=99, click=1)  # was not shown
    feed.tell(12345, item_id=10, click=1)
    feed.tell(second, item_id=10, like=1)

    document = followed(feed).verdict(SOON, 0).document

    champion = {
        "users": 2,
        "requests": 2,
        "impressions": 2,
        "click": 1,
        "long_view": 1,
        "watch_ms": 2000,
        "degraded": 1,
    }
    challenger = {"users": 1, "requests": 1, "impressions": 1, "click": 0, "long_view": 0, "watch_ms": 0, "degraded": 0}
    assert document["variants"] == {
        "champion": {"release": 1} | champion,
        "challenger": {"release": 2} | challenger,
    }
    assert document["other_requests"] == 1
    assert (document["measures"], document["looks"]) == ({}, 0)


def test_an_outcome_counts_for_a_day(tmp_path: Path) -> None:
    """And the slates of before are forgotten."""
    slate = {"kind": "impressions", "user_id": 7, "release": 1, "variant": "champion", "items": [10, 11]}
    outcome = {"kind": "outcomes", "events": [{"item_id": 10, "click": 1}]}
    records = [
        slate | {"request_id": 1, "arrived_ms": 1000},
        outcome | {"request_id": 1, "arrived_ms": 1000 + OUTCOME_MS + 1},
        slate | {"request_id": 2, "arrived_ms": 1000 + OUTCOME_MS},
        outcome | {"request_id": 1, "arrived_ms": 1000 + OUTCOME_MS},
        slate | {"request_id": 3, "arrived_ms": 1001 + OUTCOME_MS},
        outcome | {"request_id": 1, "arrived_ms": 1000 + OUTCOME_MS},  # a clock that goes back
        outcome | {"request_id": 2, "arrived_ms": 1002 + OUTCOME_MS},
    ]
    for count, clicks in ((2, 0), (4, 1), (5, 1), (6, 1), (7, 2)):
        (tmp_path / "2026-01-01.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records[:count]))
        found = Experiment(tmp_path, SPLIT, Config())
        found.read()
        assert found.verdict(SOON, 0).document["variants"]["champion"]["click"] == clicks
    assert list(found._shown) == [2, 3]


def test_degraded_answers_are_counted_and_left_in(feed: Feed) -> None:
    request = feed.show(1, "champion", 1, degraded=("rank",))
    feed.tell(request, item_id=10, click=1)
    champion = followed(feed).verdict(SOON, 0).document["variants"]["champion"]
    assert (champion["requests"], champion["click"], champion["degraded"]) == (1, 1, 1)


def test_what_came_before_the_split_is_left_out(feed: Feed) -> None:
    feed.show(1, "champion", 1)
    path = next(feed.directory.glob("*.jsonl"))
    arrived = json.loads(path.read_text())["arrived_ms"]
    for since, requests in ((arrived, 1), (arrived + 1, 0)):
        found = followed(feed, replace(SPLIT, since_ms=since)).verdict(SOON, 0)
        assert found.document["variants"]["champion"]["requests"] == requests


def test_a_look_is_what_loops_over_users_give(feed: Feed) -> None:
    feed.live(150, better=1.1)
    config = replace(EAGER, first_users=30, spacing=2.0, guardrails={"click": 0.1})
    (look,) = followed(feed, config=config).looks
    users: dict[tuple[str, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    shown: dict[int, tuple[str, int]] = {}
    records = [json.loads(line) for line in next(feed.directory.glob("*.jsonl")).read_text().splitlines()]
    for record in records[: 2 * look.requests - 1]:  # taken when a slate is shown: of the last nothing is known yet
        if record["kind"] == "impressions":
            key = shown[record["request_id"]] = (record["variant"], record["user_id"])
            users[key]["requests"] += 1
            users[key]["impressions"] += len(record["items"])
        else:
            for event in record["events"]:
                of = users[shown[record["request_id"]]]
                of["click"] += event["click"]
                of["long_view"] += event["long_view"]
                of["watch_ms"] += event["watch_time_ms"]

    def sums(variant: str, column: str, per: str) -> Sums:
        rows = [row for (name, _), row in users.items() if name == variant]
        return Sums.of([row[column] for row in rows], [row[per] for row in rows])

    assert len(shown) == look.requests < 150
    for measure in MEASURES:
        point = look.points[measure.name]
        both = [sums(name, measure.column, measure.per) for name in ("challenger", "champion")]
        difference = Difference.between(both[0], both[1])
        assert [point.challenger, point.champion] == pytest.approx([float(one.ratio) for one in both])
        scale = 0.05 * point.champion
        half = float(difference.half_width(scale, 0.05 / 3))
        assert [point.low, point.high] == pytest.approx([point.difference - half, point.difference + half])
        assert point.p_value == pytest.approx(min(1, 3 * float(difference.p_value(scale))))
        harm = Difference.between(both[0], both[1], 0.9).p_value_below(scale)
        two = min(1, 2 * float(harm))  # beside that of degraded answers
        assert point.guard == pytest.approx(two if measure.name == "click" else 1)


def test_a_log_gives_one_verdict_however_often_it_is_asked(feed: Feed) -> None:
    asked_often = Experiment(feed.directory, SPLIT, EAGER)
    for part in range(10):
        feed.live(30, better=1.2, seed=part)
        asked_often.read()
        asked_often.verdict(SOON, 0)
    once = followed(feed)
    assert once.looks == asked_often.looks
    assert len(once.looks) > 20
    assert once.verdict(SOON, 5).document == asked_often.verdict(SOON, 5).document


def test_looks_begin_with_enough_users_of_both_and_become_rarer(feed: Feed) -> None:
    feed.live(600)
    looks = followed(feed, config=replace(EAGER, first_users=40, spacing=1.1)).looks
    assert looks[0].requests > 40 / 0.3 * 0.7
    steps = np.diff([look.requests for look in looks])
    assert (steps >= 0.1 * np.array([look.requests for look in looks[:-1]])).all()
    assert followed(feed, config=replace(EAGER, first_users=10_000)).looks == []


def test_the_sequence_only_narrows_and_the_p_value_only_falls(feed: Feed) -> None:
    feed.live(500, better=1.3)
    looks = followed(feed).looks
    for name in NAMES:
        points = [look.points[name] for look in looks]
        for before, after in pairwise(points):
            assert after.low >= before.low
            assert after.high <= before.high
            assert after.p_value <= before.p_value
            assert after.guard <= before.guard
        assert [point.p_value < 0.05 for point in points] == [point.low > 0 or point.high < 0 for point in points]


def test_equal_releases_are_not_told_apart_and_a_better_one_is(feed: Feed, tmp_path: Path) -> None:
    feed.live(1500)
    same = followed(feed).verdict(SOON, 0)
    assert same.action == "ask"
    assert {one["result"] for one in same.document["measures"].values()} == {"not told apart"}
    better = Feed(tmp_path / "better")
    better.live(1500, better=1.4)
    verdict = followed(better).verdict(SOON, 0)
    better.close()
    assert verdict.action == "ask"
    assert all(check.passed for check in verdict.checks)
    assert verdict.document["measures"]["click"]["result"] == "better"
    assert verdict.sentence.startswith("Release 2 against 1: clicks an impression better (+")


def test_a_person_is_asked_at_the_minimum_or_after_the_wait(feed: Feed) -> None:
    feed.live(100)
    found = followed(feed)
    shown = found.verdict(SOON, 0).document["variants"]["challenger"]
    for minimum, now_ms, action in (
        (Minimum(shown["impressions"], shown["users"], 60), 0, "ask"),
        (Minimum(shown["impressions"] + 1, shown["users"], 60), 0, "wait"),
        (Minimum(shown["impressions"], shown["users"] + 1, 60), 0, "wait"),
        (Minimum(10**9, 10**9, 60), 60 * 60_000 - 1, "wait"),
        (Minimum(10**9, 10**9, 60), 60 * 60_000, "ask"),
    ):
        assert found.verdict(minimum, now_ms).action == action
    said = found.verdict(Minimum(1000, 50), 0).sentence
    assert said.endswith(f"of {shown['users']} users; 1,000 impressions of 50 users are wanted.")


def test_nothing_shown_is_said_and_asked(tmp_path: Path) -> None:
    found = Experiment(tmp_path / "none", SPLIT, Config())
    found.read()
    verdict = found.verdict(SOON, 0)
    assert verdict.action == "ask"
    assert "one of them has had less than 30 users" in verdict.sentence
    everybody = Experiment(tmp_path / "none", replace(SPLIT, share=1.0), Config()).verdict(SOON, 0)
    assert everybody.sentence == "Everybody gets release 2: there is nothing to hold it against."


@pytest.mark.parametrize("guardrails", [{"click": 0.02}, {"watch_time": 0.02}])
def test_a_worse_canary_is_withdrawn_before_the_minimum(feed: Feed, guardrails: dict[str, float]) -> None:
    feed.live(1500, better=0.5)
    verdict = followed(feed, config=replace(EAGER, guardrails=guardrails)).verdict(LATER, 0)
    assert verdict.action == "withdraw"
    assert verdict.sentence.startswith("Release 2 harms users: ")
    assert verdict.sentence.endswith("worse by more than 2.0% of it with confidence.")
    # a margin as wide as the harm lets it go on
    wide = followed(feed, config=replace(EAGER, guardrails=dict.fromkeys(guardrails, 0.6)))
    assert wide.verdict(LATER, 0).action == "wait"


def test_a_guardrail_that_was_breached_stays_so(feed: Feed) -> None:
    feed.live(1200, better=0.4)
    found = followed(feed)
    assert found.verdict(LATER, 0).action == "withdraw"
    feed.live(2500, better=2.0, seed=9)
    found.read()
    assert found.verdict(LATER, 0).action == "withdraw"
    assert not found.looks[-1].points["click"].steady
    assert [check.name for check in found.verdict(LATER, 0).checks if not check.passed][-1] == (
        "differences stay what they are"
    )


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_a_canary_that_answers_in_part_is_withdrawn(feed: Feed, share: float) -> None:
    generator = np.random.default_rng(1)
    for user in range(600):
        variant = routing.variant(PAIR, user)
        broken = variant == "challenger" and generator.random() < share
        feed.show(user, variant, PAIR.release(variant) or 0, degraded=("recall", "rank") if broken else ())
    verdict = followed(feed, config=replace(EAGER, guardrails={})).verdict(LATER, 0)
    assert verdict.action == "withdraw"
    assert "harms users: degraded answers" in verdict.sentence


def test_a_user_who_met_both_releases_breaks_the_evidence(feed: Feed) -> None:
    feed.live(300, better=0.3)
    feed.show(1, "champion", 1)
    feed.show(1, "challenger", 2)
    verdict = followed(feed).verdict(LATER, 0)
    assert verdict.action == "fail"  # before any guardrail: what it says is not to be believed
    assert "1 of " in verdict.sentence
    assert "user 1 among them" in verdict.sentence


def test_a_split_that_is_not_the_share_breaks_the_evidence(feed: Feed) -> None:
    feed.live(800, share=0.3)
    assert followed(feed).verdict(LATER, 0).action == "wait"
    verdict = followed(feed, replace(SPLIT, share=0.5)).verdict(LATER, 0)
    assert verdict.action == "fail"
    assert "the share is 50.0%, p = " in verdict.sentence


def test_a_split_is_what_the_document_routes_from_its_last_change_on() -> None:
    stamped = routing.stamp(PAIR, "a person", "a reason")
    split = Split.of(stamped, after=5)
    assert split
    changed = routing.datetime.fromisoformat(stamped.updated_at).timestamp() * 1000
    assert (split.champion, split.challenger, split.share, split.after) == (1, 2, 0.3, 5)
    assert split.since_ms == pytest.approx(changed + SETTLE_MS, abs=1)
    # stamped again with nothing changed, it goes on
    assert split.now(routing.stamp(PAIR, "another", "")) == split
    # a share that is changed by hand moves users: from then on it is another split
    wider = replace(stamped, share=0.5, updated_at="2100-01-01T00:00:00.000+00:00")
    again = split.now(wider)
    assert again
    assert (again.share, again.after) == (0.5, 5)
    assert again.since_ms > split.since_ms
    for ended in (routing.withdraw(stamped), routing.promote(stamped, 2), routing.canary(stamped, 3, 0.3)):
        assert split.now(ended) is None
    assert Split.of(Routing(champion=1)) is None


def test_a_watch_follows_what_is_routed_and_takes_nothing_of_after_its_end(feed: Feed) -> None:
    home = feed.directory.parent
    long_ago = "2000-01-01T00:00:00.000+00:00"
    document = replace(routing.stamp(PAIR, "ana", ""), updated_at=long_ago)
    routing.write(home / "routing.json", document)
    split = Split.of(document)
    assert split
    watch = Watch(home, split, EAGER, SOON)
    feed.live(200)
    path = next(feed.directory.glob("*.jsonl"))
    arrived = [json.loads(line)["arrived_ms"] for line in path.read_text().splitlines()]

    before = watch.look(arrived[0] + CLOCKS_MS)  # nothing had arrived before the first
    assert before
    assert before.document["variants"]["champion"]["requests"] == 0
    half = arrived[200]
    assert watch.look(half + CLOCKS_MS)
    found = watch.experiment.verdict(SOON, 0).document["variants"]
    assert sum(found[name]["requests"] for name in found) == sum(time < half for time in arrived[::2])
    assert watch.look(arrived[-1] + CLOCKS_MS + 1)
    whole = watch.experiment.verdict(SOON, 0)
    assert sum(whole.document["variants"][name]["requests"] for name in found) == 200
    assert whole.document == followed(feed, split).verdict(SOON, 0).document  # however often it was read

    routing.write(home / "routing.json", routing.withdraw(document))
    feed.live(50, share=0.0)  # whom the challenger answered meets the champion
    assert watch.look(arrived[-1] + 10**6) is None
    assert watch.verdict(0).document == whole.document


def test_a_share_that_is_changed_by_hand_begins_anew(feed: Feed) -> None:
    home = feed.directory.parent
    document = replace(PAIR, updated_at="2000-01-01T00:00:00.000+00:00")
    routing.write(home / "routing.json", document)
    split = Split.of(document)
    assert split
    watch = Watch(home, split, EAGER, SOON)
    feed.live(300)
    assert watch.look(10**14)
    routing.write(home / "routing.json", replace(document, share=0.6, updated_at="2100-01-01T00:00:00.000+00:00"))
    again = watch.look(10**14)
    assert again
    assert again.document["split"]["share"] == 0.6
    assert again.document["variants"]["champion"]["requests"] == 0  # all of it was of before the change


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"guardrails": {"likes": 0.1}}, "guardrails has 'likes'; there are click, long_view, watch_time"),
        ({"guardrails": {"click": -0.1}}, "guardrails of click is -0.1"),
        ({"guardrails": {"click": "much"}}, "guardrails of click is 'much'"),
        ({"confidence": 1.0}, "confidence is 1.0, not between 0 and 1"),
        ({"effect": 0.0}, "effect is 0.0"),
        ({"degraded": 1.0}, "degraded is 1.0"),
        ({"first_users": 2}, "first_users is 2"),
        ({"spacing": 0.5}, "spacing is 0.5"),
    ],
)
def test_settings_by_which_nothing_can_be_judged_are_refused(
    tmp_path: Path, overrides: dict[str, Any], says: str
) -> None:
    config = penstock.config(experiment, overrides)
    with pytest.raises(ValueError, match="^" + says.replace("(", r"\(")):
        Experiment(tmp_path, SPLIT, config)
    assert Config().faults() == []


def test_the_page_shows_the_sequences_and_needs_nothing_else(feed: Feed, tmp_path: Path) -> None:
    feed.live(600, better=0.6)
    found = followed(feed)
    verdict = found.verdict(SOON, 0)
    page, figures = write_experiment(found, verdict, tmp_path / "out")
    html = page.read_text()
    assert html.count('<svg role="img"') == len(MEASURES)
    assert verdict.sentence in html
    assert 'class="verdict rejected"' in html
    assert "<script" not in html
    assert "src=" not in html
    assert 'name="viewport"' in html
    for check in verdict.checks:
        assert check.reason in html
    assert json.loads(figures.read_text()) == json.loads(json.dumps(verdict.document, allow_nan=False))


def test_a_page_of_nothing_yet_says_so(tmp_path: Path) -> None:
    found = Experiment(tmp_path / "none", SPLIT, Config())
    page, figures = write_experiment(found, found.verdict(SOON, 0), tmp_path)
    assert "There is no look before either release has had 30 users." in page.read_text()
    json.dumps(json.loads(figures.read_text()), allow_nan=False)


@pytest.fixture
def write(feed: Feed) -> Callable[[], dict[str, Any]]:
    def written() -> dict[str, Any]:
        feed.live(600, better=1.3)
        return dict(followed(feed).verdict(SOON, 0).document)

    return written


def test_the_tables_of_the_approval(write: Callable[[], dict[str, Any]]) -> None:
    document = write()
    click = document["measures"]["click"]
    lines = markdown(*measures_table(document)).splitlines()
    assert lines[0] == "| measure | release 1 | release 2 | difference | 95% interval | p |"
    assert len(lines) == 2 + len(MEASURES)
    assert lines[2].startswith(f"| clicks an impression | {click['champion']:.2%} | ".replace("%", " %"))
    assert f"{100 * click['low']:+.2f} points to {100 * click['high']:+.2f} points" in lines[2]
    assert markdown(*counts_table(document)).splitlines()[3].startswith("| challenger | 2 | ")
    flat = experiment.metrics(document)
    assert flat["ab/click/difference"] == click["difference"]
    assert flat["ab/challenger/users"] == document["variants"]["challenger"]["users"]
