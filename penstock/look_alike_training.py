"""Training of the look-alike model of `penstock.look_alike`: users, and the items by those who liked them.

A pair (user, item) is an example whose item is all its other seeds: the user is taken out of the mean that he is in,
`(n c − u) / (n − 1)`, and a group that was only he is gone. Without that a model finds the user among the seeds, says
so, and learns nothing. One seed, drawn by chance, is taken out of each item that he did not like too: else a seed less
than an item has would tell what he likes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import polars as pl
import tensorflow as tf
from keras import ops

from penstock import metrics, optimizers
from penstock.evaluation import query_vectors
from penstock.examples import read_slice
from penstock.fitting import Measure, Rows, Settings, TrainingError, fit
from penstock.layers.attention import MultiplicativeScores
from penstock.layers.attention_merge import AttentionMerge, attend_counted
from penstock.look_alike import CENTROIDS, Scorer, cluster
from penstock.seeds import LIKED


@dataclass(frozen=True)
class Config:
    """Parameters of the model and of its fit.

    Attributes:
        centroids: k, what the seeds of an item are reduced to.
        prior: λ, how many seeds the mean user counts for in every item.
        dim: h, the size of `e`.
        attention: units of the self-attention over the seeds.
        alpha, beta: weights of the global and the local embedding; of 0 the part is left out.
        learn_weights: they are learned from there.
        negatives: items that the user did not like, for each that he did.
        positives_per_user: so many of the items of a user at most are examples.
    """

    centroids: int = CENTROIDS
    prior: float = 30.0
    dim: int = 32
    attention: int = 32
    alpha: float = 0.3
    beta: float = 0.7
    learn_weights: bool = False
    negatives: int = 10
    positives_per_user: int = 50
    learning_rate: float = 0.003
    batch_size: int = 256
    epochs: int = 8
    patience: int = 2

    @property
    def settings(self) -> Settings:
        return Settings(self.epochs, self.batch_size, self.learning_rate, self.patience)


class Liked(NamedTuple):
    """Who liked what, both int32 `[pairs]`; a pair is there once."""

    users: np.ndarray
    items: np.ndarray

    @staticmethod
    def of(users: np.ndarray, items: np.ndarray) -> Liked:
        """Without what is there twice."""
        pairs = np.unique(np.stack([users, items], axis=1).astype(np.int32), axis=0)
        return Liked(pairs[:, 0], pairs[:, 1])


class Groups(NamedTuple):
    """The seeds of all items in groups.

    Attributes:
        sums: of the vectors of a group's seeds, float32 `[items, k, dim]`.
        counts: float32 `[items, k]`.
        places: the group of each pair of the `Liked` they were made of, int32 `[pairs]`.
    """

    sums: np.ndarray
    counts: np.ndarray
    places: np.ndarray

    @staticmethod
    def of(vectors: np.ndarray, liked: Liked, items: int, k: int, seed: int = 0) -> Groups:
        """Those of the items 0 … `items` − 1; one that nobody likes has none."""
        sums = np.zeros((items, k, vectors.shape[1]), np.float32)
        counts = np.zeros((items, k), np.float32)
        places = np.zeros(len(liked.users), np.int32)
        order = np.argsort(liked.items, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(liked.items[order])) + 1):
            if not len(rows):
                continue
            item = liked.items[rows[0]]
            found = cluster(vectors[liked.users[rows]], k, seed)
            places[rows] = found.places
            counts[item, : len(found.counts)] = found.counts
            sums[item, : len(found.counts)] = found.centroids * found.counts[:, None]
        return Groups(sums, counts, places)


class LookAlike(keras.layers.Layer):
    """The model: users `[batch, dim]` and centroids `[batch, items, k, dim]` of so many seeds each → scores.

    `[batch, items]`, by the equations of `penstock.look_alike`.

    Args:
        mean: of all users, `[dim]`.

    Raises:
        ValueError: a prior below 0.
    """

    def __init__(self, config: Config, mean: np.ndarray, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= config.prior < np.inf:
            raise ValueError(f"prior is how many seeds the mean user counts for, 0 or more, not {config.prior}")
        self.transform = keras.layers.Dense(config.dim)
        self.merge = AttentionMerge(config.attention)
        self.local = MultiplicativeScores()
        self._config = config
        self._mean = np.asarray(mean, np.float32)

    def build(self, users_shape: Any, centroids_shape: Any, counts_shape: Any = None) -> None:
        h = self._config.dim
        self.transform.build((None, users_shape[-1]))
        self.merge.build((None, None, h))
        self.local.build((None, None, h), (None, None, h))
        start = keras.initializers.Constant
        learnt = self._config.learn_weights
        self.alpha = self.add_weight((), start(self._config.alpha), trainable=learnt, name="alpha")
        self.beta = self.add_weight((), start(self._config.beta), trainable=learnt, name="beta")

    def call(self, users: Any, centroids: Any, counts: Any) -> Any:
        batch, items, _ = ops.shape(counts)
        mean = ops.broadcast_to(self._embedded_mean(), (batch, items, 1, self._config.dim))
        seeds = ops.concatenate([self.transform(centroids), mean], axis=2)
        counts = ops.concatenate([counts, ops.full((batch, items, 1), self._config.prior)], axis=2)
        users = self.transform(users)[:, None]
        likeness = ops.tanh(self.local(users[:, None], seeds))
        local = attend_counted(likeness, seeds, counts)[..., 0, :]
        return self.alpha * _cosine(self.merge(seeds, counts), users) + self.beta * _cosine(local, users)

    def _embedded_mean(self) -> Any:
        """`e` of the mean user, `[h]`."""
        return self.transform(self._mean[None])[0]

    def scorer(self) -> Scorer:
        """What scores with these weights."""
        weights = (
            self.transform.kernel,
            self.transform.bias,
            self.merge.hidden.kernel,
            self.merge.scores.kernel[:, 0],
            self.local.kernel,
            self.alpha,
            self.beta,
            self._embedded_mean(),
            self._config.prior,
        )
        return Scorer(*(np.asarray(weight, np.float32) for weight in weights))


def _cosine(first: Any, second: Any) -> Any:
    return ops.sum(_unit(first) * _unit(second), axis=-1)


def _unit(vectors: Any) -> Any:
    return vectors * ops.rsqrt(ops.maximum(ops.sum(ops.square(vectors), axis=-1, keepdims=True), 1e-12))


class PairTrainer(keras.Model):
    """The model on pairs: `user` `[batch]` and `items` `[batch, 1 + negatives]`, the first of which he likes.

    `seed` and `place` `[batch, 1 + negatives]` are the user who is taken out of each item's seeds and the group that he
    is in, −1 for none. The loss is the log loss of `σ(γ score + δ)`, γ and δ learned, over the items that the target
    `[batch, 1 + negatives]` is 1 of.
    """

    def __init__(self, vectors: np.ndarray, groups: Groups, config: Config) -> None:
        super().__init__()
        self._vectors = tf.constant(vectors, tf.float32)
        self._sums, self._counts = tf.constant(groups.sums), tf.constant(groups.counts)
        self.look_alike = LookAlike(config, vectors.mean(axis=0))
        self.look_alike.build((None, vectors.shape[1]), None)
        # a cosine's sigmoid reaches from .27 to .73 only
        self.scale = self.add_weight((), keras.initializers.Constant(5.0), name="scale")
        rare = -float(np.log(max(config.negatives, 1)))
        self.shift = self.add_weight((), keras.initializers.Constant(rare), name="shift")
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        users = tf.gather(self._vectors, inputs["user"])
        sums, counts = tf.gather(self._sums, inputs["items"]), tf.gather(self._counts, inputs["items"])
        out = tf.one_hot(inputs["place"], tf.shape(counts)[2])
        taken = tf.gather(self._vectors, tf.maximum(inputs["seed"], 0))
        counts, sums = counts - out, sums - out[..., None] * taken[:, :, None, :]
        centroids = sums / tf.maximum(counts, 1.0)[..., None]
        return self.look_alike(users, centroids, counts)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        labels = tf.one_hot(tf.zeros(tf.shape(y_pred)[:1], tf.int32), tf.shape(y_pred)[1])
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, self.scale * y_pred + self.shift)
        return tf.reduce_sum(losses * y) / tf.reduce_sum(y)


class Seeds(NamedTuple):
    """Who is a seed of what, and in which of the item's groups, int32 `[pairs]` each."""

    users: np.ndarray
    items: np.ndarray
    places: np.ndarray

    def taken_out(
        self, users: np.ndarray, items: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A seed of each item and the group he is in, `[rows, items]`: of the first the row's user, else by chance.

        Args:
            users: `[rows]`, seeds of the first of their `items` `[rows, items]`.
        """
        order = np.lexsort((self.users, self.items))
        of_item = self.items[order]
        first, behind = (np.searchsorted(of_item, items, side=side) for side in ("left", "right"))
        chosen = random.integers(first, behind)
        width = int(self.users.max()) + 1
        keys = of_item.astype(np.int64) * width + self.users[order]
        chosen[:, 0] = np.searchsorted(keys, items[:, 0].astype(np.int64) * width + users)
        return self.users[order][chosen], self.places[order][chosen]


def pairs(
    liked: Liked, known: Liked, seeds: Seeds | None, candidates: np.ndarray, config: Config, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Examples: each pair of `liked`, with items that the user does not like drawn uniformly from `candidates`.

    Args:
        known: all that anybody is known to like, from which no negative is drawn.
        seeds: those of the items, `liked` among them, of which each example takes one out of each of its items; None
            if none of the users is a seed.
        candidates: items that have seeds, int32 `[candidates]`.

    Returns:
        The inputs of a row each and the targets: 0 of a draw that the user does like, many times over.
    """
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(liked.users))
    order = chosen[np.argsort(liked.users[chosen], kind="stable")]
    users = liked.users[order]
    rank = np.arange(len(users)) - np.searchsorted(users, users)
    order = np.sort(order[rank < config.positives_per_user])
    users, items = liked.users[order], liked.items[order]
    width = int(max(known.items.max(initial=0), candidates.max(initial=0))) + 1
    taken = np.sort(known.users.astype(np.int64) * width + known.items)

    def is_liked(drawn: np.ndarray) -> np.ndarray:
        keys = users[:, None].astype(np.int64) * width + drawn
        return taken[np.minimum(np.searchsorted(taken, keys), len(taken) - 1)] == keys

    drawn = random.choice(candidates, (len(users), config.negatives))
    for _ in range(5):
        drawn = np.where(is_liked(drawn), random.choice(candidates, drawn.shape), drawn)
    asked = np.concatenate([items[:, None], drawn], axis=1).astype(np.int32)
    out = place = np.full(asked.shape, -1, np.int32)
    if seeds is not None:
        out, place = seeds.taken_out(users, asked, random)
    inputs = {"user": users.astype(np.int32), "items": asked, "seed": out, "place": place}
    return inputs, np.concatenate([np.ones((len(users), 1), bool), ~is_liked(drawn)], axis=1).astype(np.float32)


