"""Great Expectations over a log: its rows split into good and bad, its tables and days held to their rules."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from components.data_docs import write_docs
from components.quiet_gx import gx
from components.rules import Rule, as_pandas, derived, held
from components.tracking import DATA_DOCS, TrackingError, log_run, run_url
from penstock import days, quarantine
from penstock.events import (
    EVENTS,
    HISTORIES,
    TABLES,
    LogError,
    Table,
    read_events,
    read_table,
    write_events,
)
from penstock.feedback import copy_reach

MOST_TOLD = 5
"""So many days or reasons are named in a sentence; the Data Docs have them all."""


@dataclass(frozen=True)
class Validation:
    """What was found in a log.

    Args:
        rows: by table, as read.
        bad: rows put aside, by table.
        broken: rows that break a rule, by its name; without those that none breaks.
        days: what `penstock.days.by_day` makes of the good events.
        failures: why the run fails, a sentence each; none if it does not.
    """

    rows: Mapping[str, int]
    bad: Mapping[str, int]
    broken: Mapping[str, int]
    days: pl.DataFrame
    failures: tuple[str, ...]

    @property
    def bad_share(self) -> float:
        """The largest share of bad rows of any table."""
        return max(bad / max(self.rows[name], 1) for name, bad in self.bad.items())

    def most_broken(self, table: str) -> list[tuple[str, int]]:
        """The rules of a table that its rows break, with the number of rows, most often first."""
        return _most_broken(self.broken, table)


class Validator:
    """Runs the rules on the tables of one log; `results` are Great Expectations' own, by name of the suite."""

    def __init__(self, rules: Mapping[str, Sequence[Rule]]) -> None:
        self.rules = rules
        self.results: dict[str, Any] = {}
        self.broken: Counter[str] = Counter()
        self._context = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        self._source = self._context.data_sources.add_pandas("log")

    def split(
        self, table: Table, frame: pl.DataFrame, others: Mapping[str, pl.DataFrame]
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The rows that keep every rule, and the others with `reason`, `rules` and `original`.

        Args:
            others: the good rows of the tables that `table` refers to, by name.
        """
        began = time.monotonic()
        rows = as_pandas(derived(frame, table, others))
        rules = self.rules[table.name]
        self._run(f"{table.name}, the table", [rule for rule in rules if not rule.on_rows], rows[list(table.schema)])
        reasons: dict[int, dict[str, str]] = {}
        on_rows = self._run(f"{table.name}, its rows", [rule for rule in rules if rule.on_rows], rows)
        # which of several rows with one key stays depends on what else is wrong with them
        for rule, bad in sorted(on_rows, key=lambda broken: broken[0].name.endswith(".unique")):
            if rule.name.endswith(".unique"):
                bad = _all_but_one(frame[rule.column], bad, reasons)
            if bad:
                self.broken[rule.name] = len(bad)
            for row in bad:
                reasons.setdefault(row, {})[rule.name] = f"{rule.column} {rule.says}"
        took = time.monotonic() - began
        print(f"{table.name}: {frame.height:,} rows, {len(reasons):,} of them bad, {took:.1f} s", flush=True)
        places = sorted(reasons)
        bad_rows = frame[places].with_columns(
            pl.Series("reason", ["; ".join(reasons[row].values()) for row in places], pl.String),
            pl.Series("rules", [list(reasons[row]) for row in places], pl.List(pl.String)),
            quarantine.text(frame[places]),
        )
        return frame.with_row_index("row").filter(~pl.col("row").is_in(places)).drop("row"), bad_rows

    def check(self, name: str, frame: pl.DataFrame) -> list[tuple[Rule, list[int]]]:
        """The rules of `tables` or `days` that `frame` breaks, and its rows that do."""
        found = [(rule, rows) for rule, rows in self._run(name, self.rules[name], as_pandas(frame)) if rows]
        self.broken.update({rule.name: len(rows) for rule, rows in found})
        return found

    def _run(self, name: str, rules: Sequence[Rule], frame: Any) -> list[tuple[Rule, list[int]]]:
        """For each rule the rows of `frame` that break it.

        Raises:
            LogError: a rule on the whole of a table is broken.
        """
        suite = gx.ExpectationSuite(name)
        for place, rule in enumerate(rules):
            for expectation in rule.expectations:
                expectation.meta = {"place": place}
                expectation.description = f"{rule.name} ({rule.severity}): {rule.column} {rule.says}"
                expectation.severity = "critical" if rule.severity == "fail" else "warning"
                suite.add_expectation(expectation)
        asset = self._source.add_dataframe_asset(name)
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
        result = batch.validate(
            suite, result_format={"result_format": "COMPLETE", "return_unexpected_index_query": False}
        )
        self.results[name] = result
        found: dict[int, set[int]] = {place: set() for place in range(len(rules))}
        for outcome in result.results:
            place = outcome.expectation_config.meta["place"]
            if outcome.exception_info.get("raised_exception"):
                raise RuntimeError(f"{rules[place].name}: {outcome.exception_info['exception_message']}")
            found[place].update(outcome.result.get("unexpected_index_list") or ())
            if not outcome.success and not found[place]:
                raise LogError(f"{name}: {rules[place].column} {rules[place].says}; see {rules[place].name}")
        return [(rule, sorted(found[place])) for place, rule in enumerate(rules)]


def _all_but_one(values: pl.Series, rows: Sequence[int], worse: Mapping[int, Any]) -> list[int]:
    """Of `rows`, which share their values with others, all but the first of each value that is not among `worse`."""
    stays: dict[Any, int] = {}
    for row in rows:
        value = values[row]
        if value not in stays or (stays[value] in worse and row not in worse):
            stays[value] = row
    return [row for row in rows if stays[values[row]] != row]


def read_log(log: Path) -> dict[str, pl.DataFrame]:
    """The tables of a log by name, those that others refer to first.

    Raises:
        LogError: a table cannot be read.
    """
    return {
        table.name: read_events(log) if table is EVENTS else read_table(log / f"{table.name}.parquet", table)
        for table in TABLES
        if table is not HISTORIES or (log / "histories.parquet").exists()
    }


def split_log(
    tables: Mapping[str, pl.DataFrame], validator: Validator
) -> tuple[dict[str, pl.DataFrame], dict[str, pl.DataFrame]]:
    """The good rows of each table, and the bad ones with `reason`, `rules` and `original`."""
    good: dict[str, pl.DataFrame] = {}
    bad: dict[str, pl.DataFrame] = {}
    for table in TABLES:
        if table.name in tables:
            good[table.name], bad[table.name] = validator.split(table, tables[table.name], good)
    return good, bad


def validate_log(
    log: Path,
    good: Path,
    put_aside: Path,
    docs: Path,
    *,
    max_bad_share: float,
    severity: Mapping[str, str],
    limits: days.Config,
) -> Validation:
    """Writes the rows of `log` that keep every rule to `good`, a log again, and the others to `put_aside`.

    `good` is written only if nothing fails the run; the others always are.

    Args:
        put_aside: a file as `penstock.quarantine` describes it.
        docs: a directory, whose page index.html says what was expected and what was found.
        severity: other severities than the rules have, by name of the rule.

    Raises:
        LogError: the log cannot be read.
        RuleError: `max_bad_share` or `severity` is nothing that can be asked for.
    """
    validator = Validator(held(max_bad_share, severity))
    kept, bad = split_log(read_log(log), validator)
    rows = {name: kept[name].height + bad[name].height for name in kept}
    counts = {name: frame.height for name, frame in bad.items()}
    by_day = days.by_day(kept[EVENTS.name], limits)
    failures = [
        *_rows_that_fail(validator),
        *_tables_that_fail(validator, rows, counts),
        *_days_that_fail(validator, by_day),
    ]
    found = Validation(rows, counts, validator.broken, by_day, tuple(failures))

    put_aside.parent.mkdir(parents=True, exist_ok=True)
    quarantine.in_file(bad).write_parquet(put_aside)
    write_docs(docs / "index.html", str(log), found, validator.rules, validator.results)
    if not failures:
        write_events(kept[EVENTS.name], good, "validated")
        for name, frame in kept.items():
            if name != EVENTS.name:
                frame.write_parquet(good / f"{name}.parquet")
        copy_reach(log, good)
    return found


def _most_broken(broken: Mapping[str, int], table: str) -> list[tuple[str, int]]:
    return Counter({rule: count for rule, count in broken.items() if rule.startswith(f"{table}.")}).most_common()


def _rows_that_fail(validator: Validator) -> list[str]:
    return [
        f"{validator.broken[rule.name]:,} {name} break {rule.name}, which is to fail: {rule.column} {rule.says}"
        for name, rules in validator.rules.items()
        for rule in rules
        if rule.on_rows and rule.severity == "fail" and rule.name in validator.broken
    ]


def _tables_that_fail(validator: Validator, rows: Mapping[str, int], bad: Mapping[str, int]) -> list[str]:
    summary = pl.DataFrame(
        [
            # a log may do without histories
            (name, None if name == HISTORIES.name else rows[name] - bad[name], bad[name] / max(rows[name], 1))
            for name in rows
        ],
        schema={"table": pl.String, "kept": pl.Int64, "bad_share": pl.Float64},
        orient="row",
    )
    sentences = []
    for rule, places in validator.check("tables", summary):
        for name in summary["table"].gather(places):
            most = ", ".join(f"{rule}: {count:,}" for rule, count in _most_broken(validator.broken, name)[:MOST_TOLD])
            if rule.column == "bad_share":
                share = f"{bad[name]:,} of {rows[name]:,} {name} ({bad[name] / rows[name]:.2%}) break a rule"
                sentences.append(f"{share}; the share {rule.says}, max_bad_share ({most})")
            elif rows[name]:
                sentences.append(f"none of the {rows[name]:,} {name} keeps the rules ({most})")
            else:
                sentences.append(f"the log has no {name}")
    return sentences


def _days_that_fail(validator: Validator, by_day: pl.DataFrame) -> list[str]:
    sentences = []
    for rule, places in validator.check("days", by_day):
        form = ",.0f" if rule.column == "rows" else ".2%"
        what = "rows" if rule.column == "rows" else f"of the label {rule.column}"
        told = [
            f"{day['day']} has {day[rule.column]:{form}} {what} where"
            f" {day[f'{rule.column}.lowest']:{form}} to {day[f'{rule.column}.highest']:{form}} are expected"
            for day in by_day[places[:MOST_TOLD]].to_dicts()
        ]
        more = f" and {len(places) - MOST_TOLD} days more" if len(places) > MOST_TOLD else ""
        sentences.append(f"{rule.name}: {'; '.join(told)}{more}")
    return sentences


def record(
    found: Validation, put_aside: Path, docs: Path, tracking_uri: str, run_name: str, params: Mapping[str, Any]
) -> str:
    """Keeps a validation in MLflow, with Data Docs and quarantine, and returns the id of its run.

    Raises:
        LogError: the validation failed; the message says why, and where the Data Docs are.
        TrackingError: MLflow is away or refuses.
    """
    metrics = {"rows": sum(found.rows.values()), "quarantined": sum(found.bad.values()), "bad_share": found.bad_share}
    metrics |= {f"rows/{name}": count for name, count in found.rows.items()}
    metrics |= {f"quarantined/{name}": count for name, count in found.bad.items()}
    metrics |= {f"broken/{name}": count for name, count in found.broken.items()}
    why = "; ".join(found.failures)
    tags = {"kind": "validation", "mlflow.note.content": why or "The log keeps the rules."}
    with tempfile.TemporaryDirectory() as folder:
        # named so that MLflow's page and a person know what they are
        shutil.copyfile(docs / "index.html", Path(folder) / DATA_DOCS)
        shutil.copyfile(put_aside, Path(folder) / "quarantine.parquet")
        files = sorted(Path(folder).iterdir())
        try:
            run_id = log_run(tracking_uri, run_name, params, metrics, files, tags=tags, failed=bool(why))
        except TrackingError as error:
            if why:
                raise LogError(f"{why}; the Data Docs are not in MLflow: {error}") from error
            raise
    if why:
        page = run_url(tracking_uri, run_id)
        raise LogError(why + (f"; Data Docs: {page}/artifacts/{DATA_DOCS}" if page else ""))
    return run_id
