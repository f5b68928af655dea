"""Figures that take long are measured once, and again when the code they depend on has changed."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
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
        modules: those whose code they depend on, with what `parts` finds that these import of the library.
        again: measure what is there of other code. If not it is taken, and `FORMER` is among the figures.
    """
    digest = code(parts(modules).values())
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


def parts(modules: Iterable[str]) -> dict[tuple[str, int], ast.stmt]:
    """The statements that modules run: all of theirs, and of what they import of the library what is asked for by name.

    A function is run with what it names of its own module, and with what that imports. Keys are the module and the
    statement's place in it.
    """
    left: list[tuple[str, str | None]] = [(module, None) for module in modules]
    seen: set[tuple[str, str | None]] = set()
    found: dict[tuple[str, int], ast.stmt] = {}
    while left:
        module, name = left.pop()
        if (module, name) in seen or not _path(module).exists():  # what is not of the library is not looked at
            continue
        seen.add((module, name))
        for place, statement in enumerate(statements(_path(module))):
            binds = _names(statement)
            if (module, place) in found or not (name is None or name in binds or not binds):
                continue
            found[module, place] = statement
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    left.append((module, node.id))
                elif isinstance(node, ast.Import):
                    left += [(alias.name, None) for alias in node.names if alias.name.startswith("penstock")]
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("penstock"):
                    left += [_imported(str(node.module), alias.name) for alias in node.names]
    return {key: found[key] for key in sorted(found)}


def _path(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imported(module: str, name: str) -> tuple[str, str | None]:
    """What `from module import name` asks for: a whole module, or a name of one."""
    whole = f"{module}.{name}"
    return (whole, None) if _path(whole).exists() else (module, name)


def _names(statement: ast.stmt) -> set[str]:
    """What a statement of a module binds; none, and it runs whatever is asked for."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        stored = (
            node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        )
        return {node.id for node in stored}
    return set()


@cache
def statements(path: Path) -> list[ast.stmt]:
    """Those of a Python file that run: docstrings are not among them."""
    module = _Bare().visit(ast.parse(path.read_text()))
    return list(module.body)


class _Bare(ast.NodeTransformer):
    """Leaves out statements that are a string alone."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def code(statements: Iterable[ast.stmt]) -> str:
    """A digest of statements as they run: comments and layout are not in it."""
    return hashlib.sha256(ast.dump(ast.Module(list(statements), type_ignores=[])).encode()).hexdigest()


def window(examples: Path) -> str:
    """A digest of the days that examples are of."""
    return hashlib.sha256((examples / "window.json").read_bytes()).hexdigest()
