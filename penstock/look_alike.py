"""RALM's look-alike: an item is the users who liked it, its seeds, and is scored for any user against them.

Liu et al., "Real-time Attention based Look-alike Model for Recommender System", KDD 2019. Seeds are vectors of a
recall model's query tower, reduced to k centroids. With `e(x) = A x + b` for both sides, as a user is a user on either:

    E_s = e(centroids)  [k, h],   e_u = e(u)  [h]
    global = a E_s      a = softmax(log n + W₂ tanh(W₁ E_sᵀ))  self-attention: what the seeds have in common
    local  = l E_s      l = softmax(log n + tanh(E_s W_l e_u)) those of the seeds that are like this user
    score  = α cos(e_u, global) + β cos(e_u, local)

The paper's items have thousands of seeds; ours have three, of which two may be alike by chance. So, beyond the paper, a
centroid weighs as much as the n seeds it stands for, and among those of every item is the mean of all users, who counts
for λ: the fewer seeds, the less an item is told from any other.

All of an item but `local` is known before anybody asks, so a table of `E_s` and `global` is enough to score live. It is
a file that is replaced whole, of one release: vectors of another tower mean nothing in it.

    HOME/look_alike/RELEASE/model.npz    A, b, W₁, W₂, W_l, α, β, λ and the mean user
    HOME/look_alike/RELEASE/table.npz    the items
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy import sparse

from penstock.durable import replace_file

LEAST_SEEDS = 100
"""With fewer of its own an item is known by those of the items that are most like it, too."""

LENT = 1.0
"""What others lend weighs as much as so many seeds of the item's own, however many they are."""

CENTROIDS = 20

FEW = 10_000
"""So many seeds or fewer are all looked at in each step of k-means; more a part at a time."""


class LookAlikeError(ValueError):
    """A model or table that cannot be used; the message says why."""


class Clusters(NamedTuple):
    """Seeds in groups.

    Attributes:
        centroids: the mean of each group, float32 `[groups, dim]`.
        counts: what its seeds weigh, float64 `[groups]`.
        places: the group of each seed, int64 `[seeds]`.
    """

    centroids: np.ndarray
    counts: np.ndarray
    places: np.ndarray


