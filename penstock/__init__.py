"""From a feed's event log to a recommender that is live: the library.

The folder is the registry: `foo.py` in `recall/`, `rank/`, `pretraining/` or `datasets/` is found by its name.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def module(kind: str, name: str) -> ModuleType:
    """The module `penstock.<kind>.<name>`, where kind is `recall`, `rank`, `pretraining` or `datasets`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    package = importlib.import_module(f"{__name__}.{kind}")
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}: there are {', '.join(names)}")
    return importlib.import_module(f"{package.__name__}.{name}")


def config(of: ModuleType, overrides: Mapping[str, Any]) -> Any:
    """The `Config` of a model or data set with some fields overridden, as they come from JSON (lists become tuples).

    Raises:
        ValueError: an unknown field, or a value of another type than the field's.
    """
    cls = of.Config
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)} of {of.__name__}: there are {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in overrides.items():
        value = tuple(value) if isinstance(value, list) else value
        kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
        if kinds == (Path,) and isinstance(value, str):
            value = Path(value)
        if kinds == (float,) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if all(isinstance(kind, type) for kind in kinds) and (
            not isinstance(value, kinds) or isinstance(value, bool) is not (bool in kinds)
        ):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"parameter {name} of {of.__name__} is a {expected}, not {value!r}")
        values[name] = value
    return cls(**values)
