"""What makes a head's output right on average: fitted on the validation slice, applied in the served graph.

| name | fits | maps |
|---|---|---|
| `temperature` | a slope and an intercept by maximum likelihood | a logit to a probability |
| `isotonic` | a rising curve through the observed rates | a logit to a probability |
| `scale` | one factor | seconds to seconds |

All rise strictly: they keep the order of rows, and AUC with it. A mean that is off by what the positives of training
weigh, and heads that are too sure of themselves, are mended by two numbers; `isotonic` mends any shape but needs many
positives. With P positives in the validation slice the rate itself is known to about 1/√P of its value (5 % at 480 of
26,669, a rate of 1.8 %), and no fit is better than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression
from scipy.special import expit, logit

from penstock.metrics import Array

BLOCK = 20
"""A block of the isotonic fit has at least so many positives and negatives: its odds are known to about a quarter."""

SHRINKAGE = 1.0
"""Weight of `(a − 1)²/2` beside the likelihood of all rows: as if a were known beforehand to ± 1."""

FLATTEST = 0.01
"""The least slope, over the score's standard deviation where that is above 1: by a score that ranks worse than chance
all rows get nearly the same probability, in its own order."""


@dataclass(frozen=True)
class Temperature:
    """`p = σ(a s + b)`, a > 0: Guo et al., ICML 2017, section 4.2, a = 1/T, with the intercept of Platt 1999, eq. 1."""

    kind: ClassVar[str] = "temperature"
    slope: float
    intercept: float

    def __call__(self, logits: npt.ArrayLike) -> Array:
        """Probabilities of logits of any shape, float64."""
        probabilities: Array = expit(self.slope * np.asarray(logits, np.float64) + self.intercept)
        return probabilities

    def graph(self, logits: Any) -> Any:
        """The same of a tensor, of its own type."""
        from keras import ops  # fits and NumPy need none of it

        wide = self.slope * ops.cast(logits, "float64") + self.intercept
        return ops.cast(ops.sigmoid(wide), logits.dtype)


@dataclass(frozen=True)
class Isotonic:
    """`p = σ(f(s))`, f a broken line through the knots, with `slope` before the first and after the last.

    Attributes:
        scores: the centre of each block, rising.
        values: the logit of each block's observed rate, rising.
        slope: that of the `Temperature` of the same rows.
    """

    kind: ClassVar[str] = "isotonic"
    scores: tuple[float, ...]
    values: tuple[float, ...]
    slope: float

    def __call__(self, logits: npt.ArrayLike) -> Array:
        """Probabilities of logits of any shape, float64."""
        scores, values, slopes = self._line()
        s = np.asarray(logits, np.float64)
        piece = np.searchsorted(scores, s, side="right")
        knot = np.maximum(piece - 1, 0)
        probabilities: Array = expit(values[knot] + slopes[piece] * (s - scores[knot]))
        return probabilities

    def graph(self, logits: Any) -> Any:
        """The same of a tensor, of its own type."""
        from keras import ops  # fits and NumPy need none of it

        scores, values, slopes = map(ops.convert_to_tensor, self._line())
        s = ops.cast(logits, "float64")
        piece = ops.reshape(ops.searchsorted(scores, ops.reshape(s, (-1,)), side="right"), ops.shape(s))
        knot = ops.maximum(piece - 1, 0)
        wide = ops.take(values, knot) + ops.take(slopes, piece) * (s - ops.take(scores, knot))
        return ops.cast(ops.sigmoid(wide), logits.dtype)

    def _line(self) -> tuple[Array, Array, Array]:
        """Knots `[knots]` twice, and the slope of each piece `[knots + 1]`."""
        scores, values = np.array(self.scores), np.array(self.values)
        return scores, values, np.concatenate([[self.slope], np.diff(values) / np.diff(scores), [self.slope]])


@dataclass(frozen=True)
class Scale:
    """`factor · prediction`: the mean prediction becomes the mean observed."""

    kind: ClassVar[str] = "scale"
    factor: float

    def __call__(self, predictions: npt.ArrayLike) -> Array:
        """Of predictions of any shape, float64."""
        return self.factor * np.asarray(predictions, np.float64)

    def graph(self, predictions: Any) -> Any:
        """The same of a tensor, of its own type."""
        from keras import ops  # fits and NumPy need none of it

        return ops.cast(self.factor * ops.cast(predictions, "float64"), predictions.dtype)


Calibrator = Temperature | Isotonic | Scale


def fit(name: str, observed: npt.ArrayLike, predicted: npt.ArrayLike) -> Calibrator:
    """The calibrator of a name (see above) for what was observed and what a head said of the same rows, `[rows]`.

    Raises:
        ValueError: an unknown name, or rows that cannot be learnt from (see the fit of that name).
    """
    fits = {"temperature": fit_temperature, "isotonic": fit_isotonic, "scale": fit_scale}
    if name not in fits:
        raise ValueError(f"unknown calibration {name!r}: there are {', '.join(fits)}")
    return fits[name](observed, predicted)


def fit_temperature(labels: npt.ArrayLike, logits: npt.ArrayLike, shrinkage: float = SHRINKAGE) -> Temperature:
    """Minimises `Σ [softplus(z) − y z] + shrinkage (a − 1)²/2` with `z = a s + b` by Newton's method.

    The mean probability is then the observed rate to the last digits. Shrinkage is nothing beside hundreds of
    positives; of a few, or where one score separates the classes, it keeps the slope finite. With 0 it is logistic
    regression. Where the best slope is below the least (`FLATTEST`), that is taken and the intercept fitted alone.

    Args:
        labels: 0 or 1, `[rows]`.
        logits: `[rows]`.

    Raises:
        ValueError: no rows, one class only, labels that are not 0 or 1, or logits that are not finite.
    """
    y, s = _rows(labels, logits)
    size = max(float(s.std()), 1.0)
    found = _newton(y, s, 1.0 / size, shrinkage)
    if found[0] < FLATTEST / size:
        found = _newton(y, s, FLATTEST / size, np.inf)
    return Temperature(float(found[0]), float(found[1]))


def fit_isotonic(labels: npt.ArrayLike, logits: npt.ArrayLike) -> Temperature | Isotonic:
    """The rates of the blocks that pooling adjacent violators leaves, joined by straight lines between their centres.

    Zadrozny & Elkan, KDD 2002, section 3.2, whose steps would make ties of all rows of a block and probabilities of
    0 and 1 at the ends. Here a block with fewer than `BLOCK` positives or negatives is joined with the next, the
    logits of rates are joined by lines, which rise strictly, and the ends go on with the slope of `fit_temperature`.
    A block's centre is the logit to which that fit gives the mean of what it gives to the block's rows: a block is
    wide where positives are rare, and the rate at its mean logit is not its mean rate. Where fewer than two blocks
    are left (so with fewer than 2 `BLOCK` positives), the answer is that of `fit_temperature`.

    Args and Raises: as for `fit_temperature`.
    """
    y, s = _rows(labels, logits)
    straight = fit_temperature(y, s)
    distinct, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    positives = np.bincount(place, weights=y)
    starts = isotonic_regression(positives / counts, weights=counts).blocks[:-1]
    rows = np.add.reduceat(counts.astype(np.float64), starts)
    hits = np.add.reduceat(positives, starts)
    expected = np.add.reduceat(counts * straight(distinct), starts)
    blocks: list[Array] = []
    for block in np.stack([rows, hits, expected], axis=1):
        if blocks and _small(blocks[-1]):
            blocks[-1] = blocks[-1] + block
        else:
            blocks.append(block)
    if len(blocks) > 1 and _small(blocks[-1]):
        last = blocks.pop()
        blocks[-1] = blocks[-1] + last
    rows, hits, expected = np.stack(blocks, axis=1)
    scores = (logit(expected / rows) - straight.intercept) / straight.slope
    if len(blocks) < 2 or not np.all(np.diff(scores) > 0.0):
        return straight
    return Isotonic(tuple(scores.tolist()), tuple(logit(hits / rows).tolist()), straight.slope)


def fit_scale(observed: npt.ArrayLike, predicted: npt.ArrayLike) -> Scale:
    """`Σ observed / Σ predicted`.

    Args:
        observed: seconds ≥ 0, `[rows]`.
        predicted: seconds > 0, `[rows]`.

    Raises:
        ValueError: no rows, numbers that are not finite, negative ones, predictions of 0, or nothing but 0 observed.
    """
    y, p = _pairs(observed, predicted)
    if y.min() < 0.0 or p.min() <= 0.0:
        raise ValueError(f"seconds are positive, not {y.min():g} observed or {p.min():g} predicted")
    if not y.max() > 0.0:
        raise ValueError(f"all {y.size} rows were observed as 0: there is no scale")
    return Scale(float(y.mean() / p.mean()))


def to_json(calibrator: Calibrator) -> dict[str, Any]:
    """What JSON can hold of a calibrator, to the last bit."""
    return {"kind": calibrator.kind, **dataclasses.asdict(calibrator)}


def from_json(described: Mapping[str, Any]) -> Calibrator:
    """The calibrator of `to_json`.

    Raises:
        ValueError: an unknown kind.
    """
    kinds: dict[str, type[Calibrator]] = {cls.kind: cls for cls in (Temperature, Isotonic, Scale)}
    kind = described.get("kind", "")
    if kind not in kinds:
        raise ValueError(f"unknown calibration {kind!r}: there are {', '.join(kinds)}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in described.items()}
    del values["kind"]
    return kinds[kind](**values)


def _pairs(observed: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[Array, Array]:
    y, s = np.asarray(observed, np.float64), np.asarray(predicted, np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise ValueError(f"observed {y.shape} and predicted {s.shape} must be vectors of the same rows")
    if not y.size:
        raise ValueError("there are no rows to calibrate by")
    for name, values in (("observed", y), ("predicted", s)):
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {y.size} {name} values are NaN or infinite")
    return y, s


def _rows(labels: npt.ArrayLike, logits: npt.ArrayLike) -> tuple[Array, Array]:
    y, s = _pairs(labels, logits)
    if not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("labels must be 0 or 1")
    if y.min() == y.max():
        raise ValueError(f"all {y.size} labels are {y[0]:g}: calibration needs both classes")
    return y, s


def _small(block: Array) -> bool:
    """Whether a block `(rows, positives, …)` has too few of a class."""
    return bool(min(block[1], block[0] - block[1]) < BLOCK)


def _newton(y: Array, s: Array, slope: float, shrinkage: float) -> Array:
    """Slope and intercept `[2]` from a first slope; with infinite shrinkage it stays."""
    held = np.isinf(shrinkage)
    weight = 0.0 if held else shrinkage

    def objective(point: Array) -> float:
        z = point[0] * s + point[1]
        return float(np.sum(np.logaddexp(0.0, z) - y * z) + weight * (point[0] - 1.0) ** 2 / 2.0)

    point = np.array([slope, logit(y.mean()) - slope * s.mean()])
    value = objective(point)
    for _ in range(100):
        p = expit(point[0] * s + point[1])
        spread = p * (1.0 - p)
        gradient = np.array([np.sum((p - y) * s) + weight * (point[0] - 1.0), np.sum(p - y)])
        mixed = np.sum(spread * s)
        curvature = np.array([[np.sum(spread * s * s) + weight, mixed], [mixed, np.sum(spread)]])
        if held:
            step = np.array([0.0, gradient[1] / curvature[1, 1]])
        else:
            step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        # near the minimum the objective is equal up to rounding, and the whole step is right
        while objective(point - step) > value * (1.0 + 1e-12):
            step = step / 2.0
        point, value = point - step, objective(point - step)
        if np.abs(step).max() <= 1e-12 * max(1.0, float(np.abs(point).max())):
            break
    return point
