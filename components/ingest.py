"""A data set, by name, and what the gateway was told → a log."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def ingest(source: str, options: str, feedback: str, log: dsl.Output[dsl.Dataset]) -> None:
    """Writes the log of `penstock.datasets.<source>`, and the gateway's feedback as its part "feedback".

    Args:
        options: the source's Config overrides, as JSON.
        feedback: the gateway's feedback directory; it may be absent.
    """
    import json
    import time
    from pathlib import Path

    from penstock import config, module
    from penstock.feedback import append_feedback

    start = time.monotonic()
    dataset = module("datasets", source)
    dataset.write_log(config(dataset, json.loads(options or "{}")), Path(log.path))
    rows = append_feedback(Path(log.path), Path(feedback)) if feedback else 0
    print(f"ingest: {source} and {rows:,} rows of feedback in {time.monotonic() - start:.1f} s")
