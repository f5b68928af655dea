"""A log → its good rows, and its bad rows with the reason."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def validate(
    max_bad_share: float,
    log: dsl.Input[dsl.Dataset],
    validated: dsl.Output[dsl.Dataset],
    quarantine: dsl.Output[dsl.Dataset],
    docs: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", [("rows", int), ("quarantined", int), ("bad_share", float)]):  # type: ignore[valid-type]
    """Splits the log by the rules of `penstock.events`; fails where more than `max_bad_share` of a table is bad.

    `quarantine` is one Parquet file; `docs` a directory of pages, index.html first.
    """
    import time
    from pathlib import Path

    from components.expectations import split_log

    start = time.monotonic()
    split = split_log(Path(log.path), Path(validated.path), Path(quarantine.path), Path(docs.path), max_bad_share)
    rows, quarantined = sum(split.rows.values()), sum(split.bad.values())
    print(f"validate: {rows:,} rows, {quarantined:,} quarantined in {time.monotonic() - start:.1f} s")
    return rows, quarantined, split.bad_share
