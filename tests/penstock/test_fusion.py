from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from penstock import fusion
from penstock.metrics import MetricError

LABELS = ("click", "long_view", "like")


def sample(
    rows: int = 500, *, levels: int = 10**9, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    labels = {
        name: (generator.random(rows) < share).astype(np.int8)
        for name, share in zip(LABELS, (0.4, 0.3, 0.1), strict=True)
    }
    heads = {name: np.floor(1 / (1 + np.exp(-generator.normal(labels[name]))) * levels) / levels for name in LABELS}
    return labels, heads


def test_fuse_is_the_weighted_sum() -> None:
    heads = {"click": [0.1, 0.2], "long_view": np.float32([0.5, 0.25]), "unused": [9, 9]}
    score = fusion.fuse(heads, {"click": 1.0, "long_view": 0.4})
    assert score.dtype == np.float64
    assert score == pytest.approx([0.3, 0.3])
    assert fusion.fuse({"click": []}, {"click": 1.0}).size == 0


def test_fuse_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="weights like do not fit the heads click"):
        fusion.fuse({"click": [0.1]}, {"click": 1.0, "like": 0.0})
    with pytest.raises(ValueError, match="none"):
        fusion.fuse({"click": [0.1]}, {})


@pytest.mark.parametrize(("heads", "steps"), [(1, 10), (2, 4), (3, 10), (4, 3)])
def test_directions_hold_every_point_once_and_leave_out_zero(heads: int, steps: int) -> None:
    found = fusion.directions(heads, steps)
    points = [tuple(part * scale for part in direction) for direction, scales in found.items() for scale in scales]
    assert sorted(points) == sorted(product(range(steps + 1), repeat=heads))[1:]
    units = {tuple(np.round(np.array(direction) / np.linalg.norm(direction), 12)) for direction in found}
    assert len(units) == len(found)


def test_search_equals_scikit_learn_on_every_point() -> None:
    labels, heads = sample(120, levels=8)
    found = fusion.search(labels, heads)
    assert found.grid.height == 11**3 - 1
    for row in found.grid[::7].iter_rows(named=True):
        # 8 levels and tenths: rounding to 1e-9 restores the ties that 0.1's binary form would break
        score = np.round(sum(row[name] * heads[name] for name in LABELS), 9)
        aucs = [roc_auc_score(labels[name], score) for name in LABELS]
        assert [row[f"auc_{name}"] for name in LABELS] == pytest.approx(aucs, abs=1e-9)
        assert row["objective"] == pytest.approx(np.mean(aucs), abs=1e-9)


def test_search_returns_the_best_point_of_its_grid() -> None:
    labels, heads = sample()
    found = fusion.search(labels, heads)
    assert found.value == found.grid["objective"].max()
    point = found.grid.filter(*(pl.col(name) == weight for name, weight in found.weights.items()))
    assert point["objective"].item() == found.value
    assert max(found.weights.values()) > 0.5  # the largest point of its direction
    assert found.value >= max(found.grid.filter(pl.col("click") == 1)["objective"])


def test_points_that_differ_by_scale_share_one_value() -> None:
    labels, heads = sample(levels=30)
    grid = fusion.search(labels, heads).grid
    sharing = [
        grid.filter(pl.col("click") == 0.2 * scale, pl.col("long_view") == 0.1 * scale, pl.col("like") == 0)
        for scale in (1, 2)
    ]
    assert sharing[0]["objective"].item() == sharing[1]["objective"].item()


def test_equal_points_are_told_apart_by_the_smallest_sum_then_the_earlier_head() -> None:
    labels, heads = sample()
    same = dict.fromkeys(LABELS, heads["click"])
    assert fusion.search(labels, same).weights == {"click": 1.0, "long_view": 0.0, "like": 0.0}
    constant = {**heads, "like": np.full(500, 0.5), "long_view": np.full(500, 0.1)}
    assert fusion.search(labels, constant).weights == {"click": 1.0, "long_view": 0.0, "like": 0.0}


def test_a_head_that_ranks_backwards_gets_no_weight() -> None:
    labels, heads = sample(2000)
    found = fusion.search(labels, {**heads, "click": 1 - heads["click"]})
    assert found.weights["click"] == 0


def test_objective_of_one_label() -> None:
    labels, heads = sample(2000)
    found = fusion.search(labels, heads, "auc_like")
    assert found.value == found.grid["auc_like"].max()
    with pytest.raises(ValueError, match="'accuracy' is not known; there are mean_auc, auc_click"):
        fusion.search(labels, heads, "accuracy")


@given(st.permutations(range(60)))
def test_search_does_not_depend_on_the_order_of_rows(order: list[int]) -> None:
    labels, heads = sample(60, levels=10)
    found = fusion.search(labels, {"click": heads["click"], "like": heads["like"]})
    shuffled = fusion.search(
        {name: values[order] for name, values in labels.items()},
        {"click": heads["click"][order], "like": heads["like"][order]},
    )
    assert found.weights == shuffled.weights
    assert found.grid.equals(shuffled.grid)


def test_search_names_the_label_and_head_that_cannot_be_used() -> None:
    labels, heads = sample()
    with pytest.raises(MetricError, match=r"label like.*all 500 labels are 0"):
        fusion.search({**labels, "like": np.zeros(500)}, heads)
    heads["like"][3] = np.nan
    with pytest.raises(MetricError, match=r"head like: 1 of 500 scores are NaN"):
        fusion.search(labels, heads)


def test_best_single_head_is_read_off_the_grid() -> None:
    labels, heads = sample(2000)
    grid = fusion.search(labels, heads).grid
    means = {head: np.mean([roc_auc_score(labels[name], heads[head]) for name in LABELS]) for head in LABELS}
    assert fusion.best_single_head(grid) == max(means, key=lambda head: means[head])


def test_search_predictions_writes_what_the_gate_reads(tmp_path: Path) -> None:
    labels, heads = sample()
    folder = tmp_path / "rank" / "predictions"
    folder.mkdir(parents=True)
    pl.DataFrame({**labels, **{f"p_{name}": values for name, values in heads.items()}}).write_parquet(
        folder / "validation.parquet"
    )
    found = fusion.search_predictions(tmp_path / "rank", tmp_path / "weights")
    document = json.loads((tmp_path / "weights" / "weights.json").read_text())
    assert document == {
        "fusion": "weighted_sum",
        "weights": found.weights,
        "objective": "mean_auc",
        "validation": found.value,
    }
    assert pl.read_parquet(tmp_path / "weights" / "grid.parquet").equals(found.grid)
