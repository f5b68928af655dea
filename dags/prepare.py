"""A log becomes training examples: ingest → validate → features → examples."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from airflow.sdk import BaseOperatorLink, Param, dag, get_current_context

from dags.assets import EXAMPLES
from dags.stages import RESOURCES, home, run, stage, tracking_uri, uri


def run_name(run_id: str) -> str:
    """What MLflow calls the validation of a run of this DAG."""
    return f"prepare-{run_id}"


class DataDocs(BaseOperatorLink):
    """A button on the page of a task that has ended, well or not."""

    name = "Data Docs"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The Data Docs in MLflow; nothing if there is no server, or they were not written."""
        from components.tracking import DATA_DOCS, find_run_url

        page = find_run_url(tracking_uri(), run_name(ti_key.run_id))
        return page and f"{page}/artifacts/{DATA_DOCS}"


@dag(
    dag_id="prepare",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    tags=["penstock"],
    default_args={"retries": 0, "execution_timeout": timedelta(hours=6)},
    params={
        "source": Param(
            "simulator", type="string", description="where the log comes from: a file of penstock/datasets"
        ),
        "options": Param({}, type="object", description="its settings (its Config), by name"),
        "feedback": Param(True, type="boolean", description="add what the gateway has logged"),
        "max_bad_share": Param(
            0.01, type="number", minimum=0, maximum=1, description="more bad rows of a table fail the run"
        ),
        "severity": Param(
            {},
            type="object",
            additionalProperties={"enum": ["quarantine", "fail"]},
            description="what a rule does with a row that breaks it, by name of the rule (see the Data Docs)",
        ),
        "limits": Param(
            {}, type="object", description="how far a day may be from those before it: Config of penstock/days.py"
        ),
        "validation_days": Param(2, type="integer", minimum=1),
        "test_days": Param(2, type="integer", minimum=1),
        "resources": Param(**RESOURCES),
    },
    doc_md="""
    ### From the log to training examples
    1. **ingest** the log from its source, with the gateway's own feedback added and mended rows put in place;
    2. **validate** it: bad rows go to quarantine with the reason; too many, a day out of the ordinary, or a rule that
       is set to fail, fail the run. The Data Docs are linked from the task and from MLflow, and
       `make mend FILE=<quarantine>` brings corrected rows back;
    3. **features**: Feast's tables are filled, offline and online;
    4. **examples**: each event with the features as they were before it, split by time.

    It ends with the asset `examples`, which starts `train`. Results lie in `PENSTOCK_HOME/runs/prepare/`.
    """,
)
def prepare() -> None:
    @stage(doc_md="The log of `params.source`, with the gateway's feedback and mended rows (penstock/events.py).")
    def ingest() -> dict[str, Any]:
        params = get_current_context()["params"]
        return run(
            "ingest",
            source=params["source"],
            options=json.dumps(dict(params["options"])),
            feedback=str(home() / "feedback") if params["feedback"] else "",
            mended=json.dumps([str(path) for path in sorted((home() / "mended").glob("*.parquet"))]),
        )

    @stage(doc_md="Great Expectations over the log. Bad rows go to quarantine, or fail the run; see *Data Docs*.")
    def validate(ingested: dict[str, Any]) -> dict[str, Any]:
        context = get_current_context()
        params = context["params"]
        return run(
            "validate",
            log_uri=uri(ingested, "log"),
            max_bad_share=float(params["max_bad_share"]),
            severity=json.dumps(dict(params["severity"])),
            limits=json.dumps(dict(params["limits"])),
            tracking_uri=tracking_uri(),
            run_name=run_name(context["dag_run"].run_id),
        )

    @stage(doc_md="Feature tables from the validated log, into Feast's offline and online stores.")
    def features(validated: dict[str, Any]) -> dict[str, Any]:
        return run("features", validated_uri=uri(validated, "validated"), home=str(home()))

    @stage(outlets=[EXAMPLES], doc_md="Training examples by point-in-time join; ends in the asset `examples`.")
    def examples(validated: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
        context = get_current_context()
        outputs = run(
            "examples",
            validated_uri=uri(validated, "validated"),
            features_uri=uri(features, "features"),
            home=str(home()),
            validation_days=context["params"]["validation_days"],
            test_days=context["params"]["test_days"],
        )
        context["outlet_events"][EXAMPLES].extra = {
            "uri": uri(outputs, "examples"),
            "log": uri(validated, "validated"),
            "run_id": context["dag_run"].run_id,
            "source": context["params"]["source"],
            "validation": validated["parameters"]["run_id"],
        }
        return outputs

    validated = validate(ingest())
    validated.operator.operator_extra_links = (DataDocs(),)
    examples(validated, features(validated))


prepare()
