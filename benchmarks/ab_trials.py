"""Whether a canary's evidence can be believed: equal releases that are looked at after every request, and unequal ones.

`make ab-trials` simulates users who come again, at rates and with tastes of their own, and prints how often two equal
releases are told apart, how many requests it takes to see a difference or to withdraw a harmful canary, and what the
test of the split finds. Beside it stands the z-test of a fixed horizon with the same clustered variance, looked at as
often. It writes build/bench/ab_trials.json; QUICK=1 is a smaller form, in under a minute.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

from benchmarks.table import Comparison, machine, show, show_columns, write
from penstock.experiment import MEASURES, Config, Measure
from penstock.sequential import Array, Difference, SplitTest, Sums, running_p_value

Columns = dict[str, Sequence[str | float]]

SLATE = 10
ALPHA = 0.05


@dataclass(frozen=True)
class Audience:
    """Who comes.

    Attributes:
        spread: of ln of how often a user comes; at 1 the busiest tenth makes two fifths of the requests.
        share: of the users, who get the challenger.
    """

    name: str
    users: int
    requests: int
    spread: float = 1.0
    share: float = 0.2


AUDIENCES = (
    Audience("3,000 users, a fifth", 3000, 20_000),
    Audience("3,000 users, half", 3000, 20_000, share=0.5),
    Audience("300 users who come 67 times", 300, 20_000),
    Audience("20,000 users, heavy tail", 20_000, 20_000, spread=1.7, share=0.1),
)


@dataclass(frozen=True)
class Visits:
    """An experiment: the user of each request, what came of it by column, all `[requests]`; who gets what `[users]`."""

    who: npt.NDArray[np.int64]
    challenger: npt.NDArray[np.bool_]
    columns: Mapping[str, Array]


def visits(audience: Audience, lift: float, generator: np.random.Generator) -> Visits:
    """What users do; the challenger's clicks are 1 + lift times as likely, long views and watch time follow them."""
    rates = np.cumsum(np.exp(audience.spread * generator.standard_normal(audience.users)))
    places = np.searchsorted(rates, rates[-1] * generator.random(audience.requests), side="right")
    who = np.minimum(places, audience.users - 1)
    challenger = generator.random(audience.users) < audience.share
    chance = generator.beta(2, 4, audience.users) * np.where(challenger, 1 + lift, 1.0)
    clicks = generator.binomial(SLATE, np.minimum(chance, 1.0)[who]).astype(np.float64)
    stays = generator.beta(4, 2, audience.users)
    watched = clicks * generator.gamma(2.0, 4000.0, audience.users)[who] * generator.lognormal(0, 0.7, who.size)
    return Visits(
        who,
        challenger,
        {
            "requests": np.ones(who.size),
            "impressions": np.full(who.size, float(SLATE)),
            "click": clicks,
            "long_view": generator.binomial(clicks.astype(int), stays[who]).astype(np.float64),
            "watch_ms": watched,
        },
    )


def running(found: Visits, measure: Measure) -> tuple[Sums, Sums]:
    """The sums of champion and challenger after each request, `[requests]`.

    A request that adds x and n to a user's s and n adds 2 s x + x² to Σ s², and so on.
    """
    s, n = found.columns[measure.column], found.columns[measure.per]
    order = np.argsort(found.who, kind="stable")
    first = np.diff(found.who[order], prepend=-1) > 0
    begins = np.maximum.accumulate(np.where(first, np.arange(order.size), 0))

    def before(values: Array) -> Array:
        """What the user of each request had had before it."""
        summed = np.cumsum(values[order]) - values[order]
        back = np.empty_like(summed)
        back[order] = summed - summed[begins]
        return back

    had, shown = before(s), before(n)
    new = np.zeros(order.size)
    new[order] = first
    steps = (new, s, n, 2 * had * s + s * s, had * n + shown * s + s * n, 2 * shown * n + n * n)
    of = found.challenger[found.who]
    champion, challenger = (Sums(*(np.cumsum(np.where(mine, step, 0.0)) for step in steps)) for mine in (~of, of))
    return champion, challenger


@dataclass(frozen=True)
class Trial:
    """When something was said, in requests of both releases; infinite if it was not.

    Attributes:
        sequential, peeked: told apart, by confidence sequences and by the z-test at every look.
        z: told apart by the z-test at each of its looks, `[looks]`; `harm`: a guardrail is breached by it, one-sided.
        withdrawn: a guardrail was breached; `impressions` of the challenger by then.
    """

    sequential: float
    peeked: float
    z: npt.NDArray[np.bool_]
    harm: npt.NDArray[np.bool_]
    withdrawn: float
    impressions: float


