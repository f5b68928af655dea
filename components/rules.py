"""What is held of a log, as Great Expectations: the rules of each table, generated from `penstock.events`.

A rule has a name, `table.column.kind`, and a severity. One on rows either puts the rows that break it into quarantine
or fails the run; one on a table fails the run.

    kind                     on     holds of each value, or of the table
    null, range, unique      rows   what the column says of itself
    element                  rows   no nulls in a list
    known                    rows   it is in the table that the column refers to
    order                    rows   it is not before, or not after, another time of the row
    request                  rows   it is the same in all rows of a request, or another in each
    watched                  rows   a long view has a watch time
    loops                    rows   a watch time is at most `MAX_LOOPS` durations of its item; 0 = unknown is let pass
    upload                   rows   an event is not before its item's upload, but for `UPLOAD_SLACK`
    columns, type            table  the table has just its columns, each of its type
    tables.*                 table  rows are left of each table, and not too many of them are bad
    days.*                   table  each day's rows and label rates against the days before: `penstock.days`

That likes and other outcomes have an impression needs no rule here: an event is an impression. That it is the
impression of something is `known`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import pandas as pd
import polars as pl
import pyarrow as pa

from components.quiet_gx import gxe
from penstock.events import EVENTS, LABELS, MAX_LOOPS, TABLES, UPLOAD_SLACK, Column, Table

Severity = Literal["quarantine", "fail"]

_TYPES = {pl.Int64: "int64", pl.Int8: "int8", pl.String: "str", pl.Datetime: "Timestamp", pl.List: "list"}
"""What Great Expectations calls the types that `as_pandas` gives the columns."""


class RuleError(ValueError):
    """A severity for a rule there is not, or one it cannot have; the message lists what there is."""


@dataclass(frozen=True)
class Rule:
    """What must hold of a table or of each row of it. `says` completes "<column> …" in the reason of a bad row."""

    name: str
    column: str
    says: str
    expectations: tuple[gxe.Expectation, ...]
    severity: Severity = "quarantine"
    on_rows: bool = True


def held(max_bad_share: float, severity: Mapping[str, str]) -> dict[str, list[Rule]]:
    """All rules, by table; `tables` and `days` are made of the log as the module says.

    Args:
        max_bad_share: of the rows of any table, between 0 and 1.
        severity: other severities than those the rules have, by name of the rule.

    Raises:
        RuleError: a number out of range, a rule that is not there, or a severity that it cannot have.
    """
    if not 0 <= max_bad_share <= 1:
        raise RuleError(f"max_bad_share must be between 0 and 1, not {max_bad_share}")
    found = {table.name: _rules(table) for table in TABLES}
    share = _between("bad_share", high=max_bad_share)
    found["tables"] = [
        _on_table("tables.rows", "kept", "must be at least 1", _between("kept", low=1)),
        _on_table("tables.bad_share", "bad_share", f"must be at most {max_bad_share:.2%}", share),
    ]
    found["days"] = [
        _on_table(
            f"days.{name}",
            name,
            "must be in the band that the days before it set",
            _not_less(name, f"{name}.lowest"),
            _not_less(f"{name}.highest", name),
        )
        for name in ("rows", *LABELS)
    ]
    for name, value in severity.items():
        of = name.partition(".")[0]
        rule = next((rule for rule in found.get(of, ()) if rule.name == name), None)
        if rule is None:
            known = ", ".join(rule.name for rule in found[of]) if of in found else " , ".join(f"{of}.…" for of in found)
            raise RuleError(f"there is no rule {name!r}; there are {known}")
        if value not in get_args(Severity):
            raise RuleError(f"the severity of {name} is one of {', '.join(get_args(Severity))}, not {value!r}")
        if value == "quarantine" and not rule.on_rows:
            raise RuleError(f"{name} is a rule on a table, which has no rows to put aside: it can only fail")
        changed = replace(rule, severity=cast(Severity, value))
        found[of] = [changed if rule.name == name else rule for rule in found[of]]
    return found


def _on_table(name: str, column: str, says: str, *expectations: gxe.Expectation) -> Rule:
    return Rule(name, column, says, expectations, "fail", on_rows=False)


def _between(column: str, low: float | None = None, high: float | None = None) -> gxe.Expectation:
    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=low, max_value=high)


def _not_less(larger: str, smaller: str) -> gxe.Expectation:
    return gxe.ExpectColumnPairValuesAToBeGreaterThanB(
        column_A=larger, column_B=smaller, or_equal=True, ignore_row_if="either_value_is_missing"
    )


def _rules(table: Table) -> list[Rule]:
    """The rules of a table of the log, on its columns and on those that `derived` adds."""
    columns = gxe.ExpectTableColumnsToMatchSet(column_set=list(table.schema), exact_match=True)
    found = [_on_table(f"{table.name}.columns", "the table", "must have the columns of penstock/events.py", columns)]
    for column in table.columns:
        found += _column_rules(table, column)
    if table is EVENTS:
        hours = UPLOAD_SLACK.total_seconds() / 3600
        found += [
            Rule(
                "events.long_view.watched",
                "long_view",
                "needs a watch_time_ms above 0",
                (_between("long_view.watch_time_ms", low=1),),
            ),
            Rule(
                "events.watch_time_ms.loops",
                "watch_time_ms",
                f"must be at most {MAX_LOOPS} times the item's duration_ms",
                (_between("watch_time_ms.durations", high=MAX_LOOPS),),
            ),
            Rule(
                "events.event_time.upload",
                "event_time",
                f"must not be more than {hours:g} hours before the item's upload",
                (_between("event_time.hours_before_upload", high=hours),),
            ),
        ]
    return found


def _column_rules(table: Table, column: Column) -> list[Rule]:
    name, low, high = column.name, column.minimum, column.maximum
    is_list = isinstance(column.dtype, pl.List)
    of_type = gxe.ExpectColumnValuesToBeOfType(column=name, type_=_TYPES[column.dtype.base_type()])
    found = [_on_table(f"{table.name}.{name}.type", name, f"must be {column.dtype}", of_type)]

    def add(kind: str, says: str, *expectations: gxe.Expectation) -> None:
        found.append(Rule(f"{table.name}.{name}.{kind}", name, says, expectations))

    def one(what: str) -> gxe.Expectation:
        return gxe.ExpectColumnValuesToBeInSet(column=f"{name}.{what}", value_set=[1])

    if not column.nullable:
        add("null", "must not be null", gxe.ExpectColumnValuesToNotBeNull(column=name))
    if is_list:
        add("element", "must not hold nulls", one("whole"))
    if low is not None or high is not None:
        says = f"must be at least {low}" if high is None else f"must be between {low} and {high}"
        parts = [f"{name}.lowest"] * (low is not None) + [f"{name}.highest"] * (high is not None) if is_list else [name]
        add("range", says, *(_between(part, low, high) for part in parts))
    if column.unique:
        add("unique", "must be unique", gxe.ExpectColumnValuesToBeUnique(column=name))
    if column.references:
        add("known", f"must be in {column.references}", one("known"))
    if column.not_before:
        add("order", f"must not be before {column.not_before}", _not_less(name, column.not_before))
    if column.not_after:
        add("order", f"must not be after {column.not_after}", _not_less(column.not_after, name))
    if column.constant_in:
        add("request", f"must be the same in all rows of a {column.constant_in}", one("values"))
    if column.distinct_in:
        add("request", f"must be another in each row of a {column.distinct_in}", one("rows"))
    return found


def derived(frame: pl.DataFrame, table: Table, others: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """`frame` with the columns that rules are held of and that say of a row what stands elsewhere.

    Args:
        others: the good rows of the tables that `table` refers to, by name.
    """
    extra: list[pl.Expr] = []
    for column in table.columns:
        values = pl.col(column.name)
        if isinstance(column.dtype, pl.List):
            extra += [
                values.list.min().alias(f"{column.name}.lowest"),
                values.list.max().alias(f"{column.name}.highest"),
                (values.list.len() == values.list.drop_nulls().list.len()).cast(pl.Int8).alias(f"{column.name}.whole"),
            ]
        if column.references:
            ids = others[column.references][column.name]
            extra.append(values.is_in(ids.implode()).cast(pl.Int8).alias(f"{column.name}.known"))
        if key := column.constant_in:
            several = 1 + (values.min().over(key) != values.max().over(key)).cast(pl.Int64)
            extra.append(pl.when(pl.col(key).is_not_null()).then(several).alias(f"{column.name}.values"))
        if key := column.distinct_in:
            # a row that is there twice is the business of `unique`
            rows = pl.col(table.key).is_first_distinct().sum().over(key, column.name).cast(pl.Int64)
            both = pl.col(key).is_not_null() & values.is_not_null()
            extra.append(pl.when(both).then(rows).alias(f"{column.name}.rows"))
    if table is not EVENTS:
        return frame.with_columns(extra)
    items = others["items"].select("item_id", upload="event_time", duration="duration_ms")
    before = (pl.col("upload") - pl.col("event_time")).dt.total_milliseconds() / 3_600_000
    return (
        frame.join(items, on="item_id", how="left", maintain_order="left")
        .with_columns(
            *extra,
            pl.when(pl.col("long_view") == 1).then("watch_time_ms").alias("long_view.watch_time_ms"),
            pl.when(pl.col("duration") > 0)
            .then(pl.col("watch_time_ms") / pl.col("duration"))
            .alias("watch_time_ms.durations"),
            before.alias("event_time.hours_before_upload"),
        )
        .drop("upload", "duration")
    )


def as_pandas(frame: pl.DataFrame) -> pd.DataFrame:
    """`frame` with whole numbers and lists as such, whether or not one is missing."""
    rows = frame.to_arrow()
    types = {field.type: pd.ArrowDtype(field.type) for field in rows.schema if pa.types.is_large_list(field.type)}
    types |= {pa.int64(): pd.Int64Dtype(), pa.int8(): pd.Int8Dtype()}
    return rows.to_pandas(types_mapper=types.get)
