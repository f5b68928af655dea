from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from penstock.datasets.simulator import Audience, Config, Truth, write_log
from penstock.events import DAY_MS, ITEMS, USERS, event_files, read_events, read_table

SMALL = Config(users=400, items=150, items_per_day=6, days=3, sessions_per_day=0.5)
LABELS = ("click", "long_view", "like", "profile_enter", "watch_time_ms")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = tmp_path_factory.mktemp("small")
    write_log(SMALL, log)
    return log


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = tmp_path_factory.mktemp("default")
    write_log(Config(), log)
    return log


@pytest.fixture(scope="module")
def judged(default: Path) -> pl.DataFrame:
    """The default log with the truth beside each impression: p_… (examined) and examination."""
    events = read_events(default)
    truth = Truth(Config())
    times = events["event_time"].dt.epoch("ms").to_numpy()
    probabilities = truth.probabilities(
        events["user_id"].to_numpy(), events["item_id"].to_numpy(), times, events["scenario"].to_numpy()
    )
    return events.with_columns(
        *(pl.Series(f"p_{name}", values) for name, values in probabilities.items()),
        pl.Series("examination", truth.examination(events["position"].to_numpy(), events["device"].to_numpy())),
    )


def test_the_same_seed_gives_the_same_log_and_another_seed_another(small: Path, tmp_path: Path) -> None:
    write_log(SMALL, tmp_path / "again")
    write_log(replace(SMALL, seed=8), tmp_path / "other")
    assert read_events(tmp_path / "again").equals(read_events(small))
    for name in ("users.parquet", "items.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (small / name).read_bytes()
    assert not read_events(tmp_path / "other").equals(read_events(small))


def test_more_days_only_add_to_the_log(small: Path, tmp_path: Path) -> None:
    write_log(replace(SMALL, days=5), tmp_path)
    longer = read_events(tmp_path)
    shorter = read_events(small)
    assert longer.height > shorter.height
    end = datetime.fromisoformat(SMALL.first_day).replace(tzinfo=UTC) + timedelta(days=SMALL.days)
    assert longer.filter(pl.col("created_time") < end).equals(shorter)
    late = longer.filter((pl.col("event_time") < end) & (pl.col("created_time") >= end))
    assert late.height > 0  # had not arrived when the shorter log was written
    items, more_items = (read_table(log / "items.parquet", ITEMS) for log in (small, tmp_path))
    assert more_items.height == items.height + 2 * SMALL.items_per_day
    assert more_items.head(items.height).equals(items)
    users, more_users = (read_table(log / "users.parquet", USERS) for log in (small, tmp_path))
    assert more_users.filter(pl.col("user_id").is_in(users["user_id"].implode())).equals(users)


def test_the_parts_bound_the_work_and_do_not_change_the_events(small: Path, tmp_path: Path) -> None:
    write_log(replace(SMALL, users_per_part=100), tmp_path)
    files = event_files(tmp_path)
    assert len(files) == 4 * SMALL.days
    for path in files:
        part = int(path.stem.split("-")[1])
        assert pl.read_parquet(path)["user_id"].is_between(100 * part, 100 * part + 99).all()
    assert read_events(tmp_path).equals(read_events(small))
    assert read_table(tmp_path / "users.parquet", USERS).equals(read_table(small / "users.parquet", USERS))


def test_keys_are_unique_and_safe_in_json(judged: pl.DataFrame) -> None:
    assert judged["event_id"].is_unique().all()
    assert 0 <= judged["event_id"].min() <= judged["event_id"].max() < 2**53  # type: ignore[operator]
    requests = judged.group_by("request_id").agg(
        pl.col("user_id", "event_time", "device", "scenario", "session_id").n_unique(),
        pl.col("item_id").n_unique().alias("items"),
        pl.col("position").sort().alias("positions"),
        pl.len(),
    )
    assert (requests.select("user_id", "event_time", "device", "scenario", "session_id") == 1).to_numpy().all()
    assert (requests["items"] == requests["len"]).all()
    assert requests["positions"].to_list() == [list(range(10))] * requests.height


def test_nothing_is_shown_before_it_exists(default: Path, judged: pl.DataFrame) -> None:
    items = read_table(default / "items.parquet", ITEMS).select("item_id", uploaded="event_time")
    users = read_table(default / "users.parquet", USERS).select("user_id", registered="event_time")
    known = judged.join(items, on="item_id").join(users, on="user_id")
    assert known.height == judged.height
    assert (known["event_time"] >= known["uploaded"]).all()
    assert (known["event_time"] >= known["registered"]).all()
    assert (known["registered"] > known["event_time"].min()).any()  # some users are new


def test_some_requests_arrive_late(judged: pl.DataFrame) -> None:
    delay = judged.select((pl.col("created_time") - pl.col("event_time")).dt.total_milliseconds()).to_series()
    assert delay.min() >= 1_000  # type: ignore[operator]
    assert delay.max() <= 6 * 3_600_000  # type: ignore[operator]
    assert 0.02 < (delay > 10 * 60_000).mean() < 0.05  # type: ignore[operator]


def test_the_rates_are_those_of_kuairand(judged: pl.DataFrame) -> None:
    assert 200_000 < judged.height < 300_000
    for name, rate, tolerance in (
        ("click", 0.449, 0.01),
        ("long_view", 0.316, 0.01),
        ("profile_enter", 0.0189, 0.0015),
        ("like", 0.0174, 0.0015),
    ):
        assert judged[name].mean() == pytest.approx(rate, abs=tolerance), name


def within(table: pl.DataFrame, by: list[str], label: str, expected: pl.Expr) -> pl.Series:
    """By how many standard errors the label's rate in each group differs from what is expected."""
    groups = table.with_columns(expected.alias("p")).group_by(by)
    sums = groups.agg(pl.col(label, "p").sum(), (pl.col("p") * (1 - pl.col("p"))).sum().sqrt().alias("error"))
    return ((sums[label] - sums["p"]) / sums["error"]).abs()


@pytest.mark.parametrize("label", LABELS[:4])
def test_the_labels_follow_the_truth(judged: pl.DataFrame, label: str) -> None:
    """In every tenth of the probability, position and device, a label is as frequent as it should be."""
    expected = pl.col(f"p_{label}") * pl.col("examination")
    tenths = judged.with_columns((expected.rank("ordinal") * 10 // (pl.len() + 1)).alias("tenth"))
    assert within(tenths, ["tenth"], label, expected).max() < 4.5  # type: ignore[operator]
    assert within(judged, ["position", "device"], label, expected).max() < 4.5  # type: ignore[operator]


def test_the_truth_ranks_far_better_than_popularity(judged: pl.DataFrame) -> None:
    day = pl.col("event_time").dt.epoch("ms") - Config().start_ms
    train, test = judged.filter(day < 10 * DAY_MS), judged.filter(day >= 12 * DAY_MS)
    for label, floor in (("click", 0.80), ("long_view", 0.80), ("like", 0.85)):
        mean = train[label].mean()
        counts = train.group_by("item_id").agg(score=(pl.col(label).sum() + 20 * mean) / (pl.len() + 20))
        popularity = test.join(counts, on="item_id", how="left", maintain_order="left")["score"].fill_null(mean)
        by_popularity = roc_auc_score(test[label], popularity)
        by_truth = roc_auc_score(test[label], test[f"p_{label}"])
        assert by_truth > floor, label
        assert 0.53 < by_popularity < by_truth - 0.15, label


def test_the_log_is_biased_towards_what_users_like(judged: pl.DataFrame) -> None:
    """The policy knows something: shown items are more relevant than random ones, and the first than the last."""
    sample = judged.gather_every(20)
    random = np.random.default_rng(0).integers(0, Config().items, sample.height)
    times = sample["event_time"].dt.epoch("ms").to_numpy()
    relevance = Truth(Config()).relevance(sample["user_id"].to_numpy(), random, times)
    assert sample["p_click"].mean() > relevance.mean() + 0.15  # type: ignore[operator]
    by_position = judged.group_by("position").agg(pl.col("p_click").mean()).sort("position")["p_click"]
    assert by_position[0] > by_position[9] + 0.1


def test_what_authors_are_favoured_by_is_where_they_stand_and_nothing_else(default: Path, tmp_path: Path) -> None:
    favouring = replace(Config(), favour=3.0)
    write_log(favouring, tmp_path)
    one, other = (read_events(log).sort("request_id", "item_id") for log in (default, tmp_path))
    same = ["request_id", "item_id", "user_id", "event_time", "device", "scenario"]
    assert one.select(same).equals(other.select(same))
    assert not one["position"].equals(other["position"])
    truth, ids = Truth(favouring), one["item_id"].to_numpy()
    favoured = truth.items(ids).favoured
    relevance = truth.relevance(one["user_id"].to_numpy(), ids, one["event_time"].dt.epoch("ms").to_numpy())
    assert spearmanr(favoured, other["position"]).statistic < -0.8
    assert abs(spearmanr(favoured, one["position"]).statistic) < 0.05
    assert abs(spearmanr(favoured, relevance).statistic) < 0.1


def test_randomised_slates_give_back_the_examination_curve() -> None:
    """In slates in random order the click rate of a position is proportional to its examination."""
    truth = Truth(Config())
    random = np.random.default_rng(1)
    slates = 20_000
    users = truth.users(random.integers(0, 5_000, slates))
    items = truth.items(np.arange(2_000))
    shown = random.integers(0, 2_000, slates)
    time_ms = np.full(slates, Config().start_ms + DAY_MS)
    answer = truth.answer(users, np.arange(slates), items, shown, time_ms, np.zeros(slates, np.int64))
    for device, eta in ((1, 0.15), (2, 0.22), (3, 0.35)):
        rates = []
        for position in range(10):
            request = np.arange(slates) + slates * (10 * device + position)
            examination = np.full(slates, truth.examination(position, device))
            rates.append(truth.respond(answer, examination, request, shown)["click"].mean())
        curve = np.array(rates) / rates[0]
        slope = np.polyfit(np.log(1 + np.arange(10)), np.log(curve), 1)[0]
        assert slope == pytest.approx(-eta, abs=0.03)
    assert truth.examination([0, 0, 0], [1, 2, 3]).tolist() == [1.0, 1.0, 1.0]
    assert truth.examination(4, 99) == truth.examination(4, 0) == pytest.approx(5**-0.22)


def test_interests_drift_slowly() -> None:
    users = Truth(Config()).users(np.arange(500))
    all_users = np.arange(500)

    def likeness(days: float) -> float:
        now, then = (users.interest(all_users, np.full(500, int(day * DAY_MS))) for day in (3.0, 3.0 + days))
        return float((now * then).sum(axis=1).mean())

    assert likeness(0) == pytest.approx(1)
    assert 0.99 < likeness(1) < 1
    assert 0.6 < likeness(14) < 0.95


def test_a_watch_is_long_when_it_reaches_the_length_that_is_enough(default: Path, judged: pl.DataFrame) -> None:
    items = read_table(default / "items.parquet", ITEMS).select("item_id", "duration_ms")
    seen = judged.join(items, on="item_id")
    enough = pl.min_horizontal("duration_ms", pl.lit(18_000))
    assert seen.filter(pl.col("long_view") == 1).select((pl.col("watch_time_ms") >= enough).all()).item()
    assert seen.filter(pl.col("long_view") == 0).select((pl.col("watch_time_ms") < enough).all()).item()
    assert seen.select((pl.col("watch_time_ms") <= 3 * pl.col("duration_ms")).all()).item()
    for label in ("long_view", "like", "profile_enter"):
        assert (judged[label] <= judged["click"]).all()


def test_the_audience_answers_as_the_log_did(small: Path) -> None:
    audience = Audience(SMALL)
    slates = read_events(small).sort("request_id", "position").partition_by("request_id", maintain_order=True)
    for slate in slates[:: len(slates) // 40]:
        shown = slate.row(0, named=True)
        answers = audience.respond(
            shown["user_id"],
            slate["item_id"].to_list(),
            time_ms=int(shown["event_time"].timestamp() * 1000),
            device=shown["device"],
            scenario=shown["scenario"],
            request_id=shown["request_id"],
        )
        assert answers == slate.select(sorted(LABELS, key=list(answers[0]).index)).to_dicts()


def test_the_audience_knows_users_and_items_to_come() -> None:
    audience = Audience(SMALL)
    config = SMALL
    ask = {"time_ms": config.start_ms + 20 * DAY_MS, "device": 1, "scenario": 0}
    newest = list(range(config.items_by(18), config.items_by(20)))
    answers = audience.respond(10**9, newest, **ask, request_id=1)
    assert len(answers) == 2 * config.items_per_day
    assert answers == audience.respond(10**9, newest, **ask, request_id=1)
    others = [audience.respond(10**9, newest, **ask, request_id=request) for request in range(2, 12)]
    assert any(answers != other for other in others)
    with pytest.raises(ValueError, match="there is no item -1"):
        audience.respond(1, [3, -1], **ask, request_id=1)
    assert audience.respond(1, [], **ask, request_id=1) == []


def test_the_audience_comes_on_any_day() -> None:
    audience = Audience(SMALL)
    visits = list(audience.requests(SMALL.days, 500))
    assert visits == list(audience.requests(SMALL.days, 500))
    assert visits != list(audience.requests(SMALL.days + 1, 500))
    users, times, devices, scenarios = (np.array(column) for column in zip(*visits, strict=True))
    assert users.shape == (500,)
    assert (np.diff(times) >= 0).all()
    assert set((times - SMALL.start_ms) // DAY_MS) == {SMALL.days}
    assert set(devices) == {1, 2, 3}
    assert set(scenarios) == {0, 1, 2}
    assert (Truth(SMALL).users(users).registered_day <= SMALL.days).all()
    # who comes often in the log comes often here
    activity = Truth(SMALL).users(np.arange(SMALL.users)).activity
    assert activity[users].mean() > 1.3 * activity.mean()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"users": 0}, "users is 0; it goes from 1"),
        ({"items": 10}, "items is 10; it goes from 100"),
        ({"days": 5000}, "days is 5000"),
        ({"favour": -1.0}, "favour is -1.0; it goes from 0.0"),
        ({"sessions_per_day": float("nan")}, "sessions_per_day is nan"),
        ({"first_day": "5 January"}, "first_day is '5 January', not a date"),
    ],
)
def test_a_size_out_of_range_is_told(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**wrong)  # type: ignore[arg-type]


def test_titles_are_made_of_the_words_of_their_tags(small: Path) -> None:
    """The items of a tag share a word, and an item's tags are of its category."""
    items = read_table(small / "items.parquet", ITEMS)
    words: dict[int, set[str]] = {}
    for tags, title in items.select("tags", "title").iter_rows():
        for tag in tags:
            words[tag] = words.get(tag, set(title.split())) & set(title.split())
    assert len(words) > 60
    assert all(words.values())
    topic = (pl.element() - 1) // 8 + 1
    assert items.select(pl.col("tags").list.eval(topic.unique()) == pl.concat_list("category")).to_series().all()