def train(
    vectors: np.ndarray, seeds: Liked, later: Liked, config: Config, seed: int = 0
) -> tuple[Scorer, list[dict[str, float]]]:
    """Fits the model, and keeps the epoch that tells best what users like later.

    Args:
        vectors: of the users, float32 `[users, dim]`.
        seeds: who liked what, which is both the examples and the items' seeds.
        later: what users who are no seeds of it like afterwards.

    Returns:
        The model, and a row of figures an epoch: `loss`, and `val_auc` of the later pairs against as many items as
        in training.

    Raises:
        TrainingError: no item has two seeds, or none of them is liked later.
    """
    count = int(max(seeds.items.max(initial=-1), later.items.max(initial=-1))) + 1
    of_item = np.bincount(seeds.items, minlength=count)
    several = of_item[seeds.items] >= 2
    examples = Liked(seeds.users[several], seeds.items[several])
    candidates = np.unique(examples.items)  # as often as they are liked, what is seldom liked would never be wrong
    both = Liked.of(np.concatenate([seeds.users, later.users]), np.concatenate([seeds.items, later.items]))
    known = set(zip(seeds.users.tolist(), seeds.items.tolist(), strict=True))
    new = np.array([pair not in known for pair in zip(later.users.tolist(), later.items.tolist(), strict=True)], bool)
    later = Liked(*(part[new & (of_item[later.items] >= 2)] if len(part) else part for part in later))
    if not len(candidates) or not len(later.users):
        raise TrainingError("look-alike learns from items that two or more users like, and others like later")
    keras.utils.set_random_seed(seed)
    groups = Groups.of(vectors, seeds, count, config.centroids, seed)
    inputs, targets = pairs(examples, seeds, Seeds(*seeds, groups.places), candidates, config, seed)
    model = PairTrainer(vectors, groups, config)
    rows = Rows(inputs, targets, config.batch_size)
    rate = keras.optimizers.schedules.PolynomialDecay(
        config.learning_rate, rows.steps * config.epochs, 0.1 * config.learning_rate
    )
    model.compile(optimizers.build("adam", rate))
    # cosines of vectors without negative parts are all near 1: the fit would spend its first steps on δ
    model.shift.assign_sub(model.scale * ops.mean(model(next(iter(rows.batches()))[0])))
    asked, valid = pairs(later, both, None, candidates, dataclasses.replace(config, positives_per_user=2**31), seed)
    held = Rows(asked, (), 1024)

    def figures() -> dict[str, float]:
        scores = np.concatenate([np.asarray(model(batch)) for batch, _ in held.batches()])
        labels = np.zeros(scores.shape)
        labels[:, 0] = 1
        return {"val_auc": metrics.auc(labels[valid > 0], scores[valid > 0])}

    history = fit(model, rows, Measure("val_auc", figures, 1), config.settings, seed, None)
    return model.look_alike.scorer(), history


