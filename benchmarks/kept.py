"""Figures that take long are measured once, and again when the code they depend on has changed."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

FORMER = "former"
"""Among figures: they are of other code than there is now."""

FIGURES = ROOT / "benchmarks" / "figures"
"""Where those of hours are kept, under version control: a table can be made again, and a run goes on elsewhere."""


def once(
    folder: Path,
    name: str,
    spec: Mapping[str, Any],
    modules: Iterable[str],
    measure: Callable[[], dict[str, Any]],
    again: bool = True,
) -> dict[str, Any]:
    """What `measure` gives, from `folder` if it is there of the same spec and the same code; those of other code go.

    Args:
        name: how the file's name begins.
        spec: all that the figures depend on besides the code.
        modules: those whose code they depend on, with all that these import of the library.
        again: measure what is there of other code. If not it is taken, and `FORMER` is among the figures.
    """
    digest = code(sources(modules))
    kept = folder / f"{name}-{hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]}.json"
    if kept.exists():
        there = json.loads(kept.read_text())
        if there["code"] == digest:
            return dict(there["figures"])
        if not again:
            return {**there["figures"], FORMER: True}
    found = measure()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"code": digest, "figures": found}))
    unfinished.replace(kept)
    return found


def say_former(runs: Iterable[Mapping[str, Any]]) -> None:
    """A line if figures are of other code than there is now."""
    told = [FORMER in run for run in runs]
    if any(told):
        print(f"\n{sum(told)} of {len(told)} runs were measured before the code changed; AGAIN=1 measures them again")


def sources(modules: Iterable[str]) -> list[Path]:
    """The files of modules, and of what these import of the library, by their names."""
    left = list(modules)
    found: dict[str, Path] = {}
    while left:
        module = left.pop()
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in found or not path.exists():  # a name that is imported may be no module
            continue
        found[module] = path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                left += [name.name for name in node.names if name.name.startswith("penstock")]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("penstock"):
                left += [node.module or "", *(f"{node.module}.{name.name}" for name in node.names)]
    return [found[module] for module in sorted(found)]


def code(files: Iterable[Path]) -> str:
    """A digest of Python files as they run: comments and layout are not in it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(ast.dump(ast.parse(file.read_text())).encode())
    return digest.hexdigest()


def window(examples: Path) -> str:
    """A digest of the days that examples are of."""
    return hashlib.sha256((examples / "window.json").read_bytes()).hexdigest()
