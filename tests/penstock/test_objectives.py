from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from penstock import objectives
from penstock.fitting import Checkpoint
from penstock.retrieval import BiasedItems, RecallConfig, Retrieval, Towers

KNOWN, DIM, BATCH = 12, 4, 24
CONFIG = RecallConfig(dim=DIM, sample=8, resample=4, gravity=0.3, decay=0.1, regularization=0.1, batch_size=BATCH)
COUNTS = np.array([0, 0, *[BATCH // KNOWN] * KNOWN])
CASES = [(loss, "unigram") for loss in objectives.LOSSES]
CASES += [("sampled_softmax", name) for name in objectives.SAMPLERS if name != "unigram"]


def _model(config, counts=COUNTS, seed=0, by_content=False):
    """Users 0 … 5 by one embedding each; item vectors with a bias, or of attributes and of length 1."""
    keras.utils.set_random_seed(seed)
    user = keras.Input((), dtype="int32", name="user")
    embedded = keras.layers.Embedding(KNOWN, DIM)(user)
    if by_content:
        attributes = keras.ops.convert_to_tensor(np.random.default_rng(1).normal(size=(len(counts), 5)), "float32")
        item = Content(attributes)
        query = 4.0 * keras.layers.UnitNormalization()(embedded)
    else:
        item = BiasedItems(len(counts), DIM)
        query = keras.ops.concatenate([embedded, keras.ops.ones_like(embedded[:, :1])], axis=-1)
    model = Retrieval(Towers(keras.Model({"user": user}, query), item), objectives.build(config, counts, seed))
    model.build()
    return model


class Content(keras.layers.Layer):
    def __init__(self, attributes):
        super().__init__()
        self.attributes = attributes
        self.layer = keras.layers.Dense(DIM)
        self.unit = keras.layers.UnitNormalization()

    def call(self, indices):
        return self.unit(self.layer(keras.ops.take(self.attributes, indices, axis=0)))


def _rows(known=KNOWN, seed=0):
    """Batches in which each user's positive is the item of its number, and an item is in a batch several times."""
    users = np.random.default_rng(seed).permutation(np.arange(BATCH) % known)
    targets = {"item": (users + 2).astype(np.int32), "row": np.arange(BATCH, dtype=np.int32)}
    return tf.data.Dataset.from_tensors(({"user": users.astype(np.int32)}, targets))


def _fit(model, steps, epochs=1, known=KNOWN, eager=True):
    """The loss of each epoch."""
    if not model.compiled:
        model.compile(keras.optimizers.Adam(0.05), run_eagerly=eager)  # a graph takes longer to make than a few steps
    return model.fit(_rows(known).repeat(steps), epochs=epochs, shuffle=False, verbose=0).history["loss"]


def _state(model):
    return [np.array(variable) for variable in [*model.variables, *model.optimizer.variables]]


@pytest.mark.parametrize(("loss", "sampler"), CASES)
def test_the_loss_falls_and_the_positive_comes_out_on_top(loss, sampler):
    model = _model(dataclasses.replace(CONFIG, loss=loss, sampler=sampler))
    losses = _fit(model, 60, epochs=3, eager=False)
    assert losses[-1] < losses[0]
    vectors = np.asarray(model.item_tower(np.arange(2, KNOWN + 2, dtype=np.int32)))
    scores = np.asarray(model.query_tower({"user": np.arange(KNOWN, dtype=np.int32)})) @ vectors.T
    assert scores.argmax(axis=1).tolist() == list(range(KNOWN))


@pytest.mark.parametrize("loss", objectives.LOSSES)
def test_the_loss_falls_for_items_known_by_their_content_and_of_length_one(loss):
    losses = _fit(_model(dataclasses.replace(CONFIG, loss=loss), by_content=True), 6, epochs=2)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("loss", objectives.LOSSES)
def test_a_vocabulary_of_one_item_trains_on_finite_numbers(loss):
    model = _model(dataclasses.replace(CONFIG, loss=loss), counts=np.array([0, 0, BATCH]))
    losses = _fit(model, 3, epochs=2, known=1)
    assert np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(value)) for value in _state(model))


@pytest.mark.parametrize("loss", objectives.LOSSES)
def test_a_fit_that_goes_on_from_its_state_ends_as_one_that_was_not_stopped(loss, tmp_path):
    config = dataclasses.replace(CONFIG, loss=loss)
    first, resumed = _model(config), _model(config, seed=7)
    _fit(first, 2)
    Checkpoint(tmp_path / "state", {}).save(first, first.get_weights(), [])
    _fit(resumed, 1)  # what it has done before is forgotten
    Checkpoint(tmp_path / "state", {}).restore(resumed)
    _fit(first, 2)
    _fit(resumed, 2)
    for one, other in zip(_state(first), _state(resumed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # threads may sum in any order


@pytest.mark.parametrize("loss", ["sampled_softmax", "nce", "tapas", "sagram", "sogram"])
def test_the_seed_decides_what_is_drawn(loss):
    config = dataclasses.replace(CONFIG, loss=loss)

    def losses(seed):
        objective = objectives.build(config, COUNTS, seed)
        objective.build((None, DIM))
        random = np.random.default_rng(0)
        vectors = keras.ops.convert_to_tensor(random.normal(size=(KNOWN + 2, DIM)).astype(np.float32))
        queries, positives = random.normal(size=(3, DIM)).astype(np.float32), np.array([2, 3, 3], np.int32)
        rows = np.arange(3, dtype=np.int32)
        return [
            float(objective.loss(queries, positives, lambda indices: keras.ops.take(vectors, indices, axis=0), rows))
            for _ in range(3)
        ]

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def _loss(config, queries, vectors, positives, counts=COUNTS):
    objective = objectives.build(config, counts, 0)
    objective.build((None, queries.shape[1]))
    return float(objective.loss(queries, positives, lambda indices: tf.gather(vectors, indices)))


def test_softmax_is_that_over_the_known_items_alone():
    random = np.random.default_rng(2)
    queries, vectors = (random.normal(size=(size, DIM)).astype(np.float32) for size in (5, KNOWN + 2))
    positives = np.array([2, 7, 3, 3, 5], np.int32)
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(positives - 2, queries @ vectors[2:].T).numpy().mean()
    ours = _loss(dataclasses.replace(CONFIG, loss="softmax"), queries, vectors, positives)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_each_row_has_negatives_of_its_own():
    """One positive row after another; all items but its own are drawn about alike."""
    drawn = []

    def vectors(indices):
        drawn.append(np.asarray(indices))
        return tf.ones((len(indices), DIM))

    objective = objectives.build(dataclasses.replace(CONFIG, loss="binary", sampler="uniform", negatives=5), COUNTS, 0)
    queries = np.full((300, DIM), 0.25, np.float32)
    loss = float(objective.loss(queries, tf.fill((300,), 4), vectors))
    (indices,) = drawn
    negatives = indices[300:].reshape(300, 5)
    assert len({tuple(row) for row in negatives}) > 290
    assert np.bincount(negatives.ravel(), minlength=KNOWN + 2)[2:].min() > 90  # 125 are expected of each
    others = (negatives != 4).sum() / 300
    assert loss == pytest.approx(np.log1p(np.exp(-1.0)) + others * np.log1p(np.exp(1.0)), rel=1e-5)


def test_keeping_the_whole_sample_tapas_is_the_sampled_softmax():
    random = np.random.default_rng(3)
    queries, vectors = (random.normal(size=(size, DIM)).astype(np.float32) for size in (5, KNOWN + 2))
    positives = np.array([2, 7, 3, 3, 5], np.int32)
    both = [
        _loss(dataclasses.replace(CONFIG, loss=loss, sample=9, resample=9), queries, vectors, positives)
        for loss in ("tapas", "sampled_softmax")
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


@pytest.mark.parametrize(("sampler", "alike"), [("uniform", True), ("unigram", False), ("log_uniform", False)])
def test_draws_that_are_all_alike_need_no_correction_and_others_do(sampler, alike):
    random = np.random.default_rng(4)
    queries, vectors = (random.normal(size=(size, DIM)).astype(np.float32) for size in (5, KNOWN + 2))
    positives, counts = np.array([2, 7, 3, 4, 5], np.int32), np.array([0, 0, 400, 100, 50, 20, 10, 5])
    corrected, plain = (
        _loss(
            dataclasses.replace(CONFIG, loss=loss, sampler=sampler, log_q=log_q, sample=5, resample=5),
            queries,
            vectors,
            positives,
            counts,
        )
        for loss, log_q in (("sampled_softmax", True), ("tapas", False))
    )
    assert (corrected == pytest.approx(plain, rel=1e-4)) is alike


def test_nce_starts_normalised_and_without_correction_has_no_normaliser():
    objective = objectives.build(dataclasses.replace(CONFIG, loss="nce"), COUNTS, 0)
    assert float(objective.log_normaliser) == pytest.approx(-np.log(KNOWN))
    assert objective.trainable_variables == [objective.log_normaliser]
    plain = objectives.build(dataclasses.replace(CONFIG, loss="nce", log_q=False), COUNTS, 0)
    assert plain.trainable_variables == []
    vectors = np.zeros((KNOWN + 2, DIM), np.float32)
    loss = _loss(dataclasses.replace(CONFIG, loss="nce", log_q=False), vectors[:2], vectors, np.array([2, 3], np.int32))
    assert loss == pytest.approx((1 + CONFIG.sample) * np.log(2), rel=1e-5)


def test_nce_of_a_model_that_is_the_noise_tells_nothing_apart():
    # vectors of 0 are the uniform distribution from the start: a positive is one of k + 1 that all look alike
    vectors = np.zeros((KNOWN + 2, DIM), np.float32)
    config = dataclasses.replace(CONFIG, loss="nce", sampler="uniform")
    loss = _loss(config, vectors[:2], vectors, np.array([2, 3], np.int32))
    k = CONFIG.sample
    assert loss == pytest.approx(-np.log(1 / (1 + k)) - k * np.log(k / (1 + k)), rel=1e-5)


def test_all_pairs_come_near_the_exact_loss_once_the_state_has_settled():
    random = np.random.default_rng(5)
    queries, vectors = (random.normal(size=(size, DIM)).astype(np.float32) for size in (BATCH, KNOWN + 2))
    positives = (2 + np.arange(BATCH) % KNOWN).astype(np.int32)
    scores = queries @ vectors[2:].T
    own = np.take_along_axis(scores, positives[:, None] - 2, axis=1)
    exact = np.mean((1 - own) ** 2) + CONFIG.gravity * np.mean(scores**2)
    for loss in ("sagram", "sogram"):
        config = dataclasses.replace(CONFIG, loss=loss, sampler="uniform", sample=200, decay=0.05)
        objective = objectives.build(config, COUNTS, 0)
        objective.build((None, DIM))
        losses = [
            float(
                objective.loss(
                    queries, positives, lambda indices: tf.gather(vectors, indices), np.arange(BATCH, dtype=np.int32)
                )
            )
            for _ in range(40)
        ]
        assert np.mean(losses[10:]) == pytest.approx(exact, rel=0.02)


def test_sagram_without_the_rows_says_what_it_lacks():
    vectors = np.zeros((KNOWN + 2, DIM), np.float32)
    with pytest.raises(ValueError, match="has to be told which of them the rows are"):
        _loss(dataclasses.replace(CONFIG, loss="sagram"), vectors[:2], vectors, np.array([2, 3], np.int32))


def test_unknown_names_are_answered_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"unknown loss 'focal': there are binary, bpr, .*, in_batch, nce, .*, top1_max"
    ):
        objectives.build(dataclasses.replace(CONFIG, loss="focal"), COUNTS, 0)
    with pytest.raises(ValueError, match="unknown sampler 'zipf': there are log_uniform, uniform, unigram"):
        objectives.build(dataclasses.replace(CONFIG, sampler="zipf"), COUNTS, 0)


@pytest.mark.parametrize(
    ("loss", "values", "message"),
    [
        ("sampled_softmax", {"sample": 0}, "sample is .* at least 1, not 0"),
        ("nce", {"sample": -1}, "sample is .* at least 1, not -1"),
        ("sogram", {"sample": 0}, "sample is .* at least 1, not 0"),
        ("binary", {"negatives": 0}, "negatives is .* at least 1, not 0"),
        ("tapas", {"resample": 9}, "resample is how many of sample = 8 are kept, 1 to 8, not 9"),
        ("tapas", {"resample": 0}, "1 to 8, not 0"),
        ("tapas", {"temperature": 0.0}, "temperature divides logits: it is above 0, not 0.0"),
        ("sogram", {"decay": 0.0}, "at most 1, not 0.0"),
        ("in_batch", {"decay": 1.2}, "at most 1, not 1.2"),
        ("sagram", {"gravity": -1.0}, "gravity is a weight, at least 0"),
    ],
)
def test_parameters_out_of_range_are_named(loss, values, message):
    with pytest.raises(ValueError, match=message):
        objectives.build(dataclasses.replace(CONFIG, loss=loss, **values), COUNTS, 0)


def test_a_sample_as_large_as_the_catalogue_is_the_softmax():
    config = dataclasses.replace(CONFIG, loss="sampled_softmax")
    assert isinstance(objectives.build(dataclasses.replace(config, sample=KNOWN), COUNTS, 0), objectives.Softmax)
    fewer = objectives.build(dataclasses.replace(config, sample=KNOWN - 1), COUNTS, 0)
    assert isinstance(fewer, objectives.SampledSoftmax)
