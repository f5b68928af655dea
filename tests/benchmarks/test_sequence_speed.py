"""The benchmark of SASRec trains what it says, and its goals are held to the right figures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.sequence_data import BATCH, FIRST, LENGTH, LOSSES, SAMPLE, SHORT, Histories
from benchmarks.sequence_speed import FULL_LENGTH, LIKE_BEAUTY, OURS, PEER, Measured, compare
from benchmarks.sequence_steps import behind, ours


def test_histories_survive_the_disk_and_have_no_padding(tmp_path):
    made = Histories.make(40, 9, 3, short=False)
    made.write(tmp_path / "data")
    read = Histories.read(tmp_path / "data")
    np.testing.assert_array_equal(read.items, made.items)
    assert (read.vocabulary, read.items.shape) == (40, (9, LENGTH + 1))
    assert read.items.min() >= FIRST
    assert read.items.max() < FIRST + 40


def test_short_histories_are_as_long_as_they_are_said_to_be():
    made = Histories.make(40, 20_000, 3, short=True)
    present = made.items != 0
    assert present[:, -1].all()
    assert not (present[:, :-1] & ~present[:, 1:]).any()
    lengths = present[:, :-1].sum(axis=1)
    assert lengths.min() == 2
    for share, longest in SHORT.items():
        assert np.quantile(lengths, share) == pytest.approx(longest, abs=1)
    histories = behind(made)
    for row in range(50):
        np.testing.assert_array_equal(histories[row, : lengths[row]], made.items[row, LENGTH - lengths[row] : -1])
        assert not histories[row, lengths[row] :].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_that_knows_nothing_gives_every_item_the_same_chance(loss):
    made = Histories.make(4000, BATCH, 3, short=False)
    model = ours(made, loss)
    inputs = {"history_items": made.items[:, :-1]}
    queries, positives, _ = model.pairs(inputs, made.items[:, -1])
    np.testing.assert_array_equal(np.reshape(positives, (BATCH, LENGTH + 1)), made.items)
    assert queries.shape[0] == BATCH * (LENGTH + 1)
    among = 4000 if loss == "full" else SAMPLE  # the correction is that of the positive too
    assert float(model.compute_loss(inputs, made.items[:, -1])) == pytest.approx(np.log(among), rel=0.01)


def test_ours_is_held_against_the_peer_with_the_same_loss():
    measured = [
        Measured(OURS, FULL_LENGTH, "full", 100.0, 0.0, 500.0),
        Measured(PEER, FULL_LENGTH, "full", 129.0, 0.0, 1000.0),
        Measured(OURS, FULL_LENGTH, "sampled", 100.0, 0.0, 500.0),
        Measured(PEER, FULL_LENGTH, "sampled", 131.0, 0.0, 600.0),
        Measured(OURS, LIKE_BEAUTY, "sampled", 100.0, 0.0, 500.0),
        Measured(PEER, LIKE_BEAUTY, "sampled", 300.0, 0.0, 600.0),
    ]
    rows = compare(measured)
    assert [row.holds for row in rows] == [False, None, True, None, None, None]
    assert rows[1].ratio == 0.5
    assert rows[4].ratio == 3.0
