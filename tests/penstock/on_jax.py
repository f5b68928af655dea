"""What is trained and computed under JAX and held against TensorFlow: a program, and what it shares with its test.

TensorFlow is not there for it: an import fails as where it is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
from keras import ops

from penstock import backends
from penstock.examples import FIRST, read_slice
from penstock.layers.embedding import Embedding
from penstock.layers.next_item import AfterEach, Places, begun
from penstock.layers.recurrent import LastState, MeanState
from penstock.layers.sparse_experts import NoisyTopK, SparseExperts
from penstock.losses import sampled
from penstock.losses.gramian import AverageGramian, OnlineGramian
from penstock.losses.multitask import min_norm
from penstock.samplers import StreamingFrequency

# one batch an epoch: of each shape a step is compiled once more
_FIT = {"batch_size": 4096, "epochs": 3, "patience": 3}
_FEW = _FIT | {"sample": 16, "dim": 8}

RECALL = {"youtube_dnn": _FEW, "sasrec": _FEW, "dssm": _FEW}
RANK = {"mmoe": _FIT}

ROWS = 20
"""So many rows of the test slice are asked for."""


class _Blocked:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError("TensorFlow is not there", name=name)


def values() -> dict[str, np.ndarray]:
    """What losses and layers give for the same numbers on any backend."""
    random = np.random.default_rng(4)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    batch, drawn = np.array([3, 5, 3, 9, 2], np.int32), np.array([5, 9, 9, 4, 3, 7], np.int32)
    log_q, log_of_drawn = np.log(random.uniform(0.1, 0.9, 5)), np.log(random.uniform(0.1, 0.9, 6))
    log_q, log_of_drawn = log_q.astype(np.float32), log_of_drawn.astype(np.float32)
    histories = np.array([[4, 3, 1, 0], [0, 0, 0, 0], [5, 6, 7, 8]], np.int32)

    def losses(vectors: list) -> dict:
        queries, positives, negatives = vectors
        shared = queries, positives, negatives, batch, drawn, log_q, log_of_drawn
        ids, log_times = sampled.distinct(ops.convert_to_tensor(drawn))
        of_ids = ops.take(negatives, ops.argmax(ops.equal(ids[:, None], np.unique(drawn)), axis=1), axis=0)
        return {
            "rows": ops.sum(sampled.sampled_softmax(*shared)),
            "mean": sampled.mean_sampled_softmax(*shared),
            "in chunks": sampled.mean_sampled_softmax(*shared, cells=1),
            "distinct": sampled.mean_sampled_softmax(
                queries, positives, of_ids, batch, ids, log_q, -log_times, cells=100
            ),
            "all": sampled.mean_softmax(queries, negatives, batch % 6),
            "far": sampled.mean_sampled_softmax(100.0 * queries, positives, -9.0 * negatives, *shared[3:]),
            "in_batch": ops.mean(sampled.in_batch_softmax(queries, positives, batch, log_q)),
            "uncorrected": ops.mean(sampled.in_batch_softmax(queries, positives, batch)),
        }

    found: dict[str, object] = {}
    by_name, gradients = backends.each_gradient(
        losses, [ops.convert_to_tensor(normal(*shape)) for shape in ((5, 4), (5, 4), (6, 4))]
    )
    found |= by_name | {f"gradient of {name}": gradients[place] for place, name in enumerate(by_name)}
    found["min_norm"] = min_norm(normal(3, 3) @ np.eye(3) + 4.0 * np.eye(3))

    average, online = AverageGramian(np.full(10, 0.1), 4), OnlineGramian(4, 0.3)
    frequency = StreamingFrequency(np.arange(10), 5, 0.3)
    for step in range(2):
        found[f"average {step}"] = average.update(ops.convert_to_tensor(batch), ops.convert_to_tensor(normal(5, 4)))
        found[f"online {step}"] = online.update(ops.convert_to_tensor(normal(5, 4)))
        frequency.update(ops.convert_to_tensor((batch + step) % 10))
    found |= {"table": average.table, "frequency": frequency.log_probability(np.arange(10))}

    experts, gate = SparseExperts(3, (5, 2)), NoisyTopK(3, 2)
    rows = ops.convert_to_tensor(normal(7, 4))
    gate.build((None, 4))
    experts.build((None, 4), (None, 3))
    for layer in (gate, experts):
        layer.set_weights([normal(*weight.shape) for weight in layer.weights[:4]] + layer.get_weights()[4:])
    found["experts"] = experts(rows, gate(rows))

    readers = {"last": LastState(2), "mean": MeanState(2)}
    for reader in readers.values():
        reader.build((None, None, 4))
        reader.set_weights([normal(*weight.shape) for weight in reader.weights])
    sequences = [ops.convert_to_tensor(normal(3, 4, 4))]
    states, gradients = backends.each_gradient(
        lambda read: {name: ops.sum(ops.sin(reader(read[0], histories > 1))) for name, reader in readers.items()},
        sequences,
    )
    found |= {f"{name} state": state for name, state in states.items()} | {"gradient of states": gradients}

    table = Embedding(10, 4)
    table.build(())
    table.set_weights([normal(10, 4)])
    found |= {"lists": table(histories, mean=True), "ids": table(batch)}
    places = Places(5, 4, "zeros")
    places.build(())
    places.set_weights([normal(5, 4)])
    encoder = keras.layers.Lambda(lambda items: table(items) + places(items))
    queries, positives, counts = AfterEach(encoder)({"history_items": histories}, batch[:3])
    found["pairs"] = sampled.mean_softmax(queries, table(np.arange(FIRST, 10)), positives - FIRST, counts=counts)
    found["last"] = backends.at(encoder(begun(histories)[0]), begun(histories)[1] - 1)
    return {name: np.array(ops.convert_to_numpy(value), np.float64) for name, value in found.items()}


def main(examples: Path, out: Path) -> None:
    """Trains each model, and writes what it says of the first rows of the test slice, loaded again."""
    from penstock import training

    rows = read_slice(examples, "test").head(ROWS)
    np.savez(out / "values.npz", **values())
    for name, parameters in RECALL.items():
        training.train_recall(examples, name, parameters, 3, out / name)
        model, schema = training.load_recall(examples, out / name)
        items = np.arange(FIRST, schema.size("item_id"))
        queries = training.query_vectors(model, rows, schema)
        np.savez(out / f"{name}.npz", queries=queries, items=training.item_vectors(model, items))
    for name, parameters in RANK.items():
        training.train_rank(examples, name, parameters, 3, out / name)
        model, schema = training.load_rank(examples, out / name)
        np.savez(out / f"{name}.npz", **training.scores(model, rows, schema))


if __name__ == "__main__":
    sys.meta_path.insert(0, _Blocked())
    main(Path(sys.argv[1]), Path(sys.argv[2]))
