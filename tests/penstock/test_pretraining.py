from __future__ import annotations

import dataclasses
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tensorflow as tf

from penstock import pretraining
from penstock.catalogue import Catalogue
from penstock.events import ITEMS
from penstock.examples import Schema, fit_schema, read_slice
from penstock.pretraining import Sessions, drawn_pairs, graph, negative_sampling, pairs, read_sessions, vectors
from penstock.sessions import GAP_MS
from tests.penstock.conftest import joined_rows

ITEMS_OF_ONE = 12
"""Items of each of two communities; raw ids are ten times the number, as everywhere in the tests."""

RARE = 2 * ITEMS_OF_ONE
"""An item of the second community by its attributes, which nobody ever watched with another."""

DIM = 8
START_MS = int(datetime(2024, 5, 1, tzinfo=UTC).timestamp() * 1000)


def directory(out: Path, sessions: list[list[int]], shown: list[int]) -> Path:
    """Examples in which each user has one session, half of it before the log; `shown` was seen and not watched."""
    out.mkdir(parents=True)
    rows = joined_rows(1, users=1, items=1)
    row = rows.drop("history_items", "history_times", "history_sessions", "session_id").row(0, named=True)
    made = []
    for user, items in enumerate(sessions):
        times = [START_MS + 1000 * place for place in range(len(items))]
        half = len(items) // 2
        # a later row's history has what the former rows have watched
        made += [row | told(user, items, times, place, watched=1) for place in range(half, len(items))]
    made += [row | told(10_000 + place, [10 * item], [START_MS], 0, watched=0) for place, item in enumerate(shown)]
    frame = pl.DataFrame(made, schema_overrides={"session_id": pl.Int64, **rows.schema}, infer_schema_length=None)
    frame.write_parquet(out / "train.parquet")
    catalogue_rows().write_parquet(out / "items.parquet")
    fit_schema(frame).save(out / "schema")
    return out


def told(user: int, items: list[int], times: list[int], place: int, watched: int) -> dict[str, object]:
    item = items[place] // 10
    side = int(item >= ITEMS_OF_ONE)
    return {
        "user_id": user,
        "item_id": items[place],
        "time_ms": times[place],
        "event_time": datetime.fromtimestamp(times[place] / 1000, UTC),
        "session_id": None,
        "long_view": watched,
        "history_items": items[:place],
        "history_times": times[:place],
        "history_sessions": [-1] * place,
        "author_id": 100 + side,
        "category": 1 + side,
        "tags": [7 + side],
        "music_id": 200 + item % 3,
        "item_type": 1,
        "duration_ms": 10_000 + 100 * item,
    }


def catalogue_rows() -> pl.DataFrame:
    made = []
    for item in range(RARE + 1):
        values = {
            name: 0 if dtype == pl.Int64() else "" if dtype == pl.String() else []
            for name, dtype in ITEMS.schema.items()
        }
        start = datetime(2024, 4, 1, tzinfo=UTC)
        attributes = {name: value for name, value in told(0, [10 * item], [0], 0, 0).items() if name in ITEMS.schema}
        made.append(values | attributes | {"event_time": start, "created_time": start})
    return pl.DataFrame(made, schema=ITEMS.schema)


