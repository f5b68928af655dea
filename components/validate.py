"""A log → its good rows, and its bad rows with the reason."""

from typing import NamedTuple

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def validate(
    max_bad_share: float,
    severity: str,
    limits: str,
    tracking_uri: str,
    run_name: str,
    log: dsl.Input[dsl.Dataset],
    validated: dsl.Output[dsl.Dataset],
    quarantine: dsl.Output[dsl.Dataset],
    docs: dsl.Output[dsl.HTML],
) -> NamedTuple("Outputs", [("rows", int), ("quarantined", int), ("bad_share", float), ("run_id", str)]):  # type: ignore[valid-type]
    """Splits the log by the rules of `components.rules`; fails where it breaks one that is to fail.

    `quarantine` is one Parquet file, `docs` a directory with the page index.html; both are there after a failure too,
    and in the MLflow run `run_id`.

    Args:
        severity: other severities than the rules have, by name of the rule, as JSON.
        limits: Config overrides of `penstock.days`, as JSON.
    """
    import json
    import time
    from pathlib import Path

    print("validate: loading Great Expectations", flush=True)
    from components.expectations import record, validate_log
    from penstock import config, days

    start = time.monotonic()
    asked = {"max_bad_share": max_bad_share, "severity": json.loads(severity), "limits": json.loads(limits)}
    found = validate_log(
        Path(log.path),
        Path(validated.path),
        Path(quarantine.path),
        Path(docs.path),
        max_bad_share=max_bad_share,
        severity=asked["severity"],
        limits=config(days, asked["limits"]),
    )
    rows, quarantined = sum(found.rows.values()), sum(found.bad.values())
    print(f"validate: {rows:,} rows, {quarantined:,} quarantined in {time.monotonic() - start:.1f} s", flush=True)
    run_id = record(found, Path(quarantine.path), Path(docs.path), tracking_uri, run_name, asked | {"log": log.path})
    docs.metadata["run_id"] = run_id
    return rows, quarantined, found.bad_share, run_id
