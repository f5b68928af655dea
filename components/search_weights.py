"""Searches the output weights on the validation slice."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def search_weights(rank: dsl.Input[dsl.Model], weights: dsl.Output[dsl.Artifact]):
    """The best point of the grid, and the whole grid as Parquet."""
    from pathlib import Path

    from penstock.fusion import search_predictions

    found = search_predictions(Path(rank.path), Path(weights.path))
    weights.metadata.update({**found.weights, found.objective: found.value})
    chosen = ", ".join(f"{name} {weight:.1f}" for name, weight in found.weights.items())
    print(f"weights: {chosen}; {found.objective} {found.value:.4f} on validation")
