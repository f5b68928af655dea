"""Trains the look-alike model of a release's query tower."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def train_look_alike(
    examples: dsl.Input[dsl.Dataset],
    recall: dsl.Input[dsl.Model],
    config: str,
    seed: int,
    tower: str,
    look_alike: dsl.Output[dsl.Model],
):
    """`model.npz` and `history.json`; `recall` is the SavedModel, `tower` says which query tower that is."""
    import json
    from pathlib import Path

    import penstock
    from penstock import look_alike_training

    look_alike_training.train_look_alike(
        Path(examples.path),
        Path(recall.path),
        penstock.config(look_alike_training, json.loads(config)),
        seed,
        tower,
        Path(look_alike.path),
    )