def train_look_alike(examples: Path, saved_model: Path, config: Config, seed: int, tower: str, out: Path) -> None:
    """Trains on the long views of an examples directory, users as an exported recall model's query tower has them.

    A user is as in his last row of the training slice, or his first of the validation slice if he is new there. Writes
    `model.npz` and `history.json`.

    Raises:
        ValueError: the exported model does not tell users' vectors.
        TrainingError: data that cannot be learnt from.
    """
    slices = {part: read_slice(examples, part) for part in ("train", "validation")}
    last = slices["train"].unique("user_id", keep="last", maintain_order=True)
    first = slices["validation"].unique("user_id", keep="first", maintain_order=True)
    asked = pl.concat([last, first]).unique("user_id", keep="first", maintain_order=True)
    vectors = query_vectors(saved_model, asked)
    place = {user: row for row, user in enumerate(asked["user_id"].to_list())}
    ids: dict[int, int] = {}

    def liked(part: str) -> Liked:
        rows = slices[part].filter(pl.col(LIKED) == 1)
        users = [place[user] for user in rows["user_id"].to_list()]
        return Liked.of(np.array(users, int), np.array([ids.setdefault(i, len(ids)) for i in rows["item_id"]], int))

    scorer, history = train(vectors, liked("train"), liked("validation"), config, seed)
    out.mkdir(parents=True, exist_ok=True)
    scorer.save(out / "model.npz", tower)
    (out / "history.json").write_text(json.dumps(history, indent=1))
