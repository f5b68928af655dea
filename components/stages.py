"""The stages: pipelines of one to four components, which Airflow runs one a task.

Inputs come as URIs of what former stages left; every output has a name, under which the next stage finds it.
"""

from typing import NamedTuple

from kfp import dsl

from components.build_examples import build_examples
from components.build_release import build_release
from components.export_index import export_index
from components.gate import gate as gate_component
from components.ingest import ingest as ingest_component
from components.materialise import materialise
from components.predict_rank import predict_rank
from components.replay import replay as replay_component
from components.report import report as report_component
from components.search_weights import search_weights
from components.train_look_alike import train_look_alike
from components.train_rank import train_rank
from components.train_recall import train_recall
from components.validate import validate as validate_component


def _artifact(uri: str, kind: type[dsl.Artifact]):
    return dsl.importer(artifact_uri=uri, artifact_class=kind, reimport=False).output


class Ingested(NamedTuple):
    log: dsl.Dataset


@dsl.pipeline
def ingest(source: str, options: str, feedback: str, mended: str) -> Ingested:
    done = ingest_component(source=source, options=options, feedback=feedback, mended=mended)
    return Ingested(log=done.outputs["log"])


class Validated(NamedTuple):
    validated: dsl.Dataset
    quarantine: dsl.Dataset
    docs: dsl.HTML
    rows: int
    quarantined: int
    bad_share: float
    run_id: str


@dsl.pipeline
def validate(
    log_uri: str, max_bad_share: float, severity: str, limits: str, tracking_uri: str, run_name: str
) -> Validated:
    done = validate_component(
        log=_artifact(log_uri, dsl.Dataset),
        max_bad_share=max_bad_share,
        severity=severity,
        limits=limits,
        tracking_uri=tracking_uri,
        run_name=run_name,
    )
    return Validated(**{name: done.outputs[name] for name in Validated._fields})


class Features(NamedTuple):
    features: dsl.Dataset


@dsl.pipeline
def features(validated_uri: str, home: str) -> Features:
    done = materialise(validated=_artifact(validated_uri, dsl.Dataset), home=home)
    return Features(features=done.outputs["features"])


class Examples(NamedTuple):
    examples: dsl.Dataset


@dsl.pipeline
def examples(validated_uri: str, features_uri: str, home: str, validation_days: int, test_days: int) -> Examples:
    done = build_examples(
        validated=_artifact(validated_uri, dsl.Dataset),
        features=_artifact(features_uri, dsl.Dataset),
        home=home,
        validation_days=validation_days,
        test_days=test_days,
    )
    return Examples(examples=done.outputs["examples"])


class Recall(NamedTuple):
    recall_weights: dsl.Model
    recall: dsl.Model


@dsl.pipeline
def recall(examples_uri: str, model: str, config: str, seed: int, checkpoint: str) -> Recall:
    data = _artifact(examples_uri, dsl.Dataset)
    trained = train_recall(examples=data, model=model, config=config, seed=seed, checkpoint=checkpoint)
    exported = export_index(examples=data, recall_weights=trained.outputs["recall_weights"])
    return Recall(recall_weights=trained.outputs["recall_weights"], recall=exported.outputs["recall"])


class Rank(NamedTuple):
    rank_weights: dsl.Model
    rank: dsl.Model


@dsl.pipeline
def rank(examples_uri: str, model: str, config: str, seed: int, checkpoint: str) -> Rank:
    data = _artifact(examples_uri, dsl.Dataset)
    trained = train_rank(examples=data, model=model, config=config, seed=seed, checkpoint=checkpoint)
    predicted = predict_rank(examples=data, rank_weights=trained.outputs["rank_weights"])
    return Rank(rank_weights=trained.outputs["rank_weights"], rank=predicted.outputs["rank"])


class Weights(NamedTuple):
    weights: dsl.Artifact


