"""A recall model: a query tower and item vectors in one space, scored by the inner product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops

from penstock import distribution
from penstock.fitting import Settings
from penstock.layers.embedding import Embedding

EXAMPLE_AGE = "example_age"
"""An input of a query tower that is no feature, float32 `[batch]`: how many days before the end of training the example
was; 0 when serving (Covington et al. 2016, section 3.3)."""


@dataclass(frozen=True)
class RecallConfig:
    """How a recall model is trained; each model's own `Config` adds its parameters and its defaults.

    Attributes:
        dim: width of embeddings and vectors.
        loss, sampler: names in `penstock.objectives`, which says which of the following each reads.
        power: of the sampler `unigram`, which draws an item by (its count + 1)^power.
        sample: how many items a batch draws, shared by its rows.
        negatives: how many items each row of a batch draws for itself.
        log_q: corrects the softmax over a sample, and noise-contrastive estimation, for how likely each item was
            drawn. Without it models lean to items that are seldom drawn.
        resample: how many of `sample` TAPAS keeps.
        temperature: of the softmax by which TAPAS keeps them; the lower, the more are they the highest ones.
        gravity: weight of the mean square score of all pairs against the mean square error of the positives.
        decay: weight of the newest batch in a running estimate, in (0, 1]: of SOGram's Gramians, and of how often
            batches have an item. The estimate reaches back about 1 / decay batches (or occurrences of the item).
        regularization: λ, how much `bpr_max` holds the scores of negatives near 0.
        margin: by so much `hinge` wants the positive above.
        prefixes: so many of the items that a user's first row has in its history are examples too, each with what
            stands before it as the history. 0: none.
        examples_per_user: at most so many examples of a user, drawn by the seed, so that those who do much do not
            decide for all (Covington et al. 2016, section 3.4). 0: all.
        last_rate: the share of the learning rate that is left in the last step, towards which it falls linearly.
        precision: what layers compute in, a name in `penstock.fitting.PRECISIONS`.
    """

    dim: int = 32
    loss: str = "sampled_softmax"
    sampler: str = "unigram"
    power: float = 0.75
    sample: int = 1024
    negatives: int = 1
    log_q: bool = True
    resample: int = 256
    temperature: float = 1.0
    gravity: float = 10.0
    decay: float = 0.01
    regularization: float = 1.0
    margin: float = 0.5
    prefixes: int = 10
    examples_per_user: int = 0
    optimizer: str = "adam"
    learning_rate: float = 0.003
    last_rate: float = 1.0
    batch_size: int = 512
    epochs: int = 12
    patience: int = 2
    precision: str = "float32"

    @property
    def settings(self) -> Settings:
        return Settings(self.epochs, self.batch_size, self.learning_rate, self.patience)


class Towers(NamedTuple):
    """What a file in `recall/` builds.

    Attributes:
        query: encoded features of the user and the request by name → `[batch, dim]`; `EXAMPLE_AGE` may be among them.
        item: indices of `penstock.catalogue` of any shape `[…]` → `[…, dim]`.
        by_content: the item tower reads attributes, so that items training has not seen have vectors too.
        pairs: what is learnt of a row by a model that learns from a whole history at once, not from its next item
            alone: the query's inputs and the positives `[batch]` → queries `[pairs, dim]` and their positives
            `[pairs]`, and which of them count (`penstock.backends.those`). Training then gives it a user's last row for
            all those that the row's history holds.
    """

    query: keras.Model
    item: keras.layers.Layer
    by_content: bool = False
    pairs: keras.layers.Layer | None = None


class Retrieval(distribution.Model):
    """Trains `score(user, item) = query(user) · vector(item)` for an objective of `penstock.objectives`.

    Targets are `item`, the indices of the positives, and `row`, which of the training examples each is, both int32
    `[batch]`; the indices alone do for objectives that do not remember examples.
    """

    def __init__(self, towers: Towers, objective: keras.layers.Layer) -> None:
        super().__init__()
        self.query_tower = towers.query
        self.item_tower = towers.item
        self.by_content = towers.by_content
        self.pairs = towers.pairs
        self.objective = objective

    def build(self, input_shape: Any = None) -> None:
        """Makes the weights of the item tower and of the objective; the query tower has its own already."""
        self.item_tower(ops.zeros((1,), "int32"))
        self.objective.build(self.query_tower.output_shape)
        self.built = True

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        if training and self.pairs is not None:
            return ()  # the pairs have queries of their own
        return self.query_tower(inputs, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        positives, rows = (y["item"], y["row"]) if isinstance(y, dict) else (y, None)
        counts = None
        if self.pairs is not None:
            y_pred, positives, counts = self.pairs(x, positives, training=training)
            rows = None  # a pair is a part of one

        def item_tower(indices: Any) -> Any:
            return ops.cast(self.item_tower(indices, training=training), "float32")

        y_pred = ops.cast(y_pred, "float32")  # losses are, whatever layers compute in
        return distribution.share(self.objective.loss(y_pred, ops.cast(positives, "int32"), item_tower, rows, counts))


@keras.saving.register_keras_serializable("penstock")
class BiasedItems(keras.layers.Layer):
    """The output layer of a softmax over items as vectors: `[wᵢ, bᵢ]`, `[…]` → `[…, dim + 1]`.

    With a query that ends in 1 the inner product is `w · u + b`. The weights start from a normal distribution of
    deviation 1/√dim, cut at twice that; the biases from 0.
    """

    def __init__(self, size: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        normal = keras.initializers.TruncatedNormal(stddev=dim**-0.5)

        def initial(shape: tuple[int, int], dtype: Any = None) -> Any:
            return ops.concatenate([normal((shape[0], dim), dtype), ops.zeros((shape[0], 1), dtype)], axis=-1)

        self.table = Embedding(size, dim + 1, initial)  # one table: its rows are gathered and updated once

    def call(self, indices: Any) -> Any:
        return self.table(indices)