def trial(found: Visits, config: Config) -> Trial:
    """An experiment that is looked at after every request, all measures together at 5 %."""
    counted = {measure: running(found, measure) for measure in MEASURES}
    users = np.minimum(*(sums.users for sums in counted[MEASURES[0]]))
    first = int(np.searchsorted(users, config.first_users))
    if first == users.size:
        none = np.zeros(0, bool)
        return Trial(math.inf, math.inf, none, none, math.inf, math.inf)
    least = np.ones(users.size - first)
    z = np.zeros(least.size, bool)
    breached, harm = np.zeros(least.size, bool), np.zeros(least.size, bool)
    level = (1 - config.confidence) / (len(config.guardrails) + 1)
    critical = NormalDist().inv_cdf(1 - ALPHA / len(MEASURES) / 2)
    for measure, both in counted.items():
        champion, challenger = (Sums(*(part[first:] for part in vars(one).values())) for one in both)
        scale = config.effect * champion.ratio[0]
        difference = Difference.between(challenger, champion)
        least = np.minimum(least, len(MEASURES) * running_p_value(difference, scale))
        z |= np.abs(difference.value) > critical * np.sqrt(difference.variance)
        relative = Difference.between(challenger, champion, 1 - config.guardrails[measure.name])
        harm |= relative.value < NormalDist().inv_cdf(level) * np.sqrt(relative.variance)
        breached |= relative.p_value_below(scale) <= level
    withdrawn = _first(breached, first)
    mine = found.challenger[found.who]
    until = SLATE * float(mine[: int(withdrawn)].sum()) if math.isfinite(withdrawn) else math.inf
    return Trial(_first(least <= ALPHA, first), _first(z, first), z, harm, withdrawn, until)


def _first(said: npt.NDArray[np.bool_], begins: int) -> float:
    return float(begins + 1 + said.argmax()) if said.any() else math.inf


def trials(audience: Audience, lift: float, count: int, seed: int) -> list[Trial]:
    """So many experiments, with a sign of life."""
    found, told = [], time.monotonic()
    for number in range(count):
        generator = np.random.default_rng((seed, number))
        found.append(trial(visits(audience, lift, generator), Config()))
        if time.monotonic() - told > 20:
            told = time.monotonic()
            print(f"  {audience.name}, lift {lift:+.0%}: {number + 1} of {count}", flush=True)
    return found


def interval(hits: int, count: int) -> tuple[float, float]:
    """Of a share, 95 % (Clopper and Pearson, Biometrika 1934)."""
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return low, high


def equal(audiences: Sequence[Audience], count: int, goal: bool) -> list[Comparison]:
    """How often two equal releases are told apart, and one of them withdrawn."""
    rows: Columns = {}
    said: list[Comparison] = []
    for audience in audiences:
        found = trials(audience, 0.0, count, 1)
        wrong = sum(math.isfinite(one.sequential) for one in found)
        peeked = sum(math.isfinite(one.peeked) for one in found)
        once = sum(bool(one.z[-1]) for one in found)
        withdrawn = sum(math.isfinite(one.withdrawn) for one in found)
        low, high = interval(wrong, count)
        cells = {
            "two equal releases": audience.name,
            "trials": str(count),
            "sequences": f"{wrong / count:.4f}",
            "95 % interval": f"{low:.4f} to {high:.4f}",
            "z-test, peeked at": f"{peeked / count:.3f}",
            "z-test, at the end only": f"{once / count:.3f}",
            "withdrawn": f"{withdrawn / count:.4f}",
        }
        _add(rows, cells)
        name = f"told apart though equal: {audience.name}"
        said += [
            Comparison(name, wrong / count, ALPHA, "5 %", "share", at_most=1.0 if goal else None),
            Comparison(f"{name}, peeked at", wrong / count, peeked / count, "z-test", "share"),
            Comparison(
                f"withdrawn though equal: {audience.name}",
                withdrawn / count,
                ALPHA,
                "5 %",
                "share",
                at_most=1.0 if goal else None,
            ),
        ]
    show_columns("Equal releases, looked at after every request", rows)
    return said


def unequal(audience: Audience, lifts: Sequence[float], count: int) -> list[Comparison]:
    """How many requests it takes to tell a difference in four trials of five, beside the fixed horizon that does."""
    rows: Columns = {}
    said = []
    for lift in lifts:
        found = trials(audience, lift, count, 2)
        ours = [one.sequential for one in found]
        horizon = fixed_horizon(audience, [one.z for one in found])
        middle, most = _quantile(ours, 0.5), _quantile(ours, 0.8)
        cells = {
            "lift": f"{lift:+.0%}",
            "trials": str(count),
            "told apart by the end": f"{np.isfinite(ours).mean():.2f}",
            "requests, median": _count(middle),
            "requests, 80 %": _count(most),
            "z-test with 80 % power": _count(horizon),
        }
        _add(rows, cells)
        if math.isfinite(most) and math.isfinite(horizon):
            said.append(Comparison(f"requests until a lift of {lift:+.0%} shows, 80 %", most, horizon, "z-test", ""))
    show_columns(f"True differences, of {audience.requests:,} requests of {audience.name}", rows)
    return said


