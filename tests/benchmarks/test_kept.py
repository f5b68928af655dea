from __future__ import annotations

import pytest

from benchmarks import kept
from benchmarks.kept import FORMER, code, once, parts, say_former, statements


def test_what_was_measured_is_not_measured_again(tmp_path):
    calls: list[int] = []

    def measure() -> dict[str, int]:
        calls.append(1)
        return {"figure": len(calls)}

    modules = ["penstock.layers.quantile"]
    assert once(tmp_path, "a", {"seed": 1}, modules, measure) == {"figure": 1}
    assert once(tmp_path, "a", {"seed": 1}, modules, measure) == {"figure": 1}
    assert once(tmp_path, "a", {"seed": 2}, modules, measure) == {"figure": 2}
    other = ["penstock.layers.experts"]
    assert once(tmp_path, "a", {"seed": 1}, other, measure, again=False) == {"figure": 1, FORMER: True}
    assert once(tmp_path, "a", {"seed": 1}, other, measure) == {"figure": 3}
    assert once(tmp_path, "a", {"seed": 1}, other, measure, again=False) == {"figure": 3}
    assert len(list(tmp_path.iterdir())) == 2  # that of other code is gone


def test_what_is_of_former_code_is_said(capsys):
    say_former([{}, {}])
    assert capsys.readouterr().out == ""
    say_former([{}, {FORMER: True}, {}])
    assert "1 of 3 runs were measured before the code changed" in capsys.readouterr().out


def test_code_is_what_runs(tmp_path):
    texts = (
        "x = 1",
        "x = 1  # one\n",
        '"""Says."""\nx = 1',
        'def f():\n    """Says."""\n    return 1',
        "def f(): return 1",
        "x = 2",
    )
    digests = []
    for place, text in enumerate(texts):
        file = tmp_path / f"{place}.py"
        file.write_text(text)
        digests.append(code(statements(file)))
    assert digests[0] == digests[1] == digests[2]
    assert digests[3] == digests[4]
    assert len(set(digests)) == 3


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of two modules; gives the digest of the first, after a module was written anew."""
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    (tmp_path / "penstock").mkdir()
    (tmp_path / "penstock" / "a.py").write_text("from penstock.b import used\nimport polars\nx = used()\n")

    def digest(b):
        (tmp_path / "penstock" / "b.py").write_text(b)
        statements.cache_clear()
        return code(parts(["penstock.a"]).values())

    yield digest
    statements.cache_clear()


B = "DEEP = 1\nOTHER = 2\ndef deep(): return DEEP\ndef used(): return deep()\ndef unused(): return OTHER\n"


@pytest.mark.parametrize(
    ("old", "new", "depends"),
    [
        ("DEEP = 1", "DEEP = 3", True),  # named by what is named
        ("OTHER = 2", "OTHER = 3", False),
        ("return OTHER", "return 0", False),
        ("return deep()", "return -deep()", True),
        ("OTHER = 2", "OTHER = 2\nprint()", True),  # runs whatever is asked for
        ("OTHER = 2", "OTHER = 2\nOTHER += 1", False),
        ("OTHER = 2", "OTHER = 2\nif OTHER: from penstock.c import used", True),  # what it binds hangs on what it finds
        ("OTHER = 2", "OTHER = 2\ntry: import polars\nexcept ImportError: OTHER = 3", True),
        ("def unused", "async def unused", False),
        ("DEEP = 1", "from penstock.c import DEEP", True),
    ],
)
def test_of_what_is_imported_that_counts_which_is_named(library, old, new, depends):
    assert (library(B) != library(B.replace(old, new))) == depends


def test_the_library_alone_is_looked_at():
    assert {module for module, _ in parts(["penstock.layers.quantile"])} == {"penstock.layers.quantile"}
    assert parts(["polars"]) == {}
