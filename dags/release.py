"""A candidate becomes the release that answers: approve → (canary → evidence →) replay (→ approve) → promote."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Param, PokeReturnValue, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dags.assets import CANDIDATE, TURNED_DOWN, newest
from dags.stages import environment, follow_routing, git_revision, home, run, tracking_uri, uri

CANARY = {"share": 0.2, "min_impressions": 200, "wait_minutes": 60}
# an answer within seconds of the question can meet the executor's late report of the question, and fail
ASKED_AGAIN: dict[str, Any] = {"retries": 1, "retry_delay": timedelta(seconds=5)}
APPROVERS = [{"id": "admin", "name": "admin"}]


def primary_line(verdict: dict[str, Any]) -> str:
    """The figure that the policy decides by, candidate and opponent, in Markdown; nothing if there is none."""
    found = verdict["primary"]
    if not found:
        return ""
    against = found["opponent"] if verdict["champion"] is None else f"release {verdict['champion']}"
    change = found["difference"]
    chance = "" if found["p_value"] is None else f", p = {found['p_value']:.2g}"
    return (
        f"**{found['measure'].replace('_', ' ')}** of the fused score: **{found['candidate']:.4f}**, {against} "
        f"{found['opponent_value']:.4f}: {change['value']:+.4f} ({verdict['policy']['confidence']:.0%} interval "
        f"{change['low']:+.4f} to {change['high']:+.4f}{chance})"
    )


def verdict_table(verdict: dict[str, Any]) -> str:
    """The AUC of each head as a Markdown table, against the champion or popularity; nothing if there is none."""
    if not verdict["heads"]:
        return ""
    against = "popularity" if verdict["champion"] is None else f"release {verdict['champion']}"
    confidence = f"{100 * verdict['policy']['confidence']:g} % interval"
    lines = [f"| head | AUC | {confidence} | {against} | difference |", "|---|---|---|---|---|"]
    for name, head in verdict["heads"].items():
        other = head["popularity"] if verdict["champion"] is None else head["champion"]
        lines.append(
            f"| {name} | {head['auc']:.4f} | {head['low']:.4f} to {head['high']:.4f} "
            f"| {other:.4f} | {head['auc'] - other:+.4f} |"
        )
    return "\n".join(lines)


class Question(NamedTuple):
    """What a person is asked: `warning` stands before the subject of every approval of the run."""

    warning: str
    body: str


def question(verdict: dict[str, Any], where: list[str], force_reason: str, asked_by: str) -> Question:
    """The question by a verdict, with the places in `where`; loud if a rejected candidate is to be forced."""
    facts = [part for part in (primary_line(verdict), verdict_table(verdict), *where) if part]
    if not force_reason:
        return Question("", "\n\n".join(facts))
    failed = [f"- **{check['name']}**: {check['reason']}" for check in verdict["checks"] if not check["passed"]]
    loud = [
        "## The gate REJECTED this candidate",
        verdict["sentence"],
        f"It failed {len(failed)} of {len(verdict['checks'])} checks:\n\n" + "\n".join(failed),
        f"**{asked_by} asks to force it, with this reason:**\n\n> {' '.join(force_reason.split())}",
        "Whoever approves this forces the release: the name and the reason stand in its manifest for good.",
    ]
    return Question("FORCED, the gate REJECTED it: ", "\n\n".join([*loud, *facts]))


def online_counts(directory: Path, releases: dict[str, int]) -> dict[str, dict[str, int]]:
    """Impressions, clicks and long views of each variant (name → its release), from the gateway's own log."""
    import polars as pl

    from penstock.feedback import read_feedback

    shown = read_feedback(directory)
    counts = {}
    for variant, number in releases.items():
        part = shown.filter(pl.col("variant") == variant, pl.col("release") == number)
        counts[variant] = {"impressions": part.height} | {
            name: int(part[name].sum()) for name in ("click", "long_view")
        }
    return counts


