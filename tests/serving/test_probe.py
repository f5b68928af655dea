from __future__ import annotations

import copy
from typing import Any

import pytest

from penstock import release
from penstock.release import ReleaseError
from serving import probe
from serving.model_client import ModelClient
from tests.serving.conftest import System


def test_a_loaded_release_answers_as_it_is_known_to(system: System) -> None:
    system.load((1, 2))
    with ModelClient(system.address) as client:
        for number in (1, 2):
            known = release.probe_answers(system.home, number)
            assert probe.answers(client, number) == known
            probe.check(client, number, ["click", "long_view", "like"], known)
        with pytest.raises(ReleaseError, match=r"loaded as release 2 is not that release: the recalled items differ"):
            probe.check(client, 2, ["click"], release.probe_answers(system.home, 1))
        with pytest.raises(ReleaseError, match="rank of release 1 gives no finite share"):
            probe.check(client, 1, ["click", "share"], release.probe_answers(system.home, 1))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda known: known["recall"]["scores"].__setitem__(0, 40.1), ["recall scores"]),
        (lambda known: known["recall"]["scores"].__setitem__(0, 40.0001), []),
        (lambda known: known["recall"]["ids"].__setitem__(0, 77), ["the recalled items"]),
        (lambda known: known["recall"]["ids"].pop() and known["recall"]["scores"].pop(), ["the recalled items"]),
        (lambda known: known["rank"]["click"].__setitem__(3, 0.9), ["rank click"]),
        (lambda known: known["rank"].update(gone=[0.0] * 10), ["rank gone"]),
        (lambda known: known["rank"].pop("like"), []),  # it was not steady: nothing is known of it
    ],
)
def test_what_differs_is_named(change: Any, wrong: list[str]) -> None:
    found = {
        "recall": {"ids": list(range(10)), "scores": [40.0 - n for n in range(10)]},
        "rank": {"click": [0.5] * 10, "like": [0.1] * 10},
    }
    known = copy.deepcopy(found)
    change(known)
    assert probe.differing(found, known) == wrong


def test_items_that_score_alike_may_change_places() -> None:
    def one(ids: list[int], scores: list[float], click: list[float]) -> dict:
        return {"recall": {"ids": ids, "scores": scores}, "rank": {"click": click}}

    known = one([1, 2, 3], [2.0, 1.0, 1.0], [0.1, 0.2, 0.3])
    assert probe.differing(one([1, 3, 2], [2.0, 1.0, 1.0], [0.1, 0.3, 0.2]), known) == []
    assert probe.differing(one([1, 3, 2], [2.0, 1.0, 1.0], [0.1, 0.2, 0.3]), known) == ["rank click"]
    assert probe.differing(one([1, 2, 9], [2.0, 1.0, 1.0], [0.1, 0.2, 0.7]), known) == []  # 9 ties with 3 for the end
    assert probe.differing(one([9, 2, 3], [2.0, 1.0, 1.0], [0.1, 0.2, 0.3]), known) == ["the recalled items"]
