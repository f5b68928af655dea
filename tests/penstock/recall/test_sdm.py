from __future__ import annotations

import dataclasses

import keras
import numpy as np
import polars as pl
import pytest
import tensorflow as tf

from penstock import training
from penstock.catalogue import Catalogue
from penstock.examples import Schema, read_slice
from penstock.layers.latent_cross import LatentCross
from penstock.recall import sdm
from penstock.recall.sdm import Config, Gate, ItemAttributes, LongTerm, ShortTerm, attend_as, build

ITEMS, WIDTH, DIM = 9, 3, 4
AUTHORS = np.array([0, 0, 2, 3, 2, 1, 4, 0, 2, 3, 4], np.int32)
TAGS = np.array([[0, 0]] * 2 + [[2, 3], [3, 0], [0, 0], [2, 2], [4, 1], [0, 0], [3, 4], [2, 3], [4, 4]], np.int32)
"""Of two more items than a history can have."""

SESSIONS = np.array([[2, 3, 4, 5, 6], [8, 0, 0, 0, 0], [0, 0, 0, 0, 0], [7, 7, 1, 0, 0]], np.int32)


def _attributes():
    layer = ItemAttributes({"author_id": AUTHORS, "tags": TAGS}, {"author_id": 5, "tags": 5}, ITEMS, WIDTH)
    layer.build((None, None))
    return layer


def _users():
    return np.random.default_rng(5).normal(size=(len(SESSIONS), DIM)).astype(np.float32)


def _vectors(attributes, item):
    """The vectors of an item by name."""
    tables = {name: np.asarray(layer.table) for name, layer in attributes._embeddings.items()}
    tags = [tables["tags"][tag] for tag in TAGS[item] if tag]
    return {
        "item_id": tables["item_id"][item],
        "author_id": tables["author_id"][AUTHORS[item]],
        "tags": np.mean(tags, axis=0) if tags else np.zeros(WIDTH),
    }


def _attend(query, vectors):
    parts = [np.exp(np.dot(query, vector)) for vector in vectors]
    return sum(part / sum(parts) * vector for part, vector in zip(parts, vectors, strict=True))


def _sigmoid(value):
    return 1 / (1 + np.exp(-value))


def _lstm(layer, inputs):
    kernel, recurrent, bias = map(np.asarray, layer.cell.weights)
    hidden, cell, found = np.zeros(DIM), np.zeros(DIM), []
    for one in inputs:
        gate_in, forget, candidate, out = np.split(one @ kernel + hidden @ recurrent + bias, 4)
        cell = _sigmoid(forget) * cell + _sigmoid(gate_in) * np.tanh(candidate)
        hidden = _sigmoid(out) * np.tanh(cell)
        found.append(hidden)
    return found


def _heads(layer, vectors):
    query, key, value, joined = (
        np.asarray(dense.kernel) for dense in (layer.of_queries, layer.of_keys, layer.of_values, layer.joined)
    )
    size, found = DIM // layer.heads, []
    for one in vectors:
        heads = []
        for head in range(layer.heads):
            part = slice(size * head, size * (head + 1))
            scores = [np.exp((one @ query)[part] @ (other @ key)[part]) for other in vectors]
            heads.append(sum(s / sum(scores) * (o @ value)[part] for s, o in zip(scores, vectors, strict=True)))
        found.append(np.concatenate(heads) @ joined)
    return found


def _normed(vector):
    return (vector - vector.mean()) / np.sqrt(vector.var() + 1e-3)


def test_the_users_attention_equals_the_loops():
    random = np.random.default_rng(0)
    users, vectors = random.normal(size=(6, DIM)), random.normal(size=(6, 5, DIM))
    lengths = [5, 4, 3, 2, 1, 0]
    present = np.arange(5) < np.array(lengths)[:, None]
    found = np.asarray(attend_as(*(array.astype(np.float32) for array in (users, vectors)), present))
    for row, length in enumerate(lengths):
        expected = _attend(users[row], vectors[row, :length]) if length else np.zeros(DIM)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)


def test_an_item_is_its_id_and_its_attributes():
    attributes = _attributes()
    found = attributes(np.arange(ITEMS, dtype=np.int32)[None])
    for item in range(ITEMS):
        for name, vector in _vectors(attributes, item).items():
            np.testing.assert_allclose(found[name][0, item], vector, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (2, 1), (4, 2)])
def test_the_short_term_equals_the_loops(heads, layers):
    attributes, users = _attributes(), _users()
    layer = ShortTerm(attributes, DIM, heads, layers, dropout=0.0)
    factors = np.random.default_rng(8).normal(1.0, 0.3, users.shape).astype(np.float32)
    for trains in (False, True):  # rows are put together by their length
        found = np.asarray(layer(SESSIONS, users, factors, training=trains))
        for row, session in enumerate(SESSIONS):
            hidden = [np.concatenate(list(_vectors(attributes, item).values())) for item in session if item]
            for place, lstm in enumerate(layer.recurrent):
                steps = _lstm(lstm, hidden)
                hidden = [step + of for step, of in zip(steps, hidden, strict=True)] if place else steps
            hidden = [factors[row] * of for of in hidden]
            joined = [_normed(h + of) for h, of in zip(hidden, _heads(layer.heads, hidden), strict=True)]
            expected = _attend(users[row], joined) if joined else np.zeros(DIM)
            np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-5)


