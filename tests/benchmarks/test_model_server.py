from __future__ import annotations

import numpy as np

from benchmarks.model_server import WARM_UP, a_second, in_turn


def test_acts_take_turns_and_the_first_are_not_timed() -> None:
    order = []
    times = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "a" * WARM_UP + "b" * WARM_UP + "ababab"
    assert {name: found.shape for name, found in times.items()} == {"a": (3,), "b": (3,)}
    assert all((found >= 0).all() for found in times.values())


def test_throughput_counts_what_all_threads_do() -> None:
    counts = np.zeros(2, int)

    def act(place: int) -> None:
        counts[place] += 1

    rate = a_second([lambda: act(0), lambda: act(1)], 0.05)
    assert rate > 0
    assert counts.min() > 0
    assert rate <= counts.sum() / 0.05
