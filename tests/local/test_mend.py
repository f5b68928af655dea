"""`python -m local mend`: what a person who mends rows is told."""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
import pytest

from local.__main__ import main
from penstock import quarantine
from penstock.events import USERS, read_table
from tests.small_log import START, an_event, write_log


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose newest log has two users who are no users."""
    log = write_log(tmp_path / "runs" / "prepare" / "first" / "ingest" / "log", [an_event(1, 2, 3, START)])
    (log.parent / "_SUCCESS.json").touch()
    users = read_table(log / "users.parquet", USERS)
    bad = [users.with_columns(user_id=pl.lit(user, pl.Int64), is_creator=pl.lit(7, pl.Int64)) for user in (8, 9)]
    pl.concat([users, *bad]).write_parquet(log / "users.parquet")
    rows = pl.concat(bad)
    quarantine.in_file({"users": rows.with_columns(quarantine.text(rows))}).write_parquet(tmp_path / "put-aside")
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, file: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["local", "mend", str(file)])
    return main()


def test_each_row_is_told_of(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pl.read_parquet(home / "put-aside")
    half = rows.with_columns(is_creator=pl.when(pl.col("user_id") == 8).then(1).otherwise("is_creator"))
    half.write_parquet(home / "half.parquet")
    assert call(monkeypatch, home / "half.parquet") == 1
    said = capsys.readouterr().out.splitlines()
    kept_in = quarantine.files(home / "mended")[0]
    assert said[-4:] == [
        "1 row came back (1 of users): the next run of prepare has them",
        f"kept in {kept_in}",
        f"1 row is still bad and left in {home / 'half-rest.parquet'}",
        "  users, user_id 9: is_creator must be between 0 and 1",
    ]
    rows.with_columns(is_creator=pl.lit(0, pl.Int64)).write_parquet(home / "all.parquet")
    assert call(monkeypatch, home / "all.parquet") == 0
    assert "2 rows came back (2 of users)" in capsys.readouterr().out


def test_what_is_no_quarantine_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, home / "nowhere") == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{home / 'nowhere'}: no such file; give a quarantine file of a prepare run, or a copy of it"
    ]