def test_a_last_batch_of_one_row_trains_as_any_other():
    layer = ShortTerm(_attributes(), DIM, 2, 1, dropout=0.0)
    factors = np.ones_like(_users())
    expected = np.asarray(layer(SESSIONS, _users(), factors))
    specs = [tf.TensorSpec([None, SESSIONS.shape[1]], tf.int32), *[tf.TensorSpec([None, DIM])] * 2]
    step = tf.function(lambda items, user, factor: layer(items, user, factor, training=True), input_signature=specs)
    for row in range(len(SESSIONS)):
        found = step(*(of[row : row + 1] for of in (SESSIONS, _users(), factors)))
        np.testing.assert_allclose(found[0], expected[row], rtol=1e-4, atol=1e-6)


def test_the_long_term_equals_the_loops():
    attributes, users = _attributes(), _users()
    layer = LongTerm(attributes, DIM, dropout=0.0)
    found = np.asarray(layer(SESSIONS, users))
    for row, items in enumerate(SESSIONS):
        sets = []
        for name, dense in layer.dense.items():
            kernel, bias = np.asarray(dense.kernel), np.asarray(dense.bias)
            vectors = [_vectors(attributes, item)[name] @ kernel + bias for item in items if item]
            sets.append(_attend(users[row], vectors) if vectors else np.zeros(DIM))
        expected = np.tanh(np.concatenate(sets) @ np.asarray(layer.joined.kernel) + np.asarray(layer.joined.bias))
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)


def test_the_gate_mixes_each_dimension():
    user, short, long = (np.random.default_rng(seed).normal(size=(3, DIM)).astype(np.float32) for seed in range(3))
    gate = Gate(DIM)
    found = np.asarray(gate(user, short, long))
    kernels, bias = np.split(np.asarray(gate.dense.kernel), 3), np.asarray(gate.dense.bias)
    g = _sigmoid(sum(part @ kernel for part, kernel in zip((user, short, long), kernels, strict=True)) + bias)
    np.testing.assert_allclose(found, (1 - g) * long + g * short, rtol=1e-5)


@pytest.mark.parametrize(("bias", "which"), [(100.0, 1), (-100.0, 2)])
def test_a_gate_at_1_is_the_short_term_alone_and_at_0_the_long_term(bias, which):
    parts = [np.random.default_rng(seed).normal(size=(3, DIM)).astype(np.float32) for seed in range(3)]
    gate = Gate(DIM)
    gate(*parts)
    gate.dense.bias.assign([bias] * DIM)
    np.testing.assert_array_equal(gate(*parts), parts[which])


@pytest.fixture(scope="module")
def known(examples):
    schema = Schema.load(examples / "schema")
    return schema, Catalogue.read(examples, schema)


def _inputs(query, schema, rows, **given):
    names = {tensor.name for tensor in query.inputs}
    return {f.name: schema.encode(f, rows[f.name]) for f in schema.features if f.name in names} | given


MINUTE = 60_000
NOW = 1_714_600_000_000


def _history(*actions, length=50):
    """(item index, minutes before now) → the four inputs of one row."""
    items, times = np.zeros((1, length), np.int32), np.full((1, length), -1)
    for place, (item, minutes) in enumerate(actions):
        items[0, place], times[0, place] = item, NOW - minutes * MINUTE
    return {
        "history_items": items,
        "history_times": times,
        "history_sessions": np.full((1, length), -1),
        "time_ms": np.array([NOW]),
    }


@pytest.fixture(scope="module")
def tower(known, examples):
    keras.utils.set_random_seed(1)
    query = build(Config(dim=8, width=6, heads=2), *known).query
    rows = read_slice(examples, "test").head(1)

    def parts(*actions):
        inputs = _inputs(query, known[0], rows, **_history(*actions))
        return [np.asarray(part)[0] for part in seen(inputs)]

    seen = keras.Model(query.inputs, [query.get_layer(name).output for name in ("short_term", "long_term")])
    return parts


def test_an_older_session_changes_the_long_term_alone_and_the_last_one_the_short_term(tower):
    s, p = tower((2, 60), (3, 59), (4, 5), (5, 1))
    older = tower((2, 60), (9, 59), (4, 5), (5, 1))
    newer = tower((2, 60), (3, 59), (4, 5), (9, 1))
    np.testing.assert_array_equal(older[0], s)
    np.testing.assert_array_equal(newer[1], p)
    assert not np.allclose(older[1], p)
    assert not np.allclose(newer[0], s)