def cluster(vectors: np.ndarray, k: int = CENTROIDS, seed: int = 0, weights: np.ndarray | None = None) -> Clusters:
    """k-means of seeds `[seeds, dim]` (Lloyd 1982; above `FEW` in mini-batches, Sculley 2010); k or fewer groups.

    Where no more than k of the seeds differ, each that does is a group.

    Args:
        weights: above 0, `[seeds]`; 1 each if None.

    Raises:
        LookAlikeError: no seeds, or a vector that is not finite.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if not len(vectors) or not np.isfinite(vectors).all():
        raise LookAlikeError("seeds are one or more vectors of finite numbers")
    rows = vectors.view([("", f"V{vectors.itemsize * vectors.shape[1]}")]).ravel()
    _, first, places = np.unique(rows, return_index=True, return_inverse=True)
    if len(first) > k:
        from sklearn.cluster import KMeans, MiniBatchKMeans  # takes a second, and who scores needs none

        settings: dict[str, Any] = {"n_clusters": k, "n_init": 1, "random_state": seed}
        few = len(vectors) <= FEW
        means = KMeans(**settings, max_iter=50) if few else MiniBatchKMeans(**settings, batch_size=4096, max_iter=20)
        found = means.fit_predict(vectors, sample_weight=weights)
        _, places = np.unique(found, return_inverse=True)  # without groups that are empty
    weights = np.ones(len(vectors)) if weights is None else weights
    counts = np.bincount(places, weights)
    sums = np.zeros((len(counts), vectors.shape[1]))
    np.add.at(sums, places, weights[:, None] * vectors)
    return Clusters((sums / counts[:, None]).astype(np.float32), counts, places)


@dataclass(frozen=True)
class Scorer:
    """A trained look-alike model, float32.

    Attributes:
        kernel, bias: A `[dim, h]` and b `[h]` of `e`, which is `x A + b` of rows.
        hidden, merge: W₁ `[h, units]` and W₂ `[units]` of the self-attention.
        local: W_l `[h, h]`, of a user on the left.
        alpha, beta: `[]`.
        mean, prior: `e` of the mean user `[h]`, and how many seeds he counts for in every item `[]`.
    """

    kernel: np.ndarray
    bias: np.ndarray
    hidden: np.ndarray
    merge: np.ndarray
    local: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    prior: np.ndarray

    def embed(self, vectors: np.ndarray) -> np.ndarray:
        """`e`: vectors of users `[…, dim]` → `[…, h]`."""
        return vectors.astype(np.float32) @ self.kernel + self.bias

    def summarise(self, seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """`global` of items: E_s `[…, k, h]`, each of so many seeds `[…, k]`, 0 of one that is not there → `[…, h]`."""
        shape = (*seeds.shape[:-2], 1, seeds.shape[-1])
        seeds = np.concatenate([seeds, np.broadcast_to(self.mean, shape)], axis=-2)
        counts = np.concatenate([counts, np.broadcast_to(self.prior, shape[:-1])], axis=-1)
        scores = np.tanh(seeds @ self.hidden) @ self.merge
        weights = counts * np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.einsum("...k,...kh->...h", weights / weights.sum(axis=-1, keepdims=True), seeds)

    def score(self, vector: np.ndarray, seeds: np.ndarray, counts: np.ndarray, summaries: np.ndarray) -> np.ndarray:
        """The score of a user `[dim]` for items, `[items]`.

        Args:
            seeds, counts, summaries: E_s `[items, k, h]`, `[items, k]`, `global` `[items, h]`.
        """
        user = self.embed(vector)
        asked = user @ self.local
        weights = np.tanh((seeds.reshape(-1, seeds.shape[2]) @ asked).reshape(seeds.shape[:2]))
        # tanh is within ±1: no shift is needed, nor the sum, as the cosine asks for the direction alone
        weights = counts * np.exp(weights)
        local = np.matmul(weights[:, None, :], seeds)[:, 0]
        local += self.prior * np.exp(np.tanh(self.mean @ asked)) * self.mean
        return self.alpha * _cosine(summaries, user) + self.beta * _cosine(local, user)

    @property
    def digest(self) -> str:
        """Tells models apart."""
        return hashlib.sha256(b"".join(value.tobytes() for value in vars(self).values())).hexdigest()

    def save(self, path: Path, tower: str) -> None:
        """Writes the file, whole or not at all, of the tower that it was trained on."""
        replace_file(path, _npz({"tower": np.array(tower), **vars(self)}))

    @staticmethod
    def read(path: Path, tower: str) -> Scorer:
        """The model of a file.

        Raises:
            OSError: there is none.
            LookAlikeError: it is of another tower, or damaged.
        """
        return Scorer(**_taken(_load(path, tower), path, fields(Scorer)))


def _cosine(vectors: np.ndarray, user: np.ndarray) -> np.ndarray:
    """Of each row with the user; 0 with a vector of zeros."""
    lengths = np.sqrt(np.einsum("ih,ih->i", vectors, vectors) * (user @ user))
    return (vectors @ user) / np.maximum(lengths, 1e-12)


@dataclass(frozen=True)
class Item:
    """What the table holds of one item.

    Attributes:
        seeds, counts: E_s `[k, h]` and of how many seeds each is, float32 `[k]`, 0 of one that is not there.
        summary: `global`, `[h]`.
        own: how many seeds the item has of its own; below `LEAST_SEEDS` it is known by those of others too.
    """

    seeds: np.ndarray
    counts: np.ndarray
    summary: np.ndarray
    own: int


def item_of(vectors: np.ndarray, own: int, scorer: Scorer, k: int = CENTROIDS) -> Item:
    """An item by the vectors of its seeds `[seeds, dim]`, the first of which are its own and the rest lent.

    Raises:
        LookAlikeError: as `cluster`.
    """
    lent = len(vectors) - own
    groups = cluster(vectors, k, weights=np.repeat([1.0, LENT / max(lent, 1)], [own, lent]))
    found = scorer.embed(groups.centroids)
    seeds, counts = np.zeros((k, found.shape[1]), np.float32), np.zeros(k, np.float32)
    seeds[: len(found)], counts[: len(found)] = found, groups.counts
    return Item(seeds, counts, scorer.summarise(seeds, counts).astype(np.float32), own)


@dataclass(frozen=True)
class Table:
    """The items that look-alike knows, in order of their ids.

    Attributes:
        release, tower: whose query tower the users' vectors are of: its number, and `tower_of` its manifest.
        version: one more each time it is published.
        sequence: the last record of the feedback that is in it.
        ids: int64 `[items]`.
        seeds, counts, summaries, own: of `Item`, with a first dimension `[items]`.
    """

    release: int
    tower: str
    version: int
    sequence: int
    scorer: Scorer
    ids: np.ndarray
    seeds: np.ndarray
    counts: np.ndarray
    summaries: np.ndarray
    own: np.ndarray

    @staticmethod
    def of(release: int, tower: str, version: int, sequence: int, scorer: Scorer, items: Mapping[int, Item]) -> Table:
        """The table of some items."""
        ids = sorted(items)
        h = len(scorer.bias)
        k = len(items[ids[0]].counts) if ids else CENTROIDS

        def stacked(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            return np.array([getattr(items[item], name) for item in ids], dtype).reshape(len(ids), *shape)

        return Table(
            release,
            tower,
            version,
            sequence,
            scorer,
            np.array(ids, np.int64),
            stacked("seeds", (k, h), np.float32),
            stacked("counts", (k,), np.float32),
            stacked("summary", (h,), np.float32),
            stacked("own", (), np.int64),
        )

    def items(self) -> dict[int, Item]:
        """Each item by its id."""
        rows = zip(self.ids.tolist(), self.seeds, self.counts, self.summaries, self.own.tolist(), strict=True)
        return {item: Item(*row) for item, *row in rows}

    def best(self, vector: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items that score highest for a user `[dim]`, without some ids, best first: ids and scores.

        Raises:
            LookAlikeError: a vector that is not finite, or of another size than the tower's.
        """
        if vector.shape != self.scorer.kernel.shape[:1] or not np.isfinite(vector).all():
            raise LookAlikeError(f"a user is {len(self.scorer.kernel)} finite numbers, not {vector.shape}")
        scores = self.scorer.score(vector, self.seeds, self.counts, self.summaries)
        scores[np.isin(self.ids, exclude)] = -np.inf
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[np.isfinite(scores[best])]
        return self.ids[best], scores[best].astype(np.float64)

    def publish(self, home: Path) -> None:
        """Takes the place of the release's former table, whole or not at all; one process at a time."""
        for left in table_path(home, self.release).parent.glob(".table.npz-*"):  # of one that was killed while it wrote
            left.unlink()
        arrays = {field.name: getattr(self, field.name) for field in fields(Table) if field.name != "scorer"}
        held = {f"scorer_{name}": value for name, value in vars(self.scorer).items()}
        replace_file(table_path(home, self.release), _npz({name: np.asarray(of) for name, of in arrays.items()} | held))

    @staticmethod
    def read(home: Path, release: int, tower: str) -> Table:
        """The table that is published of a release.

        Raises:
            OSError: there is none.
            LookAlikeError: it is of another tower, or damaged.
        """
        path = table_path(home, release)
        stored = _load(path, tower)
        scorer = Scorer(**_taken(stored, path, fields(Scorer), "scorer_"))
        found = _taken(stored, path, [field for field in fields(Table) if field.name != "scorer"])
        if int(found["release"]) != release:
            raise LookAlikeError(f"{path} is of release {int(found['release'])}")
        version, sequence = int(found["version"]), int(found["sequence"])
        arrays = (found[name] for name in ("ids", "seeds", "counts", "summaries", "own"))
        return Table(release, tower, version, sequence, scorer, *arrays)


