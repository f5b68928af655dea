"""Vectors of items learnt before a rank model, from what users watched together in the training slice.

| name | learns from |
|---|---|
| `item2vec` | which items stand in a session together |
| `graph` | the same as a graph, and the items' attributes, of which rare and new ids have as much as any |

Each is a file of this folder with a `learn`. What a rank model gets is of the scale that its embeddings start from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import polars as pl
import tensorflow as tf

import penstock
from penstock.activity import UNKNOWN_SESSION
from penstock.catalogue import Catalogue
from penstock.examples import FIRST, Schema, encode_ids, read_slice
from penstock.fitting import PROGRESS_SECONDS
from penstock.sessions import GAP_MS

WATCHED = "long_view"
"""The label of what is watched: the histories of users are of the same."""

FREQUENT = 10.0
"""An item that was watched more than so many times as often as the mean item is thinned out."""

WINDOW = 5
"""Each item of a session is paired with so many that follow it in a random order; of up to 6 these are all."""


LEAST_STEPS = 200
"""Of the gradient, however few the pairs are."""


class Sessions(NamedTuple):
    """What was watched, session after session.

    Attributes:
        items: indices of known items, int32 `[watched]`.
        session: the number of each one's session, rising, int64 `[watched]`.
    """

    items: np.ndarray
    session: np.ndarray


def vectors(
    name: str, examples: Path, schema: Schema, catalogue: Catalogue, dim: int, seed: int, scale: float = 0.05
) -> np.ndarray:
    """The vectors of padding, unknown and the known items, float32 `[known + 2, dim]`, by the method of a name.

    Of the training slice alone. They are moved to a mean of 0 and stretched by one factor until their numbers have the
    deviation `scale / √3` of an embedding that starts uniform in ±`scale`. Rows of what nothing was learnt of are 0,
    the mean of the others: padding, unknown, and of `item2vec` every item that was watched with no other.

    Raises:
        ValueError: an unknown name, or no two known items were watched together.
    """
    learn = penstock.module("pretraining", name).learn
    sessions = read_sessions(examples, schema)
    if not len(pairs(sessions, 1)):
        raise ValueError("no two items of the training slice were watched together: there is nothing to learn")
    found, learnt = learn(sessions, schema, catalogue, dim, seed)
    found = np.where(learnt[:, None], found - found[learnt].mean(axis=0), 0.0)
    deviation = np.sqrt(np.mean(found[learnt] ** 2))
    return (found * (scale / np.sqrt(3.0) / max(deviation, 1e-30))).astype(np.float32)


def read_sessions(examples: Path, schema: Schema) -> Sessions:
    """What users watched in the training slice and before it, as `penstock.sessions` divides it.

    What was before is the history of a user's first row. A session ends where the next item is of another of the log's
    sessions, or, where the log does not know, comes `GAP_MS` or more later.
    """
    rows = read_slice(examples, "train")
    names = ["user_id", "history_items", "history_times", "history_sessions"]
    first = rows.unique("user_id", keep="first", maintain_order=True).select(names)
    seen = rows.filter(pl.col(WATCHED) == 1).select(
        "user_id", "item_id", "time_ms", pl.col("session_id").fill_null(UNKNOWN_SESSION)
    )
    before = first.explode(*names[1:], empty_as_null=False).rename(dict(zip(names, seen.columns, strict=True)))
    watched = pl.concat([before.cast(seen.schema), seen]).sort("user_id", "time_ms", maintain_order=True)
    user, when, session = (watched[name].to_numpy() for name in ("user_id", "time_ms", "session_id"))
    told = (session[1:] >= 0) & (session[:-1] >= 0)
    apart = np.where(told, session[1:] != session[:-1], np.abs(np.diff(when)) >= GAP_MS)
    ends = (user[1:] != user[:-1]) | apart
    number = np.concatenate([np.zeros(min(len(user), 1), np.int64), np.cumsum(ends)])
    items = encode_ids(watched["item_id"].to_numpy(), schema.vocabularies["item_id"])
    return Sessions(items[items >= FIRST], number[items >= FIRST])


def counts(sessions: Sessions, size: int) -> np.ndarray:
    """How often each index was watched, `[size]`."""
    return np.bincount(sessions.items, minlength=size)


def pairs(sessions: Sessions, window: int) -> np.ndarray:
    """Two different items of a session, at most `window` places apart, int32 `[pairs, 2]`; each pair is given once."""
    items, session = sessions
    found = [np.empty((0, 2), np.int32)]
    for distance in range(1, min(window + 1, len(items))):
        together = session[distance:] == session[:-distance]
        if not together.any():
            break
        both = np.stack([items[:-distance], items[distance:]], axis=1)[together]
        found.append(both[both[:, 0] != both[:, 1]])
    return np.concatenate(found)


def drawn_pairs(sessions: Sessions, size: int, random: np.random.Generator) -> np.ndarray:
    """The pairs of an epoch, both ways and in no order: frequent items thinned out, then each session shuffled.

    Of an item that was watched f times as often as the mean one, `min(√(FREQUENT / f), 1)` is kept (Mikolov et al.
    2013, arXiv 1310.4546, eq. 5, with a threshold that goes with the number of items). The order of a session says
    nothing here; a window over a random one has each two of its items as often as any other two (Barkan & Koenigstein
    2016, arXiv 1603.04259, section 3).
    """
    watched = counts(sessions, size)
    times = watched / watched[watched > 0].mean()
    kept = random.random(len(sessions.items)) < np.sqrt(FREQUENT / np.maximum(times, FREQUENT))[sessions.items]
    items, session = sessions.items[kept], sessions.session[kept]
    order = np.lexsort((random.random(len(items)), session))
    found = pairs(Sessions(items[order], session), WINDOW)
    return random.permutation(np.concatenate([found, found[:, ::-1]]))


def negative_sampling(centres: Any, contexts: Any, noise: Any, negatives: float) -> Any:
    """The loss of telling each pair's context from noise that the batch shares, `[batch]`.

    `−log σ(u · v) − k/n Σⱼ log σ(−u · vⱼ)`: what k draws a pair would cost, estimated by n that all pairs share.
    Mikolov et al. 2013, eq. 4; Hamilton et al., NeurIPS 2017, eq. 1. Noise that is the context itself stays in: it is
    noise by its origin.

    Args:
        centres: u, `[batch, dim]`.
        contexts: v, `[batch, dim]`.
        noise: `[n, dim]`.
        negatives: k.
    """
    drawn = tf.reduce_mean(tf.nn.softplus(tf.matmul(centres, noise, transpose_b=True)), axis=1)
    return tf.nn.softplus(-tf.reduce_sum(centres * contexts, axis=1)) + negatives * drawn


def descend(
    title: str,
    loss: Callable[[Any, Any], Any],
    weights: Sequence[keras.Variable],
    optimizer: keras.optimizers.Optimizer,
    draw: Callable[[], np.ndarray],
    epochs: int,
    batch_size: int,
) -> None:
    """Follows the gradient of a loss of centres and contexts, int32 `[batch]` each, and says how it goes.

    Args:
        draw: the pairs of an epoch, `[pairs, 2]`.
        epochs: how many; more where these are not `LEAST_STEPS` steps, as with few pairs.
    """
    optimizer.build(weights)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.int32)])
    def step(both: Any) -> Any:
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(loss(both[:, 0], both[:, 1]))
        optimizer.apply(tape.gradient(value, [weight.value for weight in weights]), weights)
        return value

    steps = epoch = 0
    said = time.monotonic()
    while epoch < epochs or steps < LEAST_STEPS:
        epoch += 1
        found = draw()
        for start in range(0, max(len(found), 1), batch_size):  # a step of none where few pairs are all thinned out
            value = step(found[start : start + batch_size]) if len(found) else 0.0
            steps += 1
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                print(f"{title}  epoch {epoch}/{epochs}  step {steps}  loss {float(value):.4f}", flush=True)
    print(f"{title}  done  step {steps}  loss {float(value):.4f}", flush=True)
