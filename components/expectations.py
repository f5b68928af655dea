"""Great Expectations for the log, generated from `penstock.events`, and the split of its rows into good and bad.

Dtypes are held by reading (`events.conform`): a column that does not fit fails the run. What is held here is each row:
nulls, ranges, uniqueness, the order of times, and that an event's user and item are known.
"""

import html
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from penstock.events import EVENTS, HISTORIES, ITEMS, USERS, LogError, Table, read_events, read_table, write_events

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # nothing leaves the machine
logging.getLogger("great_expectations").setLevel(logging.ERROR)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional packages that are not there
    import great_expectations as gx
    import great_expectations.expectations as gxe
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

REFERENCES = {"user_id": "users", "item_id": "items"}
"""Columns of an event that must be in another table."""


@dataclass(frozen=True)
class Rule:
    """One expectation on the rows of a table; `says` completes "<column> …" in a quarantined row's reason."""

    column: str
    says: str
    expectation: gxe.Expectation


@dataclass(frozen=True)
class Split:
    """What validation made of a log: rows and bad rows by table, and the bad by reason."""

    rows: Mapping[str, int]
    bad: Mapping[str, int]
    reasons: Mapping[str, int]

    @property
    def bad_share(self) -> float:
        """The largest share of bad rows of any table."""
        return max(bad / max(self.rows[name], 1) for name, bad in self.bad.items())


def rules(table: Table) -> list[Rule]:
    """What each row of `table` must be. Lists are held by columns of their own: see `_flat`."""
    found = []
    for column in table.columns:
        low, high = column.minimum, column.maximum
        if not column.nullable:
            found.append(Rule(column.name, "must not be null", gxe.ExpectColumnValuesToNotBeNull(column=column.name)))
        if isinstance(column.dtype, pl.List):
            holes = gxe.ExpectColumnValuesToBeInSet(column=f"{column.name}.nulls", value_set=[0])
            found.append(Rule(column.name, "must not hold nulls", holes))
        if low is not None or high is not None:
            says = f"must be at least {low}" if high is None else f"must be between {low} and {high}"
            parts = [".lowest", ".highest"] if isinstance(column.dtype, pl.List) else [""]
            for part in parts:
                between = gxe.ExpectColumnValuesToBeBetween(column=column.name + part, min_value=low, max_value=high)
                found.append(Rule(column.name, says, between))
        if column.unique:
            found.append(Rule(column.name, "must be unique", gxe.ExpectColumnValuesToBeUnique(column=column.name)))
    order = gxe.ExpectColumnPairValuesAToBeGreaterThanB(
        column_A="created_time", column_B="event_time", or_equal=True, ignore_row_if="either_value_is_missing"
    )
    found.append(Rule("created_time", "must not be before event_time", order))
    if table is EVENTS:
        for name, other in REFERENCES.items():
            known = gxe.ExpectColumnValuesToBeInSet(column=f"{name}.known", value_set=[1])
            found.append(Rule(name, f"must be in {other}", known))
    return found


def _flat(frame: pl.DataFrame, known: Mapping[str, pl.Series]) -> pl.DataFrame:
    """`frame` with columns that say of lists and references what expectations can be held to."""
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    return frame.with_columns(
        *(pl.col(name).list.min().alias(f"{name}.lowest") for name in lists),
        *(pl.col(name).list.max().alias(f"{name}.highest") for name in lists),
        *(
            (pl.col(name).list.len() - pl.col(name).list.drop_nulls().list.len()).alias(f"{name}.nulls")
            for name in lists
        ),
        *(pl.col(name).is_in(ids.implode()).cast(pl.Int8).alias(f"{name}.known") for name, ids in known.items()),
    ).drop(lists)


class _Validator:
    """Great Expectations in memory, with its pages written to `docs`."""

    def __init__(self, docs: Path) -> None:
        self.docs = docs
        docs.mkdir(parents=True, exist_ok=True)
        self._context = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        self._source = self._context.data_sources.add_pandas("log")

    def reasons(self, frame: pl.DataFrame, table: Table, known: Mapping[str, pl.Series]) -> dict[int, list[str]]:
        """Row of `frame` → why it is bad, for those that are."""
        held = rules(table)
        suite = gx.ExpectationSuite(table.name)
        for place, rule in enumerate(held):
            rule.expectation.meta = {"rule": place}
            suite.add_expectation(rule.expectation)
        asset = self._source.add_dataframe_asset(table.name)
        flat = _flat(frame, known)
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": flat.to_pandas()})
        result = batch.validate(
            suite, result_format={"result_format": "COMPLETE", "return_unexpected_index_query": False}
        )
        page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result))
        (self.docs / f"{table.name}.html").write_text(page)
        found: dict[int, list[str]] = {}
        for outcome in result.results:
            rule = held[outcome.expectation_config.meta["rule"]]
            if outcome.exception_info.get("raised_exception"):
                raise RuntimeError(
                    f"{table.name}: {rule.column} {rule.says}: {outcome.exception_info['exception_message']}"
                )
            seen: set[object] = set()
            for row in outcome.result.get("unexpected_index_list") or []:
                if isinstance(rule.expectation, gxe.ExpectColumnValuesToBeUnique):
                    value = frame[rule.column][row]
                    if value not in seen:  # the first of several stays
                        seen.add(value)
                        continue
                found.setdefault(row, []).append(f"{rule.column} {rule.says}")
        return found