def folder_of(home: Path, release: int) -> Path:
    """Where what is known of a release's users lies."""
    return home / "look_alike" / str(release)


def model_path(home: Path, release: int) -> Path:
    """The look-alike model of a release's query tower."""
    return folder_of(home, release) / "model.npz"


def table_path(home: Path, release: int) -> Path:
    """The table that is served with a release."""
    return folder_of(home, release) / "table.npz"


def tower_of(manifest: Mapping[str, Any]) -> str:
    """Which query tower a release has: a digest of the files of its recall model."""
    files = {name: digest for name, digest in (manifest.get("files") or {}).items() if name.startswith("recall/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    return content.getvalue()


def _load(path: Path, tower: str) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
        other = str(found["tower"])
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each raise their own
        raise LookAlikeError(f"{path} is damaged: {error}") from error
    if other != tower:
        raise LookAlikeError(f"{path} is of another query tower than the release's")
    return found


def _taken(
    stored: Mapping[str, np.ndarray], path: Path, of: Sequence[Field[Any]], prefix: str = ""
) -> dict[str, np.ndarray]:
    lacking = [field.name for field in of if prefix + field.name not in stored]
    if lacking:
        raise LookAlikeError(f"{path} was written by another version of Penstock: it has no {', '.join(lacking)}")
    return {field.name: stored[prefix + field.name] for field in of}


class Content:
    """Which items are like which by what they say of themselves.

    An item is its tokens, each with the weight `log(1 + items / items that have it)`, compared by cosine.

    Args:
        ids: int64 `[items]`.
        tokens: of each item, whatever can be a key; each is counted once.
    """

    def __init__(self, ids: np.ndarray, tokens: Sequence[Sequence[Any]]) -> None:
        self._ids = ids
        self._row = {item: row for row, item in enumerate(ids.tolist())}
        columns: dict[Any, int] = {}
        held = [sorted({columns.setdefault(token, len(columns)) for token in of}) for of in tokens]
        starts = np.cumsum([0, *(len(of) for of in held)])
        places = np.array([column for of in held for column in of], np.int64)
        often = np.bincount(places, minlength=max(len(columns), 1))
        weights = np.log1p(len(ids) / np.maximum(often, 1))[places]
        vectors = sparse.csr_matrix((weights, places, starts), (len(ids), max(len(columns), 1)))
        lengths = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())
        self._vectors = sparse.diags(1.0 / np.maximum(lengths, 1e-12)) @ vectors

    @staticmethod
    def of(items: pl.DataFrame) -> Content:
        """By author, category, music and tags: `item_id` and the columns of these that there are."""
        single = [name for name in ("author_id", "category", "music_id") if name in items.columns]
        tokens = [
            [(name, row[name]) for name in single if (row[name] or 0) > 0]
            + [("tags", tag) for tag in row.get("tags") or []]
            for row in items.iter_rows(named=True)
        ]
        return Content(items["item_id"].to_numpy(), tokens)

    def like(self, item: int, among: np.ndarray) -> np.ndarray:
        """Those `among` some ids that have anything in common with an item, most alike first; itself not."""
        if item not in self._row:
            return np.empty(0, np.int64)
        rows = np.array([self._row[other] for other in among.tolist() if other in self._row and other != item], int)
        if not len(rows):
            return np.empty(0, np.int64)
        likeness = (self._vectors[rows] @ self._vectors[self._row[item]].T).toarray().ravel()
        order = np.argsort(-likeness, kind="stable")
        return self._ids[rows[order[likeness[order] > 0]]]
