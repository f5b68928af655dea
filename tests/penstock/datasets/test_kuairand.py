from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from penstock.datasets.kuairand import Config, write_log
from penstock.events import HISTORIES, ITEMS, USERS, LogError, read_events, read_table

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
# 2022-05-01 12:30 UTC, which is 20:30 in UTC+8
NOON = 1_651_408_200_000
LOG_ROWS = [
    f"7,100,20220501,2000,{NOON},1,1,0,0,0,0,1,9000,8000,0,0,1,0,4",
    # logged two hours later than it happened
    f"7,101,20220501,2200,{NOON},0,0,0,0,0,0,0,300,8000,0,0,0,0,4",
    f"8,100,20220502,0,{NOON + 3_600_000 * 4},1,0,0,0,0,0,0,2000,8000,0,0,0,0,1",
]
LOG = "log_standard_4_22_to_5_08_pure.csv"
USERS_CSV = "user_features_pure.csv"
VIDEOS_CSV = "video_features_basic_pure.csv"


def write(path: Path, header: str, rows: list[str]) -> None:
    path.write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """A download of three impressions in the official layout."""
    data = tmp_path / "KuaiRand-Pure" / "data"
    data.mkdir(parents=True)
    write(data / LOG, LOG_HEADER, [*LOG_ROWS, LOG_ROWS[0]])
    onehot = ",".join(f"onehot_feat{number}" for number in range(18))
    write(
        data / USERS_CSV,
        "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
        "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
        f"register_days_range,{onehot}",
        [
            '7,full_active,0,-124,1,514,500+,150,"[100,1k)",34,"[30,60)",799,730+,1,1,29,949,1.0,0,0,14,135,6,3,0,0.0,1.0,0,0,0,0',
            "8,UNKNOWN,0,1,0,-124,0,0,0,0,0,14,8-14,0,0,0,0,,0,0,0,0,0,0,0,,,,,,",
        ],
    )
    write(
        data / VIDEOS_CSV,
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
        "music_id,music_type,tag",
        [
            '100,7349781,NORMAL,2022-04-10,LongImport,0.0,8000.0,720.0,1280.0,9155697141,9.0,"20,43"',
            "101,5,AD,2022-04-09,PictureSet,0.0,,720.0,1280.0,0,,",
        ],
    )
    return data.parent


def read(download: Path, tmp_path: Path) -> Path:
    log = tmp_path / "log"
    write_log(Config(str(download)), log)
    return log


def test_rows_become_events(download: Path, tmp_path: Path) -> None:
    events = read_events(read(download, tmp_path))
    assert events.height == 3  # the repeated row is dropped
    first, late, last = events.rows(named=True)
    assert first["event_time"] == datetime(2022, 5, 1, 12, 30, tzinfo=UTC)
    assert first["created_time"] == first["event_time"]
    assert late["event_time"] == first["event_time"]
    assert late["created_time"] == datetime(2022, 5, 1, 14, 0, tzinfo=UTC)
    assert [row["event_id"] for row in (first, late, last)] == [0, 1, 2]
    assert [row["request_id"] for row in (first, late, last)] == [0, 0, 1]
    assert {name: first[name] for name in ("user_id", "item_id", "scenario", "device", "position", "session_id")} == {
        **{"user_id": 7, "item_id": 100, "scenario": 4, "device": 0},
        **{"position": None, "session_id": None},
    }
    labels = ("click", "long_view", "like", "profile_enter", "watch_time_ms")
    assert [first[name] for name in labels] == [1, 1, 1, 1, 9000]
    assert [last[name] for name in labels] == [1, 0, 0, 0, 2000]


def test_users_have_tokens_of_their_own_for_each_feature(download: Path, tmp_path: Path) -> None:
    users = read_table(read(download, tmp_path) / "users.parquet", USERS)
    known, unknown = users.rows(named=True)
    assert known["activity_level"] == 8
    assert unknown["activity_level"] == 0
    assert unknown["follow_count"] == 0
    assert known["traits"][:5] == [10_001, 20_001, 30_029, 40_949, 50_001]
    assert known["traits"][-4:] == [190_007, 200_003, 210_003, 220_007]  # the ranges; no -124
    assert unknown["traits"][-1] == 230_001  # streams live
    assert [token for token in unknown["traits"] if 50_000 <= token < 60_000] == []
    assert users["event_time"].max() == datetime(2022, 5, 1, tzinfo=UTC)


