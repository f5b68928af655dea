"""The former release back, everything at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import Param, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException

from dags.stages import follow_routing, home


@dag(
    dag_id="rollback",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    tags=["penstock"],
    default_args={"execution_timeout": timedelta(minutes=10)},
    params={
        "reason": Param("", type="string", description="kept in the routing document"),
        "leaving": Param(
            None,
            type=["null", "integer"],
            description="the release to leave: if it is not live any more, nothing is done; by default whichever is",
        ),
    },
    doc_md="""
    ### The former release back
    Recall, index, rank model and output weights of the release that was live before answer everybody again,
    and a canary ends. The release that is left stays where it is: `release` can promote it again.
    """,
)
def rollback() -> None:
    @task(retries=0, doc_md="Routes everybody to the former release.")
    def back() -> int | None:
        from serving import rollout

        context: Any = get_current_context()
        by = context["dag_run"].triggering_user_name or "airflow"
        reason = context["params"]["reason"] or f"rollback in run {context['run_id']}"
        try:
            return rollout.rollback(home(), by=by, reason=reason, leaving=context["params"]["leaving"]).champion
        except rollout.RolloutError as error:
            raise AirflowFailException(str(error)) from None

    @task(retries=1, retry_delay=timedelta(seconds=5), doc_md="MLflow's aliases follow what is live.")
    def aliases() -> None:
        follow_routing()

    back() >> aliases()


rollback()
