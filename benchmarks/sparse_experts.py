"""A training step of sparse experts beside the dense mixture of as many, by the number of experts and of those asked.

`python -m benchmarks.sparse_experts` prints the tables and writes build/bench/sparse_experts.json; `--quick` is a
smaller form of it, which has no goals. A step is the gate with its losses, the experts, the gradients and Adam, which
goes over the weights of all experts whoever is asked; so the time without it stands beside. Forms of a step take turns.
The gates are those of the start, which ask all experts alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from benchmarks.table import Comparison, machine, show, show_columns, write
from penstock.layers.experts import ExpertMixture, Experts
from penstock.layers.sparse_experts import NoisyTopK, SparseExperts
from penstock.optimizers import Adam

UNITS = (96, 48)
EXPERTS = (4, 16, 64, 256)
ASKED = (1, 2, 4, 8)
USUAL_EXPERTS, USUAL_ASKED = 64, 2


@dataclass(frozen=True)
class Size:
    """Rows of a batch, width of a row, and steps of each form: those left out, and those measured."""

    batch: int
    width: int
    warm_up: int
    steps: int


FULL = Size(2048, 256, 2, 9)
QUICK = Size(512, 64, 2, 5)

Step = Callable[[], object]


def sparse(size: Size, experts: int, k: int, update: bool = True) -> Step:
    gate, layer = NoisyTopK(experts, k, seed=0), SparseExperts(experts, UNITS)
    return _step(size, [gate, layer], lambda rows: layer(rows, gate(rows, training=True), training=True), update)


def dense(size: Size, experts: int) -> Step:
    mixture, layer = ExpertMixture(experts, seed=0), Experts(experts, UNITS)
    return _step(size, [mixture, layer], lambda rows: mixture(rows, layer(rows, training=True), training=True))


def _step(
    size: Size, layers: list[keras.layers.Layer], outputs: Callable[[tf.Tensor], tf.Tensor], update: bool = True
) -> Step:
    """Forwards, backwards and the update; the rows are a layer's output, so that they have a gradient too."""
    random = np.random.default_rng(0)
    rows = tf.constant(random.normal(size=(size.batch, size.width)).astype(np.float32))
    scale = tf.Variable(tf.ones(size.width))
    outputs(rows)
    weights = [weight for layer in layers for weight in layer.trainable_variables]
    optimizer = Adam(1e-5)  # the gates are to stay as they are
    optimizer.build(weights)

    @tf.function
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(outputs(rows * scale)))
            for layer in layers:
                for added in layer.losses:
                    loss += added
        gradients = tape.gradient(loss, [*(weight.value for weight in weights), scale])
        if update:
            optimizer.apply(gradients[:-1], weights)
        return gradients

    return step


def measure(steps: dict[str, Step], size: Size) -> dict[str, float]:
    """Milliseconds of each, the median, the forms taking turns."""
    took: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(size.warm_up + size.steps):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= size.warm_up:
                took[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(times)) for name, times in took.items()}


def compare(size: Size) -> list[Comparison]:
    """By the number of experts, and by that of those asked."""
    found: dict[tuple[int, int], float] = {}
    of_dense: dict[int, float] = {}
    without_update: dict[int, float] = {}
    for experts in EXPERTS:
        asked = ASKED if experts == USUAL_EXPERTS else (USUAL_ASKED,)
        forms = {str(k): sparse(size, experts, k) for k in asked} | {"dense": dense(size, experts)}
        took = measure(forms | {"gradients": sparse(size, experts, USUAL_ASKED, update=False)}, size)
        of_dense[experts], without_update[experts] = took["dense"], took["gradients"]
        found |= {(experts, k): took[str(k)] for k in asked}
    rows = [
        Comparison(f"a step, {experts} experts, {k} asked", took, of_dense[experts], "the dense mixture", "ms")
        for (experts, k), took in found.items()
    ]
    rows += [
        Comparison(
            f"without Adam, {experts} experts, {USUAL_ASKED} asked", took, found[experts, USUAL_ASKED], "the step", "ms"
        )
        for experts, took in without_update.items()
    ]
    least, most = (found[experts, USUAL_ASKED] for experts in (EXPERTS[0], EXPERTS[-1]))
    few, many = (found[USUAL_EXPERTS, k] for k in (ASKED[0], ASKED[-1]))
    growth = EXPERTS[-1] // EXPERTS[0]
    rows.append(
        Comparison(
            f"{growth} times the experts, {USUAL_ASKED} asked",
            most / least,
            of_dense[EXPERTS[-1]] / of_dense[EXPERTS[0]],
            "the dense mixture",
            "times the step",
            at_most=0.25 if size is FULL else None,
        )
    )
    rows.append(Comparison(f"{ASKED[-1]} asked, not {ASKED[0]}", many, few, f"{ASKED[0]} asked", "ms"))
    return rows


def computed(size: Size) -> dict[str, Sequence[str | float]]:
    """How many rows the experts compute for each row of a batch: what asks them, and what fills blocks up."""
    cases = list(dict.fromkeys([(experts, USUAL_ASKED) for experts in EXPERTS] + [(USUAL_EXPERTS, k) for k in ASKED]))
    counts: list[float] = []

    def counting(hidden: tf.Tensor) -> tf.Tensor:
        counts.append(float(np.prod(hidden.shape[:-1])) / size.batch)
        return hidden

    for experts, k in cases:
        layer, gate = SparseExperts(experts, (1,), counting), NoisyTopK(experts, k, seed=0)
        rows = tf.random.stateless_normal((size.batch, 4), (0, 0))
        gates = gate(rows, training=True)
        layer.build(rows.shape)
        layer.call(rows, gates)
    experts_of, asked = zip(*cases, strict=True)
    return {"experts": experts_of, "asked": asked, "rows computed for a row": counts}


def main() -> None:
    """Measures, prints and writes."""
    tf.get_logger().setLevel("ERROR")  # each form is traced once, and TensorFlow takes them for one
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smaller form, in under a minute")
    size = QUICK if parser.parse_args().quick else FULL
    keras.utils.set_random_seed(0)
    print(machine())
    rows = compare(size)
    show(f"A training step: {size.batch:,} rows of {size.width} numbers, experts of {UNITS} units", rows)
    show_columns("What is computed", computed(size))
    print(f"written to {write('sparse_experts', rows)}")


if __name__ == "__main__":
    main()
