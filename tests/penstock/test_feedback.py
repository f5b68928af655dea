from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from penstock.events import EVENTS, USERS, read_events, read_table
from penstock.feedback import (
    FeedbackError,
    FeedbackLog,
    FeedbackReader,
    append_feedback,
    copy_reach,
    last_sequence,
    new_request_id,
    read_feedback,
    read_sequence,
    read_until,
)
from penstock.json_lines import LineError
from tests.small_log import an_event, write_log

NOON_MS = 1_650_000_000_000
SLATE: dict[str, Any] = {
    "time_ms": NOON_MS,
    "scenario": 1,
    "device": 2,
    "release": 3,
    "variant": "champion",
    "features_us": (NOON_MS - 1) * 1000,
}


def outcome(item_id: int, **values: int) -> dict[str, int]:
    return {"item_id": item_id, **values}


def test_every_impression_is_a_row_and_outcomes_are_merged(tmp_path: Path) -> None:
    with FeedbackLog(tmp_path) as log:
        log.impressions(2**52, 7, [30, 10, 20], **SLATE)
        log.impressions(2**52 + 1, 8, [10], **SLATE | {"variant": "challenger"})
        log.outcomes(2**52, [outcome(10, click=1, watch_time_ms=500), outcome(20, like=1)])
        log.outcomes(2**52, [outcome(10, click=0, long_view=1, watch_time_ms=400)])
        log.outcomes(2**52, [outcome(99, click=1)])
        log.outcomes(2**52 + 9, [outcome(10, click=1)])
    rows = read_feedback(tmp_path)
    assert rows.schema == pl.Schema(EVENTS.schema)
    assert rows.select("user_id", "item_id", "position", "click", "long_view", "like", "watch_time_ms").rows() == [
        (7, 30, 0, 0, 0, 0, 0),
        (7, 10, 1, 1, 1, 0, 500),
        (7, 20, 2, 0, 0, 1, 0),
        (8, 10, 0, 0, 0, 0, 0),
    ]
    assert rows["event_id"].is_unique().all()
    assert rows["event_id"].min() > 2**58  # type: ignore[operator]
    assert set(rows["event_time"]) == {datetime.fromtimestamp(NOON_MS / 1000, UTC)}
    assert rows["release"].to_list() == [3] * 4
    assert rows["features_time"].dt.epoch("ms").to_list() == [NOON_MS - 1] * 4
    assert rows["variant"].to_list() == ["champion"] * 3 + ["challenger"]


def test_outcomes_arrive_so_much_after_their_row_as_they_did(tmp_path: Path) -> None:
    (tmp_path / "2022-04-15.jsonl").write_text(
        '{"kind":"impressions","arrived_ms":1000,"request_id":5,"user_id":1,"time_ms":600,"scenario":0,"device":0,'
        '"release":1,"variant":"champion","items":[1,2]}\n'
        '{"kind":"outcomes","arrived_ms":2000,"request_id":5,"events":[{"item_id":2,"click":1}]}\n'
        '{"kind":"outcomes","arrived_ms":3000,"request_id":5,"events":[{"item_id":2,"click":1,"long_view":1}]}\n'
        '{"kind":"outcomes","arrived_ms":4000,"request_id":5,"events":[{"item_id":2,"click":1,"watch_time_ms":9}]}\n'
        '{"kind":"outcomes","arrived_ms":5000,"request_id":5,"events":[{"item_id":1,"watch_time_ms":9}]}\n'
    )
    rows = read_feedback(tmp_path)
    assert rows["event_time"].dt.epoch("ms").to_list() == [600, 600]
    assert rows["created_time"].dt.epoch("ms").to_list() == [600, 600]
    assert rows["outcome_time"].dt.epoch("ms").to_list() == [4600, 2600]
    assert rows["watch_time_ms"].to_list() == [9, 9]
    assert rows["features_time"].to_list() == [None, None]