def evidence_table(releases: dict[str, int], counts: dict[str, dict[str, int]]) -> str:
    """What users did with each variant, as a Markdown table."""
    lines = ["| variant | release | impressions | clicks | long views |", "|---|---|---|---|---|"]
    for variant, number in releases.items():
        shown, *done = (counts[variant][name] for name in ("impressions", "click", "long_view"))
        rates = " | ".join(f"{count / shown:.2%}" if shown else "–" for count in done)
        lines.append(f"| {variant} | {number} | {shown} | {rates} |")
    return "\n".join(lines)


class Answer(NamedTuple):
    """What came of an approval: `by` is "nobody" if its default was taken, `form` is what the approver filled in."""

    approved: bool
    by: str
    form: dict[str, Any]


def answer(task_id: str) -> Answer:
    """The answer to the approval `task_id` of this run."""
    said = get_current_context()["ti"].xcom_pull(task_ids=task_id) or {}
    by = said.get("responded_by_user") or {}
    approved = said.get("chosen_options") == [ApprovalOperator.APPROVE]
    return Answer(approved, by.get("name") or "nobody", CANARY | (said.get("params_input") or {}))


def with_force(reason: str) -> str:
    """The reason of an act, for the routing document: it says when this run forces what the gate has rejected."""
    forced = get_current_context()["params"]["force_reason"]
    return f"{reason}, forced against the gate: {forced}" if forced else reason


