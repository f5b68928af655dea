"""Items by those who liked them: feedback → seeds → of each release (a model →) its table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Param, dag, get_current_context, task, task_group
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dags.assets import EXAMPLES, newest
from dags.stages import home, run, stage, uri

MINUTES = float(os.environ.get("PENSTOCK_LOOK_ALIKE_MINUTES") or 0)
"""0: by hand alone."""


def seeds_config(overrides: dict[str, Any]) -> Any:
    """What the buffer of seeds keeps."""
    import penstock
    from penstock import seeds

    try:
        return penstock.config(seeds, overrides)
    except ValueError as error:
        raise AirflowFailException(f"seeds: {error}") from None


def answering() -> list[int]:
    """The releases that answer."""
    from penstock import routing

    return list(routing.read(home() / "routing.json").answering)


@contextmanager
def at_work(number: int) -> Iterator[None]:
    """Has what goes wrong name the release; skips one that a long run has outlived."""
    if number not in answering():
        raise AirflowSkipException(f"release {number} answers no more")
    try:
        yield
    except Exception as error:
        raise AirflowFailException(f"release {number}: {error}") from error


@dag(
    dag_id="look_alike",
    schedule=timedelta(minutes=MINUTES) if MINUTES else None,
    catchup=False,
    max_active_runs=1,
    tags=["penstock"],
    default_args={"retries": 0, "execution_timeout": timedelta(hours=2)},
    params={
        "config": Param({}, type="object", description="settings of the look-alike model, by name"),
        "seeds": Param({}, type="object", description="what the buffer of seeds keeps: Config of penstock/seeds.py"),
        "retrain": Param(False, type="boolean", description="train the model of the releases that answer anew"),
        "seed": Param(1, type="integer"),
    },
    doc_md="""
    ### A new item reaches its audience with no training
    1. **follow** takes the feedback since the last run into the seeds: of each item, who liked it lately;
    2. **train** makes the look-alike model of a release's query tower, once in the release's life;
    3. **refresh** groups the seeds of the items that changed and replaces the release's table: the gateway's next
       request is answered by it.

    The last two are done for each release that answers by itself: one that fails leaves the others' as they would be.
    It runs by hand, and every PENSTOCK_LOOK_ALIKE_MINUTES if that is set. What fails leaves the former table.
    """,
)
def look_alike() -> None:
    @task(doc_md="The feedback since the last run becomes seeds. Skips the rest while no release answers.")
    def follow() -> list[int]:
        numbers = answering()
        if not numbers:
            raise AirflowSkipException("no release is live")
        from serving import look_alike  # takes seconds, and there is nothing to follow for before a release is live

        look_alike.follow(home(), seeds_config(dict(get_current_context()["params"]["seeds"])))
        return numbers

    @stage(
        inlets=[EXAMPLES],
        map_index_template="release {{ task.op_kwargs['number'] }}",
        doc_md="Trains the look-alike model of a release that has none.",
    )
    def train(number: int) -> int:
        from penstock import release
        from penstock.look_alike import tower_of
        from serving import look_alike

        context = get_current_context()
        params = context["params"]
        with at_work(number):
            if look_alike.trained(home(), number) and not params["retrain"]:
                return number
            found = newest(EXAMPLES, context, "there are no examples yet: trigger the DAG `prepare` first")
            outputs = run(
                "look_alike",
                key=str(number),
                examples_uri=found["uri"],
                recall_uri=str(release.directory(home(), number) / "recall"),
                config=json.dumps(dict(params["config"])),
                seed=params["seed"],
                tower=tower_of(release.manifest(home(), number)),
            )
            look_alike.adopt(home(), number, Path(uri(outputs, "look_alike")) / "model.npz")
        return number

    @task(
        map_index_template="release {{ task.op_kwargs['number'] }}",
        doc_md="Groups the seeds of the items that changed, and replaces the table of a release.",
    )
    def refresh(number: int) -> dict[str, Any]:
        from serving import look_alike, rollout

        config = seeds_config(dict(get_current_context()["params"]["seeds"]))
        with at_work(number):
            return asdict(look_alike.refresh(home(), number, rollout.servers(os.environ).model_server, config))

    @task_group(prefix_group_id=False, tooltip="A release that answers")
    def answers(number: int) -> None:
        refresh(number=train(number=number))

    answers.expand(number=follow())


look_alike()
