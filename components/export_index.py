"""Exports a trained recall model with the vectors of its items."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def export_index(
    examples: dsl.Input[dsl.Dataset],
    recall_weights: dsl.Input[dsl.Model],
    recall: dsl.Output[dsl.Model],
):
    """SavedModel (query tower and item vectors), ids + vectors as Parquet, and its figures on both slices."""
    from pathlib import Path

    from penstock import candidate

    figures = candidate.write_recall(Path(examples.path), Path(recall_weights.path), Path(recall.path))
    recall.metadata.update(figures)
