from __future__ import annotations

import json
from pathlib import Path

import pytest
from kfp import dsl

from components.build_release import build_release
from penstock import release
from tests.penstock.test_release import candidate


@pytest.mark.parametrize("force_reason", ["", "the audit asks for it"])
def test_a_candidate_becomes_a_release_that_says_who_approved_or_forced_it(tmp_path: Path, force_reason: str) -> None:
    made = candidate(tmp_path, approved=not force_reason)
    home, out = tmp_path / "home", tmp_path / "out"
    number = build_release.python_func(
        recall=dsl.Model(uri=str(made.recall)),
        rank=dsl.Model(uri=str(made.rank)),
        weights=dsl.Artifact(uri=str(made.weights)),
        verdict=dsl.Artifact(uri=str(made.verdict)),
        rehearsal=dsl.Artifact(uri=str(made.rehearsal)),
        report=dsl.HTML(uri=str(made.report)),
        home=str(home),
        store=str(tmp_path / "store"),
        approved_by="a person",
        run_id="run",
        git_revision="abc",
        environment="def",
        force_reason=force_reason,
        release=dsl.Artifact(uri=str(out)),
    )
    assert number == 1
    manifest = release.verify(home, number)
    assert (tmp_path / "store" / "1" / "manifest.json").is_file()
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert (manifest["approved_by"], manifest["run_id"], manifest["git_revision"]) == ("a person", "run", "abc")
    forced = {"by": "a person", "reason": force_reason, "verdict": "better"}
    assert manifest["forced"] == (forced if force_reason else None)
