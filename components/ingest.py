"""A data set, by name, what the gateway was told, and mended rows → a log."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def ingest(source: str, options: str, feedback: str, mended: str, log: dsl.Output[dsl.Dataset]) -> None:
    """Writes the log of `penstock.datasets.<source>`, and the gateway's feedback as its part "feedback".

    Args:
        options: the source's Config overrides, as JSON.
        feedback: the gateway's feedback directory; it may be absent.
        mended: the files of mended rows that take the place of bad ones, oldest first, as JSON.
    """
    import json
    import time
    from pathlib import Path

    from penstock import config, module
    from penstock.feedback import append_feedback
    from penstock.quarantine import add_mended

    start = time.monotonic()
    dataset = module("datasets", source)
    dataset.write_log(config(dataset, json.loads(options or "{}")), Path(log.path))
    rows = append_feedback(Path(log.path), Path(feedback)) if feedback else 0
    back = add_mended(Path(log.path), [Path(path) for path in json.loads(mended or "[]")])
    took = time.monotonic() - start
    print(f"ingest: {source}, {rows:,} rows of feedback and {back:,} mended rows in {took:.1f} s")