@dsl.pipeline
def weights(rank_uri: str, search: str, champion: str) -> Weights:
    done = search_weights(rank=_artifact(rank_uri, dsl.Model), search=search, champion=champion)
    return Weights(weights=done.outputs["weights"])


class Verdict(NamedTuple):
    verdict: dsl.Artifact
    approved: bool
    sentence: str


@dsl.pipeline
def gate(
    examples_uri: str,
    recall_uri: str,
    rank_uri: str,
    weights_uri: str,
    rehearsal_uri: str,
    champion: str,
    policy: str,
) -> Verdict:
    done = gate_component(
        examples=_artifact(examples_uri, dsl.Dataset),
        recall=_artifact(recall_uri, dsl.Model),
        rank=_artifact(rank_uri, dsl.Model),
        weights=_artifact(weights_uri, dsl.Artifact),
        rehearsal=_artifact(rehearsal_uri, dsl.Artifact),
        champion=champion,
        policy=policy,
    )
    return Verdict(**{name: done.outputs[name] for name in Verdict._fields})


class Report(NamedTuple):
    report: dsl.HTML
    run_id: str


@dsl.pipeline
def report(
    examples_uri: str,
    recall_uri: str,
    rank_uri: str,
    weights_uri: str,
    verdict_uri: str,
    tracking_uri: str,
    run_name: str,
    validation: str,
) -> Report:
    done = report_component(
        examples=_artifact(examples_uri, dsl.Dataset),
        recall=_artifact(recall_uri, dsl.Model),
        rank=_artifact(rank_uri, dsl.Model),
        weights=_artifact(weights_uri, dsl.Artifact),
        verdict=_artifact(verdict_uri, dsl.Artifact),
        tracking_uri=tracking_uri,
        run_name=run_name,
        validation=validation,
    )
    return Report(report=done.outputs["report"], run_id=done.outputs["Output"])


class Released(NamedTuple):
    release: dsl.Artifact
    number: int


@dsl.pipeline
def release(
    recall_uri: str,
    rank_uri: str,
    weights_uri: str,
    verdict_uri: str,
    rehearsal_uri: str,
    report_uri: str,
    home: str,
    store: str,
    approved_by: str,
    run_id: str,
    git_revision: str,
    environment: str,
    force_reason: str,
) -> Released:
    done = build_release(
        recall=_artifact(recall_uri, dsl.Model),
        rank=_artifact(rank_uri, dsl.Model),
        weights=_artifact(weights_uri, dsl.Artifact),
        verdict=_artifact(verdict_uri, dsl.Artifact),
        rehearsal=_artifact(rehearsal_uri, dsl.Artifact),
        report=_artifact(report_uri, dsl.HTML),
        home=home,
        store=store,
        approved_by=approved_by,
        run_id=run_id,
        git_revision=git_revision,
        environment=environment,
        force_reason=force_reason,
    )
    return Released(release=done.outputs["release"], number=done.outputs["Output"])


class Replayed(NamedTuple):
    replayed: dsl.Artifact
    reached: bool
    sentence: str


@dsl.pipeline
def replay(
    validated_uri: str, home: str, release: int, newest: int, min_equal_share: float, tracking_uri: str
) -> Replayed:
    done = replay_component(
        validated=_artifact(validated_uri, dsl.Dataset),
        home=home,
        release=release,
        newest=newest,
        min_equal_share=min_equal_share,
        tracking_uri=tracking_uri,
    )
    return Replayed(**{name: done.outputs[name] for name in Replayed._fields})


class LookAlike(NamedTuple):
    look_alike: dsl.Model


@dsl.pipeline
def look_alike(examples_uri: str, recall_uri: str, config: str, seed: int, tower: str) -> LookAlike:
    done = train_look_alike(
        examples=_artifact(examples_uri, dsl.Dataset),
        recall=_artifact(recall_uri, dsl.Model),
        config=config,
        seed=seed,
        tower=tower,
    )
    return LookAlike(look_alike=done.outputs["look_alike"])
