"""LSTM-DSSM: a text read word by word, compared by cosine (Palangi et al., TASLP 2016, arXiv 1502.06922)."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.catalogue import Catalogue
from penstock.examples import Schema
from penstock.layers.recurrent import LastState
from penstock.recall import dssm
from penstock.retrieval import Towers


@dataclass(frozen=True)
class Config(dssm.TextConfig):
    """Parameters of the model and of its fit."""

    words: int = 32


def build(config: Config, schema: Schema, catalogue: Catalogue) -> Towers:
    """Both sides read their words in order; what the LSTM holds after the last is the vector."""
    return dssm.towers(config, schema, catalogue, lambda: LastState(config.dim))
