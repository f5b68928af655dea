from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock import candidate, training
from penstock.examples import write_examples
from serving import rehearsal
from serving.model_client import Input, Signature
from tests.penstock.conftest import catalogue, joined_rows
from tests.penstock.test_models import thin


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples, and a candidate of two small models."""
    out = tmp_path_factory.mktemp("made")
    write_examples(joined_rows(rows=900), catalogue(), out / "examples")
    thin(out / "examples")
    settings = {"epochs": 1, "batch_size": 64}
    training.train_recall(out / "examples", "youtube_dnn", settings, 1, out / "recall_weights")
    candidate.write_recall(out / "examples", out / "recall_weights", out / "recall")
    training.train_rank(out / "examples", "shared_bottom", settings, 1, out / "rank_weights")
    candidate.write_rank(out / "examples", out / "rank_weights", out / "rank")
    return out


@pytest.fixture
def spoilt(made: Path, tmp_path: Path) -> Path:
    """The candidate, to spoil."""
    for name in ("recall", "rank"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def rehearse(made: Path, folder: Path, out: Path) -> dict:
    found = rehearsal.rehearse(made / "examples", folder / "recall", folder / "rank", out, requests=20)
    assert json.loads((out / "rehearsal.json").read_text()) == found
    return found


def test_a_fresh_server_says_what_the_trained_models_say(made: Path, tmp_path: Path) -> None:
    found = rehearse(made, made, tmp_path)
    assert found["error"] is None
    assert found["requests"] == 20
    assert found["finite"] is True
    assert found["largest_difference"] < 1e-5
    assert 0 < found["p50_ms"] <= found["p99_ms"]


def test_another_tower_or_another_head_is_seen_in_the_scores(made: Path, spoilt: Path) -> None:
    path = spoilt / "rank" / "trained.parquet"
    pl.read_parquet(path).with_columns(p_click=1 - pl.col("p_click")).write_parquet(path)
    assert rehearse(made, spoilt, spoilt / "out")["largest_difference"] > 0.01


def test_an_index_of_other_items_is_named(made: Path, spoilt: Path) -> None:
    path = spoilt / "recall" / "items.parquet"
    pl.read_parquet(path).with_columns(item_id=pl.col("item_id") + 1).write_parquet(path)
    assert rehearse(made, spoilt, spoilt / "out")["error"].startswith("recall answers item ")


def test_a_model_that_cannot_be_loaded_is_an_answer_too(made: Path, spoilt: Path) -> None:
    (spoilt / "rank" / "saved_model" / "saved_model.pb").write_bytes(b"no graph")
    found = rehearse(made, spoilt, spoilt / "out")
    assert "rank version 1" in found["error"]
    assert (found["requests"], found["finite"]) == (0, False)


def test_an_input_that_no_request_has_is_named() -> None:
    number = Input(np.dtype(np.float32), 1)
    rehearsal._check_inputs("rank", Signature({"item_id": number, "user_click_rate_7d": number}, ()))
    with pytest.raises(rehearsal.RehearsalError, match="rank reads click, which the feature service does not give"):
        rehearsal._check_inputs("rank", Signature({"item_id": number, "click": number}, ()))
