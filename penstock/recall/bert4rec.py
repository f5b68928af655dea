"""BERT4Rec: masked items, told from both sides (Sun et al., CIKM 2019, arXiv 1904.06690)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock import backends
from penstock.catalogue import Catalogue
from penstock.examples import FIRST, PADDING, Schema
from penstock.layers.attention import Transformer
from penstock.layers.by_length import ByLength
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.next_item import Places, appended
from penstock.retrieval import RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit.

    Attributes:
        blocks: transformers one on the other.
        heads: of each of them.
        masked: the share of a sequence's items that training hides.
        last: the share of sequences of which it hides the last item alone, as serving does.
        cuts: so many more are made of each sequence at every step, each cut behind an item of its own draw, which alone
            is hidden: so serving asks after a history of any length. 0: none, as in the paper.
    """

    dim: int = 64
    blocks: int = 2
    heads: int = 2
    masked: float = 0.4
    last: float = 0.1
    cuts: int = 0
    dropout: float = 0.2
    sample: int = 8192
    batch_size: int = 128
    learning_rate: float = 0.001
    epochs: int = 60
    patience: int = 5


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """The state of a mask behind the last item; each hidden item of a training sequence is told from all others.

    `P(i) = softmax(eᵢ · GELU(W h + b) + bᵢ)`, h of the mask (eq. 7), e the items' vectors in the sequence: the query is
    that of `Bidirectional`, `[batch, dim + 1]`. An item is `[eᵢ, bᵢ]`.

    Raises:
        ValueError: a share that is not in [0, 1], none that is hidden, or fewer cuts than none.
    """
    if not (0.0 < config.masked <= 1.0 and 0.0 <= config.last <= 1.0):
        raise ValueError(f"masked and last are shares, masked above 0, not {config.masked} and {config.last}")
    if config.cuts < 0:
        raise ValueError(f"cuts are 0 or more, not {config.cuts}")
    (history,) = schema.named("history_items")
    inputs = inputs_of((history,))
    items = Embedding(schema.size("item_id"), config.dim + 1, _vectors_and_bias, name="items")
    encoder = Bidirectional(items, history.length + 1, config, name="encoder")
    query = Masked(encoder, name="masked")(inputs["history_items"])
    pairs = Cloze(ByLength(encoder), config.masked, config.last, config.cuts)
    return Towers(keras.Model(inputs, query, name="query"), items, pairs=pairs)


