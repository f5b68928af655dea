"""KuaiRand-Pure in its official layout (Gao et al., CIKM 2022, doi:10.1145/3511808.3557624) as a log.

Read are all `log_standard_*.csv` (the random-exposure log is not), `user_features_pure.csv`,
`video_features_basic_pure.csv` and, if it lies beside them, `user_history_to_4_24.parquet`. The official
`video_features_statistic_pure.csv` is not read: its counts span the days one would test on.

    event_time   = time_ms, ms since the UTC epoch
    created_time = max(event_time, start of the hour `date` + `hourmin`, UTC+8): the hour in which the row was logged
    scenario     = tab;   device = 0;   position = null;   session = null;   request = all rows of a user at one time_ms
    traits       = (feature + 1) · 10,000 + value, one token a feature that is known
    category     = the first tag
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from penstock.events import EVENTS, HISTORIES, ITEMS, TIME, USERS, LogError, conform, write_events

_UTC_OFFSET_MS = 8 * 60 * 60 * 1000
_TOKENS_PER_FEATURE = 10_000

_LOG_COLUMNS = (
    "user_id",
    "video_id",
    "date",
    "hourmin",
    "time_ms",
    "is_click",
    "is_like",
    "long_view",
    "play_time_ms",
    "is_profile_enter",
    "tab",
)
_ONEHOT = tuple(f"onehot_feat{number}" for number in range(18))
# in order, so that a token's value grows with what it stands for
_RANGES = {
    "follow_user_num_range": ("0", "(0,10]", "(10,50]", "(50,100]", "(100,150]", "(150,250]", "(250,500]", "500+"),
    "fans_user_num_range": (
        *("0", "[1,10)", "[10,100)", "[100,1k)", "[1k,5k)"),
        *("[5k,1w)", "[1w,10w)", "[10w,100w)", "[100w,1000w)"),
    ),
    "friend_user_num_range": ("0", "[1,5)", "[5,30)", "[30,60)", "[60,120)", "[120,250)", "250+"),
    "register_days_range": ("8-14", "15-30", "31-60", "61-90", "91-180", "181-365", "366-730", "730+"),
}
_ACTIVITY = (
    *("UNKNOWN", "day_new", "2_14_day_new", "single_low_active", "low_active"),
    *("30day_retention", "middle_active", "high_active", "full_active"),
)
_USER_COLUMNS = {
    "user_id": pl.Int64,
    "user_active_degree": pl.String,
    "is_live_streamer": pl.Int64,
    "is_video_author": pl.Int64,
    "follow_user_num": pl.Int64,
    "fans_user_num": pl.Int64,
    "friend_user_num": pl.Int64,
    "register_days": pl.Int64,
    **dict.fromkeys(_RANGES, pl.String),
    **dict.fromkeys(_ONEHOT, pl.Float64),
}
_UPLOAD_TYPES = (
    *("UNKNOWN", "LongImport", "Web", "ShortImport", "Kmovie", "LongPicture", "PictureSet", "LongCamera"),
    *("ShortCamera", "ShareFromOtherApp", "FollowShoot", "AiCutVideo", "LipsSync", "PhotoCopy"),
)
_VIDEO_COLUMNS = {
    "video_id": pl.Int64,
    "author_id": pl.Int64,
    "upload_dt": pl.String,
    "upload_type": pl.String,
    "video_duration": pl.Float64,
    "music_id": pl.Int64,
    "tag": pl.String,
}


@dataclass(frozen=True)
class Config:
    """`path`: the unpacked `KuaiRand-Pure`, or the `data` folder in it."""

    path: str


def write_log(config: Config, log: Path) -> None:
    """Writes KuaiRand-Pure to the directory `log` in the layout of `penstock.events`.

    Exact duplicate rows are dropped. Histories are written only if they end before the logs begin: otherwise the
    logs hold those views themselves.

    Raises:
        LogError: a file or column is missing, a file is cut short, or a value is not of its column's type.
    """
    started = time.monotonic()
    folder = _folder(Path(config.path))
    events, first_hour_ms = _events(folder)
    write_events(events, log, "kuairand")
    known_from = events["event_time"].min()
    users = _users(folder / "user_features_pure.csv", pl.lit(known_from).dt.truncate("1d").cast(TIME))
    users.write_parquet(log / "users.parquet")
    items = _items(folder / "video_features_basic_pure.csv")
    items.write_parquet(log / "items.parquet")
    histories = _histories(folder / "user_history_to_4_24.parquet", first_hour_ms)
    if histories is not None:
        histories.write_parquet(log / "histories.parquet")
    print(
        f"KuaiRand-Pure: {events.height:,} impressions, {users.height:,} users, {items.height:,} items, "
        f"{0 if histories is None else histories.height:,} histories in {time.monotonic() - started:.1f} s",
        flush=True,
    )


def _folder(path: Path) -> Path:
    """Where the CSV files are: `path` or `path`/data."""
    if not path.is_dir():
        raise LogError(f"{path}: no such directory; give the unpacked KuaiRand-Pure folder, or the data folder in it")
    for folder in (path / "data", path):
        if any(folder.glob("log_standard_*.csv")):
            return folder
    raise LogError(f"{path}: no log_standard_*.csv in it or in its data/; is it the unpacked KuaiRand-Pure folder?")


def _csv(path: Path, types: dict[str, type[pl.DataType]], *, optional: tuple[str, ...] = ()) -> pl.DataFrame:
    """A whole CSV file, in which every column of `types` is there, typed and, unless `optional`, without gaps."""
    if not path.is_file():
        raise LogError(f"{path}: no such file; it is part of the KuaiRand-Pure download")
    with path.open("rb") as file:
        header = file.readline().decode("utf-8", "replace").strip().split(",")
        file.seek(max(0, path.stat().st_size - 1))
        complete = file.read() == b"\n"
    missing = [name for name in types if name not in header]
    if missing:
        raise LogError(
            f"{path}: column {', '.join(missing)} is missing from the first line; expected is the official file"
        )
    # checked before parsing: a number cut in half is still a number
    if not complete:
        raise LogError(f"{path}: cut short, its last line has no end; download or copy it again")
    try:
        frame = pl.read_csv(path, schema_overrides=types)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise LogError(f"{path}: not readable as the official CSV: {str(error).splitlines()[0]}") from error
    for name in types:
        if name not in optional and frame[name].null_count():
            line = frame[name].is_null().arg_max()
            raise LogError(f"{path}: line {(line or 0) + 2} has no {name}; download or copy the file again")
    return frame


def _events(folder: Path) -> tuple[pl.DataFrame, int]:
    """The events of all logs, and when the first hour of logging began (ms)."""
    paths = sorted(folder.glob("log_standard_*.csv"))
    frames = [_csv(path, dict.fromkeys(_LOG_COLUMNS, pl.Int64)) for path in paths]
    hours = []
    for path, frame in zip(paths, frames, strict=True):
        date = frame["date"].cast(pl.String).str.to_date("%Y%m%d", strict=False)
        if date.null_count():
            line = date.is_null().arg_max() or 0
            raise LogError(
                f"{path}: line {line + 2} has date {frame['date'][line]}, not YYYYMMDD; is it the official file?"
            )
        minutes = frame["hourmin"] // 100 * 60 + frame["hourmin"] % 100
        hours.append(date.cast(pl.Datetime("ms")).dt.epoch("ms") + minutes * 60_000 - _UTC_OFFSET_MS)
    logged = (
        pl.concat(
            [frame.with_columns(hour.alias("hour_ms")) for frame, hour in zip(frames, hours, strict=True)],
            how="diagonal_relaxed",
        )
        .unique()
        .sort(
            "time_ms", "user_id", "video_id", "hour_ms", pl.all().exclude("time_ms", "user_id", "video_id", "hour_ms")
        )
    )
    if logged.is_empty():
        raise LogError(f"{paths[0]}: no rows; download or copy the file again")
    first_hour_ms = logged["hour_ms"].min()
    assert isinstance(first_hour_ms, int)
    events = logged.select(
        pl.int_range(pl.len()).alias("event_id"),
        (pl.struct("time_ms", "user_id").rank("dense") - 1).cast(pl.Int64).alias("request_id"),
        "user_id",
        pl.col("video_id").alias("item_id"),
        _time(pl.col("time_ms")).alias("event_time"),
        _time(pl.max_horizontal("time_ms", "hour_ms")).alias("created_time"),
        pl.lit(None, TIME).alias("outcome_time"),
        pl.lit(None, pl.Int64).alias("session_id"),
        pl.col("tab").alias("scenario"),
        pl.lit(0, pl.Int64).alias("device"),
        pl.lit(None, pl.Int64).alias("position"),
        pl.col("is_click").alias("click"),
        "long_view",
        pl.col("is_like").alias("like"),
        pl.col("is_profile_enter").alias("profile_enter"),
        pl.col("play_time_ms").alias("watch_time_ms"),
        pl.lit(None, pl.Int64).alias("release"),
        pl.lit(None, pl.String).alias("variant"),
        pl.lit(None, TIME).alias("features_time"),
    )
    return conform(events, EVENTS, str(folder)), first_hour_ms


def _users(path: Path, known_from: pl.Expr) -> pl.DataFrame:
    """The users; negative numbers (-124) stand for unknown."""
    frame = _csv(path, _USER_COLUMNS, optional=(*_ONEHOT, *_RANGES, "user_active_degree"))
    values = [
        *(pl.col(name).cast(pl.Int64) for name in _ONEHOT),
        *(_code(name, known) for name, known in _RANGES.items()),
        pl.col("is_live_streamer"),
    ]
    tokens = [
        pl.when(value.is_between(0, _TOKENS_PER_FEATURE - 1)).then(value + feature * _TOKENS_PER_FEATURE)
        for feature, value in enumerate(values, 1)
    ]
    users = frame.select(
        "user_id",
        known_from.alias("event_time"),
        known_from.alias("created_time"),
        _code("user_active_degree", _ACTIVITY).fill_null(0).alias("activity_level"),
        _known("register_days"),
        _known("follow_user_num").alias("follow_count"),
        _known("fans_user_num").alias("fans_count"),
        _known("friend_user_num").alias("friend_count"),
        _known("is_video_author").alias("is_creator"),
        pl.concat_list(tokens).list.drop_nulls().alias("traits"),
    )
    return conform(users, USERS, str(path))


def _items(path: Path) -> pl.DataFrame:
    """The items; one counts as uploaded when its day of upload (UTC+8) began."""
    frame = _csv(path, _VIDEO_COLUMNS, optional=("video_duration", "music_id", "tag", "upload_type"))
    uploaded = frame["upload_dt"].str.to_datetime("%Y-%m-%d", strict=False, time_unit="ms")
    if uploaded.null_count():
        line = uploaded.is_null().arg_max() or 0
        raise LogError(f"{path}: line {line + 2} has upload_dt {frame['upload_dt'][line]!r}, not YYYY-MM-DD")
    tags = (
        pl.col("tag").str.split(",").list.eval(pl.element().str.strip_chars().cast(pl.Int64, strict=False).drop_nulls())
    )
    upload_time = _time(pl.lit(uploaded.dt.epoch("ms") - _UTC_OFFSET_MS))
    items = frame.with_columns(tags.fill_null(pl.lit([], pl.List(pl.Int64))).alias("tags")).select(
        pl.col("video_id").alias("item_id"),
        upload_time.alias("event_time"),
        upload_time.alias("created_time"),
        "author_id",
        pl.col("tags").list.first().fill_null(0).alias("category"),
        "tags",
        _known("music_id").fill_null(0),
        _code("upload_type", _UPLOAD_TYPES).fill_null(0).alias("item_type"),
        pl.col("video_duration").fill_null(0).cast(pl.Int64).alias("duration_ms"),
        pl.lit("").alias("title"),
    )
    return conform(items, ITEMS, str(path))


def _histories(path: Path, first_hour_ms: int) -> pl.DataFrame | None:
    """What users long-viewed before the logs begin; None if the file is not there or the logs cover it."""
    if not path.is_file():
        return None
    try:
        frame = pl.read_parquet(path, columns=["user_id", "last_time_ms", "long_watch_seq"])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise LogError(f"{path}: not readable, or not our history file: {str(error).splitlines()[0]}") from error
    last_ms = frame["last_time_ms"].max()
    if isinstance(last_ms, int) and last_ms >= first_hour_ms:
        print(f"{path.name}: left out, the logs begin before it ends and hold those views themselves", flush=True)
        return None
    histories = frame.filter(pl.col("long_watch_seq").list.len() > 0).select(
        "user_id",
        _time(pl.col("last_time_ms")).alias("event_time"),
        _time(pl.col("last_time_ms")).alias("created_time"),
        pl.col("long_watch_seq").alias("items"),
    )
    return conform(histories, HISTORIES, str(path))


def _time(milliseconds: pl.Expr) -> pl.Expr:
    return pl.from_epoch(milliseconds, time_unit="ms").dt.replace_time_zone("UTC").cast(TIME)


def _code(name: str, known: tuple[str, ...]) -> pl.Expr:
    """The place of a text in `known`; null if it is not there."""
    return pl.col(name).replace_strict(
        dict(zip(known, range(len(known)), strict=True)), default=None, return_dtype=pl.Int64
    )


def _known(name: str) -> pl.Expr:
    return pl.col(name).clip(lower_bound=0)
