"""Vectors of items from their attributes and their neighbourhood (GraphSAGE: Hamilton, Ying & Leskovec, NeurIPS 2017).

Items are nodes; each time that two were watched together is an edge, so that a neighbour drawn from a node's edges is
drawn as often as it was watched with it.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy import sparse

from penstock import optimizers
from penstock.catalogue import Catalogue
from penstock.examples import FIRST, PADDING, Schema
from penstock.layers.embedding import Embedding
from penstock.pretraining import Sessions, counts, descend, drawn_pairs, negative_sampling, pairs
from penstock.samplers import Unigram

EPOCHS = 2
NEGATIVES = 5.0
SAMPLE = 512
"""How many items of noise a batch shares."""

NEIGHBOURS = 10
"""How many of a node's edges are drawn for a mean."""

ALONE = 0.2
"""The share of nodes that a batch takes for such as nobody has watched: those come up when it is over."""

PAIRS = 1_000_000
"""At most so many of the pairs are learnt from in an epoch."""

BATCH_SIZE = 8192
LEARNING_RATE = 0.005


def learn(
    sessions: Sessions, schema: Schema, catalogue: Catalogue, dim: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors `[known + 2, dim]`, and which of them say something: items with an attribute or a neighbour."""
    random = np.random.default_rng(seed)
    size = schema.size("item_id")
    nodes = Nodes(catalogue, schema, size, (dim + 1) // 2, seed)
    model = GraphSage(nodes, edges_of(sessions, size, random), size, dim, seed)
    sampler = Unigram(counts(sessions, size), 0.75, seed)

    def loss(centre: Any, context: Any) -> Any:
        nodes, place = tf.unique(tf.concat([centre, context, sampler.draw(SAMPLE)], axis=0))
        found = tf.gather(model(nodes), place)
        count = tf.size(centre)
        return negative_sampling(found[:count], found[count : 2 * count], found[2 * count :], NEGATIVES)

    def draw() -> np.ndarray:
        return drawn_pairs(sessions, size, random)[:PAIRS]

    weights = model.trainable_variables
    descend("graph", loss, weights, optimizers.Adam(LEARNING_RATE), draw, EPOCHS, BATCH_SIZE)
    learnt = np.isin(np.arange(size), pairs(sessions, 1))
    for values in catalogue.attributes.values():
        if values.dtype == np.int32:
            learnt |= (values[:size].reshape(size, -1) != PADDING).any(axis=1)
    learnt[:FIRST] = False
    return model.exact(), learnt


def edges_of(sessions: Sessions, size: int, random: np.random.Generator) -> np.ndarray:
    """The pairs of an epoch, and those of items that were watched with others but have none there: `[edges, 2]`."""
    drawn, near = drawn_pairs(sessions, size, random), pairs(sessions, 1)
    both_ways = np.concatenate([near, near[:, ::-1]])
    return np.concatenate([drawn, both_ways[~np.isin(both_ways[:, 0], drawn[:, 0])]])


class Nodes(keras.layers.Layer):
    """What a node says of itself: its id's vector, its attributes' vectors and numbers, side by side.

    Indices `[n]`, and 1 or 0 for whether the id counts, `[n]` → `[n, width]`. Ids start at 0: a rare one adds little.
    """

    def __init__(self, catalogue: Catalogue, schema: Schema, size: int, dim: int, seed: int) -> None:
        super().__init__()
        self.ids = Embedding(size, dim, "zeros")
        self.ids.build(None)
        self.tables: list[Embedding] = []
        self._values = []
        for feature in schema.of("item"):
            if feature.name not in catalogue.attributes:
                continue
            values = tf.constant(catalogue.attributes[feature.name][:size])
            self._values.append(values)
            if feature.kind in ("id", "ids"):
                start = keras.initializers.RandomUniform(-0.5, 0.5, seed=seed + len(self.tables))
                table = Embedding(schema.size(feature.vocabulary), dim, start)
                table.build(None)
                self.tables.append(table)

    def call(self, nodes: Any, linked: Any) -> Any:
        tables = iter(self.tables)
        parts = [self.ids(nodes) * linked[:, None]]
        for values in self._values:
            found = tf.gather(values, nodes)
            if found.dtype == tf.int32:
                parts.append(next(tables)(found, mean=found.shape.rank == 2))
            else:
                parts.append(found[:, None])
        return tf.concat(parts, axis=1)


class GraphSage(keras.layers.Layer):
    """Two hops: `hᵏ = σ(Wᵏ [hᵏ⁻¹, mean of hᵏ⁻¹ of drawn neighbours])`, each made of length 1: algorithm 1.

    Indices `[n]` → `[n, dim]`. σ is ReLU in the first hop and none in the second: with it no two vectors could point
    apart. The nodes that a batch needs, hop by hop, are taken once each (their algorithm 2). A node without neighbours
    has 0 for their mean and for its id, so that its attributes alone speak: as noise its id would learn whom it is far
    from, and never whom it is near.

    Args:
        nodes: indices `[n]` → `[n, width]`.
        edges: from one node to another, int32 `[edges, 2]`.
        size: number of indices.
    """

    def __init__(self, nodes: Nodes, edges: np.ndarray, size: int, dim: int, seed: int) -> None:
        super().__init__()
        self.nodes = nodes
        self._size = size
        self._edges = edges[np.argsort(edges[:, 0], kind="stable")]
        degrees = np.bincount(edges[:, 0], minlength=size)
        self._degrees = tf.constant(degrees.astype(np.int32))
        self._starts = tf.constant((np.cumsum(degrees) - degrees).astype(np.int32))
        self._ends = tf.constant(self._edges[:, 1])
        self._seeds = keras.random.SeedGenerator(seed)
        first, second = (keras.initializers.GlorotUniform(seed + place) for place in range(2))
        self.hops = [
            keras.layers.Dense(2 * dim, "relu", kernel_initializer=first),
            keras.layers.Dense(dim, kernel_initializer=second),
        ]
        width = nodes(tf.zeros([1], tf.int32), tf.zeros([1])).shape[1]
        for hop, wide in zip(self.hops, (width, 2 * dim), strict=True):
            hop.build((None, 2 * wide))

    def call(self, nodes: Any) -> Any:
        alone = keras.random.uniform((self._size,), seed=self._seeds) < ALONE
        return self._vectors(nodes, tf.where(alone, 0.0, self._linked()), len(self.hops))

    def _linked(self) -> Any:
        """1 for an index that has neighbours, else 0: `[size]`."""
        return tf.cast(self._degrees > 0, tf.float32)

    def _vectors(self, nodes: Any, linked: Any, depth: int) -> Any:
        """Of nodes that occur once each, from the draws of `depth` hops."""
        some = tf.gather(linked, nodes)
        if not depth:
            return self.nodes(nodes, some)
        count = tf.size(nodes)
        needed, place = tf.unique(tf.concat([nodes, tf.reshape(self._drawn(nodes), [-1])], axis=0))
        below = self._vectors(needed, linked, depth - 1)
        owners = tf.repeat(tf.range(count), NEIGHBOURS)
        means = tf.sparse.segment_mean(below, place[count:], owners, num_segments=count)
        return self._hop(depth, tf.gather(below, place[:count]), means * some[:, None])

    def _drawn(self, nodes: Any) -> Any:
        """Neighbours with replacement, `[n, NEIGHBOURS]`; of a node that has none any node."""
        degrees = tf.gather(self._degrees, nodes)[:, None]
        uniform = keras.random.uniform((tf.size(nodes), NEIGHBOURS), seed=self._seeds)
        # a float next to 1 times a degree is the degree
        chosen = tf.minimum(tf.cast(uniform * tf.cast(degrees, tf.float32), tf.int32), degrees - 1)
        edge = tf.gather(self._starts, nodes)[:, None] + tf.maximum(chosen, 0)
        return tf.gather(self._ends, tf.minimum(edge, tf.size(self._ends) - 1))

    def _hop(self, depth: int, own: Any, means: Any) -> Any:
        return tf.math.l2_normalize(self.hops[depth - 1](tf.concat([own, means], axis=1)), axis=1)

    def exact(self) -> np.ndarray:
        """The vectors of all nodes from the means over all edges, of which those of drawn ones are estimates."""
        weights = np.ones(len(self._edges), np.float32)
        shape = (self._size, self._size)
        adjacent = sparse.csr_matrix((weights, (self._edges[:, 0], self._edges[:, 1])), shape)
        adjacent = sparse.diags(1.0 / np.maximum(np.asarray(self._degrees, np.float32), 1.0)) @ adjacent
        found = self.nodes(tf.range(self._size), self._linked())
        for depth in range(1, len(self.hops) + 1):
            found = self._hop(depth, found, tf.constant((adjacent @ np.asarray(found)).astype(np.float32)))
        return np.asarray(found)
