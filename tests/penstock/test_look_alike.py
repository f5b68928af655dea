from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import look_alike
from penstock.look_alike import Content, LookAlikeError, Scorer, Table, cluster, item_of

DIM, H = 5, 4


def scorer(seed=1, prior=2.5):
    random = np.random.default_rng(seed)
    shapes = ((DIM, H), (H,), (H, 3), (3,), (H, H), (H,))
    *parts, mean = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    return Scorer(*parts, np.float32(0.3), np.float32(0.7), mean, np.float32(prior))


def vectors(count, seed=2):
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def table(items=6, k=4, version=1, seed=1):
    of = {7 * item: item_of(vectors(3 + item, item), 3 + item, scorer(seed), k) for item in range(items)}
    return Table.of(3, "tower", version, 10, scorer(seed), of)


def _cosine(first, second):
    return first @ second / np.sqrt(first @ first * (second @ second))


def _score(model, user, seeds):
    """In the symbols of the paper, seeds as columns, and among them the mean user, who weighs as much as `prior`."""
    e_u, e_s = model.kernel.T @ user + model.bias, (seeds @ model.kernel + model.bias).T
    e_s = np.column_stack([e_s, model.mean])
    n = np.append(np.ones(len(seeds)), model.prior)
    a = n * np.exp(model.merge @ np.tanh(model.hidden.T @ e_s))
    l = n * np.exp(np.tanh(e_s.T @ (model.local.T @ e_u)))  # noqa: E741
    parts = _cosine(e_s @ (a / a.sum()), e_u), _cosine(e_s @ (l / l.sum()), e_u)
    return model.alpha * parts[0] + model.beta * parts[1]


def _scored(model, user, seeds, own=None, k=4):
    item = item_of(seeds, len(seeds) if own is None else own, model, k)
    ids, scores = Table.of(1, "", 1, 0, model, {5: item}).best(user, np.empty(0), 1)
    assert ids.tolist() == [5]
    return scores[0]


@pytest.mark.parametrize("prior", [0.0, 2.5])
def test_the_score_is_that_of_the_paper_with_the_mean_user_among_the_seeds(prior):
    model, user = scorer(prior=prior), vectors(1, 9)[0]
    for count in (1, 2, 4):
        seeds = vectors(count, count)
        assert _scored(model, user, seeds) == pytest.approx(_score(model, user, seeds), rel=1e-4)


def test_a_centroid_weighs_as_much_as_the_seeds_it_stands_for():
    model, user, two = scorer(), vectors(1, 9)[0], vectors(2, 3)
    seeds = np.repeat(two, [5, 1], axis=0)
    assert _scored(model, user, seeds) == pytest.approx(_score(model, user, seeds), rel=1e-4)
    assert _scored(model, user, seeds) != pytest.approx(_score(model, user, two), rel=1e-3)


def test_an_item_of_one_seed_is_its_cosine_whatever_the_attention():
    user, (seed,), model = vectors(1, 9)[0], vectors(1, 3), scorer(prior=0.0)
    assert _scored(model, user, seed[None]) == pytest.approx(_cosine(model.embed(seed), model.embed(user)), rel=1e-4)


def test_few_seeds_are_the_mean_user_and_many_are_themselves():
    user, (seed,) = vectors(1, 9)[0], vectors(1, 3)
    for times, prior, of in ((1, 1e6, lambda model: model.mean), (100_000, 10.0, lambda model: model.embed(seed))):
        model = scorer(prior=prior)
        expected = _cosine(of(model), model.embed(user))
        assert _scored(model, user, np.repeat(seed[None], times, axis=0)) == pytest.approx(expected, abs=1e-3)


def test_what_is_lent_weighs_as_much_as_one_seed_however_many_they_are():
    model, user, own, (lent,) = scorer(), vectors(1, 9)[0], vectors(3, 3), vectors(1, 4)
    asked = [_scored(model, user, np.concatenate([own, np.repeat(lent[None], n, axis=0)]), 3) for n in (1, 50)]
    assert asked[0] == pytest.approx(asked[1], rel=1e-5)
    assert asked[0] == pytest.approx(_score(model, user, np.concatenate([own, lent[None]])), rel=1e-4)


def test_duplicate_seeds_are_one_group():
    found = cluster(np.repeat(vectors(2), [3, 5], axis=0), k=4)
    assert sorted(found.counts.tolist()) == [3, 5]
    model = scorer(prior=0.0)
    once, often = (item_of(np.repeat(vectors(1), times, axis=0), times, model) for times in (1, 9))
    np.testing.assert_allclose(once.summary, often.summary, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seeds=st.integers(1, 40), k=st.integers(1, 6), kinds=st.integers(1, 8))
def test_groups_are_the_means_of_their_seeds(seeds, k, kinds):
    of = vectors(kinds)[np.random.default_rng(seeds).integers(0, kinds, seeds)]
    found = cluster(of, k)
    assert len(found.counts) <= k
    assert found.counts.min() >= 1
    assert found.counts.sum() == seeds
    for group in range(len(found.counts)):
        np.testing.assert_allclose(found.centroids[group], of[found.places == group].mean(axis=0), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seeds=st.integers(1, 30), k=st.integers(1, 6))
def test_weights_are_those_of_seeds_that_are_there_so_often(seeds, k):
    of, often = vectors(seeds), np.random.default_rng(seeds).integers(1, 4, seeds)
    found = cluster(of, k, weights=often.astype(float))
    for group in range(len(found.counts)):
        mine = found.places == group
        assert found.counts[group] == often[mine].sum()
        mean = np.repeat(of[mine], often[mine], axis=0).mean(axis=0)
        np.testing.assert_allclose(found.centroids[group], mean, rtol=1e-4, atol=1e-5)


