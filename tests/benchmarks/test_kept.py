from __future__ import annotations

from benchmarks.kept import FORMER, code, once, say_former, sources


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
    file = tmp_path / "a.py"
    digests = []
    for text in ("x = 1\n", "x = 1  # one\n\n", "x = 2\n"):
        file.write_text(text)
        digests.append(code([file]))
    assert digests[0] == digests[1] != digests[2]


def test_sources_follow_imports_of_the_library_alone():
    assert [path.name for path in sources(["penstock.layers.quantile"])] == ["quantile.py"]
    assert sources(["polars"]) == []
