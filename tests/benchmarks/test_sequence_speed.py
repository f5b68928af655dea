"""The benchmark of SASRec trains what it says, and its goals are held to the right figures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.sequence_data import BATCH, FIRST, LENGTH, LOSSES, SAMPLE, Histories
from benchmarks.sequence_speed import OURS, PEER, Measured, compare
from benchmarks.sequence_steps import ours


def test_histories_survive_the_disk_and_have_no_padding(tmp_path):
    made = Histories.make(40, 9, 3)
    made.write(tmp_path / "data")
    read = Histories.read(tmp_path / "data")
    np.testing.assert_array_equal(read.items, made.items)
    assert (read.vocabulary, read.items.shape) == (40, (9, LENGTH + 1))
    assert read.items.min() >= FIRST
    assert read.items.max() < FIRST + 40


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_that_knows_nothing_gives_every_item_the_same_chance(loss):
    made = Histories.make(4000, BATCH, 3)
    model = ours(made, loss)
    inputs = {"history_items": made.items[:, :-1]}
    queries, positives, _ = model.pairs(inputs, made.items[:, -1])
    np.testing.assert_array_equal(np.reshape(positives, (BATCH, LENGTH + 1)), made.items)
    assert queries.shape[0] == BATCH * (LENGTH + 1)
    among = 4000 if loss == "full" else SAMPLE  # the correction is that of the positive too
    assert float(model.compute_loss(inputs, made.items[:, -1])) == pytest.approx(np.log(among), rel=0.01)


def test_ours_is_held_against_the_peer_with_the_same_loss():
    measured = [
        Measured(OURS, "full", 100.0, 0.0, 500.0),
        Measured(PEER, "full", 129.0, 0.0, 1000.0),
        Measured(OURS, "sampled", 100.0, 0.0, 500.0),
        Measured(PEER, "sampled", 131.0, 0.0, 600.0),
    ]
    rows = compare(measured)
    assert [row.holds for row in rows] == [False, None, True, None]
    assert rows[1].ratio == 0.5