def test_the_short_term_knows_the_order_and_the_long_term_does_not(tower):
    one, other = tower((2, 60), (3, 60), (4, 5), (5, 5)), tower((3, 60), (2, 60), (5, 5), (4, 5))
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5, atol=1e-6)
    assert not np.allclose(one[0], other[0])


def test_what_is_older_than_a_week_is_forgotten(tower):
    day = 24 * 60
    s, p = tower((4, 5))
    found = tower((2, 8 * day), (4, 5))
    np.testing.assert_array_equal(found[0], s)
    np.testing.assert_array_equal(found[1], p)
    assert not np.allclose(tower((2, 6 * day), (4, 5))[1], p)


def test_no_history_and_one_of_unknown_items(tower):
    nothing, unknown = tower(), tower((1, 5), (1, 3))
    assert not nothing[0].any()
    assert all(np.isfinite(part).all() for part in (*nothing, *unknown))
    assert unknown[0].any()
    assert not np.allclose(unknown[0], tower((2, 5), (2, 3))[0])


def test_who_else_is_in_the_batch_changes_nothing(known, examples):
    schema, catalogue = known
    keras.utils.set_random_seed(2)
    query = build(Config(dim=8, width=6, heads=2, dropout=0.0), schema, catalogue).query
    inputs = _inputs(query, schema, read_slice(examples, "test").head(7))
    together = np.asarray(query(inputs))
    assert together.shape == (7, 9)
    np.testing.assert_array_equal(together[:, -1], 1)
    np.testing.assert_allclose(query(inputs, training=True), together, rtol=1e-4, atol=1e-6)
    for row in (0, 4):
        alone = query({name: values[row : row + 1] for name, values in inputs.items()})
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-4, atol=1e-6)


def test_context_multiplies_the_session_and_nothing_else(known, examples):
    keras.utils.set_random_seed(4)
    query = build(Config(dim=8, width=6, heads=2, latent_cross=True), *known).query
    seen = keras.Model(query.inputs, [query.get_layer(name).output for name in ("short_term", "long_term")])
    (cross,) = (layer for layer in query.layers if isinstance(layer, LatentCross))
    for weight in cross.weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    rows = read_slice(examples, "test").filter(pl.col("history_items").list.len() > 1).head(3)
    inputs = _inputs(query, known[0], rows)
    s, p = seen(inputs)
    other_s, other_p = seen(inputs | {"hour": (inputs["hour"] + 1) % 3})
    np.testing.assert_array_equal(other_p, p)
    assert not np.allclose(other_s, s)


@pytest.mark.parametrize(("heads", "gate", "layers", "cross"), [(1, True, 1, True), (4, False, 2, False)])
def test_every_weight_learns_with_any_heads_and_with_or_without_the_gate(heads, gate, layers, cross, known, examples):
    schema, catalogue = known
    tags = np.random.default_rng(1).integers(0, schema.size("tags"), catalogue.attributes["tags"].shape)
    catalogue = dataclasses.replace(catalogue, attributes={**catalogue.attributes, "tags": tags})
    towers = build(Config(dim=8, width=6, heads=heads, gate=gate, layers=layers, latent_cross=cross), schema, catalogue)
    assert ("gate" in {layer.name for layer in towers.query.layers}) == gate
    inputs = _inputs(towers.query, schema, read_slice(examples, "train").head(256))
    toward = np.random.default_rng(0).normal(size=(256, 9)).astype(np.float32)
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(towers.query(inputs, training=True) * toward)
    variables = towers.query.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(value, [v.value for v in variables]), strict=True):
        assert gradient is not None, variable.path
        values = np.asarray(tf.convert_to_tensor(gradient))
        assert np.isfinite(values).all(), variable.path
        assert values.any(), variable.path


def test_a_prefix_of_a_history_is_asked_for_when_its_next_item_was_shown(known, examples):
    schema, _ = known
    rows = training._positives(examples, "train", schema)
    first = read_slice(examples, "train").unique("user_id", keep="first", maintain_order=True)
    found = training._with_prefixes(rows, examples, Config(prefixes=9), 0)
    prefixes = found.head(found.height - rows.height)
    assert prefixes.height > 20
    of_user = {row["user_id"]: row for row in first.iter_rows(named=True)}
    for row in prefixes.iter_rows(named=True):
        whole = of_user[row["user_id"]]
        place = len(row["history_items"])
        assert place > 0
        for name in ("history_items", "history_times", "history_sessions"):
            assert row[name] == whole[name][:place]
        assert (row["item_id"], row["time_ms"]) == (whole["history_items"][place], whole["history_times"][place])


def test_heads_must_share_the_dim(known):
    with pytest.raises(ValueError, match="10 dimensions cannot be shared by 4 heads"):
        build(Config(dim=10), *known)


def test_the_attributes_are_those_of_items(known):
    assert set(sdm.ATTRIBUTES) <= set(known[1].attributes)
