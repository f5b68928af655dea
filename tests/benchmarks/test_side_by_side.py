"""Figures come back in the order of their calls, and a failure ends all."""

from __future__ import annotations

import pytest

from benchmarks.side_by_side import each


def test_what_each_call_gives_comes_back_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert each(divmod, [(7, 2), (9, 4), (5, 5)], ["a", "b", "c"]) == [(3, 1), (2, 1), (1, 0)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1 of 3", "2 of 3", "3 of 3"]
    assert sorted(line.split(": ")[1] for line in lines) == ["a", "b", "c"]

    with pytest.raises(ZeroDivisionError):
        each(divmod, [(1, 1), (1, 0)], ["good", "bad"])
