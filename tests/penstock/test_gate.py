from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from penstock import fusion, gate, metrics
from penstock.events import LABELS
from penstock.gate import Verdict
from tests.penstock.candidates import Artifacts, write_candidate, write_recall_model, write_release

POLICY = {"replicates": 200}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidate(tmp_path_factory.mktemp("good")).root


@pytest.fixture(scope="session")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("releases") / "7", 7)


@pytest.fixture
def candidate(good: Path, tmp_path: Path) -> Artifacts:
    """A good candidate to spoil."""
    shutil.copytree(good, tmp_path / "candidate")
    return Artifacts(tmp_path / "candidate")


def verdict_on(candidate: Artifacts, champion: Path | None = None, **policy: Any) -> Verdict:
    paths = (candidate.examples, candidate.recall, candidate.rank, candidate.weights, candidate.rehearsal)
    return gate.judge_candidate(*paths, str(champion or ""), candidate.verdict, POLICY | policy)


def put_weights(candidate: Artifacts, **weights: float) -> None:
    document = {"fusion": "weighted_sum", "weights": weights}
    (candidate.weights / "weights.json").write_text(json.dumps(document))


def failures(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.reason for check in verdict.checks if not check.passed}


def only_failure(verdict: Verdict) -> tuple[str, str]:
    assert not verdict.approved
    assert verdict.sentence.startswith("Rejected: ")
    [(name, reason)] = failures(verdict).items()
    return name, reason


# Approved


def test_a_good_first_release_is_approved_by_figures_that_can_be_recomputed(candidate: Artifacts) -> None:
    verdict = verdict_on(candidate)
    assert verdict.approved, failures(verdict)
    assert verdict.sentence.startswith("Approved: on 5,000 test rows the mean AUC of the fused score is 0.")
    rows = pl.read_parquet(candidate.test_predictions)
    weights = json.loads((candidate.weights / "weights.json").read_text())["weights"]
    score = sum(weights[label] * rows[f"p_{label}"].to_numpy() for label in LABELS)
    expected = {label: roc_auc_score(rows[label], score) for label in LABELS}
    assert {label: verdict.fused["candidate"][label] for label in LABELS} == pytest.approx(expected)
    assert verdict.fused["candidate"]["value"] == pytest.approx(np.mean(list(expected.values())))
    popularity = np.mean([roc_auc_score(rows[label], rows[f"popularity_{label}"]) for label in LABELS])
    check = next(check for check in verdict.checks if check.name == "better than popularity")
    assert check.value == pytest.approx(np.mean(list(expected.values())) - popularity)
    assert 0 < check.low < check.value < check.high
    assert verdict.heads["click"]["auc"] == pytest.approx(roc_auc_score(rows["click"], rows["p_click"]))
    assert verdict.heads["click"]["champion"] is None


def test_a_better_candidate_replaces_the_champion(candidate: Artifacts, champion: Path) -> None:
    verdict = verdict_on(candidate, champion)
    assert verdict.approved, failures(verdict)
    assert "champion 7's is 0." in verdict.sentence
    assert verdict.champion == 7
    test = pl.read_parquet(candidate.examples / "test.parquet")
    theirs = {label: 1 / (1 + np.exp(-test[f"champion_{label}"].to_numpy().astype(float))) for label in LABELS}
    for label in LABELS:
        assert verdict.heads[label]["champion"] == pytest.approx(roc_auc_score(test[label], theirs[label]), abs=1e-5)
        assert verdict.fused["champion"][label] == pytest.approx(
            roc_auc_score(test[label], sum(theirs.values())), abs=1e-5
        )
    scores = pl.read_parquet(candidate.verdict / "champion.parquet")
    assert scores["event_id"].equals(test["event_id"])
    assert scores["score"].to_numpy() == pytest.approx(sum(theirs.values()), abs=1e-5)


def test_the_verdict_on_disk_is_the_verdict_and_says_what_the_champion_was(
    candidate: Artifacts, champion: Path
) -> None:
    verdict = verdict_on(candidate, champion)
    document = json.loads((candidate.verdict / "verdict.json").read_text())
    assert document["approved"] is True
    assert document["sentence"] == verdict.sentence
    assert document["champion"] == 7
    assert [check["name"] for check in document["checks"]] == [check.name for check in verdict.checks]
    assert set(document["heads"]["like"]) == {
        *("auc", "low", "high", "champion", "difference", "difference_low", "difference_high", "popularity"),
        *(f"calibration_{name}{end}" for name in ("ratio", "slope") for end in ("", "_low", "_high")),
    }
    assert document["data_window"]["rows"]["test"] == 5000
    assert document["champion_manifest"]["rank"]["config"]["settings"] == {"epochs": 1}
    assert document["champion_manifest"]["data_window"]["rows"] == {"train": 4000}
    assert "files" not in document["champion_manifest"]
    assert verdict_on(candidate, champion) == verdict  # the same evidence, the same verdict


