from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from penstock import fusion, gate
from penstock.events import LABELS
from penstock.gate import Policy, Verdict
from tests.penstock.candidates import Artifacts, write_candidate, write_release

POLICY = Policy(replicates=200)


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


def verdict_on(candidate: Artifacts, champion: Path | None = None, policy: Policy = POLICY) -> Verdict:
    paths = (candidate.examples, candidate.recall, candidate.rank, candidate.weights)
    return gate.judge_candidate(*paths, str(champion or ""), candidate.verdict, policy)


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
        *("auc", "low", "high", "champion", "difference", "difference_low", "difference_high", "popularity")
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
    weights = {"weights": {"click": 0.5, "long_view": 0.5, "like": 0.5}}  # another scale, the same ranking
    (candidate.weights / "weights.json").write_text(json.dumps(weights))
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
    name, reason = only_failure(verdict_on(candidate, policy=Policy(minimum_rows=5001)))
    assert (name, reason) == ("enough test rows", "There are 5,000 test rows; 5,001 are asked for.")
    rare = pl.when(pl.int_range(pl.len()) < 4000).then(0).otherwise(pl.col("like")).cast(pl.Int8)
    for path in (candidate.test_predictions, candidate.examples / "test.parquet"):
        candidate.change(path, like=rare)
    positives = pl.read_parquet(candidate.test_predictions)["like"].sum()
    name, reason = only_failure(verdict_on(candidate, policy=Policy(minimum_cases=positives + 1)))
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
    document = {"weights": {"click": 0.1, "long_view": 0.0, "like": 1.0}}
    (candidate.weights / "weights.json").write_text(json.dumps(document))
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
    assert json.loads((candidate.verdict / "verdict.json").read_text())["approved"] is False


def test_a_recall_model_that_finds_no_more_than_chance(candidate: Artifacts) -> None:
    document = json.loads((candidate.recall / "metrics.json").read_text())
    for value, says in ((0.04, "a random list finds 5.0%"), (float("nan"), "no finite recall@50"), (None, "no finite")):
        document["test"]["recall@50"] = value
        (candidate.recall / "metrics.json").write_text(json.dumps(document))
        name, reason = only_failure(verdict_on(candidate))
        assert name == "recall@50 above chance"
        assert says in reason


@pytest.mark.parametrize(
    "missing", ["weights/weights.json", "weights/grid.parquet", "rank/predictions/test.parquet", "recall/metrics.json"]
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
    document = {"weights": {"click": float("nan"), "long_view": 1.0, "like": 1.0}}
    (candidate.weights / "weights.json").write_text(json.dumps(document))
    assert only_failure(verdict_on(candidate))[0] == "figures are defined"


# Slices


def test_slices_are_named_and_small_ones_left_unjudged(candidate: Artifacts, champion: Path) -> None:
    verdict = verdict_on(candidate, champion)
    found = {one["name"]: one for one in verdict.slices}
    assert list(found) == ["new users", "known users", "new items", "scenario 0", "scenario 1", "scenario 2"]
    rows = pl.read_parquet(candidate.test_predictions)
    assert found["new users"]["rows"] == rows["new_user"].sum()
    assert found["new items"]["auc"] is None  # about a hundred rows
    assert found["new users"]["low"] < found["new users"]["auc"] < found["new users"]["high"]
    weights = json.loads((candidate.weights / "weights.json").read_text())["weights"]
    part = rows.filter(pl.col("scenario") == 1)
    score = sum(weights[label] * part[f"p_{label}"].to_numpy() for label in LABELS)
    assert found["scenario 1"]["auc"] == pytest.approx(np.mean([roc_auc_score(part[label], score) for label in LABELS]))
    assert {check.name for check in verdict.checks if check.name.startswith("no harm")} == {
        *("no harm to new users", "no harm to known users"),
        *(f"no harm to scenario {value}" for value in range(3)),
    }
