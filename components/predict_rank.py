"""Exports a trained rank model and lets it predict the held-out slices."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def predict_rank(
    examples: dsl.Input[dsl.Dataset],
    rank_weights: dsl.Input[dsl.Model],
    rank: dsl.Output[dsl.Model],
):
    """SavedModel, predictions on validation and test, and their figures."""
    from pathlib import Path

    from penstock import candidate

    figures = candidate.write_rank(Path(examples.path), Path(rank_weights.path), Path(rank.path))
    rank.metadata.update(figures)
