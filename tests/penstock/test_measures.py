from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from penstock import metrics
from penstock.measures import Measures
from penstock.metrics import MetricError

LABELS = ("click", "long_view", "like")
SHARES = (0.4, 0.3, 0.05)


def columns(kind: str, rows: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Scores of shapes that buckets could get wrong."""
    raw = generator.normal(size=(3, rows))
    shaped = {
        "smooth": 1 / (1 + np.exp(-raw)),
        "steps": np.floor(5 / (1 + np.exp(-raw))) / 5,
        "few and many": np.where(generator.random((3, rows)) < 0.5, 0.25, 1 / (1 + np.exp(-raw))),
        "tails": np.exp(6 * raw),
        "one far": np.where(np.arange(rows) == rows // 2, 1e12, 1 / (1 + np.exp(-raw))),
        "last bits": 1 + np.floor(20 * generator.random((3, rows))) * np.finfo(np.float64).eps,
        "constant": np.full((3, rows), 0.5),
        "tiny": raw * 1e-310,
    }[kind]
    return dict(zip(LABELS, shaped, strict=True))


def sample(
    kind: str, rows: int, users: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = {
        name: (generator.random(rows) < share).astype(np.int8) for name, share in zip(LABELS, SHARES, strict=True)
    }
    of_user = generator.integers(0, users, rows)
    # requests of a user are told apart by the row's parity, and their ids are in no order
    sessions = (of_user * 2 + np.arange(rows) % 2) * 7919 % 100_003
    return labels, columns(kind, rows, generator), of_user, sessions


def fused(heads: dict[str, np.ndarray], weights: tuple[float, ...]) -> np.ndarray:
    total = np.zeros(len(next(iter(heads.values()))))
    for weight, values in zip(weights, heads.values(), strict=True):
        total = total + weight * values
    return total


def gauc_by_loop(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    found = []
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            found.append((mine.sum(), roc_auc_score(labels[mine], scores[mine])))
    weights, values = zip(*found, strict=True)
    return float(np.average(values, weights=weights))


def ndcg_by_loop(labels: np.ndarray, scores: np.ndarray, sessions: np.ndarray, k: int) -> float:
    found = []
    for session in np.unique(sessions):
        mine = sessions == session
        if labels[mine].sum() and mine.sum() > 1:
            found.append(ndcg_score([labels[mine]], [scores[mine]], k=k))
        elif labels[mine].sum():
            found.append(1.0)  # scikit-learn asks for more than one document
    return float(np.mean(found))


@pytest.mark.parametrize("weights", [(3.0, 1.0, 2.0), (0.0, 1.0, 0.0), (-2.0, 1.0, 0.0)])
@pytest.mark.parametrize(
    "kind", ["smooth", "steps", "few and many", "tails", "one far", "last bits", "constant", "tiny"]
)
def test_auc_is_scikit_learns(kind: str, weights: tuple[float, ...]) -> None:
    for rows in (40, 5000):
        labels, heads, _, _ = sample(kind, rows, 5)
        found = Measures(labels, heads)(weights)
        expected = [roc_auc_score(values, fused(heads, weights)) for values in labels.values()]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_labels_is_measured_at_once(count: int) -> None:
    generator = np.random.default_rng(count)
    labels = {f"label {place}": generator.integers(0, 2, 3000) for place in range(count)}
    scores = np.round(generator.random(3000), 2)
    found = Measures(labels, {"one": scores})([1.0])
    assert found == pytest.approx([roc_auc_score(values, scores) for values in labels.values()], abs=1e-12)


@pytest.mark.parametrize("users", [3, 60, 300])
@pytest.mark.parametrize("kind", ["smooth", "steps", "few and many"])
def test_gauc_and_ndcg_are_loops_over_scikit_learn(kind: str, users: int) -> None:
    rows = 1200  # 3 users have more rows than are compared pair by pair, 300 have few that have both classes
    labels, heads, of_user, sessions = sample(kind, rows, users)
    measures = Measures(labels, heads, ("ndcg@3", "auc", "gauc", "ndcg@50"), users=of_user, sessions=sessions)
    found = dict(zip(measures.names, measures((3.0, 1.0, 2.0)), strict=True))
    score = fused(heads, (3.0, 1.0, 2.0))
    for name, values in labels.items():
        assert found[f"auc_{name}"] == pytest.approx(roc_auc_score(values, score), abs=1e-12)
        assert found[f"gauc_{name}"] == pytest.approx(gauc_by_loop(values, score, of_user), abs=1e-12)
        for k in (3, 50):
            assert found[f"ndcg@{k}_{name}"] == pytest.approx(ndcg_by_loop(values, score, sessions, k), abs=1e-12)


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40).filter(
        lambda rows: len({label for _, label, _ in rows}) == 2
    ),
)
def test_measures_are_the_plain_metrics_on_any_rows(k: int, rows: list[tuple[int, bool, int]]) -> None:
    scores, labels, groups = (np.array(values) for values in zip(*rows, strict=True))
    measures = Measures({"like": labels}, {"one": scores / 4}, ("auc", f"ndcg@{k}"), users=groups, sessions=groups)
    assert measures([2.0]).tolist() == pytest.approx(
        [metrics.auc(labels, scores), metrics.session_ndcg(labels, scores, groups, k)], abs=1e-12
    )


def test_a_measure_does_not_depend_on_the_order_of_rows_or_on_threads() -> None:
    labels, heads, users, _ = sample("few and many", 4000, 50)
    order = np.random.default_rng(1).permutation(4000)
    one = Measures(labels, heads, ("auc", "gauc"), users=users)
    other = Measures(
        {name: values[order] for name, values in labels.items()},
        {name: values[order] for name, values in heads.items()},
        ("auc", "gauc"),
        users=users[order],
    )
    points = [(1.0, a, b) for a in range(6) for b in range(6)]
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(one, points))
    for point, found in zip(points, at_once, strict=True):
        assert found.tolist() == one(point).tolist() == other(point).tolist()


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    labels, heads, users, sessions = sample("smooth", 100, 10)
    with pytest.raises(MetricError, match=r"label like: all 100 labels are 0"):
        Measures({**labels, "like": np.zeros(100)}, heads)
    with pytest.raises(MetricError, match=r"head like: 1 of 100 scores are NaN"):
        Measures(labels, {**heads, "like": np.where(np.arange(100) == 3, np.nan, 0.5)})
    with pytest.raises(MetricError, match=r"head like: scores have the shape"):
        Measures(labels, {**heads, "like": np.zeros(99)})
    with pytest.raises(MetricError, match="labels of 99 and 100 rows"):
        Measures({**labels, "like": np.arange(99) % 2}, heads)
    with pytest.raises(MetricError, match="9 labels: there must be 1 to 8"):
        Measures({str(place): labels["like"] for place in range(9)}, heads)
    with pytest.raises(ValueError, match="the users of the rows are needed"):
        Measures(labels, heads, ("gauc",))
    with pytest.raises(ValueError, match="the sessions of the rows are needed"):
        Measures(labels, heads, ("ndcg@5",), users=users)
    with pytest.raises(MetricError, match="99 sessions for 100 labels"):
        Measures(labels, heads, ("ndcg@5",), sessions=sessions[:99])
    with pytest.raises(MetricError, match=r"label click: no user has both"):
        Measures(labels, heads, ("gauc",), users=np.arange(100))


def test_compiled_code_that_cannot_be_kept_is_compiled_again(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[2] / "penstock"
    shutil.copytree(source, tmp_path / "penstock", ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        "import numpy, penstock.measures as m; assert not m._fuse.stats.cache_path, m._fuse.stats; s = numpy.zeros(2);"
        "m._fuse(numpy.array([[1.0, 2.0]]), numpy.array([3.0]), s); print(s.tolist(), m.__file__)"
    )
    (tmp_path / "penstock" / "__pycache__").write_text("")  # where it would be kept, and the home, are no folders
    (tmp_path / "no folder").write_text("")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tmp_path),
        "HOME": str(tmp_path / "no folder"),
        "XDG_CACHE_HOME": str(tmp_path / "no folder"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"[3.0, 6.0] {tmp_path}")
    assert not done.stderr
