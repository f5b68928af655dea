"""Makes an approved candidate, or one that a person forces, a numbered release."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def build_release(
    recall: dsl.Input[dsl.Model],
    rank: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    rehearsal: dsl.Input[dsl.Artifact],
    report: dsl.Input[dsl.HTML],
    home: str,
    store: str,
    approved_by: str,
    run_id: str,
    git_revision: str,
    environment: str,
    force_reason: str,
    release: dsl.Output[dsl.Artifact],
) -> int:
    """The number of the release in HOME/releases, and at the URL `store`; `release` holds a copy of its manifest."""
    import shutil
    from pathlib import Path

    from penstock.release import MANIFEST, Candidate, build, directory
    from penstock.release_store import ReleaseStore

    parts = (recall, rank, weights, verdict, rehearsal, report)
    number = build(
        Path(home),
        Candidate(*(Path(part.path) for part in parts)),
        approved_by=approved_by,
        run_id=run_id,
        git_revision=git_revision,
        environment=environment,
        force_reason=force_reason,
        store=ReleaseStore(store) if store else None,
    )
    Path(release.path).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory(Path(home), number) / MANIFEST, Path(release.path) / MANIFEST)
    release.metadata["release"] = number
    return number
