"""The best of many directions by evaluating few of them: what a search does where each evaluation is dear.

A method is handed the directions as vectors of length 1 and evaluates those that it likes; what was found stands in
`Trials`. Measures change little from a direction to its neighbours, and that is all that the methods build on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np
from scipy.stats import norm

from penstock.metrics import Array, Bools, Integers

Evaluate = Callable[[Integers], Array]
"""Places of directions → figures [places, 1 + constraints]: the objective, 0 to 1, and by how much each constraint is
kept; negative: by how much it is missed."""

_BATCH = 4


class Trials:
    """The directions that were evaluated, at most `budget` of them.

    Attributes:
        units: the directions at length 1 [directions, heads].
        figures: what `evaluate` said [directions, 1 + constraints]; NaN where it was not asked.
    """

    def __init__(self, units: Array, evaluate: Evaluate, budget: int, constraints: int) -> None:
        self.units = units
        self.figures = np.full((len(units), 1 + constraints), np.nan)
        self._evaluate = evaluate
        self._left = min(budget, len(units))

    @property
    def left(self) -> int:
        """How many more may be evaluated."""
        return self._left

    @property
    def tried(self) -> Bools:
        """Which directions were evaluated."""
        return ~np.isnan(self.figures[:, 0])

    @property
    def merits(self) -> Array:
        """What to sort by: the objective, and below all of it, where constraints are missed, by how little."""
        slack = self.figures[:, 1:].min(axis=1, initial=np.inf)
        return np.where(np.isnan(slack) | (slack >= 0), self.figures[:, 0], slack - 2)

    def run(self, places: Iterable[int]) -> None:
        """Evaluates those that were not yet, in their order, as far as the budget goes."""
        new = [place for place in dict.fromkeys(places) if np.isnan(self.figures[place, 0])][: self._left]
        if new:
            self.figures[new] = self._evaluate(np.array(new))
            self._left -= len(new)


def exhaustive(trials: Trials, seed: int) -> None:
    """Evaluates all directions."""
    trials.run(range(len(trials.units)))


def coarse_to_fine(trials: Trials, seed: int) -> None:
    """Evaluates a coarse net of directions, then the neighbours of the best, of the next best, as far as it goes."""
    trials.run(_net(trials, trials.left // 3))
    _climb(trials)


def bayesian(trials: Trials, seed: int) -> None:
    """Asks where a Gaussian process expects the greatest improvement, and ends with the neighbours of the best.

    Jones, Schonlau & Welch 1998, eq. 15; with constraints the improvement is weighed by the probability that they are
    kept (Gardner et al. 2014, eq. 6). The process has a Matérn kernel on the unit sphere and noise, its length and
    noise of largest likelihood.
    """
    generator = np.random.default_rng(seed)
    total = trials.left
    trials.run(_net(trials, total // 4))
    while trials.left > total // 4:
        tried = trials.tried
        models = [_process(trials.units[tried], values) for values in trials.figures[tried].T]
        means, deviations = zip(*(model(trials.units) for model in models), strict=True)
        kept = norm.cdf([mean / deviation for mean, deviation in zip(means[1:], deviations[1:], strict=True)])
        feasible = np.prod(kept, axis=0) if len(models) > 1 else np.ones(len(trials.units))
        best = trials.merits[tried].max()
        gain = feasible
        if best > -1:  # else no direction is known that keeps the constraints: any that does is an improvement
            z = (means[0] - best) / deviations[0]
            gain = feasible * deviations[0] * (z * norm.cdf(z) + norm.pdf(z))
        gain = np.where(tried, -1.0, gain + 1e-12 * generator.random(len(gain)))
        trials.run(np.argsort(-gain)[: min(_BATCH, trials.left)].tolist())
    _climb(trials)


METHODS: Mapping[str, Callable[[Trials, int], None]] = MappingProxyType(
    {"exhaustive": exhaustive, "coarse_to_fine": coarse_to_fine, "bayesian": bayesian}
)


def _net(trials: Trials, size: int) -> list[int]:
    """The heads alone, and then again and again the direction that is farthest from those that were taken."""
    units = trials.units
    taken = list(dict.fromkeys(np.argmax(units, axis=0).tolist()))
    nearest = (units @ units[taken].T).max(axis=1)
    while len(taken) < min(size, len(units)):
        taken.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, units @ units[taken[-1]])
    return taken


def _climb(trials: Trials) -> None:
    """Evaluates the nearest neighbours of the best direction whose neighbours were not, until nothing is left."""
    units = trials.units
    around = 2 * units.shape[1]
    done: set[int] = set()
    while trials.left:
        merits = trials.merits
        open_ = [place for place in np.flatnonzero(trials.tried).tolist() if place not in done]
        if not open_:
            return
        best = max(open_, key=lambda place: merits[place])
        done.add(best)
        trials.run(np.argsort(-(units @ units[best]), kind="stable")[1 : around + 1].tolist())


def _process(units: Array, values: Array) -> Callable[[Array], tuple[Array, Array]]:
    """A Gaussian process through `values`: directions → its mean and standard deviation."""
    # scikit-learn takes a second to import, and an exhaustive search needs none of it
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    middle, spread = values.mean(), max(float(values.std()), 1e-9)
    fits = [
        GaussianProcessRegressor(Matern(length, nu=2.5) + WhiteKernel(noise), optimizer=None).fit(
            units, (values - middle) / spread
        )
        for length in (0.1, 0.3, 1.0, 3.0)
        for noise in (1e-6, 1e-3)
    ]
    likeliest = max(fits, key=lambda fit: fit.log_marginal_likelihood_value_)

    def predict(at: Array) -> tuple[Array, Array]:
        mean, deviation = likeliest.predict(at, return_std=True)
        return middle + spread * mean, spread * np.maximum(deviation, 1e-9)

    return predict