@dag(
    dag_id="release",
    schedule=[CANDIDATE],
    catchup=False,
    max_active_runs=1,
    tags=["penstock"],
    default_args={"retries": 0, "execution_timeout": timedelta(hours=1)},
    params={
        "force_reason": Param(
            "",
            type="string",
            pattern=r"^(|[\s\S]*\S[\s\S]*)(?![\s\S])",  # blank is no reason
            description="why the newest candidate that the gate has turned down is to be released all the same",
        ),
        "replayed_requests": Param(5000, type="integer", minimum=0, description="newest logged requests, at most"),
        "min_equal_share": Param(
            0.9999, type="number", minimum=0, maximum=1, description="of the vectors that the replay compares"
        ),
        "require_replay": Param(
            True, type="boolean", description="a lower share fails the run; without, a person decides by it"
        ),
    },
    doc_md="""
    ### From a candidate to what users get
    A person approves the candidate by the gate's verdict and the report; silence for a day is a rejection.
    The first release is promoted at once. Later ones answer a `share` of the users first (the canary); when it has been
    shown `min_impressions` times, or after `wait_minutes`, a person approves its promotion by what the A/B split has
    shown, or it is withdrawn. The approver sets the three in the form of the approval.

    With `force_reason` it takes the newest candidate that the gate has **turned down** instead. The approval says so,
    and why; who answers it is named in the manifest with the reason. It goes through canary and replay as any other.

    Before any promotion the **replay** holds the feature vectors that requests were served, and those of a probe,
    against what training is given for the same entity and time, bit for bit. Below `min_equal_share` the run fails and
    a canary is withdrawn, unless `require_replay` is off.

    Approvals wait under **Required Actions**. A rejection skips what follows and the run is a success: whether a
    release was promoted is told by the task `promote`.
    """,
)
def release() -> None:
    @task(
        inlets=[CANDIDATE, TURNED_DOWN],
        doc_md="The candidate, its verdict, and the champion it was held against; to be forced, one turned down.",
    )
    def candidate() -> dict[str, Any]:
        from components import tracking
        from penstock import routing

        context = get_current_context()
        reason = context["params"]["force_reason"]
        if reason:
            found = newest(
                TURNED_DOWN, context, "there is no candidate that was turned down: there is nothing to force"
            )
        else:
            found = newest(CANDIDATE, context, "there is no approved candidate yet: trigger the DAG `train` first")
        verdict = json.loads((Path(found["verdict"]) / "verdict.json").read_text())
        live = routing.read(home() / "routing.json").champion
        if verdict["champion"] != live:
            raise AirflowFailException(
                f"the candidate was held against release {verdict['champion']}, but {live} is live now: "
                "trigger the DAG `train` again"
            )
        where = [f"Report: `{found['report']}`"]
        if link := tracking.run_url(tracking_uri(), found["run_id"]):
            where.append(f"MLflow: [run {found['run_id']}]({link})")
        asked_by = context["dag_run"].triggering_user_name or "Somebody"
        return found | {"champion": live, **question(verdict, where, reason, asked_by)._asdict()}

    approve = ApprovalOperator(
        task_id="approve",
        subject="{{ ti.xcom_pull(task_ids='candidate')['warning'] }}Release this candidate? "
        "{{ ti.xcom_pull(task_ids='candidate')['sentence'] }}",
        body="{{ ti.xcom_pull(task_ids='candidate')['body'] }}",
        assigned_users=APPROVERS,
        defaults=ApprovalOperator.REJECT,
        response_timeout=timedelta(days=1),
        **ASKED_AGAIN,
        params={
            "share": Param(CANARY["share"], type="number", exclusiveMinimum=0, maximum=1, description="of the users"),
            "min_impressions": Param(
                CANARY["min_impressions"], type="integer", minimum=0, description="before promotion"
            ),
            "wait_minutes": Param(CANARY["wait_minutes"], type="integer", minimum=0, description="for them, at most"),
        },
        doc_md="A person decides by the verdict and the report. No answer within a day is a rejection.",
    )

    @task(doc_md="The numbered, immutable directory of the release, and its version in MLflow's registry.")
    def build(found: dict[str, Any]) -> int:
        from components import tracking
        from penstock import release as releases

        parts = {f"{name}_uri": found[name] for name in ("recall", "rank", "weights", "verdict", "rehearsal", "report")}
        outputs = run(
            "release",
            home=str(home()),
            store=os.environ.get("PENSTOCK_RELEASES", ""),
            approved_by=answer("approve").by,
            run_id=found["run_id"],
            git_revision=git_revision(),
            environment=environment(),
            force_reason=get_current_context()["params"]["force_reason"],
            **parts,
        )
        number = int(outputs["parameters"]["number"])
        tracking.register_release(tracking_uri(), releases.directory(home(), number), releases.manifest(home(), number))
        return number

    @task.branch(doc_md="The first release needs no canary; a later one goes through one.")
    def road(found: dict[str, Any], number: int) -> str:
        return "replay" if found["champion"] is None else "canary"

    @task(retries=1, retry_delay=timedelta(seconds=5), doc_md="The release answers a share of the users.")
    def canary(found: dict[str, Any], number: int) -> dict[str, Any]:
        from serving import rollout

        said = answer("approve")
        reason = f"canary of run {get_current_context()['run_id']}"
        rollout.canary(home(), number, float(said.form["share"]), by=said.by, reason=with_force(reason))
        follow_routing()
        pair = {"champion": found["champion"], "challenger": number}
        before = online_counts(home() / "feedback", pair)
        return {"releases": pair, "before": before, "since": time.time(), "form": said.form}

    # it stays in its worker: a reschedule after seconds can meet the executor's late report of the last poke and fail
    @task.sensor(
        mode="poke",
        poke_interval=5,
        timeout=timedelta(days=8).total_seconds(),
        execution_timeout=timedelta(days=8),
        doc_md="Waits until the canary has been shown often enough, or long enough, and tells how both variants fare.",
    )
    def evidence(started: dict[str, Any]) -> PokeReturnValue:
        form = started["form"]
        now, before = online_counts(home() / "feedback", started["releases"]), started["before"]
        counts = {name: {key: now[name][key] - before[name][key] for key in now[name]} for name in now}
        enough = counts["challenger"]["impressions"] >= form["min_impressions"]
        waited = time.time() - started["since"] >= form["wait_minutes"] * 60
        return PokeReturnValue(enough or waited, evidence_table(started["releases"], counts))

    @task(
        trigger_rule="none_failed_min_one_success",
        doc_md="Holds served feature vectors against offline ones; a release that is served others is not promoted.",
    )
    def replay() -> dict[str, str]:
        from components import tracking

        context = get_current_context()
        params = context["params"]
        found, number = (context["ti"].xcom_pull(task_ids=name) for name in ("candidate", "build"))
        if not Path(found.get("log") or "nowhere").is_dir():
            raise AirflowFailException("the log that this release was trained on is gone: trigger the DAG `prepare`")
        outputs = run(
            "replay",
            key=str(context["ti"].try_number),  # what was served has gone on since another try
            validated_uri=found["log"],
            home=str(home()),
            release=int(number),
            newest=params["replayed_requests"],
            min_equal_share=params["min_equal_share"],
            tracking_uri=tracking_uri(),
        )
        page = Path(uri(outputs, "replayed")) / "replay.html"
        reached, sentence = (outputs["parameters"][name] for name in ("reached", "sentence"))
        if not reached and params["require_replay"]:
            raise AirflowFailException(f"release {number} is not promoted. {sentence} See {page}")
        link = tracking.run_url(tracking_uri(), found["run_id"])
        where = f"[replay.html]({link}/artifacts/replay.html)" if link else f"`{page}`"
        return {"sentence": sentence, "body": f"{sentence if reached else f'**{sentence}**'} {where}"}

    approve_promotion = ApprovalOperator(
        task_id="approve_promotion",
        subject="{{ ti.xcom_pull(task_ids='candidate')['warning'] }}"
        "Promote release {{ ti.xcom_pull(task_ids='build') }} from canary to everybody?",
        body="{{ ti.xcom_pull(task_ids='candidate')['sentence'] }}\n\n"
        "{{ ti.xcom_pull(task_ids='candidate')['body'] }}\n\n"
        "{{ ti.xcom_pull(task_ids='replay')['body'] }}\n\nOnline so far:\n\n"
        "{{ ti.xcom_pull(task_ids='evidence') }}",
        assigned_users=APPROVERS,
        defaults=ApprovalOperator.REJECT,
        response_timeout=timedelta(days=7),
        **ASKED_AGAIN,
        doc_md="A person decides by the A/B evidence. No answer within a week withdraws the canary.",
    )

    @task(
        trigger_rule="none_failed_min_one_success",
        retries=1,
        retry_delay=timedelta(seconds=5),
        doc_md="The release answers everybody. Whether a run has promoted is told by this task.",
    )
    def promote() -> int:
        from serving import rollout

        context = get_current_context()
        first = context["ti"].xcom_pull(task_ids="candidate")["champion"] is None
        said = answer("approve" if first else "approve_promotion")
        if not said.approved:
            raise AirflowFailException("nobody has approved this promotion")
        number = int(context["ti"].xcom_pull(task_ids="build"))
        rollout.promote(home(), number, by=said.by, reason=with_force(f"approved in run {context['run_id']}"))
        return number

    # whatever became of the tasks before it: a canary that nobody can judge is none
    @task(trigger_rule="all_done", doc_md="A canary that was turned down, or that failed its replay, answers nobody.")
    def withdraw() -> None:
        from serving import rollout

        context = get_current_context()
        if context["ti"].xcom_pull(task_ids="canary") is None:
            raise AirflowSkipException("there was no canary")
        said = answer("approve_promotion")
        if said.approved:
            raise AirflowSkipException("its promotion was approved")
        rollout.withdraw(home(), by=said.by, reason=f"not promoted in run {context['run_id']}")
        follow_routing()

    @task(
        trigger_rule="none_failed_min_one_success",
        retries=1,
        retry_delay=timedelta(seconds=5),
        doc_md="MLflow's aliases champion and challenger follow what is live.",
    )
    def aliases() -> None:
        follow_routing()

    found = candidate()
    number = build(found)
    way = road(found, number)
    started = canary(found, number)
    shown = evidence(started)
    # these hang on nothing else: with any other success above them a rejection would let them run
    replayed = replay()
    promoted = promote()
    withdrawn = withdraw()
    found >> approve >> number
    way >> [started, replayed]
    shown >> replayed >> [approve_promotion, promoted]
    shown >> approve_promotion >> promoted
    [started, promoted] >> withdrawn
    [promoted, withdrawn] >> aliases()


release()