# Rejected, each for its own reason


def test_no_better_than_the_champion(tmp_path: Path, champion: Path) -> None:
    equal = write_candidate(tmp_path / "equal", noise=0.8, seed=3)
    assert "better than the champion" in failures(verdict_on(equal, champion))
    worse = write_candidate(tmp_path / "worse", noise=2.0, seed=4)
    assert {"better than the champion", "click head not worse than the champion's"} <= failures(
        verdict_on(worse, champion)
    ).keys()


def test_identical_to_the_champion(candidate: Artifacts, champion: Path) -> None:
    test = pl.read_parquet(candidate.examples / "test.parquet")
    logits = {f"p_{label}": 1 / (1 + (-test[f"champion_{label}"]).exp()) for label in LABELS}
    candidate.change(candidate.test_predictions, **logits)
    put_weights(candidate, click=0.5, long_view=0.5, like=0.5)  # another scale, the same ranking
    name, reason = only_failure(verdict_on(candidate, champion))
    assert name == "differs from the champion"
    assert "exactly as champion 7 does" in reason


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -0.1, 1.5])
def test_predictions_that_are_no_probabilities(candidate: Artifacts, bad: float | None) -> None:
    first = pl.int_range(pl.len()) == 17
    candidate.change(
        candidate.test_predictions, p_like=pl.when(first).then(pl.lit(bad, pl.Float64)).otherwise(pl.col("p_like"))
    )
    name, reason = only_failure(verdict_on(candidate))
    assert name == "predictions are probabilities"
    assert reason == "Predictions are NaN, infinite or outside 0 to 1: 1 of p_like."


def test_constant_scores(candidate: Artifacts) -> None:
    candidate.change(candidate.test_predictions, p_click=pl.lit(0.4))
    name, reason = only_failure(verdict_on(candidate))
    assert name == "no head is constant"
    assert "p_click" in reason


def test_an_inverted_head_even_where_the_weights_ignore_it(candidate: Artifacts, champion: Path) -> None:
    for part in ("validation", "test"):
        candidate.change(candidate.rank / "predictions" / f"{part}.parquet", p_like=1 - pl.col("p_like"))
    assert fusion.search_predictions(candidate.rank, candidate.weights).weights["like"] == 0
    assert "like head above chance" in failures(verdict_on(candidate))
    assert {"like head above chance", "like head not worse than the champion's"} <= failures(
        verdict_on(candidate, champion)
    ).keys()


def test_an_empty_test_slice(candidate: Artifacts) -> None:
    for path in (candidate.test_predictions, candidate.examples / "test.parquet"):
        pl.read_parquet(path).clear().write_parquet(path)
    verdict = verdict_on(candidate)
    assert failures(verdict)["enough test rows"] == "The test slice is empty: there is nothing to judge by."
    assert not verdict.approved


def test_too_few_rows_or_positives(candidate: Artifacts) -> None:
    name, reason = only_failure(verdict_on(candidate, minimum_rows=5001))
    assert (name, reason) == ("enough test rows", "There are 5,000 test rows; 5,001 are asked for.")
    rare = pl.when(pl.int_range(pl.len()) < 4000).then(0).otherwise(pl.col("like")).cast(pl.Int8)
    for path in (candidate.test_predictions, candidate.examples / "test.parquet"):
        candidate.change(path, like=rare)
    positives = pl.read_parquet(candidate.test_predictions)["like"].sum()
    name, reason = only_failure(verdict_on(candidate, minimum_cases=positives + 1))
    assert name == "enough cases of like"
    assert f"{positives} positives" in reason


def test_one_class_only(candidate: Artifacts) -> None:
    for path in (candidate.test_predictions, candidate.examples / "test.parquet"):
        candidate.change(path, like=pl.lit(0, pl.Int8))
    assert only_failure(verdict_on(candidate))[0] == "enough cases of like"