def test_an_answer_could_use_no_snapshot_of_after_its_time(tmp_path: Path) -> None:
    with FeedbackLog(tmp_path) as log:
        log.impressions(1, 7, [1], **SLATE | {"features_us": (NOON_MS + 5) * 1000})
    assert read_feedback(tmp_path)["features_time"].dt.epoch("ms").to_list() == [NOON_MS]


def numbers(reader: FeedbackReader) -> list[int]:
    return [record["sequence"] for record in reader.read()]


def test_records_are_numbered_over_all_files_and_by_every_writer(tmp_path: Path) -> None:
    with FeedbackLog(tmp_path) as log:
        assert log.impressions(1, 7, [1], **SLATE) == 1
        assert log.outcomes(1, [outcome(1, click=1)]) == 2
    (path,) = tmp_path.glob("*.jsonl")
    path.rename(tmp_path / "2022-04-15.jsonl")
    with FeedbackLog(tmp_path) as log:
        assert log.sequence == 2
        assert log.outcomes(1, [outcome(1, like=1)]) == 3
    assert numbers(FeedbackReader(tmp_path)) == [1, 2, 3]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_of_records_without_a_number_it_is_their_place(tmp_path: Path) -> None:
    old = '{"kind":"outcomes","arrived_ms":2000,"request_id":5,"events":[{"item_id":2,"click":1}]}\n'
    (tmp_path / "2022-04-14.jsonl").write_text(old * 2)
    (tmp_path / "2022-04-15.jsonl").write_text(old * 3)
    assert last_sequence(tmp_path) == 5
    for number in (6, 7):
        with FeedbackLog(tmp_path) as log:
            assert log.outcomes(5, []) == number
    assert numbers(FeedbackReader(tmp_path)) == numbers(FeedbackReader(tmp_path, after=4)) == [1, 2, 3, 4, 5, 6, 7]


