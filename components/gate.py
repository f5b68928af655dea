"""Holds a candidate against the champion on the test slice."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def gate(
    examples: dsl.Input[dsl.Dataset],
    recall: dsl.Input[dsl.Model],
    rank: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Artifact],
    rehearsal: dsl.Input[dsl.Artifact],
    champion: str,
    policy: str,
    verdict: dsl.Output[dsl.Artifact],
) -> NamedTuple("Outputs", [("approved", bool), ("sentence", str)]):  # type: ignore[valid-type]
    """The verdict; a rejection is no failure.

    Args:
        champion: the directory of the live release, "" if none is.
        policy: thresholds by name as JSON, where they are not the default's.
    """
    import json
    from pathlib import Path

    from penstock.gate import judge_candidate

    found = judge_candidate(
        Path(examples.path),
        Path(recall.path),
        Path(rank.path),
        Path(weights.path),
        Path(rehearsal.path),
        champion,
        Path(verdict.path),
        json.loads(policy),
    )
    verdict.metadata.update({"approved": found.approved, "sentence": found.sentence})
    print(found.sentence)
    return found.approved, found.sentence
