"""Searches the output weights on the validation slice."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def search_weights(rank: dsl.Input[dsl.Model], search: str, champion: str, weights: dsl.Output[dsl.Artifact]):
    """The best point of the grid, and every point that was evaluated as Parquet.

    Args:
        search: settings of the search by name as JSON, where they are not the default's.
        champion: the directory of the live release, whose weights are the reference; "" if none is.
    """
    import json
    from pathlib import Path

    from penstock import fusion

    settings = fusion.settings(json.loads(search))
    found = fusion.search_predictions(Path(rank.path), Path(weights.path), settings, champion)
    weights.metadata.update({**found.weights, "objective": found.value})
    chosen = ", ".join(f"{name} {weight:g}" for name, weight in found.weights.items())
    print(
        f"weights: {chosen}; {settings.fusion}, {settings.objective} {found.value:.4f} on validation,"
        f" the best of {found.evaluations} directions"
    )
