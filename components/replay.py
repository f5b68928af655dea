"""Holds what requests were served against what training is given for them."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def replay(
    validated: dsl.Input[dsl.Dataset],
    home: str,
    release: int,
    newest: int,
    min_equal_share: float,
    tracking_uri: str,
    replayed: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("reached", bool), ("sentence", str)]):  # type: ignore[valid-type]
    """Replays the `newest` logged requests and a probe for a release; too many differences are no failure.

    `validated` is the log the release was trained on, `home` has its feedback and its served vectors. `replayed` holds
    replay.html and replay.json, which the release's MLflow run gets too, with the figures.
    """
    import tempfile
    import time
    from pathlib import Path

    from components.tracking import add_to_run
    from feature_repo.replay import replay as replay_release
    from penstock.release import manifest
    from penstock.replay_page import write_replay

    start = time.monotonic()
    out = Path(replayed.path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        found = replay_release(
            Path(home), Path(validated.path), release, Path(scratch), newest=newest, goal=min_equal_share
        )
    files = write_replay(found, out)
    add_to_run(tracking_uri, manifest(Path(home), release)["run_id"], found.metrics, files)
    replayed.metadata.update(found.metrics)
    print(f"{found.sentence} ({time.monotonic() - start:.1f} s)")
    return found.reached, found.sentence
