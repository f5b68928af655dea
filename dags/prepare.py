"""A log becomes training examples: ingest → validate → features → examples."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from airflow.sdk import Param, dag, get_current_context, task

from dags.assets import EXAMPLES
from dags.stages import home, run, uri


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
        "max_bad_share": Param(0.01, type="number", minimum=0, maximum=1, description="more bad rows fail the run"),
        "validation_days": Param(2, type="integer", minimum=1),
        "test_days": Param(2, type="integer", minimum=1),
    },
    doc_md="""
    ### From the log to training examples
    1. **ingest** the log from its source, with the gateway's own feedback added;
    2. **validate** it: bad rows go to quarantine with the reason, too many fail the run;
    3. **features**: Feast's tables are filled, offline and online;
    4. **examples**: each event with the features as they were before it, split by time.

    It ends with the asset `examples`, which starts `train`. Results lie in `PENSTOCK_HOME/runs/prepare/`.
    """,
)
def prepare() -> None:
    @task(doc_md="The log of `params.source`, and the gateway's feedback, in the layout of penstock/events.py.")
    def ingest() -> dict[str, Any]:
        params = get_current_context()["params"]
        feedback = str(home() / "feedback") if params["feedback"] else ""
        return run("ingest", source=params["source"], options=json.dumps(dict(params["options"])), feedback=feedback)

    @task(doc_md="Great Expectations over the log. Bad rows go to quarantine; more than `max_bad_share` of them fail.")
    def validate(ingested: dict[str, Any]) -> dict[str, Any]:
        share = get_current_context()["params"]["max_bad_share"]
        return run("validate", log_uri=uri(ingested, "log"), max_bad_share=float(share))

    @task(doc_md="Feature tables from the validated log, into Feast's offline and online stores.")
    def features(validated: dict[str, Any]) -> dict[str, Any]:
        return run("features", validated_uri=uri(validated, "validated"), home=str(home()))

    @task(outlets=[EXAMPLES], doc_md="Training examples by point-in-time join; ends in the asset `examples`.")
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
            "run_id": context["dag_run"].run_id,
            "source": context["params"]["source"],
        }
        return outputs

    validated = validate(ingest())
    examples(validated, features(validated))


prepare()