def test_items_of_absent_tags_and_duration(download: Path, tmp_path: Path) -> None:
    tagged, bare = read_table(read(download, tmp_path) / "items.parquet", ITEMS).rows(named=True)
    assert (tagged["tags"], tagged["category"], tagged["music_id"]) == ([20, 43], 20, 9155697141)
    assert tagged["event_time"] == datetime(2022, 4, 9, 16, tzinfo=UTC)
    assert (bare["tags"], bare["category"], bare["duration_ms"], bare["music_id"]) == ([], 0, 0, 0)


def test_the_data_folder_itself_and_all_standard_logs_are_read(download: Path, tmp_path: Path) -> None:
    earlier = LOG_ROWS[0].replace("20220501", "20220410").replace(str(NOON), str(NOON - 21 * 86_400_000))
    write(download / "data" / "log_standard_4_08_to_4_21_pure.csv", LOG_HEADER, [earlier])
    write(download / "data" / "log_random_4_22_to_5_08_pure.csv", LOG_HEADER, LOG_ROWS)
    log = read(download / "data", tmp_path)
    assert read_events(log).height == 4
    assert sorted(path.name for path in (log / "events").iterdir()) == ["dt=2022-04-10", "dt=2022-05-01"]


def history(folder: Path, last_ms: int) -> None:
    pl.DataFrame(
        {
            "user_id": [7, 8],
            "last_time_ms": [last_ms, last_ms - 5],
            "watch_seq": [[1, 2, 3], [9]],
            "like_seq": [[], []],
            "long_watch_seq": [[3, 1], []],
        },
        schema_overrides={"like_seq": pl.List(pl.Int64), "long_watch_seq": pl.List(pl.Int64)},
    ).write_parquet(folder / "user_history_to_4_24.parquet")


def test_histories_that_end_before_the_logs_are_kept(download: Path, tmp_path: Path) -> None:
    history(download / "data", NOON - 86_400_000)
    histories = read_table(read(download, tmp_path) / "histories.parquet", HISTORIES)
    assert histories.select("user_id", "items").rows() == [(7, [3, 1])]
    assert histories["event_time"][0] == datetime(2022, 4, 30, 12, 30, tzinfo=UTC)


def test_histories_that_the_logs_cover_are_left_out(download: Path, tmp_path: Path) -> None:
    history(download / "data", NOON + 1)
    assert not (read(download, tmp_path) / "histories.parquet").exists()


def test_a_second_run_writes_the_same(download: Path, tmp_path: Path) -> None:
    first = read_events(read(download, tmp_path))
    assert read_events(read(download, tmp_path)).equals(first)


@pytest.mark.parametrize("name", [LOG, USERS_CSV, VIDEOS_CSV])
def test_a_file_cut_short_is_told(download: Path, tmp_path: Path, name: str) -> None:
    path = download / "data" / name
    whole = path.read_text()
    for cut in (1, 2, 7):
        path.write_text(whole[:-cut])
        with pytest.raises(LogError, match=f"{name}: cut short"):
            read(download, tmp_path)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (LOG, "is_click", "clicked", r"column is_click is missing"),
        (VIDEOS_CSV, ",tag", ",tags", r"column tag is missing"),
        (USERS_CSV, "onehot_feat3,", "onehot,", r"column onehot_feat3 is missing"),
        (LOG, LOG_ROWS[2], LOG_ROWS[2][:30], r"line 4 has no time_ms|line 4 has no is_click"),
        (LOG, LOG_ROWS[2], LOG_ROWS[2].replace("20220502", "20221302"), r"line 4 has date 20221302"),
        (LOG, LOG_ROWS[2], LOG_ROWS[2].replace("8,100", "eight,100"), r"not readable as the official CSV: .*eight"),
        (VIDEOS_CSV, "2022-04-09", "yesterday", r"line 3 has upload_dt 'yesterday'"),
    ],
)
def test_bad_input_is_told_in_one_line(
    download: Path, tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    replace(download / "data" / name, old, new)
    with pytest.raises(LogError, match=message) as caught:
        read(download, tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [LOG, USERS_CSV, VIDEOS_CSV])
def test_a_missing_file_is_told(download: Path, tmp_path: Path, name: str) -> None:
    (download / "data" / name).unlink()
    with pytest.raises(LogError, match=r"no such file|no log_standard_\*\.csv"):
        read(download, tmp_path)


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="nowhere: no such directory"):
        write_log(Config(str(tmp_path / "nowhere")), tmp_path / "log")


def test_an_empty_log_is_told(download: Path, tmp_path: Path) -> None:
    write(download / "data" / LOG, LOG_HEADER, [])
    with pytest.raises(LogError, match="no rows"):
        read(download, tmp_path)
