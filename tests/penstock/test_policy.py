from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from penstock.policy import Config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gate.md"


def told() -> dict[str, Any]:
    """The defaults in the page's table of thresholds, by name."""
    found: dict[str, Any] = {}
    for names, cell in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.+?) \|", PAGE.read_text(), flags=re.MULTILINE):
        listed = re.findall(r"`(\w+)`", names)
        values = [cell.strip("`")] if len(listed) == 1 else cell.split(", ")
        found |= dict(zip(listed, values, strict=True))
    return found


def test_the_page_tells_the_defaults() -> None:
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    said = {name: value if isinstance(defaults[name], str) else json.loads(value) for name, value in told().items()}
    assert said == defaults


def test_the_defaults_have_no_fault() -> None:
    assert Config().faults() == []
