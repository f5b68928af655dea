"""A candidate becomes the release that answers: approve → (canary → evidence →) replay (→ approve) → promote."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Param, PokeReturnValue, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dags.assets import CANDIDATE, TURNED_DOWN, newest
from dags.stages import environment, folder, follow_routing, git_revision, home, run, stage, tracking_uri, uri

if TYPE_CHECKING:
    from penstock.experiment import Verdict, Watch

CANARY = {"share": 0.2, "min_impressions": 200, "min_users": 30, "wait_minutes": 60}
GUARD = "guardrail"
"""Who withdraws a canary that nobody had to be asked about."""
# an answer within seconds of the question can meet the executor's late report of the question, and fail
ASKED_AGAIN: dict[str, Any] = {"retries": 1, "retry_delay": timedelta(seconds=5)}
# it stays in its worker: a reschedule after seconds can meet the executor's late report of the last poke and fail.
# One that a restarted scheduler begins anew reads the log again, and knows what it knew.
WATCHING: dict[str, Any] = {
    "mode": "poke",
    "poke_interval": 5,
    "timeout": timedelta(days=8).total_seconds(),
    "execution_timeout": timedelta(days=8),
    "retries": 1,
    "retry_delay": timedelta(seconds=5),
}
APPROVERS = [{"id": "admin", "name": "admin"}]


def primary_line(verdict: dict[str, Any]) -> str:
    """The figure that the policy decides by, candidate and opponent, in Markdown; nothing if there is none."""
    from penstock.policy import measure_in_words

    found = verdict["primary"]
    if not found:
        return ""
    against = found["opponent"] if verdict["champion"] is None else f"release {verdict['champion']}"
    change = found["difference"]
    chance = "" if found["p_value"] is None else f", p = {found['p_value']:.2g}"
    return (
        f"**{measure_in_words(found['measure'])}** of the fused score: **{found['candidate']:.4f}**, {against} "
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


def check_ab(overrides: dict[str, Any]) -> None:
    """Fails on settings by which no canary can be judged, before any work is done."""
    import penstock
    from penstock import experiment

    try:
        faults = penstock.config(experiment, overrides).faults()
    except ValueError as error:
        faults = [str(error)]
    if faults:
        raise AirflowFailException(f"ab_policy: {'; '.join(faults)}")


@cache
def watch(place: Path, started: str) -> Watch:
    """The canary that the task `canary` tells of, in JSON: one in a process, so that each look reads what is new."""
    import penstock
    from penstock import experiment

    said = json.loads(started)
    split, minimum = experiment.Split(**said["split"]), experiment.Minimum(**said["minimum"])
    return experiment.Watch(place, split, penstock.config(experiment, said["policy"]), minimum)


def look(started: dict[str, Any]) -> tuple[Watch, Verdict | None]:
    """What users did with a canary so far; no verdict if it is no longer routed."""
    watched = watch(home(), json.dumps(started, sort_keys=True))
    return watched, watched.look(time.time_ns() // 1_000_000)


def keep(watched: Watch, verdict: Verdict) -> dict[str, Any]:
    """Writes the page of the evidence and records it in the run of the candidate; what the next tasks say of it."""
    from components import tracking
    from penstock.experiment import metrics
    from penstock.experiment_page import counts_table, markdown, measures_table, write_experiment

    run_id = get_current_context()["ti"].xcom_pull(task_ids="candidate")["run_id"]
    page, figures = write_experiment(watched.experiment, verdict, folder("evidence"))
    try:
        tracking.add_to_run(tracking_uri(), run_id, metrics(verdict.document), [page, figures])
    except tracking.TrackingError as error:  # no reason to lose a canary: it goes on, or ends, as the evidence says
        print(f"{error}; {page} is not recorded")
    link = tracking.run_url(tracking_uri(), run_id)
    where = f"[evidence.html]({link}/artifacts/evidence.html)" if link else f"`{page}`"
    tables = [table(verdict.document) for table in (measures_table, counts_table)]
    failed = [f"**{check.name}**: {check.reason}" for check in verdict.checks if not check.passed]
    parts = [verdict.sentence, *failed, *(markdown(names, rows) for names, rows in tables if rows), where]
    return {
        "action": verdict.action,
        "sentence": verdict.sentence,
        "body": "\n\n".join(parts),
        "tables": [[names, rows] for names, rows in tables if rows],
        "measures": verdict.document["measures"],
    }


def withdraw_by(started: dict[str, Any], by: str, reason: str) -> None:
    """The canary answers nobody, at once; one that is over, or another one, is left alone."""
    from penstock import routing
    from serving import rollout

    if routing.read(home() / "routing.json").challenger == started["split"]["challenger"]:
        rollout.withdraw(home(), by=by, reason=reason)
    follow_routing()


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
        "ab_policy": Param(
            {}, type="object", description="of guardrails and confidence those that differ, as in docs/ab.md"
        ),
    },
    doc_md="""
    ### From a candidate to what users get
    A person approves the candidate by the gate's verdict and the report; silence for a day is a rejection.
    The first release is promoted at once. Later ones answer a `share` of the users first (the canary); when `min_users`
    have been shown `min_impressions`, or after `wait_minutes`, a person approves its promotion by the A/B evidence, or
    it is withdrawn. The approver sets the four in the form of the approval.

    A canary that is worse than a **guardrail** allows is withdrawn without asking anybody, also while a person is being
    asked, and the run is a success that promoted nothing. Evidence that is broken (a split that is not the share, users
    who met both releases) withdraws it and fails the run. `ab_policy` sets the guardrails.

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
        check_ab(dict(context["params"]["ab_policy"]))
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
            "min_users": Param(CANARY["min_users"], type="integer", minimum=0, description="the same of its users"),
            "wait_minutes": Param(CANARY["wait_minutes"], type="integer", minimum=0, description="for them, at most"),
        },
        doc_md="A person decides by the verdict and the report. No answer within a day is a rejection.",
    )

    @stage(doc_md="The numbered, immutable directory of the release, and its version in MLflow's registry.")
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
        from dataclasses import asdict

        from penstock.experiment import Split
        from penstock.feedback import last_sequence
        from serving import rollout

        said = answer("approve")
        context = get_current_context()
        after = last_sequence(home() / "feedback")
        reason = with_force(f"canary of run {context['run_id']}")
        routed = rollout.canary(home(), number, float(said.form["share"]), by=said.by, reason=reason)
        follow_routing()
        split = Split.of(routed, after)
        if split is None:
            raise AirflowFailException(f"release {number} is no canary any more: somebody has changed the routing")
        minimum = {
            "impressions": said.form["min_impressions"],
            "users": said.form["min_users"],
            "wait_minutes": said.form["wait_minutes"],
        }
        return {"split": asdict(split), "minimum": minimum, "policy": context["params"]["ab_policy"]}

    @task.sensor(
        **WATCHING,
        doc_md="Waits for enough evidence to ask a person by. Withdraws the canary at once if a guardrail is breached, "
        "and fails if the evidence is broken.",
    )
    def evidence(started: dict[str, Any]) -> PokeReturnValue:
        from penstock import routing

        watched, verdict = look(started)
        if verdict is None:
            live = routing.read(home() / "routing.json")
            ended = f"The canary was ended by {live.by}: {live.reason}"
            print(ended)
            return PokeReturnValue(True, {"action": "ended", "sentence": ended})
        if verdict.action == "wait":
            return PokeReturnValue(False)
        if verdict.action != "ask":
            withdraw_by(started, GUARD, verdict.sentence)
        found = keep(watched, verdict)
        print(verdict.sentence)
        if verdict.action == "fail":
            raise AirflowFailException(
                f"release {watched.experiment.split.challenger} is withdrawn. {verdict.sentence}"
            )
        return PokeReturnValue(True, found)

    @task.sensor(
        **WATCHING,
        doc_md="Goes on watching the canary while a person is asked, until it is promoted or withdrawn; withdraws it "
        "itself if a guardrail is breached meanwhile.",
    )
    def guard(started: dict[str, Any]) -> bool:
        watched, verdict = look(started)
        if verdict is None:
            if watched.experiment.looks:
                keep(watched, watched.verdict(time.time_ns() // 1_000_000))
            return True
        if verdict.action in ("wait", "ask"):
            return False
        withdraw_by(started, GUARD, verdict.sentence)
        keep(watched, verdict)
        print(verdict.sentence)
        return True

    @stage(
        trigger_rule="none_failed_min_one_success",
        doc_md="Holds served feature vectors against offline ones; a release that is served others is not promoted.",
    )
    def replay() -> dict[str, str]:
        from components import tracking

        context = get_current_context()
        params = context["params"]
        found, number, shown = (context["ti"].xcom_pull(task_ids=name) for name in ("candidate", "build", "evidence"))
        if shown is not None and shown["action"] != "ask":
            raise AirflowSkipException(f"nobody is asked to promote release {number}. {shown['sentence']}")
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
        "{{ ti.xcom_pull(task_ids='evidence')['body'] }}",
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
        from penstock import routing
        from serving import rollout

        context = get_current_context()
        found, started, built = (context["ti"].xcom_pull(task_ids=name) for name in ("candidate", "canary", "build"))
        first, number = found["champion"] is None, int(built)
        said = answer("approve" if first else "approve_promotion")
        if not said.approved:
            raise AirflowFailException("nobody has approved this promotion")
        live = routing.read(home() / "routing.json")
        if not first and live.champion != number:  # it is when an interrupted try is repeated
            _, verdict = look(started)
            if verdict is None:
                ended = f"it was ended by {live.by}: {live.reason}"
                raise AirflowFailException(f"release {number} is no canary any more, {ended}")
            if verdict.action not in ("wait", "ask"):
                withdraw_by(started, GUARD, verdict.sentence)
                raise AirflowFailException(f"release {number} is withdrawn, not promoted. {verdict.sentence}")
        rollout.promote(home(), number, by=said.by, reason=with_force(f"approved in run {context['run_id']}"))
        return number

    # whatever became of the tasks before it: a canary that nobody can judge is none
    @task(trigger_rule="all_done", doc_md="A canary that was turned down, or that failed its replay, answers nobody.")
    def withdraw() -> None:
        context = get_current_context()
        started = context["ti"].xcom_pull(task_ids="canary")
        if started is None:
            raise AirflowSkipException("there was no canary")
        said = answer("approve_promotion")
        if said.approved:
            raise AirflowSkipException("its promotion was approved")
        withdraw_by(started, said.by, f"not promoted in run {context['run_id']}")

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
    watching = guard(started)
    # these hang on nothing else: with any other success above them a rejection would let them run
    replayed = replay()
    promoted = promote()
    withdrawn = withdraw()
    found >> approve >> number
    way >> [started, replayed]
    shown >> [replayed, watching]
    replayed >> [approve_promotion, promoted]
    shown >> approve_promotion >> promoted
    [started, promoted] >> withdrawn
    [promoted, withdrawn] >> aliases()


release()
