from __future__ import annotations

import keras
import numpy as np
import pytest

from penstock.fitting import TrainingError
from penstock.look_alike import Table, item_of
from penstock.look_alike_training import Config, Groups, Liked, LookAlike, PairTrainer, Seeds, pairs, train

DIM = 6


def vectors(users, seed=1):
    return np.random.default_rng(seed).normal(size=(users, DIM)).astype(np.float32)


def chance(users=80, each=(12,) * 30, seed=2):
    """Likes without any reason, of each item so many."""
    random = np.random.default_rng(seed)
    of = [random.choice(users, count, replace=False) for count in each]
    return Liked.of(np.concatenate(of), np.repeat(np.arange(len(each)), each))


def test_what_it_says_is_what_the_scorer_says():
    keras.utils.set_random_seed(3)
    users, seeds = vectors(4), vectors(12, 5).reshape(3, 4, DIM)
    model = LookAlike(Config(dim=5, attention=3, prior=2.0), vectors(9).mean(axis=0))
    model.build((None, DIM), None)
    said = np.asarray(model(users, np.repeat(seeds[None], 4, axis=0), np.ones((4, 3, 4), np.float32)))
    scorer = model.scorer()
    items = {item: item_of(seeds[item], 4, scorer, k=4) for item in range(3)}
    table = Table.of(1, "", 1, 0, scorer, items)
    for user in range(4):
        ids, scores = table.best(users[user], np.array([]), 3)
        np.testing.assert_allclose(said[user, ids], scores, rtol=1e-4, atol=1e-6)


def test_an_example_is_scored_as_if_its_user_had_never_liked_the_item():
    """Four seeds in as many groups: each is one, so that the item without the user can be made by hand."""
    users = vectors(6)
    liked = Liked.of(np.array([0, 1, 2, 3, 4]), np.array([0, 0, 0, 0, 1]))
    config = Config(centroids=4, dim=5, negatives=1)
    keras.utils.set_random_seed(3)
    model = PairTrainer(users, Groups.of(users, liked, 2, 4), config)
    places = Groups.of(users, liked, 2, 4).places
    for user in range(4):
        rest = Liked(*(part[liked.users != user] for part in liked))
        without = PairTrainer(users, Groups.of(users, rest, 2, 4), config)
        without.set_weights(model.get_weights())
        asked = {"user": np.array([user]), "items": np.array([[0, 1]])}
        own = places[(liked.users == user) & (liked.items == 0)][0]
        ours = np.asarray(model({**asked, "seed": np.array([[user, -1]]), "place": np.array([[own, -1]])}))
        nobody = np.full((1, 2), -1)
        theirs = np.asarray(without({**asked, "seed": nobody, "place": nobody}))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_seed_is_taken_out_of_each_item_of_an_example_the_user_out_of_his():
    liked = chance(users=30, each=(2, 5, 9) * 4)
    places = np.arange(len(liked.users), dtype=np.int32)
    place_of = dict(zip(zip(liked.users.tolist(), liked.items.tolist(), strict=True), places.tolist(), strict=True))
    inputs, _ = pairs(liked, liked, Seeds(*liked, places), np.arange(12), Config(negatives=3), 1)
    assert (inputs["seed"][:, 0] == inputs["user"]).all()
    for seeds, items, out in zip(inputs["seed"], inputs["items"], inputs["place"], strict=True):
        assert [place_of[pair] for pair in zip(seeds.tolist(), items.tolist(), strict=True)] == out.tolist()
    assert len(np.unique(inputs["seed"][inputs["items"] == 2])) == 9  # each of its seeds by chance
    inputs, _ = pairs(liked, liked, None, np.arange(12), Config(negatives=3), 1)
    assert (inputs["seed"] == -1).all()
    assert (inputs["place"] == -1).all()


def test_nothing_is_learned_where_there_is_nothing_to_learn():
    """A model that sees the user among the seeds, or one seed less where he is out, tells his items from others."""
    users, liked = vectors(80) + 1.0, chance(each=(2,) * 240)
    later = Liked.of(np.arange(80), np.random.default_rng(5).integers(0, 30, 80))
    config = Config(8, prior=1.0, dim=16, negatives=4, epochs=30, patience=99, learning_rate=0.03, batch_size=64)
    _, history = train(users, liked, later, config)
    nothing = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    assert history[-1]["loss"] > 0.99 * nothing


def test_it_learns_who_likes_what_and_keeps_its_best_epoch():
    random = np.random.default_rng(7)
    taste = random.integers(0, 4, 200)
    users = (2 * np.eye(4)[taste] @ random.normal(size=(4, DIM)) + 0.5 * vectors(200)).astype(np.float32)
    of = random.integers(0, 4, 40)
    likes = [(user, item) for item in range(40) for user in random.choice(np.flatnonzero(taste == of[item]), 12)]
    liked = Liked.of(*np.array(likes).T)
    half = random.random(len(liked.users)) < 0.7
    seeds, later = (Liked(*(part[which] for part in liked)) for which in (half, ~half))
    _, history = train(users, seeds, later, Config(centroids=4, dim=8, epochs=4, batch_size=64))
    assert max(row["val_auc"] for row in history) > 0.75
    assert history[-1]["loss"] < history[0]["loss"]


def test_weights_are_learned_only_if_that_is_asked_for():
    users, liked = vectors(80), chance()
    later = Liked.of(np.arange(80), np.random.default_rng(5).integers(0, 30, 80))
    for learn in (False, True):
        config = Config(centroids=2, dim=4, negatives=2, epochs=1, learn_weights=learn)
        scorer, _ = train(users, liked, later, config)
        moved = abs(scorer.alpha - 0.3) + abs(scorer.beta - 0.7)
        assert bool(moved > 1e-4) is learn


def test_examples_are_capped_and_what_is_liked_is_no_negative():
    liked = chance(users=10, each=(6,) * 20)
    config = Config(negatives=3, positives_per_user=4)
    inputs, valid = pairs(liked, liked, None, np.arange(20), config, 1)
    assert np.bincount(inputs["user"]).max() == 4
    assert inputs["items"].shape == valid.shape == (len(inputs["user"]), 4)
    known = set(zip(liked.users.tolist(), liked.items.tolist(), strict=True))
    for user, items, there in zip(inputs["user"].tolist(), inputs["items"].tolist(), valid, strict=True):
        said = [(user, item) in known for item in items]
        assert said[0]
        assert all(is_known != bool(counts) for is_known, counts in zip(said[1:], there[1:], strict=True))


def test_a_user_who_likes_everything_has_no_negatives():
    liked = Liked.of(np.zeros(5, int), np.arange(5))
    _, valid = pairs(liked, liked, None, np.arange(5), Config(), 1)
    assert valid[:, 0].all()
    assert not valid[:, 1:].any()


def test_items_of_one_seed_and_nothing_later_are_refused():
    one = Liked.of(np.arange(3), np.arange(3))
    with pytest.raises(TrainingError, match="two or more users like"):
        train(vectors(3), one, one, Config())


@pytest.mark.parametrize("prior", [-1.0, float("nan"), float("inf")])
def test_a_prior_that_is_no_count_is_refused(prior):
    with pytest.raises(ValueError, match="prior is how many seeds the mean user counts for, 0 or more"):
        LookAlike(Config(prior=prior), np.zeros(DIM))
