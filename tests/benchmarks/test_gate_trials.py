from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bad_candidates import KINDS, Kind, Stage
from benchmarks.gate_trials import chance, expected_auc
from tests.penstock.candidates import write_candidate, write_release

TOLD_EARLY = {"champion can be scored", "figures are defined", "policy is complete"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A good candidate, made up."""
    place = tmp_path_factory.mktemp("good")
    candidate = write_candidate(place / "candidate")
    return Stage(candidate.root, write_release(place / "7", 7), {"replicates": 50})


def test_every_kind_is_told_apart_and_names_checks_that_there_are(good: Stage) -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 30
    verdict = good.judge()
    assert verdict.approved
    names = {check.name for check in verdict.checks} | TOLD_EARLY | {"no harm to new items"}
    for kind in KINDS:
        assert set(kind.reasons) <= names, kind.name


OF_FILES = ("constant scores", "probabilities squared", "predictions of other rows", "a missing threshold")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in OF_FILES], ids=lambda kind: kind.name)
def test_a_spoilt_candidate_is_rejected_for_its_reason(good: Stage, kind: Kind, tmp_path: Path) -> None:
    stage = Stage(shutil.copytree(good.root, tmp_path / "candidate"), good.champion)
    kind.spoil(stage)
    failed = {check.name for check in stage.judge().checks if not check.passed}
    assert failed & set(kind.reasons)


def test_the_expected_auc_is_the_mean_over_labels_that_might_have_been() -> None:
    generator = np.random.default_rng(0)
    scores, chances = generator.random(400), generator.random(400)
    drawn = [auc_of(scores, generator.random(400) < chances) for _ in range(300)]
    assert expected_auc(scores, chances) == pytest.approx(np.mean(drawn), abs=0.002)
    # certain labels: the AUC itself
    labels = (generator.random(400) < 0.3).astype(float)
    assert expected_auc(scores, labels) == pytest.approx(auc_of(scores, labels == 1), abs=1e-9)


def auc_of(scores: np.ndarray, positive: np.ndarray) -> float:
    return float((scores[positive][:, None] > scores[~positive][None, :]).mean())


def test_chance_counts_what_was_promoted(capsys: pytest.CaptureFixture[str]) -> None:
    no = {"approved": False, "difference": 0.001, "true": 0.0, "failed": ["better than the champion"]}
    yes = {"approved": True, "difference": 0.004, "true": 0.001, "failed": []}
    (row,) = chance([{"same": [no] * 9 + [yes]}, {"same": [no] * 10}], goal=True)
    assert row.ours == pytest.approx(0.05)
    assert row.holds
    (row,) = chance([{"same": [no] * 8 + [yes] * 2}, {"same": [no] * 10}], goal=True)
    assert not row.holds