def test_files_that_are_not_asked_for_are_left_out(tmp_path: Path) -> None:
    line = '{{"sequence":{},"kind":"outcomes","arrived_ms":2000,"request_id":5,"events":[]}}\n'
    for day, held in (("01", [1, 2]), ("08", [3, 4]), ("09", []), ("10", [5]), ("16", [6, 7])):
        (tmp_path / f"2022-04-{day}.jsonl").write_text("".join(line.format(number) for number in held))
    assert numbers(FeedbackReader(tmp_path, after=5)) == [6, 7]
    assert numbers(FeedbackReader(tmp_path, after=9)) == [6, 7]
    assert numbers(FeedbackReader(tmp_path, after=4)) == [5, 6, 7]
    assert numbers(FeedbackReader(tmp_path, after=3)) == [3, 4, 5, 6, 7]
    assert numbers(FeedbackReader(tmp_path, after=5, days_before=7)) == [5, 6, 7]
    assert numbers(FeedbackReader(tmp_path, after=5, days_before=8)) == [3, 4, 5, 6, 7]
    assert numbers(FeedbackReader(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]


def test_a_reader_goes_on_with_what_comes(tmp_path: Path) -> None:
    reader = FeedbackReader(tmp_path)
    assert numbers(reader) == []
    with FeedbackLog(tmp_path) as log:
        log.outcomes(1, [])
        assert numbers(reader) == [1]
        log.outcomes(1, [])
        log.outcomes(1, [])
        assert numbers(reader) == [2, 3]
        assert numbers(reader) == []
    (path,) = tmp_path.glob("*.jsonl")
    with path.open("a") as file:
        file.write('{"sequence":4,"kind":"outcomes",')
        file.flush()
        assert numbers(reader) == []
        file.write('"request_id":1,"arrived_ms":1,"events":[]}\n')
    (tmp_path / "9999-01-01.jsonl").write_text('{"sequence":5,"kind":"outcomes"}\n')
    assert numbers(reader) == [4, 5]


def test_a_clock_that_is_set_back_changes_no_order(tmp_path: Path) -> None:
    (tmp_path / "9999-01-01.jsonl").write_text('{"sequence":5,"kind":"outcomes","request_id":1,"events":[]}\n')
    with FeedbackLog(tmp_path) as log:
        assert log.outcomes(1, []) == 6
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["9999-01-01.jsonl"]
    assert numbers(FeedbackReader(tmp_path)) == [5, 6]


def test_nothing_shown_is_an_empty_log(tmp_path: Path) -> None:
    with FeedbackLog(tmp_path) as log:
        log.impressions(1, 7, [], **SLATE)
    assert read_feedback(tmp_path).schema == pl.Schema(EVENTS.schema)
    assert read_feedback(tmp_path).height == 0
    assert read_feedback(tmp_path / "absent").height == 0


def test_a_torn_last_line_is_no_record_and_the_next_writer_clears_it(tmp_path: Path) -> None:
    with FeedbackLog(tmp_path) as log:
        log.impressions(1, 7, [1], **SLATE)
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert read_feedback(tmp_path).height == 1
    with FeedbackLog(tmp_path) as log:
        log.impressions(2, 7, [1], **SLATE)
    assert read_feedback(tmp_path)["request_id"].to_list() == [1, 2]
    path.write_bytes(whole[: len(whole) // 2])
    with FeedbackLog(tmp_path) as log:
        log.impressions(3, 7, [1], **SLATE)
    assert read_feedback(tmp_path)["request_id"].to_list() == [3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "2022-04-15.jsonl").write_text('{"kind": "impress\n{"kind": "outcomes"}\n')
    with pytest.raises(LineError, match=r"2022-04-15\.jsonl, line 1: not a record; move the file away"):
        read_feedback(tmp_path)
    with pytest.raises(LineError):
        FeedbackLog(tmp_path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with FeedbackLog(tmp_path), pytest.raises(FeedbackError, match="another gateway"):
        FeedbackLog(tmp_path)
    FeedbackLog(tmp_path).close()


def test_request_ids_survive_javascript() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(2**52 <= number < 2**53 and int(float(number)) == number for number in ids)


def test_feedback_joins_the_log_and_so_do_users_it_did_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path / "log", [an_event(0, 1, 10, datetime(2022, 4, 15, tzinfo=UTC))])
    with FeedbackLog(tmp_path / "feedback") as log:
        for request, user in ((11, 1), (12, 77), (13, 77)):
            log.impressions(request, user, [10, 20], **SLATE)
    before = read_table(tmp_path / "log" / "users.parquet", USERS)
    monkeypatch.setattr(time, "time_ns", lambda: NOON_MS * 1_000_000)
    assert append_feedback(tmp_path / "log", tmp_path / "feedback") == 6
    users = read_table(tmp_path / "log" / "users.parquet", USERS)
    assert users.head(before.height).equals(before)
    assert users["user_id"].to_list() == [*before["user_id"], 77]
    assert users.row(-1, named=True)["traits"] == []
    assert read_sequence(tmp_path / "log") == 3
    assert read_events(tmp_path / "log").height == 1 + 6
    # all that had arrived before is in it, but for what may just have been written
    assert read_until(tmp_path / "log") == NOON_MS * 1000 - 1_000_000
    (tmp_path / "validated").mkdir()
    copy_reach(tmp_path / "log", tmp_path / "validated")
    assert read_sequence(tmp_path / "validated") == 3
    assert read_until(tmp_path / "validated") == read_until(tmp_path / "log")


def test_a_log_that_never_met_the_gateway_says_nothing_of_it(tmp_path: Path) -> None:
    copy_reach(tmp_path, tmp_path)
    assert (read_sequence(tmp_path), read_until(tmp_path), list(tmp_path.iterdir())) == (0, 0, [])


def test_no_feedback_changes_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [an_event(0, 1, 10, datetime(2022, 4, 15, tzinfo=UTC))])
    assert append_feedback(tmp_path / "log", tmp_path / "absent") == 0
    assert read_sequence(tmp_path / "log") == 0
    assert read_events(tmp_path / "log").height == 1
