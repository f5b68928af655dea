"""Makes an approved candidate, or one that a person forces, a numbered release."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def build_release(
    recall: dsl.Input[dsl.Model],
    rank: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    report: dsl.Input[dsl.HTML],
    home: str,
    approved_by: str,
    run_id: str,
    git_revision: str,
    force_reason: str,
    release: dsl.Output[dsl.Artifact],
) -> int:
    """The number of the release in HOME/releases; `release` holds a copy of its manifest."""
    import shutil
    from pathlib import Path

    from penstock.release import MANIFEST, Candidate, build, directory

    candidate = Candidate(Path(recall.path), Path(rank.path), Path(weights.path), Path(verdict.path), Path(report.path))
    number = build(
        Path(home),
        candidate,
        approved_by=approved_by,
        run_id=run_id,
        git_revision=git_revision,
        force_reason=force_reason,
    )
    Path(release.path).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory(Path(home), number) / MANIFEST, Path(release.path) / MANIFEST)
    release.metadata["release"] = number
    return number