def test_test_rows_that_were_trained_on(candidate: Artifacts) -> None:
    test = pl.read_parquet(candidate.examples / "test.parquet")
    train = pl.read_parquet(candidate.examples / "train.parquet")
    pl.concat([train, test.head(3)]).write_parquet(candidate.examples / "train.parquet")
    name, reason = only_failure(verdict_on(candidate))
    assert name == "test rows are unseen"
    assert reason.startswith("3 test rows are also training or validation rows")


def test_test_rows_from_the_time_of_training(candidate: Artifacts) -> None:
    candidate.change(candidate.examples / "validation.parquet", event_time=pl.col("event_time") + pl.duration(hours=20))
    name, reason = only_failure(verdict_on(candidate))
    assert name == "test rows are unseen"
    assert "they overlap" in reason


def test_predictions_of_other_rows_or_other_labels(candidate: Artifacts) -> None:
    rows = pl.read_parquet(candidate.test_predictions)
    others = rows.with_columns(event_id=pl.col("event_id") + 1)
    shifted = rows.with_columns(click=pl.col("click").shift(1).fill_null(0))
    for spoilt in (rows.reverse(), rows.head(-1), others, shifted):
        spoilt.write_parquet(candidate.test_predictions)
        assert "predictions are of the test rows" in failures(verdict_on(candidate))


def test_popularity_not_beaten(candidate: Artifacts) -> None:
    # popularity as good as the model's own heads
    better = {f"popularity_{label}": pl.col(f"p_{label}") for label in LABELS}
    candidate.change(candidate.test_predictions, **better)
    name, reason = only_failure(verdict_on(candidate))
    assert name == "better than popularity"
    assert "popularity's is 0." in reason


def test_a_first_release_worse_than_its_best_single_head(candidate: Artifacts) -> None:
    blurred = 0.3 * pl.col("p_like") + 0.7 * pl.int_range(pl.len()).hash(1) / 2**64
    for part in ("validation", "test"):
        candidate.change(candidate.rank / "predictions" / f"{part}.parquet", p_like=blurred)
    fusion.search_predictions(candidate.rank, candidate.weights)
    put_weights(candidate, click=0.1, long_view=0.0, like=1.0)
    reason = failures(verdict_on(candidate))["not worse than the best single head"]
    assert "head alone is 0." in reason


def test_worse_for_new_users_only(candidate: Artifacts, champion: Path) -> None:
    flipped = {
        f"p_{label}": pl.when("new_user").then(1 - pl.col(f"p_{label}")).otherwise(pl.col(f"p_{label}"))
        for label in LABELS
    }
    # so few new users that the mean over all rows still gains
    candidate.change(candidate.test_predictions, new_user=pl.col("user_id") < 70)
    candidate.change(candidate.test_predictions, **flipped)
    verdict = verdict_on(candidate, champion)
    assert "no harm to new users" in failures(verdict)
    assert "no harm to known users" not in failures(verdict)


@pytest.mark.parametrize("spoil", ["nowhere", "no model", "no weights", "other inputs", "nan"])
def test_a_champion_that_cannot_be_scored(candidate: Artifacts, champion: Path, tmp_path: Path, spoil: str) -> None:
    release = tmp_path / "releases" / "7"
    if spoil != "nowhere":
        shutil.copytree(champion, release)
    if spoil == "no model":
        (release / "rank" / "saved_model.pb").write_bytes(b"not a graph")
    if spoil == "no weights":
        (release / "weights.json").unlink()
    test = candidate.examples / "test.parquet"
    if spoil == "other inputs":
        pl.read_parquet(test).drop("champion_like").write_parquet(test)
    if spoil == "nan":
        candidate.change(test, champion_like=pl.lit(float("nan"), pl.Float32))
    name, reason = only_failure(verdict_on(candidate, release))
    assert name == "champion can be scored"
    assert "hampion" in reason
    assert "{{" not in reason
    document = json.loads((candidate.verdict / "verdict.json").read_text())
    assert document["approved"] is False
    assert document["champion"] == 7


def test_a_recall_model_that_finds_no_more_than_the_baselines(candidate: Artifacts, champion: Path) -> None:
    shutil.rmtree(candidate.recall / "saved_model")
    test = pl.read_parquet(candidate.examples / "test.parquet")
    write_recall_model(candidate.recall / "saved_model", test, 0.0, np.random.default_rng(1))
    found = failures(verdict_on(candidate))
    assert found.keys() == {"recall better than the most popular items", "recall better than item-item CF"}
    assert "of what users long-viewed, item-item CF " in found["recall better than item-item CF"]
    # who asks for less gets less
    assert verdict_on(candidate, baselines={"popularity": 0.0, "item_item_cf": 0.0}).approved is False
    assert verdict_on(candidate, baselines={}).approved


