from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from penstock.datasets import simulator
from penstock.datasets.canonical import Config, write_log
from penstock.events import LogError, read_events


@pytest.fixture
def own(tmp_path: Path) -> Path:
    log = tmp_path / "own"
    simulator.write_log(simulator.Config(users=60, items=100, items_per_day=5, days=2, sessions_per_day=1.0), log)
    return log


def test_a_log_is_copied_as_it_is(own: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_log(Config(str(own)), log)
    assert read_events(log).equals(read_events(own))
    for name in ("users.parquet", "items.parquet"):
        assert pl.read_parquet(log / name).equals(pl.read_parquet(own / name))
        assert (log / name).stat().st_ino != (own / name).stat().st_ino


def test_narrow_columns_are_cast_and_rows_go_under_their_own_day(own: Path, tmp_path: Path) -> None:
    events = read_events(own)
    for path in (own / "events").glob("*/*"):
        path.unlink()
    (own / "events" / "dt=2026-01-05" / "all.parquet").parent.mkdir(exist_ok=True)
    events.with_columns(pl.col("user_id").cast(pl.Int32)).write_parquet(
        own / "events" / "dt=2026-01-05" / "all.parquet"
    )
    log = tmp_path / "log"
    write_log(Config(str(own)), log)
    assert read_events(log).equals(events)
    assert sorted(path.name for path in (log / "events").iterdir()) == ["dt=2026-01-05", "dt=2026-01-06"]


def test_files_of_one_name_do_not_overwrite_each_other(own: Path, tmp_path: Path) -> None:
    """Both folders hold rows of both days, in files of the same name."""
    events = read_events(own)
    for number, folder in enumerate(sorted((own / "events").iterdir())):
        events.gather_every(2, number).write_parquet(folder / "part-00000-000.parquet")
    log = tmp_path / "log"
    write_log(Config(str(own)), log)
    assert read_events(log).equals(events)


def test_a_truncated_file_is_told(own: Path, tmp_path: Path) -> None:
    path = next((own / "events").glob("*/*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LogError, match=r"truncated\?") as caught:
        write_log(Config(str(own)), tmp_path / "log")
    assert str(path) in str(caught.value)


def test_a_wrong_column_is_told(own: Path, tmp_path: Path) -> None:
    path = own / "items.parquet"
    pl.read_parquet(path).rename({"author_id": "author"}).write_parquet(path)
    with pytest.raises(LogError, match=r"items\.parquet: column author_id is missing"):
        write_log(Config(str(own)), tmp_path / "log")


def test_a_missing_table_is_told(own: Path, tmp_path: Path) -> None:
    (own / "users.parquet").unlink()
    with pytest.raises(LogError, match=r"users\.parquet: no such file"):
        write_log(Config(str(own)), tmp_path / "log")


def test_a_log_is_not_copied_onto_itself(own: Path) -> None:
    before = read_events(own)
    with pytest.raises(LogError, match="is the log to be written"):
        write_log(Config(str(own)), own)
    assert read_events(own).equals(before)


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no such directory"):
        write_log(Config(str(tmp_path / "nowhere")), tmp_path / "log")
