"""What every benchmark shows and writes: figures of ours beside a peer's, measured in one run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

BUILD = Path(__file__).resolve().parents[1] / "build" / "bench"


@dataclass(frozen=True)
class Comparison:
    """A measure of ours and of a peer; the ratio is ours / peer.

    Attributes:
        at_most: the goal, if there is one: what the ratio may be at most.
        at_least: the same where more is better.
    """

    measure: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.peer if self.peer else float("inf")

    @property
    def goal(self) -> str | None:
        if self.at_most is not None:
            return f"ratio <= {self.at_most:g}"
        return None if self.at_least is None else f"ratio >= {self.at_least:g}"

    @property
    def holds(self) -> bool | None:
        if self.at_most is not None:
            return self.ratio <= self.at_most
        return None if self.at_least is None else self.ratio >= self.at_least


def show(title: str, rows: Sequence[Comparison]) -> None:
    """Prints rows for people."""
    table = _table(title)
    for name in ("measure", "ours", "peer", "of", "unit", "ratio", "goal", ""):
        table.add_column(name, justify="right" if name in ("ours", "peer", "ratio") else "left")
    for row in rows:
        verdict = {True: "[green]holds", False: "[bold red]FAILS", None: ""}[row.holds]
        figures = (_figure(row.ours), _figure(row.peer), row.peer_name, row.unit, _figure(row.ratio))
        table.add_row(row.measure, *figures, row.goal or "", verdict)
    _console().print(table)


def show_columns(title: str, columns: dict[str, Sequence[str | float]]) -> None:
    """Prints another table: columns by name."""
    table = _table(title)
    for name, values in columns.items():
        table.add_column(name, justify="left" if isinstance(values[0], str) else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(value if isinstance(value, str) else _figure(value) for value in row))
    _console().print(table)


def write(name: str, rows: Sequence[Comparison]) -> Path:
    """Writes rows as build/bench/NAME.json."""
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / f"{name}.json"
    listed = [
        {
            "measure": row.measure,
            "ours": row.ours,
            "peer": row.peer,
            "peer_name": row.peer_name,
            "unit": row.unit,
            "ratio": row.ratio,
            "goal": row.goal,
            "holds": row.holds,
        }
        for row in rows
    ]
    path.write_text(json.dumps(listed, indent=1) + "\n")
    return path


def machine() -> str:
    """What the figures are of."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GB; Python {platform.python_version()};"
        f" load before: {load:.1f}"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _figure(value: float) -> str:
    """Four digits, or all of a larger whole number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
