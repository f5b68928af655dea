"""The user representation of RALM: YouTubeDNN whose fields are merged by attention (Liu et al., KDD 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from penstock.catalogue import Catalogue
from penstock.examples import Schema
from penstock.layers.attention_merge import AttentionMerge
from penstock.layers.embedding import Embedding, Given, embed, inputs_of
from penstock.retrieval import EXAMPLE_AGE, RecallConfig, Towers


@dataclass(frozen=True)
class Config(RecallConfig):
    """Parameters of the model and of its fit.

    Attributes:
        domains: attributes of the items of the history that are a field each, beside the items themselves.
        attention: k, the units of the attention that merges the fields.
        hidden: sizes of the layers between the merged fields and the user's vector.
    """

    domains: tuple[str, ...] = ("author_id", "tags")
    attention: int = 32
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.1
    example_age: bool = True
    power: float = 0.5
    sample: int = 8192
    last_rate: float = 0.1


class DomainHistory(keras.layers.Layer):
    """What the items of a history have of an attribute: indices `[batch, items]` → `[batch, values]`, 0 is none.

    Args:
        values: of each item index, int32 `[items + 2]` or `[items + 2, length]`.
    """

    def __init__(self, values: np.ndarray, **kwargs: Any) -> None:
        super().__init__(dtype="int32", **kwargs)
        self._values = np.asarray(values, np.int32).reshape(len(values), -1)

    def build(self, history_shape: Any) -> None:
        values = self._values
        self._table = self.add_weight(values.shape, Given(values), dtype="int32", trainable=False, name="table")

    def call(self, history: Any) -> Any:
        found = ops.take(self._table, history, axis=0)
        return ops.reshape(found, (-1, found.shape[1] * found.shape[2]))


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """Fields of the user as vectors of one size, merged by attention, through an MLP: `P(i | user) ∝ exp(wᵢ · u)`.

    H `[batch, fields, dim]` holds the profile's ids, the mean of the history's items, those of each of their
    attributes, and all numbers, brought to `dim`; `u = MLP(AttentionMerge(H))`, `[batch, dim]`, is not negative: its
    last layer is one of ReLUs too. Item vectors start from a normal distribution of deviation 1/√dim, cut at twice
    that.

    Raises:
        ValueError: a domain that items have no ids of.
    """
    features = tuple(feature for feature in schema.of("user") if feature.name != "user_id")
    inputs = inputs_of(features)
    vectors = embed(inputs, features, schema, config.dim)
    is_number = [feature.kind in ("count", "number") for feature in features]
    fields = [vector for vector, number in zip(vectors, is_number, strict=True) if not number]
    numbers = [vector for vector, number in zip(vectors, is_number, strict=True) if number]
    for domain in config.domains:
        if domain not in catalogue.attributes or domain not in schema.vocabularies:
            there = ", ".join(sorted(set(catalogue.attributes) & set(schema.vocabularies)))
            raise ValueError(f"items have no ids of the domain {domain!r}: there are {there}")
        table = Embedding(schema.size(domain), config.dim, keras.initializers.RandomUniform(-0.05, 0.05), domain)
        of_history = DomainHistory(catalogue.attributes[domain][: schema.size("item_id")])(inputs["history_items"])
        fields.append(table(of_history, mean=True))
    if config.example_age:
        inputs[EXAMPLE_AGE] = keras.Input((), dtype="float32", name=EXAMPLE_AGE)
        numbers.append(keras.layers.Reshape((1,))(inputs[EXAMPLE_AGE]))
    if numbers:
        fields.append(keras.layers.Dense(config.dim)(ops.concatenate(numbers, axis=-1)))
    hidden = AttentionMerge(config.attention, name="merge")(ops.stack(fields, axis=1))
    for units in config.hidden:
        hidden = keras.layers.Dense(units, "relu")(hidden)
        hidden = keras.layers.Dropout(config.dropout)(hidden)
    user = keras.layers.Dense(config.dim, "relu")(hidden)
    weights = keras.initializers.TruncatedNormal(stddev=config.dim**-0.5)
    return Towers(
        keras.Model(inputs, user, name="query"), Embedding(schema.size("item_id"), config.dim, weights, name="items")
    )
