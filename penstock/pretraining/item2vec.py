"""Skip-gram with negative sampling over sessions (Barkan & Koenigstein 2016, arXiv 1603.04259)."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from penstock import optimizers
from penstock.catalogue import Catalogue
from penstock.examples import Schema
from penstock.layers.embedding import Embedding
from penstock.pretraining import Sessions, counts, descend, drawn_pairs, negative_sampling, pairs
from penstock.samplers import Unigram

EPOCHS = 3
NEGATIVES = 5.0
SAMPLE = 128
"""How many items of noise a batch shares."""

BATCH_SIZE = 4096
LEARNING_RATE = 0.2


def learn(
    sessions: Sessions, schema: Schema, catalogue: Catalogue, dim: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors as centres `[known + 2, dim]`, and which of them were learnt: items that were watched with others.

    Centres start uniform in ±1/(2 dim), contexts at 0, as in word2vec.
    """
    random = np.random.default_rng(seed)
    size = schema.size("item_id")
    start = keras.initializers.RandomUniform(-0.5 / dim, 0.5 / dim, seed=seed)
    centres, contexts = Embedding(size, dim, start), Embedding(size, dim, "zeros")
    for table in (centres, contexts):
        table.build(None)
    sampler = Unigram(counts(sessions, size), 0.75, seed)

    def loss(centre: Any, context: Any) -> Any:
        return negative_sampling(centres(centre), contexts(context), contexts(sampler.draw(SAMPLE)), NEGATIVES)

    weights = [centres.table, contexts.table]
    draw = partial(drawn_pairs, sessions, size, random)
    descend("item2vec", loss, weights, optimizers.Adagrad(LEARNING_RATE), draw, EPOCHS, BATCH_SIZE)
    return ops.convert_to_numpy(centres.table), np.isin(np.arange(size), pairs(sessions, 1))
