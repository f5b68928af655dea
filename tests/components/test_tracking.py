from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.tracking import (
    TrackingError,
    add_to_run,
    find_run_url,
    log_run,
    register_release,
    run_url,
    set_aliases,
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def run_id(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text("<p>0.71</p>")
    (folder / "figures").mkdir()
    (folder / "figures" / "roc.png").write_bytes(b"png")
    metrics = {"test/auc_click": 0.71, "validation/recall@50": 0.2}
    files = [folder / "report.html", folder / "figures"]
    return log_run(uri, "manual__1", {"rank": {"model": "mmoe"}}, metrics, files, tags={"validation": "docs"})


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def release(tmp_path: Path, number: int, run_id: str) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / str(number)
    folder.mkdir()
    (folder / "manifest.json").write_text(f'{{"release": {number}}}')
    return folder, {
        "release": number,
        "run_id": run_id,
        "approved_by": "admin",
        "parent": None,
        "git_revision": "abc",
        "verdict": "better",
    }


def test_a_candidate_is_a_finished_run_with_metrics_and_files(uri: str, run_id: str) -> None:
    run = client(uri).get_run(run_id)

    assert run.info.status == "FINISHED"
    assert run.info.run_name == "manual__1"
    assert run.data.metrics == {"test/auc_click": 0.71, "validation/recall_at_50": 0.2}
    assert run.data.params == {"rank": '{"model": "mmoe"}'}
    assert run.data.tags["validation"] == "docs"
    assert {found.path for found in client(uri).list_artifacts(run_id)} == {"report.html", "figures"}
    assert [found.path for found in client(uri).list_artifacts(run_id, "figures")] == ["figures/roc.png"]


def test_releases_are_versions_and_aliases_follow(uri: str, run_id: str, tmp_path: Path) -> None:
    first = register_release(uri, *release(tmp_path, 1, run_id))
    path, manifest = release(tmp_path, 2, run_id)
    forced = {"by": "ana", "reason": "the audit asks for it", "verdict": "Rejected: worse."}
    second = register_release(uri, path, manifest | {"forced": forced})
    assert first != second
    # a repeated step registers nothing twice
    assert register_release(uri, tmp_path / "1", release(tmp_path / "1", 1, run_id)[1]) == first

    set_aliases(uri, champion=1, challenger=2)
    registry = client(uri)
    assert str(registry.get_model_version_by_alias("penstock", "champion").version) == first
    tags = registry.get_model_version_by_alias("penstock", "challenger").tags
    assert {name: tags[name] for name in ("release", "forced_by", "force_reason")} == {
        "release": "2",
        "forced_by": "ana",
        "force_reason": "the audit asks for it",
    }
    assert "forced_by" not in registry.get_model_version_by_alias("penstock", "champion").tags
    assert [found.path for found in registry.list_artifacts(run_id, "release")] == ["release/manifest.json"]

    set_aliases(uri, champion=2, challenger=None)
    assert registry.get_registered_model("penstock").aliases == {"champion": int(second)}


def test_a_run_that_has_ended_can_be_added_to(uri: str, tmp_path: Path) -> None:
    run_id = log_run(uri, "manual__2", {"seed": "1"}, {"approved": 1.0}, [])
    (tmp_path / "replay.html").write_text("<p>100 %</p>")
    add_to_run(uri, run_id, {"replay/equal_share": 1.0}, [tmp_path / "replay.html"])
    run = client(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"approved": 1.0, "replay/equal_share": 1.0}
    assert [found.path for found in client(uri).list_artifacts(run_id)] == ["replay.html"]
    with pytest.raises(TrackingError, match="not found"):
        add_to_run(uri, "0" * 32, {"replay/equal_share": 1.0}, [])


def test_an_unregistered_release_gets_no_alias(uri: str, run_id: str) -> None:
    with pytest.raises(TrackingError, match="release 99 is not registered"):
        set_aliases(uri, champion=99, challenger=None)


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(TrackingError, match=r"^MLflow at http://127\.0\.0\.1:1: "):
        log_run("http://127.0.0.1:1", "run", {}, {}, [])
    assert run_url("http://127.0.0.1:1", "x") == ""
    assert find_run_url("http://127.0.0.1:1", "x") == ""
    assert run_url("sqlite:///x.db", "x") == ""