def harmful(audience: Audience, harms: Sequence[float], count: int, goal: bool) -> list[Comparison]:
    """What a canary that is so much worse has shown until it is withdrawn, beside the fixed horizon that sees it."""
    rows: Columns = {}
    said = []
    for harm in harms:
        found = trials(audience, -harm, count, 3)
        seen, requests = [one.impressions for one in found], [one.withdrawn for one in found]
        horizon = fixed_horizon(audience, [one.harm for one in found])
        share = float(np.isfinite(seen).mean())
        cells = {
            "worse by": f"{harm:.0%}",
            "trials": str(count),
            "withdrawn by the end": f"{share:.3f}",
            "impressions of the canary, median": _count(_quantile(seen, 0.5)),
            "90 %": _count(_quantile(seen, 0.9)),
            "requests of both, 80 %": _count(_quantile(requests, 0.8)),
            "z-test with 80 % power": _count(horizon),
        }
        _add(rows, cells)
        if harm <= Config().guardrails["click"]:
            name = f"withdrawn, worse by {harm:.0%}, which the margin allows"
            said.append(Comparison(name, share, ALPHA, "5 %", "share", at_most=1.0 if goal else None))
            continue
        said.append(Comparison(f"withdrawn, worse by {harm:.0%}", share, 1.0, "all", "share"))
        late = _quantile(requests, 0.8)
        if math.isfinite(late) and math.isfinite(horizon):
            said.append(Comparison(f"requests until withdrawn, worse by {harm:.0%}, 80 %", late, horizon, "z-test", ""))
    show_columns(f"Harmful canaries, of {audience.name}", rows)
    return said


def fixed_horizon(audience: Audience, said: Sequence[npt.NDArray[np.bool_]]) -> float:
    """The least requests at which a test of one look says it in four trials of five; `said` are theirs from some on."""
    common = min(each.size for each in said)
    power = np.mean([each[each.size - common :] for each in said], axis=0)
    return float(audience.requests - common + 1 + (power >= 0.8).argmax()) if (power >= 0.8).any() else math.inf


def splits(shares: Sequence[float], users: int, count: int, goal: bool) -> list[Comparison]:
    """What the test of the split says of shares where 20 % was asked for, beside a χ² test looked at as often."""
    asked, level = 0.2, Config().mismatch
    critical = NormalDist().inv_cdf(1 - level / 2)
    rows: Columns = {}
    said = []
    for share in shares:
        at = []
        peeked = 0
        for number in range(count):
            falls = np.random.default_rng((4, number)).random(users) < share
            test = SplitTest(asked)
            alarm = math.inf
            for place, challenger in enumerate(falls.tolist(), 1):
                test.add(challenger)
                if test.p_value < level:
                    alarm = place
                    break
            at.append(alarm)
            came = np.arange(1, users + 1)
            off = np.abs(np.cumsum(falls) - asked * came) / np.sqrt(came * asked * (1 - asked))
            peeked += bool((off[29:] > critical).any())
        alarms = sum(map(math.isfinite, at))
        cells = {
            "share, asked 20 %": f"{share:.1%}",
            "trials": str(count),
            "alarms": f"{alarms / count:.4f}",
            "users until then, median": _count(_quantile(at, 0.5)),
            "χ² test, peeked at": f"{peeked / count:.4f}",
        }
        _add(rows, cells)
        if share == asked:
            name = "alarms over a right split"
            said.append(Comparison(name, alarms / count, level, "0.1 %", "share", at_most=1.0 if goal else None))
            said.append(Comparison(f"{name}, peeked at", alarms / count, peeked / count, "χ² test", "share"))
        else:
            said.append(Comparison(f"alarms over {share:.1%} instead of 20 %", alarms / count, 1.0, "all", "share"))
    show_columns(f"The split, of {users:,} users, at the level {level}", rows)
    return said


def _add(rows: Columns, cells: Mapping[str, str]) -> None:
    """A row to a table by columns."""
    for name, cell in cells.items():
        rows[name] = [*rows.get(name, []), cell]


def _quantile(values: Sequence[float], share: float) -> float:
    """Of values that may be infinite."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "more"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    print(machine(), flush=True)
    requests = 20_000 if quick else 60_000
    half = Audience("50,000 users, half", 50_000, requests, share=0.5)
    fifth = Audience("50,000 users, a fifth", 50_000, requests)
    few, many = (20, 100) if quick else (300, 1000)
    rows = equal(AUDIENCES[:2] if quick else AUDIENCES, many, not quick)
    rows += unequal(half, (0.1, 0.2) if quick else (0.02, 0.05, 0.1, 0.2), few)
    rows += harmful(fifth, (0.02, 0.1) if quick else (0.02, 0.05, 0.1, 0.2), few, not quick)
    rows += splits((0.2, 0.25) if quick else (0.2, 0.21, 0.22, 0.25), 5000 if quick else 20_000, many, not quick)
    show("A/B", rows)
    print(f"written to {write('ab_trials', rows)}")


if __name__ == "__main__":
    main()
