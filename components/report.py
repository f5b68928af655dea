"""Writes the page a person approves by, and records the candidate in MLflow."""

from kfp import dsl


@dsl.component(base_image="penstock/python-step:latest", install_kfp_package=False)
def report(
    examples: dsl.Input[dsl.Dataset],
    recall: dsl.Input[dsl.Model],
    rank: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    tracking_uri: str,
    run_name: str,
    validation: str,
    report: dsl.Output[dsl.HTML],
) -> str:
    """One HTML file; the answer is the id of the MLflow run that holds it as `report.html`, with every figure.

    Args:
        validation: the id of the MLflow run with the Data Docs of the log; a tag of the candidate's.
    """
    import shutil
    import tempfile
    from pathlib import Path

    from components.tracking import log_run
    from penstock.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"  # named so that MLflow shows it as a page
        record = write_report(
            Path(examples.path), Path(recall.path), Path(rank.path), Path(weights.path), Path(verdict.path), page
        )
        Path(report.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, report.path)
        run_id = log_run(
            tracking_uri, run_name, record.params, record.metrics, record.files, tags={"validation": validation}
        )
    report.metadata["run_id"] = run_id
    return run_id