def split_log(log: Path, good: Path, quarantine: Path, docs: Path, max_bad_share: float) -> Split:
    """Writes the rows of `log` that keep every rule to `good`, a log again, and the others to `quarantine`.

    Args:
        quarantine: a Parquet file: `table`, `reason` (all that is wrong with the row), and the row's own columns.
        docs: a directory of HTML pages: what was expected of each table and what was found.
        max_bad_share: between 0 and 1, for each table.

    Raises:
        LogError: the log cannot be read, or too many rows of a table are bad.
    """
    validator = _Validator(docs)
    rows: dict[str, int] = {}
    bad: dict[str, pl.DataFrame] = {}
    kept: dict[str, pl.DataFrame] = {}
    for table, frame in _tables(log):
        known = {name: kept[other][name] for name, other in REFERENCES.items()} if table is EVENTS else {}
        reasons = validator.reasons(frame, table, known)
        why = pl.Series("reason", ["; ".join(reasons[row]) for row in sorted(reasons)], pl.String)
        rows[table.name] = frame.height
        bad[table.name] = frame[sorted(reasons)].insert_column(0, why)
        kept[table.name] = frame.with_row_index("row").filter(~pl.col("row").is_in(list(reasons))).drop("row")
    split = Split(
        rows,
        {name: frame.height for name, frame in bad.items()},
        Counter(
            f"{name}.{reason}" for name, frame in bad.items() for line in frame["reason"] for reason in line.split("; ")
        ),
    )
    (docs / "index.html").write_text(_index(split))
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    pl.concat(
        (frame.insert_column(0, pl.lit(name, pl.String).alias("table")) for name, frame in bad.items()), how="diagonal"
    ).write_parquet(quarantine)
    _check(split, max_bad_share)
    for name, frame in kept.items():
        if name == EVENTS.name:
            write_events(frame, good, "validated")
        else:
            good.mkdir(parents=True, exist_ok=True)
            frame.write_parquet(good / f"{name}.parquet")
    return split


def _tables(log: Path) -> Iterator[tuple[Table, pl.DataFrame]]:
    yield USERS, read_table(log / "users.parquet", USERS)
    yield ITEMS, read_table(log / "items.parquet", ITEMS)
    if (log / "histories.parquet").exists():
        yield HISTORIES, read_table(log / "histories.parquet", HISTORIES)
    yield EVENTS, read_events(log)  # last: they refer to the good rows of the others


def _check(split: Split, max_bad_share: float) -> None:
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share must be between 0 and 1, not {max_bad_share}")
    for name, bad in split.bad.items():
        if bad > max_bad_share * split.rows[name]:
            counts = [(count, rule) for rule, count in split.reasons.items() if rule.startswith(f"{name}.")]
            most = "; ".join(f"{rule}: {count:,}" for count, rule in sorted(counts, reverse=True)[:5])
            raise LogError(
                f"{bad:,} of {split.rows[name]:,} {name} ({bad / split.rows[name]:.2%}) break the rules of"
                f" penstock/events.py, more than max_bad_share = {max_bad_share:.2%} ({most});"
                " mend the log, or allow more"
            )
        if bad == split.rows[name] and name == EVENTS.name:
            raise LogError(f"none of the {bad:,} events keeps the rules of penstock/events.py")


def _index(split: Split) -> str:
    """The first page: how many rows of each table, how many bad, and why."""
    tables = "".join(
        f'<tr><td><a href="{name}.html">{name}</a></td><td>{rows:,}</td><td>{split.bad[name]:,}</td></tr>'
        for name, rows in split.rows.items()
    )
    reasons = "".join(
        f"<tr><td>{html.escape(reason)}</td><td>{count:,}</td></tr>"
        for reason, count in sorted(split.reasons.items(), key=lambda item: -item[1])
    )
    return (
        '<!doctype html><meta charset="utf-8"><title>Validation of the log</title>'
        "<style>body{font:15px sans-serif;margin:2rem}td,th{text-align:left;padding:.2rem 1rem .2rem 0}</style>"
        f"<h1>Validation of the log</h1><table><tr><th>table<th>rows<th>quarantined</tr>{tables}</table>"
        f"<h2>Why</h2><table>{reasons or '<tr><td>every row keeps every rule</td></tr>'}</table>\n"
    )