def test_an_index_that_lacks_items_or_has_others(candidate: Artifacts) -> None:
    items = pl.read_parquet(candidate.recall / "items.parquet")
    items.filter(pl.col("item_id") != 17).write_parquet(candidate.recall / "items.parquet")
    found = failures(verdict_on(candidate))
    assert found == {
        "index holds the items": "1 of the 200 items of the training slice are not in the index.",
        "recall answers its own items": (
            "The recall model answers 1 items that items.parquet does not have: another index is in it."
        ),
    }


@pytest.mark.parametrize("part", ["recall", "rank"])
def test_a_model_that_was_trained_on_other_examples(candidate: Artifacts, part: str) -> None:
    path = candidate.root / part / "window.json"
    window = json.loads(path.read_text())
    window["digests"]["train"] = "of test too"
    path.write_text(json.dumps(window))
    name, reason = only_failure(verdict_on(candidate))
    assert name == "models are of these examples"
    assert f"The {part} model was trained on other examples" in reason


@pytest.mark.parametrize(
    ("said", "name", "says"),
    [
        (None, "a fresh server answers", "was not loaded in a fresh server"),
        ({"error": "rank reads click, which the feature service does not give"}, "a fresh server answers", "click"),
        ({"error": None, "requests": 3}, "a fresh server answers", "does not say what it found: KeyError: 'finite'"),
        ({"requests": 0}, "a fresh server answers", "answered no request"),
        ({"finite": False}, "a fresh server answers", "NaN or infinity"),
        ({"largest_difference": 0.01}, "served scores are the training graph's", "at most 0.01; 0.0001 is allowed"),
        ({"largest_difference": float("nan")}, "served scores are the training graph's", "nan"),
        ({"p99_ms": 900.0}, "answers in time", "at most 900.0 ms; 250 ms are allowed"),
    ],
)
def test_what_a_fresh_server_could_not_do(
    candidate: Artifacts, said: dict[str, Any] | None, name: str, says: str
) -> None:
    path = candidate.rehearsal / "rehearsal.json"
    if said is None:
        path.write_text("null")
    elif "error" in said:
        path.write_text(json.dumps(said))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    found, reason = only_failure(verdict_on(candidate))
    assert found == name
    assert says in reason


@pytest.mark.parametrize(("power", "figure"), [(2.0, "ratio"), (0.5, "ratio"), (2.0, "slope")])
def test_probabilities_to_a_power_are_no_probabilities(candidate: Artifacts, power: float, figure: str) -> None:
    # the head ranks as before; alone the weights are not what they were searched for
    candidate.change(candidate.test_predictions, p_click=pl.col("p_click") ** power)
    assert f"click head is calibrated ({figure})" in failures(verdict_on(candidate))


def test_a_head_that_knows_its_label(candidate: Artifacts, champion: Path) -> None:
    rows = pl.read_parquet(candidate.test_predictions)
    leaked = 0.9 * rows["like"].to_numpy() + 0.1 * np.random.default_rng(0).random(rows.height)
    candidate.change(candidate.test_predictions, p_like=pl.Series(leaked))
    found = failures(verdict_on(candidate, champion))
    assert "look for a feature that knows the label" in found["like head is plausible"]


def test_a_gain_that_no_model_has(tmp_path: Path, champion: Path) -> None:
    better = write_candidate(tmp_path / "better", noise=0.0, seed=0)
    assert "gain is plausible" not in failures(verdict_on(better, champion))
    name = "gain is plausible"
    assert "look for a feature that knows the label" in failures(verdict_on(better, champion, highest_gain=0.01))[name]


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"margin": float("nan")}, "margin is nan, which is no number"),
        ({"margin": None}, "parameter margin of penstock.policy is a float, not None"),
        ({"margin": -0.1}, "margin is -0.1, below 0"),
        ({"heads": {"click": None, "long_view": 0.1, "like": 0.1}}, "heads of click is None, which is no number"),
        ({"heads": {"click": 0.1}}, "heads has no margin for long_view, like"),
        ({"primary": "accuracy"}, "primary is 'accuracy'"),
        ({"guardrails": {"auc_share": 0.1}}, "guardrails has 'auc_share'"),
        ({"baselines": {"random": 0.1}}, "baselines has 'random'; there are popularity, item_item_cf"),
        ({"slices": ["old users"]}, "slices has 'old users'"),
        ({"confidence": 1.0}, "confidence is 1.0, not between 0 and 1"),
        ({"thresholds": {}}, "unknown parameter thresholds of penstock.policy: there are confidence,"),
    ],
)
def test_a_policy_that_says_nothing_approves_nothing(candidate: Artifacts, policy: dict[str, Any], says: str) -> None:
    name, reason = only_failure(verdict_on(candidate, **policy))
    assert name == "policy is complete"
    assert says in reason


