"""A validated log → the feature tables, offline and online."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def materialise(home: str, validated: dsl.Input[dsl.Dataset], features: dsl.Output[dsl.Dataset]) -> None:
    """Makes the feature tables of the log, registers their definitions and fills the online store.

    `features` holds tables.json: for each view its rows, entities online and newest snapshot.
    """
    import time
    from pathlib import Path

    from feature_repo.store import refresh

    start = time.monotonic()
    tables = refresh(Path(home), Path(validated.path), Path(features.path))
    rows = sum(table["rows"] for table in tables.values())
    online = sum(table["online"] for table in tables.values())
    features.metadata["rows"] = rows
    print(f"materialise: {rows:,} snapshots offline, {online:,} online in {time.monotonic() - start:.1f} s")
