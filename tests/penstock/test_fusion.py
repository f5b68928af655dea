from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from penstock import fusion, grids, metrics
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


@pytest.mark.parametrize("name", fusion.FUSIONS)
def test_a_fusion_is_the_weighted_sum_of_what_it_makes_of_a_head(name: str) -> None:
    _, heads = sample(200)
    weights = {"click": 0.5, "like": -0.2}
    click, like = heads["click"], heads["like"]
    expected = {
        "weighted_sum": 0.5 * click - 0.2 * like,
        "weighted_logits": 0.5 * np.log(click / (1 - click)) - 0.2 * np.log(like / (1 - like)),
        "weighted_product": np.log(click**0.5 * like**-0.2),
    }[name]
    assert fusion.fuse(heads, weights, name) == pytest.approx(expected, abs=1e-12)


def test_logarithms_of_isotonic_heads_are_finite_and_keep_their_order() -> None:
    head = [0.0, 1e-7, 1e-6, 0.5, 1 - 1e-6, 1.0]
    logits = fusion.fuse({"click": head}, {"click": 1.0}, "weighted_logits")
    assert logits == pytest.approx([-13.8155, -13.8155, -13.8155, 0, 13.8155, 13.8155], abs=1e-4)
    product = fusion.fuse({"click": head}, {"click": 1.0}, "weighted_product")
    assert product == pytest.approx(np.log([1e-6, 1e-6, 1e-6, 0.5, 1 - 1e-6, 1.0]))


def test_a_product_does_not_underflow() -> None:
    heads = {str(place): [1e-5, 2e-5] for place in range(100)}
    score = fusion.fuse(heads, dict.fromkeys(heads, 1.0), "weighted_product")
    assert score == pytest.approx([100 * np.log(1e-5), 100 * np.log(2e-5)])


def test_fusions_of_one_head_rank_as_the_head_does() -> None:
    labels, heads = sample()
    best = [fusion.search(labels, {"click": heads["click"]}, fusion.Config(name)).value for name in fusion.FUSIONS]
    assert best == [pytest.approx(np.mean([roc_auc_score(y, heads["click"]) for y in labels.values()]))] * 3


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


