"""BINN: what a session shows and a history prefers, by contextual LSTMs (Li et al., KDD 2018, arXiv 1808.01075)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from penstock import sessions
from penstock.catalogue import Catalogue
from penstock.examples import PADDING, Schema
from penstock.layers.embedding import Embedding, inputs_of
from penstock.layers.next_item import or_unknown
from penstock.layers.recurrent import LastState, MeanState
from penstock.retrieval import BiasedItems, RecallConfig, Towers

BUCKETS = 18
"""Padding, the pauses by powers of two of a minute up to 45 days, and that of the first item, which has none."""


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit.

    Attributes:
        short: so many actions of the session are read, the last.
        long: so many of the actions before it are read, the last.
        long_days: and those alone that are no older than this.
        width: size of the vector of an item in the history.
        context: size of the vector of what an item was met in.
        units: width of the LSTMs.
    """

    dim: int = 64
    short: int = 20
    long: int = 30
    long_days: float = 60.0
    width: int = 64
    context: int = 8
    units: int = 64
    dropout: float = 0.2
    sample: int = 8192
    prefixes: int = 50
    learning_rate: float = 0.001


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """`P(i | user) = softmax(wᵢ · q + bᵢ)` with `q = W [s; p] + b`, s of `LastState`, p of `MeanState` (section 4).

    s reads the session that runs, p all that was liked before it. The paper reads behaviours of several kinds (clicks,
    carts, purchases) by a contextual LSTM, whose gates see the kind beside the item, and takes for the preferences
    those that say most; a history of long views is of one kind, so the context that stands beside an item is how long
    after the one before it was. The paper's query learns to come near the next item's vector, which was learnt before;
    here the loss is any of `penstock.objectives`, and items are learnt with the rest. The query is `[q; 1]`
    `[batch, dim + 1]`.
    """
    inputs = inputs_of(schema.named("history_items", "history_times", "history_sessions", "time_ms"))
    items, times = inputs["history_items"], inputs["history_times"]
    settings = (times, inputs["history_sessions"], inputs["time_ms"], config.short, config.long, config.long_days)
    read = [sessions.split(of, *settings) for of in (items, Pauses(name="pauses")(items, times))]
    (short, long), (short_pauses, long_pauses) = read
    behaviours = Behaviours(schema.size("item_id"), config, name="behaviours")
    session = LastState(config.units, behaviours, name="session")(*_steps(or_unknown(short), short_pauses))
    preference = MeanState(config.units, behaviours, name="preference")(*_steps(long, long_pauses))
    joined = keras.layers.Dropout(config.dropout)(ops.concatenate([session, preference], axis=-1))
    query = keras.layers.Dense(config.dim)(joined)
    query = ops.concatenate([query, ops.ones_like(query[:, :1])], axis=-1)
    return Towers(
        keras.Model(inputs, query, name="query"), BiasedItems(schema.size("item_id"), config.dim, name="items")
    )


def _steps(items: Any, pauses: Any) -> tuple[Any, Any]:
    """What `Behaviours` reads, `[batch, length, 2]`, and where there is an item."""
    return ops.stack([items, pauses], axis=-1), ops.not_equal(items, PADDING)


class Pauses(keras.layers.Layer):
    """How long after the one before it each item was: items and times in ms, `[batch, length]` → indices, 0 = padding.

    `1 + ⌊log₂(1 + minutes)⌋`, at most 16; 17 for a first item.
    """

    def call(self, items: Any, times: Any) -> Any:
        minutes = ops.cast(ops.maximum(times[:, 1:] - times[:, :-1], 0), "float32") / 60_000.0
        buckets = 1 + ops.cast(ops.minimum(ops.log2(1.0 + minutes), 15.0), items.dtype)
        first = ops.full_like(items[:, :1], BUCKETS - 1)
        return ops.where(ops.not_equal(items, PADDING), ops.concatenate([first, buckets], axis=1), 0)


class Behaviours(keras.layers.Layer):
    """Items and pauses `[steps, 2]` → their vectors side by side `[steps, width + context]`.

    An LSTM whose input this is, is contextual: `W [x; c]` is `W_x x + W_c c` in each of its gates (section 4.2.1).
    """

    def __init__(self, size: int, config: Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        uniform = keras.initializers.RandomUniform(-0.05, 0.05)
        self.items = Embedding(size, config.width, uniform)
        self.pauses = Embedding(BUCKETS, config.context, keras.initializers.RandomUniform(-0.05, 0.05))
        self.dropout = keras.layers.Dropout(config.dropout)

    def build(self, steps_shape: Any) -> None:
        self.items.build((None,))
        self.pauses.build((None,))

    def call(self, steps: Any, training: bool | None = None) -> Any:
        vectors = ops.concatenate([self.items(steps[..., 0]), self.pauses(steps[..., 1])], axis=-1)
        return self.dropout(vectors, training=training)

    def compute_output_shape(self, steps_shape: Any) -> Any:
        return *steps_shape[:-1], self.items.dim + self.pauses.dim
