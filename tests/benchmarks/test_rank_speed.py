"""The rank training benchmark trains the product's net on the product's features, and its goal is of the best peer."""

from __future__ import annotations

import keras
import numpy as np

from benchmarks.rank_data import BATCH, TASKS, Made, make
from benchmarks.rank_speed import OURS, SIZES, Measured, Size, Variant, columns, compare, measure
from benchmarks.rank_steps import CONFIG, fit, ours, schema_of
from penstock.examples import FEATURES
from penstock.ranking import SIDES


def rows(count: int, sizes: int | None = None) -> Made:
    return make(columns(), {name: sizes or known + 2 for name, known in SIZES.items()}, count, 7)


def test_the_rows_have_every_feature_of_the_rank_models_within_its_vocabulary(tmp_path):
    made = rows(200)
    features = [feature for feature in FEATURES if feature.side in SIDES]
    assert list(made.inputs) == [feature.name for feature in features]
    assert {feature.vocabulary for feature in features if feature.vocabulary} == set(SIZES)
    for feature in features:
        values = made.inputs[feature.name]
        assert values.shape == ((200, feature.length) if feature.length else (200,))
        if feature.vocabulary:
            known = values[values != 0]
            assert known.min() >= 2
            assert known.max() < made.sizes[feature.vocabulary]
        if feature.length:
            # what is there stands in front
            assert (np.diff((values != 0).astype(int), axis=1) <= 0).all()
    rates = {task: labels.mean() for task, labels in made.labels.items()}
    assert 0.4 < rates["click"] < 0.6
    assert rates["click"] > rates["long_view"] > 3 * max(rates["like"], rates["profile_enter"])

    made.write(tmp_path / "data")
    read = Made.read(tmp_path / "data")
    assert list(read.columns) == list(made.columns)
    assert read.sizes == made.sizes
    for name, values in {**made.inputs, **made.labels}.items():
        np.testing.assert_array_equal(values, {**read.inputs, **read.labels}[name])


def test_ours_is_the_product_s_net_and_learns_what_the_rows_tell():
    made = rows(60 * BATCH, sizes=12)
    keras.utils.set_random_seed(1)
    model = ours(made)
    assert {tensor.name for tensor in model.shared.inputs} == {column.name for column in made.columns}
    assert tuple(TASKS) == CONFIG.tasks
    assert schema_of(made).size("item_id") == 12
    found = fit(model, made, 5, 55)
    assert len(found["milliseconds"]) == 55
    rates = np.array([labels.mean() for labels in made.labels.values()])
    chance = -(rates * np.log(rates) + (1 - rates) * np.log(1 - rates)).sum()
    assert found["loss"] < 0.97 * chance


def test_the_goal_is_of_the_best_peer():
    measured = [Measured(OURS.name, 10.0, 1.0), Measured("slow", 30.0, 1.0), Measured("quick", 14.0, 1.0)]
    found = [(row.peer_name, round(row.ratio, 6), row.goal, row.holds) for row in compare(measured)]
    assert found == [("quick", 1.4, "ratio >= 1.5", False), ("slow", 3.0, None, None)]


def test_what_is_not_installed_is_said(monkeypatch, tmp_path, capsys):
    absent = Variant("absent", ("/nowhere/python",))
    monkeypatch.setattr("benchmarks.rank_speed.OURS", Variant("gone", ("/nowhere/too",)))
    assert list(measure(tmp_path, Size(1, 1, 1, (absent,)))) == []
    said = capsys.readouterr().out
    assert "absent: left out: /nowhere/python is not installed" in said
    assert "gone: left out: /nowhere/too is not installed" in said