def grouped(rows: int = 600) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    labels, heads = sample(rows)
    users = np.arange(rows) * 7 % 30
    return labels, heads, users, users * 10 + np.arange(rows) % 3


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        ("auc_like", {"auc_like": 1.0}),
        ("gauc_long_view", {"gauc_long_view": 1.0}),
        ("ndcg@5_click", {"ndcg@5_click": 1.0}),
        ("mean_gauc", dict.fromkeys(("gauc_click", "gauc_long_view", "gauc_like"), 1 / 3)),
        ({"auc_like": 3, "mean_ndcg@2": 1}, {"auc_like": 0.75} | {f"ndcg@2_{label}": 0.25 / 3 for label in LABELS}),
        ({"gauc_like": 1, "mean_gauc": 3}, {"gauc_click": 0.25, "gauc_long_view": 0.25, "gauc_like": 0.5}),
    ],
)
def test_an_objective_is_a_weighted_mean_of_measures(objective: str | dict, parts: dict[str, float]) -> None:
    labels, heads, users, sessions = grouped()
    config = fusion.Config(steps=4, objective=objective)
    found = fusion.search(labels, heads, config, users=users, sessions=sessions)
    values = sum(weight * found.grid[name] for name, weight in parts.items())
    assert found.grid["objective"].to_numpy() == pytest.approx(values.to_numpy(), abs=1e-12)
    assert found.value == found.grid["objective"].max()
    assert found.value == pytest.approx(sum(weight * found.measures[name] for name, weight in parts.items()))
    for name in parts:
        kind, label = name.split("_", 1)
        score = fusion.fuse(heads, found.weights)
        if kind == "auc":
            assert found.measures[name] == pytest.approx(roc_auc_score(labels[label], score), abs=1e-9)
        elif kind == "gauc":
            assert found.measures[name] == pytest.approx(metrics.gauc(labels[label], score, users), abs=1e-9)
        else:
            expected = metrics.session_ndcg(labels[label], score, sessions, int(kind.split("@")[1]))
            assert found.measures[name] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("accuracy", r"'accuracy' is not known; there are auc_\{click, long_view, like\}.*mean_auc"),
        ("auc_share", "'auc_share' is not known"),
        ("ndcg@0_like", "'ndcg@0_like' is not known"),
        ({"auc_like": 0}, "must be above 0, not 0"),
        ({"auc_like": "much"}, "must be above 0, not 'much'"),
        ({}, "an objective without a measure"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(objective: str | dict, says: str) -> None:
    labels, heads = sample(100)
    with pytest.raises(ValueError, match=says):
        fusion.search(labels, heads, fusion.Config(objective=objective))


def test_constraints_hold_back_from_the_reference() -> None:
    labels, heads = sample(3000)
    free = fusion.search(labels, heads, fusion.Config(objective="auc_click"))
    reference = fusion.Reference("champion 3", {"click": 0.2, "long_view": 0.2, "like": 1.0})
    config = fusion.Config(objective="auc_click", constraints={"auc_like": 0.002, "mean_auc": 0.1})
    held = fusion.search(labels, heads, config, reference=reference)
    at_most = roc_auc_score(labels["like"], fusion.fuse(heads, reference.weights)) - 0.002
    assert held.reference_measures["auc_like"] == pytest.approx(at_most + 0.002, abs=1e-9)
    assert free.measures["auc_like"] < at_most <= held.measures["auc_like"]
    feasible = held.grid.filter(pl.col("auc_like") >= at_most - 1e-12)
    assert held.value == feasible["objective"].max() < free.value
    assert held.grid["feasible"].sum() == feasible.height < held.grid.height


def test_the_reference_itself_keeps_every_constraint_of_nothing() -> None:
    labels, heads = sample(3000)
    constraints = {f"auc_{label}": 0.0 for label in LABELS}
    found = fusion.search(labels, heads, fusion.Config(objective="auc_like", constraints=constraints))
    assert found.reference == fusion.Reference("all weights equal", dict.fromkeys(LABELS, 1.0), "weighted_sum")
    equal = found.grid.filter(pl.col("click") == 1, pl.col("long_view") == 1, pl.col("like") == 1)
    assert equal["feasible"].item()
    assert found.value >= equal["objective"].item()


def test_where_nothing_is_live_the_reference_has_the_fusion_that_is_searched() -> None:
    labels, heads = sample()
    found = fusion.search(labels, heads, fusion.Config("weighted_logits", steps=1))
    equal = found.grid.filter(pl.col("click") == 1, pl.col("long_view") == 1, pl.col("like") == 1)
    for name, value in found.reference_measures.items():
        assert equal[name].item() == pytest.approx(value, abs=1e-12)


def test_a_reference_of_another_fusion_is_fused_by_its_own() -> None:
    labels, heads = sample()
    weights = {"click": 0.3, "long_view": 0.1, "like": 1.0}
    reference = fusion.Reference("champion 3", weights, "weighted_product")
    found = fusion.search(labels, heads, fusion.Config(steps=2), reference=reference)
    score = np.prod([heads[name] ** weight for name, weight in weights.items()], axis=0)
    for label in LABELS:
        assert found.reference_measures[f"auc_{label}"] == pytest.approx(roc_auc_score(labels[label], score), abs=1e-9)


def test_constraints_that_nothing_keeps_say_by_how_much_the_nearest_fails() -> None:
    labels, heads = sample(3000)
    two = {"good": heads["like"], "inverted": 1 - (heads["like"] + labels["like"]) / 2}
    live = fusion.Reference("champion 3", {"inverted": -1.0})
    with pytest.raises(MetricError) as error:
        fusion.search(labels, two, fusion.Config(steps=3, constraints={"auc_like": 0.001}), reference=live)
    best = roc_auc_score(labels["like"], two["good"])
    least = roc_auc_score(labels["like"], -two["inverted"]) - 0.001
    assert str(error.value) == (
        "none of the 9 directions evaluated keeps the constraints: the nearest, good 1, inverted 0, has auc_like"
        f" {best:.6f}, {least - best:.6f} less than the {least:.6f} that are asked for"
        " (champion 3, less what it may fall)"
    )


def test_a_constraint_is_a_distance() -> None:
    with pytest.raises(ValueError, match=r"constraint of auc_like is how far it may fall, at least 0, not -0\.1"):
        fusion.Config(constraints={"auc_like": -0.1})


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=30))
def test_the_front_is_what_nothing_dominates(rows: list[tuple[int, int, int]]) -> None:
    values = np.array(rows, float)
    expected = [not any((other >= row).all() and (other > row).any() for other in values) for row in values]
    assert fusion.undominated(values).tolist() == expected


def test_the_front_of_a_search_is_of_the_labels() -> None:
    labels, heads = sample()
    grid = fusion.search(labels, heads, fusion.Config(objective="auc_like")).grid
    values = grid.select(f"auc_{label}" for label in LABELS).to_numpy()
    assert grid["front"].to_list() == fusion.undominated(values).tolist()
    assert 0 < grid["front"].sum() < grid.height
    for label in LABELS:
        assert grid.filter(pl.col(f"auc_{label}") == pl.col(f"auc_{label}").max())["front"].any()


@pytest.mark.parametrize("grid", ["log", "signed", "simplex"])
def test_any_grid_is_searched_whole(grid: str) -> None:
    labels, heads = sample(300)
    found = fusion.search(labels, heads, fusion.Config(grid=grid, steps=4))
    assert found.grid.height == len(grids.make(grid, 3, 4, 2).points)
    for row in found.grid[::9].iter_rows(named=True):
        aucs = [
            roc_auc_score(labels[name], fusion.fuse(heads, {name: row[name] for name in LABELS})) for name in LABELS
        ]
        assert row["objective"] == pytest.approx(np.mean(aucs), abs=1e-9)
    assert fusion.best_single_head(found.grid) in LABELS


