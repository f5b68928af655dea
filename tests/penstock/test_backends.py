"""What is trained under JAX is served by TensorFlow, and where TensorFlow itself may be imported."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import penstock
from penstock import backends, distribution, export, training
from penstock.backends import tensorflow
from penstock.catalogue import Catalogue
from penstock.examples import FIRST, read_slice, write_examples
from penstock.ranking import check_tasks
from penstock.scoring import feed, score_rows
from tests.penstock import on_jax
from tests.penstock.conftest import catalogue, joined_rows
from tests.penstock.test_models import thin

ROOT = Path(penstock.__file__).parent
JAX = ROOT.parent / "build" / "jax"

NEUTRAL = ("recall", "rank", "layers", "losses", "samplers", "objectives", "retrieval", "ranking", "sessions")
"""Files and folders of `penstock/` that import TensorFlow nowhere, not even within a function."""

ALONE = {
    "backends/tensorflow.py": "is what the backend does its own way",
    "backends/recurrence.py": "rows of unlike length, within a function that no other backend comes to",
    "distribution.py": "tf.distribute, within functions that no other backend comes to",
    "optimizers.py": "sparse gradients, within functions that no other backend comes to",
    "pretraining/__init__.py": "learns before a model, and gives NumPy",
    "pretraining/graph.py": "learns before a model, and gives NumPy",
    "export.py": "makes SavedModels",
    "index.py": "is part of a SavedModel",
    "scoring.py": "runs SavedModels",
    "evaluation.py": "runs SavedModels",
    "look_alike_training.py": "learns from what a SavedModel gives",
}
"""All files of `penstock/` that import TensorFlow, and why."""


def _imports(file: Path, module: str) -> bool:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name == module or name.startswith(f"{module}.") for name in names):
            return True
    return False


def _files(*names: str) -> Iterator[Path]:
    for name in names:
        yield from (ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]


def test_tensorflow_is_imported_where_it_has_to_be_and_nowhere_in_a_model():
    assert {str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py") if _imports(file, "tensorflow")} == set(ALONE)
    assert {str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py") if _imports(file, "jax")} == {"backends/jax.py"}
    neutral = {str(file.relative_to(ROOT)) for file in _files(*NEUTRAL)}
    assert len(neutral) > 40
    assert not neutral & set(ALONE)


def test_backends_have_the_same_names_with_the_same_arguments():
    """By the text: one of the two cannot be imported here."""

    def of(name: str) -> dict[str, list[str]]:
        tree = ast.parse((ROOT / "backends" / f"{name}.py").read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        return {node.name: [argument.arg for argument in node.args.args] for node in functions if node.name[0] != "_"}

    ours, theirs = of("tensorflow"), of("jax")
    assert {name for name in backends.__all__ if inspect.isfunction(getattr(backends, name))} == set(theirs)
    assert theirs == {name: ours[name] for name in theirs}
    assert set(ours) - set(theirs) == {"accidental_hits"}
    assert backends.rows is tensorflow.rows


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_what_another_backend_cannot_do_is_said_before_anything_is_done(backend, monkeypatch):
    monkeypatch.setattr("keras.backend.backend", lambda: backend)
    monkeypatch.setattr("keras.config.backend", lambda: backend)
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(RuntimeError, match="only KERAS_BACKEND=tensorflow"), distribution.scope():
        pass
    monkeypatch.delenv("TF_CONFIG")
    config = penstock.config(penstock.module("rank", "mmoe"), {"pretrained": "graph"})
    with pytest.raises(ValueError, match=f"KERAS_BACKEND=tensorflow, not {backend}"):
        check_tasks(config)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Path:
    """Examples, and beside them what JAX made of them."""
    out = tmp_path_factory.mktemp("jax")
    write_examples(joined_rows(rows=600), catalogue(), out / "examples")
    thin(out / "examples")
    assert (JAX / "jax").is_dir(), "JAX is not there: make jax"
    there = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.penstock.on_jax", str(out / "examples"), str(out)],
        env=os.environ | there | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT.parent, JAX, *sys.path]))},
        check=True,
    )
    return out


def test_losses_and_layers_give_the_same_with_the_same_gradients(seen):
    ours = on_jax.values()
    with np.load(seen / "values.npz") as theirs:
        assert set(theirs) == set(ours)
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", on_jax.RECALL)
def test_a_recall_model_of_jax_gives_the_same_vectors(seen, name):
    model, schema = training.load_recall(seen / "examples", seen / name)
    rows = read_slice(seen / "examples", "test").head(on_jax.ROWS)
    with np.load(seen / f"{name}.npz") as theirs:
        np.testing.assert_allclose(training.query_vectors(model, rows, schema), theirs["queries"], atol=1e-5)
        items = training.item_vectors(model, np.arange(FIRST, schema.size("item_id")))
        np.testing.assert_allclose(items, theirs["items"], atol=1e-5)
        assert np.abs(items).max() > 0.01


@pytest.mark.parametrize("name", on_jax.RANK)
def test_a_rank_model_of_jax_gives_the_same_scores_and_is_exported_with_them(seen, name, tmp_path):
    model, schema = training.load_rank(seen / "examples", seen / name)
    rows = read_slice(seen / "examples", "test").head(on_jax.ROWS)
    scores = training.scores(model, rows, schema)
    with np.load(seen / f"{name}.npz") as theirs:
        assert set(theirs) == set(scores)
        for task, values in scores.items():
            assert values.std() > 0
            np.testing.assert_allclose(values, theirs[task], rtol=1e-5, atol=1e-5, err_msg=task)
        export.export_rank(model, schema, tmp_path)
        for task, values in score_rows(tmp_path / "saved_model", rows).items():
            np.testing.assert_allclose(values, theirs[task], rtol=1e-5, atol=1e-5, err_msg=task)


def test_a_recall_model_of_jax_is_exported_and_scores_as_there(seen, tmp_path):
    model, schema = training.load_recall(seen / "examples", seen / "youtube_dnn")
    export.export_recall(model, schema, Catalogue.read(seen / "examples", schema), tmp_path)
    signature = tf.saved_model.load(str(tmp_path / "saved_model")).signatures["recommend"]
    rows = read_slice(seen / "examples", "test").head(on_jax.ROWS)
    specs = signature.structured_input_signature[1]
    fed = {
        name: tf.constant(feed(rows, name, spec.dtype.as_numpy_dtype, len(spec.shape)))
        for name, spec in specs.items()
        if name not in ("k", "exclude")
    }
    answer = signature(**fed, k=tf.constant(5), exclude=tf.constant(np.full((rows.height, 1), -1)))
    with np.load(seen / "youtube_dnn.npz") as theirs:
        expected = -np.sort(-theirs["queries"] @ theirs["items"].T, axis=1)[:, :5]
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-5)