@pytest.fixture(scope="module")
def communities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two communities that are never watched together."""
    random = np.random.default_rng(0)
    sessions = [
        (10 * (ITEMS_OF_ONE * (user % 2) + random.permutation(ITEMS_OF_ONE)[: random.integers(3, 8)])).tolist()
        for user in range(120)
    ]
    return directory(tmp_path_factory.mktemp("communities") / "examples", sessions, [RARE] * 3)


def learnt(name: str, examples: Path, seed: int = 0) -> np.ndarray:
    schema = Schema.load(examples / "schema")
    return vectors(name, examples, schema, Catalogue.read(examples, schema), DIM, seed)


@pytest.fixture(scope="module")
def found(communities: Path) -> dict[str, np.ndarray]:
    return {name: learnt(name, communities) for name in ("item2vec", "graph")}


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = (side / np.maximum(np.linalg.norm(side, axis=-1, keepdims=True), 1e-12) for side in (one, other))
    return one @ other.T


# sessions and pairs


def test_sessions_are_those_of_the_log_or_end_with_a_gap(tmp_path):
    gap = GAP_MS
    rows = joined_rows(6, users=1, items=1).drop("history_items", "history_times", "history_sessions")
    times = [0, 10, 20, 20 + gap, 20 + 2 * gap, 30 + 2 * gap]
    rows = rows.with_columns(
        user_id=pl.Series([5, 5, 5, 5, 5, 4]),
        item_id=pl.Series([10, 20, 30, 40, 50, 60]),
        time_ms=pl.Series(times) + START_MS,
        session_id=pl.Series([None, 3, 4, 4, None, None], dtype=pl.Int64),
        long_view=pl.Series([1, 1, 1, 1, 1, 1], dtype=pl.Int8),
        history_items=pl.Series([[70, 80], [70, 80, 10], [], [], [], []], dtype=pl.List(pl.Int64)),
        history_times=pl.Series(
            [[START_MS - gap, START_MS - gap + 1], [0] * 3, [], [], [], []], dtype=pl.List(pl.Int64)
        ),
        history_sessions=pl.Series([[-1, -1], [-1] * 3, [], [], [], []], dtype=pl.List(pl.Int64)),
    )
    rows.write_parquet(tmp_path / "train.parquet")
    schema = fit_schema(rows)
    sessions = read_sessions(tmp_path, schema)
    known = schema.vocabularies["item_id"][sessions.items - 2]
    divided = [known[sessions.session == number].tolist() for number in range(sessions.session.max() + 1)]
    # 70 to 10 is less than the gap; 30 and 40 are of one session of the log, 20 of another; 50 comes the gap later
    assert divided == [[60], [70, 80, 10, 20], [30, 40], [50]]
    assert read_sessions(
        tmp_path, dataclasses.replace(schema, vocabularies={"item_id": np.array([30])})
    ).items.tolist() == [2]


def random_sessions(seed: int, count: int = 30, items: int = 9) -> Sessions:
    random = np.random.default_rng(seed)
    session = np.repeat(np.arange(count), random.integers(0, 9, count))
    return Sessions(random.integers(2, 2 + items, len(session)).astype(np.int32), session)


@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_equal_the_loops(seed, window):
    items, session = random_sessions(seed)
    expected = [
        (items[one], items[other])
        for one in range(len(items))
        for other in range(one + 1, len(items))
        if session[one] == session[other] and other - one <= window and items[one] != items[other]
    ]
    assert sorted(map(tuple, pairs(Sessions(items, session), window).tolist())) == sorted(expected)


def test_no_items_no_pairs():
    none = Sessions(np.empty(0, np.int32), np.empty(0, np.int64))
    assert pairs(none, 5).shape == (0, 2)


def test_a_short_session_gives_all_its_pairs_both_ways():
    sessions = Sessions(np.array([2, 3, 4, 5, 6, 7, 8, 9], np.int32), np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    drawn = drawn_pairs(sessions, 10, np.random.default_rng(0))
    expected = [(a, b) for a in range(2, 8) for b in range(2, 8) if a != b] + [(8, 9), (9, 8)]
    assert sorted(map(tuple, drawn.tolist())) == sorted(expected)


def test_of_a_long_session_each_pair_is_drawn_as_often_as_any_other():
    sessions = Sessions(np.arange(2, 22, dtype=np.int32), np.zeros(20, np.int64))
    random = np.random.default_rng(0)
    times = np.zeros((22, 22))
    for _ in range(400):
        np.add.at(times, tuple(drawn_pairs(sessions, 22, random).T), 1)
    off = times[2:, 2:][~np.eye(20, dtype=bool)]
    share = (20 * 5 - 15) / 190  # of the pairs of 20 items those at most 5 apart
    assert off.mean() == pytest.approx(400 * share)
    assert np.abs(off - off.mean()).max() < 5 * np.sqrt(400 * share * (1 - share))


def test_frequent_items_are_thinned_out():
    # the first item 40 times as often watched as the mean of 99, each time with one of the others
    others = np.arange(3, 101, dtype=np.int32)
    sessions = Sessions(np.stack([np.full(98, 2, np.int32), others], 1).ravel(), np.repeat(np.arange(98), 2))
    times = 98 / (196 / 99)
    random = np.random.default_rng(0)
    kept = [len(drawn_pairs(sessions, 101, random)) / 2 for _ in range(300)]
    assert np.mean(kept) == pytest.approx(98 * np.sqrt(pretraining.FREQUENT / times), rel=0.03)


# the loss


@pytest.mark.parametrize("negatives", [1.0, 5.0])
def test_the_loss_and_its_gradient_equal_the_loops(negatives):
    random = np.random.default_rng(1)
    centres, contexts, noise = (random.normal(size=(size, 3)).astype(np.float32) for size in (4, 4, 6))
    expected, gradients = np.zeros(4), [np.zeros((size, 3)) for size in (4, 4, 6)]
    for row in range(4):
        own = 1 / (1 + np.exp(-centres[row] @ contexts[row]))
        expected[row] = -np.log(own)
        gradients[0][row] -= (1 - own) * contexts[row]
        gradients[1][row] -= (1 - own) * centres[row]
        for place in range(6):
            taken = 1 / (1 + np.exp(-centres[row] @ noise[place]))
            expected[row] -= negatives / 6 * np.log(1 - taken)
            gradients[0][row] += negatives / 6 * taken * noise[place]
            gradients[2][place] += negatives / 6 * taken * centres[row]
    values = [tf.constant(value) for value in (centres, contexts, noise)]
    with tf.GradientTape() as tape:
        tape.watch(values)
        loss = negative_sampling(*values, negatives)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for ours, oracle in zip(tape.gradient(loss, values), gradients, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-6)


def test_one_context_and_its_own_noise_by_hand():
    zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    np.testing.assert_allclose(negative_sampling(zero, one, one, 5.0), [6 * np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(
        negative_sampling(one, one, one, 2.0), [np.log1p(np.exp(-1)) + 2 * np.log1p(np.exp(1))], rtol=1e-6
    )


# the graph


def small_model(communities: Path, edges: np.ndarray) -> graph.GraphSage:
    schema = Schema.load(communities / "schema")
    size = schema.size("item_id")
    return graph.GraphSage(graph.Nodes(Catalogue.read(communities, schema), schema, size, 3, 1), edges, size, 4, 1)


def test_the_vectors_from_all_edges_equal_the_loops(communities):
    random = np.random.default_rng(0)
    edges = random.integers(2, 12, (40, 2)).astype(np.int32)
    model = small_model(communities, edges)
    model.nodes.ids.table.assign(random.normal(size=model.nodes.ids.table.shape))
    size = model.nodes.ids.size
    linked = np.isin(np.arange(size), edges[:, 0]).astype(np.float32)
    below = np.asarray(model.nodes(tf.range(size), linked), np.float64)
    for depth, hop in enumerate(model.hops):
        weight, bias = (np.asarray(value, np.float64) for value in hop.get_weights())
        above = []
        for node in range(size):
            around = [below[other] for one, other in edges if one == node]
            mean = np.mean(around, axis=0) if around else np.zeros(below.shape[1])
            hidden = np.concatenate([below[node], mean]) @ weight + bias
            hidden = np.maximum(hidden, 0.0) if depth == 0 else hidden
            above.append(hidden / np.linalg.norm(hidden))
        below = np.array(above)
    np.testing.assert_allclose(model.exact(), below, atol=1e-5)


def test_the_id_of_a_node_without_neighbours_says_nothing(communities):
    model = small_model(communities, np.array([[2, 3], [3, 2]], np.int32))
    before = model.exact()
    model.nodes.ids.table.assign(np.ones(model.nodes.ids.table.shape))
    changed = np.abs(model.exact() - before).max(axis=1) > 1e-3
    assert np.flatnonzero(changed).tolist() == [2, 3]


def test_what_was_watched_with_others_has_an_edge_though_thinned_out():
    others = np.arange(3, 103, dtype=np.int32)
    sessions = Sessions(np.stack([np.full(100, 2, np.int32), others], 1).ravel(), np.repeat(np.arange(100), 2))
    random = np.random.default_rng(0)
    assert len(np.unique(drawn_pairs(sessions, 103, random)[:, 0])) < 101
    edges = graph.edges_of(sessions, 103, random)
    assert np.unique(edges[:, 0]).tolist() == [*range(2, 103)]
    np.testing.assert_array_equal(np.unique(edges[edges[:, 0] > 2], axis=0)[:, 1], 2)


def test_draws_are_neighbours_as_often_as_there_are_edges(communities):
    edges = np.array([[5, 3], [4, 6], [4, 6], [4, 7], [4, 6]], np.int32)
    model = small_model(communities, edges)
    drawn = np.concatenate([np.asarray(model._drawn(tf.constant([4, 5]))) for _ in range(300)], axis=1)
    assert set(drawn[1].tolist()) == {3}
    assert set(drawn[0].tolist()) == {6, 7}
    assert (drawn[0] == 6).mean() == pytest.approx(0.75, abs=0.04)


def test_a_node_with_one_neighbour_is_drawn_as_it_is(communities, monkeypatch):
    monkeypatch.setattr(graph, "ALONE", 0.0)
    # each node that has neighbours has one, ten draws of which have its vector for their mean
    edges = np.array([[2, 3], [3, 2], [4, 5], [5, 4], [6, 9]], np.int32)
    model = small_model(communities, edges)
    nodes = np.array([6, 2, 11, 5, 0])
    np.testing.assert_allclose(model(tf.constant(nodes, tf.int32)), model.exact()[nodes], atol=1e-5)


def test_drawn_means_are_estimates_of_the_exact_ones(communities, monkeypatch):
    monkeypatch.setattr(graph, "ALONE", 0.0)
    random = np.random.default_rng(2)
    edges = random.integers(2, 12, (200, 2)).astype(np.int32)
    model = small_model(communities, edges)
    nodes = np.arange(2, 12)
    means = np.mean([np.asarray(model(tf.constant(nodes, tf.int32))) for _ in range(30)], axis=0)
    assert np.diag(cosines(means, model.exact()[nodes])).min() > 0.98


# both methods


@pytest.mark.parametrize("name", ["item2vec", "graph"])
def test_items_watched_together_lie_together(found, name):
    one = found[name][2 : 2 + ITEMS_OF_ONE]
    two = found[name][2 + ITEMS_OF_ONE : 2 + RARE]
    within = (cosines(one, one).mean() + cosines(two, two).mean()) / 2
    assert within > cosines(one, two).mean() + 0.8


def test_a_rare_item_lies_by_its_attributes_in_the_graph_alone(found):
    rare = 2 + RARE
    one, two = slice(2, 2 + ITEMS_OF_ONE), slice(2 + ITEMS_OF_ONE, 2 + RARE)
    vector = found["graph"][rare : rare + 1]
    assert cosines(vector, found["graph"][two]).mean() > cosines(vector, found["graph"][one]).mean() + 0.5
    np.testing.assert_array_equal(found["item2vec"][rare], 0.0)


@pytest.mark.parametrize("name", ["item2vec", "graph"])
def test_the_table_is_in_the_order_and_of_the_scale_of_an_embedding(communities, found, name):
    schema = Schema.load(communities / "schema")
    table = found[name]
    assert table.shape == (schema.size("item_id"), DIM)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table[:2], 0.0)
    some = table[np.abs(table).sum(axis=1) > 0]
    assert len(some) == 2 * ITEMS_OF_ONE + (name == "graph")
    np.testing.assert_allclose(some.mean(axis=0), 0.0, atol=1e-6)
    assert some.std() == pytest.approx(0.05 / np.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("name", ["item2vec", "graph"])
def test_the_seed_decides_and_nothing_later_than_training_is_read(communities, name, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "LEAST_STEPS", 10)
    later = tmp_path / "later"
    shutil.copytree(communities, later)
    rows = read_slice(communities, "train")
    for part in ("validation", "test"):
        rows.with_columns(item_id=pl.col("item_id").reverse(), long_view=pl.lit(1, pl.Int8)).write_parquet(
            later / f"{part}.parquet"
        )
    table = learnt(name, communities)
    np.testing.assert_array_equal(learnt(name, later), table)
    assert not np.array_equal(learnt(name, later, seed=1), table)


def test_what_cannot_be_learnt_is_refused(communities, tmp_path):
    with pytest.raises(ValueError, match="unknown pretraining 'glove': there are graph, item2vec"):
        learnt("glove", communities)
    alone = directory(tmp_path / "alone", [[10], [20], [30]], [])
    with pytest.raises(ValueError, match="no two items of the training slice were watched together"):
        learnt("item2vec", alone)