def test_a_signed_grid_turns_a_head_that_ranks_backwards() -> None:
    labels, heads = sample(2000)
    straight = fusion.search(labels, heads, fusion.Config(grid="signed", steps=5))
    turned = fusion.search(labels, {**heads, "like": 1 - heads["like"]}, fusion.Config(grid="signed", steps=5))
    assert turned.weights == {**straight.weights, "like": -straight.weights["like"]}
    assert turned.value == pytest.approx(straight.value, abs=1e-9)


def test_two_and_five_heads() -> None:
    labels, heads = sample(400)
    many = {**heads, "profile": heads["click"] ** 2, "share": 1 - heads["like"]}
    found = fusion.search({"like": labels["like"]}, many, fusion.Config(steps=3))
    assert found.grid.height == 4**5 - 1
    assert set(found.weights) == set(many)
    two = fusion.search({"like": labels["like"]}, {name: heads[name] for name in ("click", "like")})
    assert two.directions == 65  # fractions of two numbers up to 10, and the two heads alone


def test_settings_come_from_json_and_are_refused_by_name() -> None:
    config = fusion.settings({"fusion": "weighted_logits", "objective": {"auc_like": 1, "gauc_click": 2}, "steps": 4})
    assert config == fusion.Config("weighted_logits", steps=4, objective={"auc_like": 1, "gauc_click": 2})
    for overrides, says in (
        ({"weights": 1}, "unknown parameter weights of penstock.fusion: there are fusion, grid, steps"),
        ({"steps": "many"}, "parameter steps of penstock.fusion is a int, not 'many'"),
        ({"objective": 3}, "objective of penstock.fusion is a str or Mapping, not 3"),
        ({"objective": "auc_share"}, "'auc_share' is not known"),
        ({"constraints": {"auc_shares": 0.1}}, "'auc_shares' is not known"),
        ({"fusion": "mean"}, "fusion 'mean' is not known; there are weighted_sum, weighted_logits, weighted_product"),
        ({"method": "luck"}, "method 'luck' is not known; there are exhaustive, coarse_to_fine, bayesian"),
        ({"grid": "cubic"}, "grid 'cubic' is not known"),
        ({"steps": 500}, "at most 1,000,000"),
    ):
        with pytest.raises(ValueError, match=says):
            fusion.settings(overrides)
    with pytest.raises(ValueError, match="fusion 'mean' is not known"):
        fusion.fuse({"click": [0.1]}, {"click": 1.0}, "mean")


def test_a_long_search_says_how_long_it_takes(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 100_000, 3))
    monkeypatch.setattr("penstock.fusion.time.monotonic", lambda: next(ticks))
    labels, heads = sample(50)
    fusion.search(labels, heads, fusion.Config(steps=1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights: 1 of 7 directions, about 18 s left"
    assert lines[-1] == "weights: 7 of 7 directions, about 0 s left"


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
    rows = pl.DataFrame({**labels, **{f"p_{name}": values for name, values in heads.items()}})
    rows = rows.with_columns(user_id=pl.int_range(500) % 20, session=pl.int_range(500) % 100)
    folder = tmp_path / "rank" / "predictions"
    folder.mkdir(parents=True)
    rows.write_parquet(folder / "validation.parquet")
    live = {"fusion": "weighted_product", "weights": {"click": 0.1, "long_view": 0.2, "like": 0.3}}
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "weights.json").write_text(json.dumps(live))
    config = fusion.Config("weighted_logits", steps=3, objective="mean_ndcg@3", constraints={"gauc_like": 0.5})
    found = fusion.search_predictions(tmp_path / "rank", tmp_path / "weights", config, str(tmp_path / "7"))
    document = json.loads((tmp_path / "weights" / "weights.json").read_text())
    assert document == {
        "fusion": "weighted_logits",
        "weights": found.weights,
        "objective": "mean_ndcg@3",
        "validation": found.value,
        "measures": found.measures,
        "reference": {"name": "champion 7", **live, "measures": found.reference_measures},
        "search": dataclasses.asdict(config),
        "evaluations": 49,
        "directions": 49,
    }
    assert pl.read_parquet(tmp_path / "weights" / "grid.parquet").equals(found.grid)
    assert fusion.measure(rows, found.weights, "weighted_logits", "mean_ndcg@3") == pytest.approx(found.value, abs=1e-9)
    with pytest.raises(ValueError, match="the sessions of the rows are needed"):
        fusion.measure(rows.drop("session"), found.weights, "weighted_logits", "mean_ndcg@3")
    # a champion that nobody can read is for the gate to tell; the search goes on without it
    (tmp_path / "7" / "weights.json").write_text("{}")
    config = dataclasses.replace(config, constraints={})
    alone = fusion.search_predictions(tmp_path / "rank", tmp_path / "weights", config, str(tmp_path / "7"))
    assert alone.reference == fusion.search_predictions(tmp_path / "rank", tmp_path / "weights", config).reference