def test_groups_that_lie_apart_are_found_few_or_many(monkeypatch):
    centres = 20 * vectors(3)
    places = np.random.default_rng(4).integers(0, 3, 300)
    near = centres[places] + 0.1 * vectors(300, 5)
    for few in (10_000, 10):
        monkeypatch.setattr(look_alike, "FEW", few)
        found = cluster(near, 3)
        order = np.argsort(found.centroids[:, 0])
        np.testing.assert_allclose(found.centroids[order], centres[np.argsort(centres[:, 0])], atol=0.1)


def test_no_seeds_and_seeds_that_are_no_numbers_are_refused():
    for bad in (np.empty((0, DIM)), np.full((2, DIM), np.nan)):
        with pytest.raises(LookAlikeError, match="one or more vectors of finite numbers"):
            cluster(bad)


def test_the_best_are_those_that_score_highest_without_the_excluded():
    of, user = table(), vectors(1, 9)[0]
    ids, scores = of.best(user, np.array([]), 99)
    assert sorted(ids) == of.ids.tolist()
    assert (np.diff(scores) <= 0).all()
    again, _ = of.best(user, np.array([ids[0], 12345]), 2)
    assert again.tolist() == ids[1:3].tolist()


@pytest.mark.parametrize("vector", [np.zeros(DIM + 1), np.full(DIM, np.nan)])
def test_a_vector_of_another_tower_is_refused(vector):
    with pytest.raises(LookAlikeError, match="a user is 5 finite numbers"):
        table().best(vector, np.array([]), 1)


def test_a_table_is_read_as_it_was_published(tmp_path):
    published = table()
    published.publish(tmp_path)
    found = Table.read(tmp_path, 3, "tower")
    for name, value in vars(published).items():
        if name != "scorer":
            np.testing.assert_array_equal(getattr(found, name), value)
    assert found.scorer.digest == published.scorer.digest
    assert Table.of(3, "tower", 1, 10, found.scorer, found.items()).ids.tolist() == published.ids.tolist()


def test_a_table_of_another_tower_or_damaged_is_refused(tmp_path):
    table().publish(tmp_path)
    with pytest.raises(LookAlikeError, match="another query tower"):
        Table.read(tmp_path, 3, "other")
    path = look_alike.table_path(tmp_path, 3)
    look_alike.folder_of(tmp_path, 4).mkdir()
    look_alike.table_path(tmp_path, 4).write_bytes(path.read_bytes())
    with pytest.raises(LookAlikeError, match="is of release 3"):
        Table.read(tmp_path, 4, "tower")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(LookAlikeError, match="damaged"):
        Table.read(tmp_path, 3, "tower")
    with pytest.raises(FileNotFoundError):
        Table.read(tmp_path, 5, "tower")


def test_a_table_or_model_of_another_version_is_refused(tmp_path):
    scorer().save(tmp_path / "model.npz", "tower")
    table().publish(tmp_path)
    for path, name, read in (
        (tmp_path / "model.npz", "prior", lambda: Scorer.read(tmp_path / "model.npz", "tower")),
        (look_alike.table_path(tmp_path, 3), "counts", lambda: Table.read(tmp_path, 3, "tower")),
        (look_alike.table_path(tmp_path, 3), "scorer_mean", lambda: Table.read(tmp_path, 3, "tower")),
    ):
        written = path.read_bytes()
        with np.load(path) as stored:
            former = {key: stored[key] for key in stored.files if key != name}
        np.savez(path, **former)
        with pytest.raises(LookAlikeError, match=f"another version of Penstock: it has no {name.split('_')[-1]}"):
            read()
        path.write_bytes(written)


def test_a_publication_that_is_killed_leaves_the_former_table(tmp_path, monkeypatch):
    table(version=1).publish(tmp_path)

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.durable.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        table(version=2).publish(tmp_path)
    assert Table.read(tmp_path, 3, "tower").version == 1


def test_no_items_are_a_table_too(tmp_path):
    Table.of(3, "tower", 1, 0, scorer(), {}).publish(tmp_path)
    ids, scores = Table.read(tmp_path, 3, "tower").best(vectors(1)[0], np.array([]), 5)
    assert len(ids) == len(scores) == 0


def test_a_tower_is_known_by_the_files_of_its_recall_model():
    files = {"recall/saved_model.pb": "a", "rank/saved_model.pb": "b"}
    known = look_alike.tower_of({"files": files})
    assert known == look_alike.tower_of({"files": files | {"rank/saved_model.pb": "c", "weights.json": "d"}})
    assert known != look_alike.tower_of({"files": files | {"recall/saved_model.pb": "c"}})


def test_items_are_alike_by_what_they_have_in_common_the_rare_more():
    rows = {
        "item_id": [1, 2, 3, 4, 5],
        "author_id": [7, 7, 8, 9, 0],
        "category": [1, 1, 1, 1, 0],
        "tags": [[1], [2], [1], None, []],
    }
    content = Content.of(pl.DataFrame(rows))
    everything = np.array([1, 2, 3, 4, 5, 99])
    assert set(content.like(1, everything)[:2].tolist()) == {2, 3}
    assert content.like(1, everything)[2:].tolist() == [4]
    assert content.like(4, np.array([2, 3])).tolist() == [2, 3]
    assert content.like(5, everything).tolist() == []  # it says nothing of itself
    assert content.like(99, everything).tolist() == []