class Bidirectional(keras.layers.Layer):
    """Items and which are hidden, `[batch, length]` both → `[norm(GELU(W h + b)); 1]`, `[batch, length, dim + 1]`.

    `h = blocks(D(norm(eᵢ + pₖ)))`, each place looking at all; a hidden item has one vector, the mask's, whatever it is.
    (The norm behind the GELU is of the authors' code.) Attention starts as the mean of what it looks at, and W as the
    identity, so that a mask leans from the first step to the items around it: the product of the kernels of values and
    of what joins the heads is near the identity in trained language models too (Trockman & Kolter, ICML 2023).
    """

    def __init__(self, items: Embedding, length: int, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.items = items
        self.dim = config.dim
        self.places = Places(length, config.dim, _small())
        self.blocks = [
            Transformer(config.heads, config.dim, 4 * config.dim, "gelu", config.dropout, initializer=_small())
            for _ in range(config.blocks)
        ]
        for block in self.blocks:
            block.heads.of_values.kernel_initializer = block.heads.joined.kernel_initializer = _passing
        self.norms = [keras.layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.projection = keras.layers.Dense(config.dim, "gelu", kernel_initializer=_passing)
        self.dropout = keras.layers.Dropout(config.dropout)

    def build(self, items_shape: Any, hidden_shape: Any = None) -> None:
        if not self.items.built:
            self.items.build(items_shape)
        self.mask = self.add_weight((self.dim,), _small(), name="mask")
        self.places.build(items_shape)
        for layer in (*self.blocks, *self.norms, self.projection):
            layer.build((None, None, self.dim))

    def call(self, items: Any, hidden: Any, training: bool | None = None) -> Any:
        present = ops.not_equal(items, PADDING)
        vectors = ops.where(hidden[..., None], ops.convert_to_tensor(self.mask), self.items(items)[..., : self.dim])
        vectors = self.dropout(self.norms[0](vectors + self.places(items)), training=training)
        for block in self.blocks:
            vectors = block(vectors, present, training=training)
        states = self.norms[1](self.projection(vectors))
        return ops.concatenate([states, ops.ones_like(states[..., :1])], axis=-1)


class Masked(keras.layers.Layer):
    """The state of a mask behind the last item: histories `[batch, length]` → `[batch, dim + 1]`."""

    def __init__(self, encoder: Bidirectional, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.encoder = encoder

    def build(self, items_shape: Any) -> None:
        if not self.encoder.built:
            self.encoder.build(items_shape)

    def call(self, items: Any, training: bool | None = None) -> Any:
        sequences, lengths = with_next(items, ops.full((ops.shape(items)[0],), FIRST))  # which it is does not matter
        behind = _at(lengths - 1, sequences)
        return backends.at(self.encoder(sequences, behind, training=training), lengths - 1)


class Cloze(keras.layers.Layer):
    """The states of hidden items and which they are: as `AfterEach`, of the history and the positive as one sequence.

    Each item is hidden with a probability of its own draw; where a sequence would have none, and in a share of the
    sequences, the last alone is (section 3.6). Behind the sequences stand their cuts, which keep two items at least.
    """

    def __init__(self, encoder: keras.layers.Layer, masked: float, last: float, cuts: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_jit = backends.FIXED_SHAPES
        self.encoder = encoder
        self.masked, self.last, self.cuts = masked, last, cuts
        self._seeds = keras.random.SeedGenerator()

    def build(self, inputs_shape: Any, positives_shape: Any) -> None:
        if not self.encoder.built:
            self.encoder.build(inputs_shape["history_items"])

    def call(self, inputs: Any, positives: Any, training: bool | None = None) -> tuple[Any, Any, Any]:
        items, lengths = with_next(inputs["history_items"], positives)
        drawn = keras.random.uniform(ops.shape(items), seed=self._seeds) < self.masked
        drawn = ops.logical_and(drawn, items >= FIRST)  # what the unknown is cannot be told
        alone = keras.random.uniform(ops.shape(lengths), seed=self._seeds) < self.last
        alone = ops.logical_or(alone, ops.logical_not(ops.any(drawn, axis=1)))
        hidden = ops.where(alone[:, None], _at(lengths - 1, items), drawn)
        if self.cuts:
            cut, ends = self._cut(*(ops.repeat(whole, self.cuts, axis=0) for whole in (items, lengths)))
            items = ops.concatenate([items, cut], axis=0)
            hidden = ops.concatenate([hidden, ops.logical_and(_at(ends, cut), cut >= FIRST)], axis=0)
        return backends.those(hidden, self.encoder(items, hidden, training=training), items)

    def _cut(self, items: Any, lengths: Any) -> tuple[Any, Any]:
        """Sequences that end at a place of theirs, and that place: `[rows, length]`, `[rows]`."""
        drawn = keras.random.uniform(ops.shape(lengths), seed=self._seeds)
        ends = lengths - 1 - ops.cast(drawn * ops.cast(lengths - 1, "float32"), "int32")
        return ops.where(ops.arange(ops.shape(items)[1], dtype="int32") <= ends[:, None], items, PADDING), ends


def with_next(items: Any, last: Any) -> tuple[Any, Any]:
    """Histories with one item more, cut to the longest, and how long they are then: `[batch, …]`, `[batch]`."""
    items = ops.convert_to_tensor(items)
    lengths = ops.sum(ops.cast(ops.not_equal(items, PADDING), "int32"), axis=1)
    return appended(items[:, backends.leading(ops.max(lengths))], lengths, last), lengths + 1


def _at(places: Any, items: Any) -> Any:
    """Which place of each sequence it is: `[batch]`, `[batch, length]` → bool `[batch, length]`."""
    return ops.equal(ops.arange(ops.shape(items)[1], dtype="int32"), places[:, None])


def _small() -> keras.initializers.Initializer:
    """Of deviation 0.02, cut at twice that: so all weights start in the authors' code."""
    return keras.initializers.TruncatedNormal(stddev=0.02)


def _passing(shape: tuple[int, int], dtype: Any = None) -> Any:
    """A square kernel that passes on what it is given, and little else."""
    return ops.eye(*shape, dtype=dtype) + _small()(shape, dtype)


def _vectors_and_bias(shape: tuple[int, int], dtype: Any = None) -> Any:
    """Items' vectors, and their biases from 0: `[items, dim + 1]`."""
    return ops.pad(_small()((shape[0], shape[1] - 1), dtype), [[0, 0], [0, 1]])