@pytest.mark.parametrize("primary", ["auc_click", "gauc_long_view", "ndcg@5_click"])
def test_another_figure_can_be_the_one_that_counts(candidate: Artifacts, champion: Path, primary: str) -> None:
    verdict = verdict_on(candidate, champion, primary=primary)
    assert verdict.primary["measure"] == primary
    kind, label = primary.split("_", 1)
    assert f"the {kind.upper()} of {label} of the fused score is {verdict.primary['candidate']:.4f}" in next(
        check.reason for check in verdict.checks if check.name == "better than the champion"
    )
    rows = pl.read_parquet(candidate.test_predictions)
    weights = json.loads((candidate.weights / "weights.json").read_text())["weights"]
    score = sum(weights[label] * rows[f"p_{label}"].to_numpy() for label in LABELS)
    expected = {
        "auc": lambda y: metrics.auc(y, score),
        "gauc": lambda y: metrics.gauc(y, score, rows["user_id"].to_numpy()),
        "ndcg@5": lambda y: metrics.session_ndcg(y, score, rows["session"].to_numpy(), 5),
    }[kind](rows[label].to_numpy())
    assert verdict.primary["candidate"] == pytest.approx(expected, abs=1e-12)


def test_guardrails_hold_what_the_primary_figure_does_not_see(candidate: Artifacts, champion: Path) -> None:
    """A fused score that only serves clicks wins by clicks, and loses what it is guarded for."""
    put_weights(candidate, click=1.0, long_view=0.0, like=0.0)
    verdict = verdict_on(candidate, champion, primary="auc_click", guardrails={"gauc_like": 0.01, "ndcg@10_like": 0.01})
    assert failures(verdict).keys() >= {"GAUC of like not worse than the champion's"}
    assert "better than the champion" not in failures(verdict)


@pytest.mark.parametrize(
    "missing", ["weights/weights.json", "weights/grid.parquet", "rank/predictions/test.parquet", "recall/items.parquet"]
)
def test_a_missing_or_broken_artifact_is_a_rejection_that_names_it(candidate: Artifacts, missing: str) -> None:
    (candidate.root / missing).write_text("{}")
    assert only_failure(verdict_on(candidate))[0] == "artifacts are complete"
    (candidate.root / missing).unlink()
    name, reason = only_failure(verdict_on(candidate))
    assert name == "artifacts are complete"
    assert missing.split("/")[-1] in reason
    document = json.loads((candidate.verdict / "verdict.json").read_text())
    assert document["approved"] is False


def test_weights_that_are_not_numbers(candidate: Artifacts) -> None:
    put_weights(candidate, click=float("nan"), long_view=1.0, like=1.0)
    assert only_failure(verdict_on(candidate))[0] == "figures are defined"


# Slices


def test_slices_are_named_and_small_ones_left_unjudged(candidate: Artifacts, champion: Path) -> None:
    verdict = verdict_on(candidate, champion)
    found = {one["name"]: one for one in verdict.slices}
    assert list(found) == [
        "new users",
        "known users",
        "new items",
        "tail items",
        "scenario 0",
        "scenario 1",
        "scenario 2",
    ]
    rows = pl.read_parquet(candidate.test_predictions)
    assert found["new users"]["rows"] == rows["new_user"].sum()
    assert found["new items"]["auc"] is None  # about a hundred rows
    assert found["new users"]["low"] < found["new users"]["auc"] < found["new users"]["high"]
    weights = json.loads((candidate.weights / "weights.json").read_text())["weights"]
    part = rows.filter(pl.col("scenario") == 1)
    score = sum(weights[label] * part[f"p_{label}"].to_numpy() for label in LABELS)
    assert found["scenario 1"]["auc"] == pytest.approx(np.mean([roc_auc_score(part[label], score) for label in LABELS]))
    assert {check.name for check in verdict.checks if check.name.startswith("no harm")} == {
        *("no harm to new users", "no harm to known users", "no harm to tail items"),
        *(f"no harm to scenario {value}" for value in range(3)),
    }
