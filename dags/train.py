"""Examples become a candidate: recall models ∥ rank models → output weights → gate → report."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Param, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dags.assets import CANDIDATE, EXAMPLES, TURNED_DOWN, newest
from dags.stages import RESOURCES, champion, folder, run, stage, tracking_uri, uri


def check_models(kind: str, names: list[str], overrides: dict[str, Any]) -> None:
    """Fails on a model there is not, or a setting it does not have, before any work is done."""
    from importlib.util import find_spec

    import penstock

    for name in names:
        # a known model is imported (with TensorFlow) only when there are settings to hold against it
        if find_spec(f"penstock.{kind}.{name}") is None or overrides:
            try:
                penstock.config(penstock.module(kind, name), overrides)
            except ValueError as error:
                raise AirflowFailException(str(error)) from None


def check_policy(overrides: dict[str, Any]) -> None:
    """Fails on thresholds that the gate could only reject by, before any work is done."""
    import penstock
    from penstock import policy

    try:
        faults = penstock.config(policy, overrides).faults()
    except ValueError as error:
        faults = [str(error)]
    if faults:
        raise AirflowFailException(f"gate_policy: {'; '.join(faults)}")


def check_search(overrides: dict[str, Any]) -> None:
    """Fails on a search of the weights that cannot be, before any work is done."""
    from penstock import fusion

    try:
        fusion.settings(overrides)
    except ValueError as error:
        raise AirflowFailException(f"weights_search: {error}") from None


def check_resources(overrides: dict[str, Any]) -> None:
    """Fails on resources that no component or no machine knows, before any work is done."""
    from components.resources import by_component

    try:
        by_component(overrides)
    except ValueError as error:
        raise AirflowFailException(f"resources: {error}") from None


def with_config(names: list[str], overrides: dict[str, Any]) -> list[dict[str, str]]:
    """The arguments that tell the mapped tasks apart."""
    return [{"model": name, "config": json.dumps(dict(overrides))} for name in names]


def best(candidates: list[dict[str, Any]], artifact: str, measures: list[str]) -> dict[str, Any]:
    """The candidate whose mean of `measures` on the validation slice is highest (the first, if equal)."""

    def value(outputs: dict[str, Any]) -> float:
        metrics = json.loads((Path(uri(outputs, artifact)) / "metrics.json").read_text())["validation"]
        return sum(metrics[measure] for measure in measures) / len(measures)

    return max(candidates, key=value)


@dag(
    dag_id="train",
    schedule=[EXAMPLES],
    catchup=False,
    max_active_runs=1,
    tags=["penstock"],
    default_args={"retries": 0, "execution_timeout": timedelta(hours=24)},
    params={
        "recall_models": Param(["youtube_dnn"], type="array", items={"type": "string"}, minItems=1),
        "rank_models": Param(["mmoe"], type="array", items={"type": "string"}, minItems=1),
        "recall_config": Param({}, type="object", description="settings of the recall models, by name"),
        "rank_config": Param({}, type="object", description="settings of the rank models, by name"),
        "weights_search": Param({}, type="object", description="settings of the search of the weights, by name"),
        "gate_policy": Param({}, type="object", description="thresholds of the gate, by name, that differ"),
        "seed": Param(1, type="integer"),
        "resources": Param(**RESOURCES),
    },
    doc_md="""
    ### From examples to a candidate
    Recall and rank models are trained side by side, one task a model; the best of each by the validation slice go on.
    The output **weights** are searched on the validation slice; a fresh model server is to **rehearse** rows of the
    log; the **gate** holds the candidate against the champion on the test slice (the first time: against its best
    single head), and always against baselines; and the **report** shows it all, in a file and in MLflow.

    Started by the asset `examples`, or by hand: then it takes the newest examples.
    An approved candidate becomes the asset `candidate`, which starts `release`; one turned down skips `publish` and
    becomes the asset `turned_down`, which starts nothing: `release` takes it by hand, with a reason.
    """,
)
def train() -> None:
    @task(inlets=[EXAMPLES], doc_md="Finds the examples and checks the names of the models.")
    def plan() -> dict[str, Any]:
        context = get_current_context()
        params = context["params"]
        check_models("recall", params["recall_models"], dict(params["recall_config"]))
        check_models("rank", params["rank_models"], dict(params["rank_config"]))
        check_search(dict(params["weights_search"]))
        check_policy(dict(params["gate_policy"]))
        check_resources(dict(params["resources"]))
        found = newest(EXAMPLES, context, "there are no examples yet: trigger the DAG `prepare` first")
        if not Path(found["uri"]).is_dir():
            raise AirflowFailException(f"{found['uri']} is gone: trigger the DAG `prepare` again")
        return {
            "examples": found["uri"],
            "log": found.get("log", ""),
            "validation": found.get("validation", ""),
            "recall": with_config(params["recall_models"], params["recall_config"]),
            "rank": with_config(params["rank_models"], params["rank_config"]),
        }

    def map_over(kind: str) -> Any:
        @task(task_id=f"{kind}_models", doc_md=f"The {kind} models to train, one mapped task each.")
        def models(plan: dict[str, Any]) -> list[dict[str, str]]:
            return plan[kind]

        return models

    @stage(
        map_index_template="{{ task.op_kwargs['model']['model'] }}",
        doc_md="Trains one recall model and exports it with its item index.",
    )
    def recall(model: dict[str, str], plan: dict[str, Any]) -> dict[str, Any]:
        seed = get_current_context()["params"]["seed"]
        return run("recall", key=model["model"], resumes=True, examples_uri=plan["examples"], seed=seed, **model)

    @stage(
        map_index_template="{{ task.op_kwargs['model']['model'] }}",
        doc_md="Trains one rank model and predicts the validation and test slices.",
    )
    def rank(model: dict[str, str], plan: dict[str, Any]) -> dict[str, Any]:
        seed = get_current_context()["params"]["seed"]
        return run("rank", key=model["model"], resumes=True, examples_uri=plan["examples"], seed=seed, **model)

    @task(doc_md="The best recall model by recall@50, the best rank model by its mean AUC, on the validation slice.")
    def choose(plan: dict[str, Any], recalls: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> dict[str, str]:
        heads = ["auc_click", "auc_long_view", "auc_like"]
        return {
            "examples": plan["examples"],
            "log": plan["log"],
            "validation": plan["validation"],
            "recall": uri(best(list(recalls), "recall", ["recall@50"]), "recall"),
            "rank": uri(best(list(ranks), "rank", heads), "rank"),
        }

    @stage(doc_md="Searches the weights of the heads in the fused score, on the validation slice.")
    def weights(chosen: dict[str, str]) -> dict[str, str]:
        search = json.dumps(get_current_context()["params"]["weights_search"])
        outputs = run("weights", rank_uri=chosen["rank"], search=search, champion=champion())
        return chosen | {"weights": uri(outputs, "weights")}

    @task(doc_md="Loads the candidate in a fresh model server, and has it answer rows of the log.")
    def rehearse(chosen: dict[str, str]) -> str:
        from serving import rehearsal

        out = folder("rehearsal")
        examples, recall, rank = (Path(chosen[name]) for name in ("examples", "recall", "rank"))
        rehearsal.rehearse(examples, recall, rank, out)
        return str(out)

    @stage(doc_md="Holds the candidate against the champion on the test slice. No verdict is a rejection.")
    def gate(chosen: dict[str, str], rehearsal: str) -> dict[str, Any]:
        outputs = run(
            "gate",
            examples_uri=chosen["examples"],
            recall_uri=chosen["recall"],
            rank_uri=chosen["rank"],
            weights_uri=chosen["weights"],
            rehearsal_uri=rehearsal,
            champion=champion(),
            policy=json.dumps(get_current_context()["params"]["gate_policy"]),
        )
        return chosen | {"rehearsal": rehearsal, "verdict": uri(outputs, "verdict")} | outputs["parameters"]

    @stage(doc_md="The HTML file a person approves by, and the MLflow run.")
    def report(judged: dict[str, Any]) -> dict[str, Any]:
        run_id = get_current_context()["dag_run"].run_id
        outputs = run(
            "report",
            **{f"{name}_uri": judged[name] for name in ("examples", "recall", "rank", "weights", "verdict")},
            tracking_uri=tracking_uri(),
            run_name=run_id,
            validation=judged["validation"],
        )
        return judged | {"report": uri(outputs, "report"), "run_id": outputs["parameters"]["run_id"]}

    @task(
        outlets=[CANDIDATE], doc_md="Makes an approved candidate the asset `candidate`; skips one that is turned down."
    )
    def publish(reported: dict[str, Any]) -> dict[str, Any]:
        if not reported["approved"]:
            raise AirflowSkipException(f"turned down by the gate: {reported['sentence']}")
        get_current_context()["outlet_events"][CANDIDATE].extra = reported
        return reported

    @task(outlets=[TURNED_DOWN], doc_md="Keeps a candidate that is turned down, should a person force its release.")
    def set_aside(reported: dict[str, Any]) -> dict[str, Any]:
        if reported["approved"]:
            raise AirflowSkipException("approved by the gate")
        get_current_context()["outlet_events"][TURNED_DOWN].extra = reported
        return reported

    planned = plan()
    recalls = recall.partial(plan=planned).expand(model=map_over("recall")(planned))
    ranks = rank.partial(plan=planned).expand(model=map_over("rank")(planned))
    chosen = choose(planned, recalls, ranks)
    reported = report(gate(weights(chosen), rehearse(chosen)))
    publish(reported)
    set_aside(reported)


train()
