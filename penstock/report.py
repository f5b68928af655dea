"""The page a person approves by: one HTML file with its pictures inside, for a screen, a phone or paper."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from penstock import fusion, metrics, page
from penstock.events import LABELS
from penstock.gate import RECALL, REHEARSED
from penstock.metrics import Array, Integers, MetricError
from penstock.policy import RECALL_MEASURES, measure_in_words
from penstock.policy import Config as Policy

NOT_COMPUTED = "Not computed: the candidate was rejected before any figure could mean something."
ENDS = {"value": "", "low": "_low", "high": "_high"}
"""The parts of a difference, by how their names end in a verdict."""


@dataclass(frozen=True)
class Record:
    """What a tracker keeps of a candidate."""

    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Material:
    """The artifacts as read."""

    verdict: Mapping[str, Any]
    weights: Mapping[str, Any]
    grid: pl.DataFrame
    test: pl.DataFrame
    champion: pl.DataFrame | None
    models: Mapping[str, Mapping[str, Any]]
    history: Mapping[str, Sequence[Mapping[str, float]]]
    figures: Mapping[str, Mapping[str, Any]]
    window: Mapping[str, Any]


def write_report(examples: Path, recall: Path, rank: Path, weights: Path, verdict: Path, out: Path) -> Record:
    """Writes the report on a judged candidate to the file `out`, each of its pictures to `figures/` beside it too.

    Returns:
        What to record of the candidate.

    Raises:
        OSError: an artifact is missing.
    """
    material = _read(examples, recall, rank, weights, verdict)
    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(page.RC):
        document = _page(material)
    out.write_text(document, encoding="utf-8")
    pictures = out.parent / "figures"
    pictures.mkdir(exist_ok=True)
    for picture, says in re.findall(
        r'<figure>(<svg role="img" aria-label="([^"]+)".*?</svg>)\s*</figure>', document, re.DOTALL
    ):
        name = re.sub(r"\W+", "_", says).lower()
        (pictures / f"{name}.svg").write_text(picture, encoding="utf-8")
    return Record(
        params=_parameters(material),
        metrics=_figures(material),
        files=(out, pictures, verdict / "verdict.json", weights / "weights.json"),
    )


def _read(examples: Path, recall: Path, rank: Path, weights: Path, verdict: Path) -> _Material:
    def document(path: Path) -> Any:
        return json.loads(path.read_text())

    folders = {"recall": recall, "rank": rank}
    scored = verdict / "champion.parquet"
    return _Material(
        verdict=document(verdict / "verdict.json"),
        weights=document(weights / "weights.json"),
        grid=pl.read_parquet(weights / "grid.parquet"),
        test=pl.read_parquet(rank / "predictions" / "test.parquet"),
        champion=pl.read_parquet(scored) if scored.is_file() else None,
        models={name: document(folder / "config.json") for name, folder in folders.items()},
        history={name: document(folder / "history.json") for name, folder in folders.items()},
        figures={name: document(folder / "metrics.json") for name, folder in folders.items()},
        window=document(examples / "window.json"),
    )


def _parameters(material: _Material) -> dict[str, Any]:
    found: dict[str, Any] = dict(_flat(material.models))
    found |= {f"weight.{name}": weight for name, weight in material.weights["weights"].items()}
    found |= dict(_flat({"window": material.window}))
    return found | {"champion": material.verdict["champion"]}


def _figures(material: _Material) -> dict[str, float]:
    """Every figure by a flat name; those that are not numbers are left out."""
    verdict = material.verdict
    found = {"approved": float(verdict["approved"]), "fused/validation": material.weights["validation"]}
    parts = {
        "fused": verdict["fused"],
        "primary": verdict["primary"],
        "recall_of": verdict["recall"],
        "head": verdict["heads"],
        "slice": {one["name"].replace(" ", "_"): {"auc": one["auc"]} for one in verdict["slices"]},
        **material.figures,
    }
    for name, part in parts.items():
        found |= {key.replace(" ", "_"): value for key, value in _flat({name: part}, "/")}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and np.isfinite(float(value))
    }


def _flat(document: Mapping[str, Any], dot: str = ".", prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, dot, f"{prefix}{name}{dot}")
        else:
            yield f"{prefix}{name}", value


# The page


def _page(material: _Material) -> str:
    verdict = material.verdict
    kind = "approved" if verdict["approved"] else "rejected"
    sections = [
        ("Primary figure", _primary(verdict)),
        ("Checks", _checks(verdict)),
        ("AUC of each head", _heads(material)),
        ("ROC and calibration", _curves(material)),
        ("Output weights", _weights(material)),
        ("Recall", _recall(material)),
        ("Slices", _slices(verdict)),
        ("Rehearsal", _rehearsal(verdict)),
        ("What changed since the champion", _changes(material)),
        ("How to roll back", _roll_back(verdict)),
        ("Training", _training(material)),
        ("Data and parameters", _data(material)),
        ("Policy of the gate", _policy(verdict)),
    ]
    return page.document(
        f"Penstock: candidate {kind}",
        f"""<h1>Penstock candidate report</h1>
<p class="verdict {kind}">{page.text(verdict["sentence"])}</p>
{_summary(material)}
{page.contents([title for title, _ in sections])}
{page.sections(sections)}""",
    )


def _summary(material: _Material) -> str:
    verdict = material.verdict
    primary = verdict["primary"]
    passed = sum(check["passed"] for check in verdict["checks"])
    facts = [("Checks passed", f"{passed} of {len(verdict['checks'])}")]
    if primary:
        measure, difference = _measure(primary["measure"]), primary["difference"]
        facts += [
            (f"{measure}, candidate", page.number(primary["candidate"])),
            (f"{measure}, {_whose(primary['opponent'], verdict)}", page.number(primary["opponent_value"])),
            ("Difference", f"{difference['value']:+.4f}"),
        ]
    facts.append(("Test rows", f"{verdict['rows']:,}"))
    facts.append(("Users", f"{verdict['users']:,}"))
    return page.facts(facts)


def _whose(name: str, verdict: Mapping[str, Any]) -> str:
    return f"champion {verdict['champion']}" if name == "champion" else name


def _measure(name: str) -> str:
    words = measure_in_words(name)
    return words[0].upper() + words[1:]


def _checks(verdict: Mapping[str, Any]) -> str:
    note = (
        "Failed checks come first. An interval must lie above its bound; harm and bad calibration are shown only by an "
        "interval that lies wholly on the wrong side."
    )
    if not verdict["approved"]:
        note += " A rejected candidate is released only if a named person forces it, with a reason."
    return _listed(verdict["checks"]) + page.note(note)


def _listed(checks: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for check in sorted(checks, key=lambda check: bool(check["passed"])):
        mark = '<span class="pass">✓ pass</span>' if check["passed"] else '<span class="fail">✗ fail</span>'
        name = f'{mark} <b>{page.text(check["name"])}</b><span class="reason">{page.text(check["reason"])}</span>'
        interval = page.interval(check["low"], check["high"])
        rows.append([name, _figure(check["value"]), interval, _figure(check["bound"])])
    return page.table(["Check", "Value", "Interval", "Bound"], rows, marked=True)


def _figure(value: float | None) -> str:
    """A count in full, what four decimals would make nothing of by its first digit."""
    if value is not None and (value == int(value) or 0 < abs(value) < 5e-5):
        return f"{value:,.0f}" if value == int(value) else f"{value:.0e}"
    return page.number(value)


def _primary(verdict: Mapping[str, Any]) -> str:
    found = verdict["primary"]
    if not found:
        return page.note(NOT_COMPUTED)
    whose = _whose(found["opponent"], verdict).capitalize()
    difference = found["difference"]
    names = ["Of the fused score", "Candidate", whose, "Difference", "Interval of it", "p-value"]
    row = [
        _measure(found["measure"]),
        page.number(found["candidate"]),
        page.number(found["opponent_value"]),
        f"{difference['value']:+.4f}",
        page.interval(difference["low"], difference["high"], "+.4f"),
        "–" if found["p_value"] is None else f"{found['p_value']:.2g}",
    ]
    drawn = found["measure"].startswith(("gauc", "ndcg"))
    how = (
        f"users drawn again with all of their rows, {verdict['policy']['replicates']:,} times, which gives no p-value"
        if drawn
        else "DeLong's variance with users as clusters; the p-value is of no difference, two-sided"
    )
    note = (
        f"The figure that the policy decides by, both on the same {verdict['rows']:,} rows of {verdict['users']:,} "
        f"users. The interval holds {verdict['policy']['confidence']:.0%}: {how}."
    )
    return page.table(names, [row]) + page.note(note)


def _heads(material: _Material) -> str:
    verdict = material.verdict
    if not verdict["heads"]:
        return page.note(NOT_COMPUTED)
    rows = []
    for label, head in verdict["heads"].items():
        against = "" if head["difference"] is None else f"{head['difference']:+.4f}"
        rows.append(
            [
                f"{label} head",
                page.number(head["auc"]),
                page.interval(head["low"], head["high"]),
                page.number(head["champion"]),
                against,
                page.interval(head["difference_low"], head["difference_high"], "+.4f"),
                page.number(head["popularity"]),
            ]
        )
    fused = verdict["fused"]
    names = ["AUC of", "Candidate", "Interval", "Champion", "Difference", "Interval of it", "Popularity"]
    by_label = [
        [f"fused score on {label}", *(page.number(one[label]) for one in fused.values())] for label in (*LABELS,)
    ] + [["mean", *(page.number(one["value"]) for one in fused.values())]]
    note = (
        f"Intervals hold {verdict['policy']['confidence']:.0%}, by DeLong's variance with users as clusters: rows of "
        "one user are not independent."
    )
    return (
        page.figure(_forest(verdict), "AUC of each head with its interval")
        + page.table(names, rows)
        + page.table(["AUC of", *(_whose(name, verdict).capitalize() for name in fused)], by_label)
        + page.note(note)
    )


def _forest(verdict: Mapping[str, Any]) -> Figure:
    """AUC per head and of the fused score: the interval as a line, champion and popularity as marks."""
    entries = [
        (f"{label} head", head["auc"], head["low"], head["high"], head["champion"], head["popularity"])
        for label, head in verdict["heads"].items()
    ]
    fused = verdict["fused"]
    own = fused["candidate"]
    champion = fused.get("champion", {}).get("value")
    entries.append(("fused, mean", own["value"], own["low"], own["high"], champion, fused["popularity"]["value"]))
    figure = Figure(figsize=(4.2, 2.3), layout="constrained")
    axes = figure.subplots()
    for place, (_, value, low, high, theirs, popularity) in enumerate(reversed(entries)):
        axes.plot([low, high], [place, place], color=page.CANDIDATE, linewidth=2.5, solid_capstyle="butt")
        axes.plot(value, place, "o", color=page.CANDIDATE, markersize=6, label="candidate" if place == 0 else None)
        if theirs is not None:
            axes.plot(
                theirs,
                place,
                "D",
                color=page.CHAMPION,
                markersize=6,
                markeredgecolor=page.INK,
                markeredgewidth=0.5,
                label="champion" if place == 0 else None,
            )
        axes.plot(
            popularity,
            place,
            "|",
            color=page.POPULARITY,
            markersize=13,
            markeredgewidth=2.5,
            label="popularity" if place == 0 else None,
        )
    axes.axvline(0.5, color=page.FAINT, zorder=0)
    axes.set_yticks(range(len(entries)), [name for name, *_ in reversed(entries)])
    axes.set_ylim(-0.6, len(entries) - 0.4)
    axes.set_xlabel("AUC (0.5 is chance)")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _curves(material: _Material) -> str:
    panels = []
    for draw in (_roc, _calibration):
        for label in LABELS:
            try:
                panels.append(page.figure(draw(material, label), f"{draw.__name__.strip('_')} of {label}"))
            except MetricError as error:
                panels.append(page.note(f"{label}: {error}"))
    note = (
        "ROC: share of positives found against share of negatives let through, each head on its own label. "
        "Calibration: rows in bins of equal count; on the diagonal, what is predicted happens."
    )
    return f'<div class="panels">{"".join(panels)}</div>' + page.note(note) + _calibrated(material.verdict)


def _calibrated(verdict: Mapping[str, Any]) -> str:
    """What each head predicts over what happened, and the slope, with what the policy allows."""
    if not verdict["heads"]:
        return ""
    rows = []
    for label, head in verdict["heads"].items():
        row = [f"{label} head"]
        for name in ("calibration_ratio", "calibration_slope"):
            row += [f"{head[name]:.3f}", page.interval(head[f"{name}_low"], head[f"{name}_high"], ".3f")]
        rows.append(row)
    bounds = [verdict["policy"][f"calibration_{name}"] for name in ("ratio", "slope")]
    rows.append(["allowed", *(cell for bound in bounds for cell in ("", page.interval(1 / bound, bound, ".3f")))])
    note = (
        "1 is right in both. The ratio is above 1 where the head promises too much; the slope, of the label's log-odds "
        "over the predicted ones, is below 1 where it is too sure of itself."
    )
    names = ["Calibration", "Predicted over happened", "Interval", "Slope", "Interval of it"]
    return page.table(names, rows) + page.note(note)


def _scorers(material: _Material, label: str) -> list[tuple[str, str, str, Array]]:
    """(name, colour, line, scores) of those that are compared on a head's label."""
    found = [("candidate", page.CANDIDATE, "-", material.test[f"p_{label}"].cast(pl.Float64).to_numpy())]
    if material.champion is not None:
        found.append(("champion", page.CHAMPION, "--", material.champion[f"p_{label}"].to_numpy()))
    return found


def _square(figure: Figure, title: str) -> Axes:
    axes: Axes = figure.subplots()
    axes.set_title(title)
    axes.set_aspect("equal")
    return axes


def _roc(material: _Material, label: str) -> Figure:
    labels = material.test[label].to_numpy()
    figure = Figure(figsize=(3.3, 3.5), layout="constrained")
    axes = _square(figure, f"{label}: ROC")
    axes.plot([0, 1], [0, 1], color=page.FAINT, linewidth=1)
    popularity = ("popularity", page.POPULARITY, ":", material.test[f"popularity_{label}"].to_numpy())
    for name, colour, line, scores in [*_scorers(material, label), popularity]:
        curve = metrics.roc(labels, scores)
        keep = np.unique(np.linspace(0, curve.true_positive_rate.size - 1, 200).astype(int))
        area = metrics.auc(labels, scores)
        axes.plot(
            curve.false_positive_rate[keep],
            curve.true_positive_rate[keep],
            line,
            color=colour,
            label=f"{name} {area:.3f}",
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(loc="lower right")
    return figure


def _calibration(material: _Material, label: str) -> Figure:
    labels = material.test[label].to_numpy()
    figure = Figure(figsize=(3.3, 3.5), layout="constrained")
    axes = _square(figure, f"{label}: calibration")
    top = 0.0
    for name, colour, line, scores in _scorers(material, label):
        curve = metrics.calibration(labels, scores)
        top = max(top, float(curve.probability.max()), float(curve.share.max()))
        axes.plot(
            curve.probability,
            curve.share,
            line,
            marker="o",
            markersize=3.5,
            color=colour,
            label=f"{name}, error {curve.error:.3f}",
        )
    top = min(1.0, 1.08 * top) if top else 1.0
    axes.plot([0, top], [0, top], color=page.FAINT, linewidth=1, zorder=0)
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="predicted probability", ylabel="share that happened")
    axes.locator_params(nbins=5)
    axes.legend(loc="upper left")
    return figure


def _weights(material: _Material) -> str:
    found = material.weights
    reference, objective = found["reference"], _objective(found)
    try:
        test = fusion.measure(material.test, found["weights"], found["fusion"], found["objective"])
    except (MetricError, ValueError):
        test = None  # the checks say what is wrong with the test predictions
    optimism = "" if test is None else f"{found['validation'] - test:+.4f}"
    columns = ["Chosen weights", "Validation", "Test", "Optimism"]
    row = [_mix(found["weights"]), page.number(found["validation"]), page.number(test), optimism]
    fall = found["search"]["constraints"]
    measures = [
        [
            _words(name),
            page.number(value),
            page.number(reference["measures"][name]),
            f"{value - reference['measures'][name]:+.4f}",
            page.value(fall.get(name)),
        ]
        for name, value in found["measures"].items()
    ]
    against = f"{reference['name'][0].upper()}{reference['name'][1:]}"
    search = (
        f"A {found['fusion'].replace('_', ' ')}, chosen on the validation slice alone, by {objective}: the best of "
        f"{found['evaluations']:,} of the {found['directions']:,} mixes of the grid that rank differently. "
        "The test column is the same figure on rows that the search has not seen; optimism is what it loses there."
    )
    compared = (
        f"On the validation slice. {against} is {_mix(reference['weights'])} "
        f"({reference['fusion'].replace('_', ' ')}), applied to the candidate's heads."
    )
    panels = "".join(
        page.figure(_front(material, *pair), f"Pareto front of {_words(pair[0])} and {_words(pair[1])}")
        for pair in combinations(list(found["measures"])[: len(LABELS)], 2)
    )
    drawn = (
        "Each point is one mix. On the front are those that no other mix beats on one label without losing on another: "
        "of all labels, or, along the line, of the two that a picture shows."
    )
    pictures = f'<div class="panels">{panels}</div>' + page.note(drawn)
    if len(found["weights"]) == 3 and (material.grid.select(*found["weights"]).to_numpy() >= 0).all():
        corners = page.note("The nearer a corner, the more weight that head has.")
        pictures += page.figure(_simplex(material), "Objective over the weight grid") + corners
    return (
        page.table(columns, [row])
        + page.note(search)
        + page.table(["Measure", "Chosen", against, "Difference", "May fall by"], measures)
        + page.note(compared)
        + pictures
    )


def _mix(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())


def _objective(found: Mapping[str, Any]) -> str:
    """The objective of a search in words."""
    objective = found["objective"]
    if isinstance(objective, str):
        return _words(objective)
    return "the mean of " + ", ".join(f"{_words(name)} × {weight:g}" for name, weight in objective.items())


def _front(material: _Material, across: str, up: str) -> Figure:
    """Two labels' measures of every mix, the fronts of all labels and of these two, the chosen mix, the reference."""
    found = material.weights
    figure = Figure(figsize=(3.3, 4.1), layout="constrained")
    axes = figure.subplots()
    names = [across, up]
    values = material.grid.select(*names).to_numpy()
    front = material.grid["front"].to_numpy()
    best = values[fusion.undominated(values)]
    for on, colour, label in ((~front, page.FAINT, "mix"), (front, page.LIGHT, "on the front of all")):
        points = values[on][_apart(values[on])]
        axes.scatter(points[:, 0], points[:, 1], s=7, color=colour, linewidths=0, label=label)
    best = best[np.argsort(best[:, 0])]
    axes.plot(best[:, 0], best[:, 1], color=page.CANDIDATE, linewidth=2, label="on that of these two")
    reference = found["reference"]
    marks: list[tuple[Mapping[str, float], str, str, str, int, float]] = [
        (reference["measures"], "D", page.CHAMPION, page.INK, 7, 0.6),
        (found["measures"], "o", "none", page.BAD, 12, 2.0),
    ]
    for (measures, shape, face, edge, size, width), label in zip(marks, (reference["name"], "chosen"), strict=True):
        axes.plot(
            measures[across],
            measures[up],
            shape,
            markersize=size,
            markerfacecolor=face,
            markeredgecolor=edge,
            markeredgewidth=width,
            label=label,
        )
    axes.set(xlabel=_words(across), ylabel=_words(up))
    axes.locator_params(nbins=4)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _apart(points: Array, cells: int = 120) -> Integers:
    """Which points [n, 2] to draw, so that there is one a place: the last of each cell of a fine raster."""
    low, high = points.min(axis=0, initial=np.inf), points.max(axis=0, initial=-np.inf)
    places = np.floor((points - low) / np.maximum(high - low, 1e-12) * cells)
    _, last = np.unique(places[::-1], axis=0, return_index=True)
    return np.sort(len(points) - 1 - last)


def _simplex(material: _Material) -> Figure:
    """The objective over the mixes of three heads, as points of a triangle; the best is ringed."""
    names = list(material.weights["weights"])
    objective = material.weights["objective"]
    grid = material.grid.sort("objective")
    points = grid.select(names).to_numpy()
    shares = points / points.sum(axis=1, keepdims=True)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    places = shares @ corners
    kept = _apart(places)
    best = np.array([material.weights["weights"][name] for name in names])
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*corners[[0, 1, 2, 0]].T, color=page.FAINT, linewidth=1, zorder=0)
    drawn = axes.scatter(
        places[kept, 0], places[kept, 1], c=grid["objective"].to_numpy()[kept], cmap="cividis", s=16, linewidths=0
    )
    axes.plot(
        *(best / best.sum() @ corners),
        "o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor=page.BAD,
        markeredgewidth=2,
    )
    patch = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
    axes.annotate(
        "chosen", best / best.sum() @ corners, xytext=(11, 9), textcoords="offset points", color=page.BAD, bbox=patch
    )
    for (x, y), name, below in zip(corners, names, (True, True, False), strict=True):
        axes.text(x, y - 0.05 if below else y + 0.03, f"{name} only", ha="center", va="top" if below else "bottom")
    axes.set(xlim=(-0.14, 1.14), ylim=(-0.1, 0.93))
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.colorbar(drawn, ax=axes, shrink=0.75, label=_words(objective) if isinstance(objective, str) else "objective")
    return figure


def _dots(entries: Sequence[tuple[str, Mapping[str, Any], str]], across: str, line: float | None = None) -> Figure:
    """Figures below one another, each (name, its value, low and high, colour) with its interval as a line."""
    figure = Figure(figsize=(4.2, 0.75 + 0.3 * len(entries)), layout="constrained")
    axes = figure.subplots()
    for place, (_, found, colour) in enumerate(reversed(entries)):
        axes.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(found["value"], place, "o", color=colour, markersize=6)
    if line is not None:
        axes.axvline(line, color=page.FAINT, zorder=0)
    axes.set_yticks(range(len(entries)), [name for name, *_ in reversed(entries)])
    axes.set_ylim(-0.6, len(entries) - 0.4)
    axes.set_xlabel(across)
    return figure


def _recall(material: _Material) -> str:
    return _recall_judged(material.verdict) + _recall_alone(material)


def _recall_judged(verdict: Mapping[str, Any]) -> str:
    """The recall model beside the champion's and the baselines, on the same users."""
    if not verdict["recall"]:
        return page.note(NOT_COMPUTED)
    called = {"popularity": "most popular", "item_item_cf": "item-item CF"}
    colours = {"candidate": page.CANDIDATE, "champion": page.CHAMPION}
    entries, rows = [], []
    for name in sorted(verdict["recall"], key=["candidate", "champion", *called].index):
        found = verdict["recall"][name]
        words = called.get(name, _whose(name, verdict))
        entries.append((words, {**found, "value": found[RECALL]}, colours.get(name, page.POPULARITY)))
        others = [page.number(found[measure]) for measure in RECALL_MEASURES if measure != RECALL]
        rows.append([words, page.number(found[RECALL]), page.interval(found["low"], found["high"]), *others])
    names = ["Who recommends", RECALL, "Interval", *(_words(name) for name in RECALL_MEASURES if name != RECALL)]
    note = (
        f"For the same users of the test slice. Intervals hold {verdict['policy']['confidence']:.0%}: users drawn "
        f"again, {verdict['policy']['replicates']:,} times."
    )
    return (
        page.figure(_dots(entries, f"{RECALL}, with its interval"), "recall of candidate, champion and baselines")
        + page.table(names, rows)
        + page.note(note)
    )


def _recall_alone(material: _Material) -> str:
    figures = material.figures["recall"]
    popular = figures.get("popularity", {})
    rows = [
        [
            f"{_words(name)}, {part}",
            page.number(value),
            page.number(popular.get(part, {}).get(name)),
            _ratio(value, popular.get(part, {}).get(name)),
        ]
        for part in ("test", "validation")
        for name, value in figures[part].items()
    ]
    note = (
        "Over the whole catalogue, for users with at least one long view in the slice: recall is the share of their "
        "items that is found, NDCG also asks for them near the top. Coverage is the share of items that stand in the "
        "first 200 of any user: of those that training has not shown, and of the half with the fewest long views."
    )
    return page.table(["Figure", "Recall model", "Popularity", "Times"], rows) + page.note(note)


def _ratio(value: float, other: float | None) -> str:
    return f"{value / other:.2f} ×" if other else ""


def _slices(verdict: Mapping[str, Any]) -> str:
    if not verdict["slices"]:
        return page.note(NOT_COMPUTED)
    rows = [
        [
            one["name"],
            f"{one['rows']:,}",
            page.number(one["auc"]) or "–",
            page.interval(one["low"], one["high"]),
            page.number(one["champion"]),
            "" if one["difference"] is None else f"{one['difference']:+.4f}",
            page.interval(one["difference_low"], one["difference_high"], "+.4f"),
            ", ".join(one["labels"]) if len(one["labels"]) < len(LABELS) else "all",
        ]
        for one in verdict["slices"]
    ]
    names = ["Slice", "Rows", "Candidate", "Interval", "Champion", "Difference", "Interval of it", "Labels"]
    note = (
        "The mean AUC of the fused score over the labels with enough cases in the slice; – where there are too few "
        "rows or cases. New: not in the training slice. Tail items: the half with the fewest long views."
    )
    compared = [
        (one["name"], {key: one[f"difference{end}"] for key, end in ENDS.items()}, page.CANDIDATE)
        for one in verdict["slices"]
        if one["difference"] is not None
    ]
    picture = ""
    if compared:
        across = f"difference of the fused AUC to champion {verdict['champion']}'s"
        picture = page.figure(_dots(compared, across, line=0.0), "difference to the champion by slice")
    return picture + page.table(names, rows) + page.note(note)


def _rehearsal(verdict: Mapping[str, Any]) -> str:
    checks = [check for check in verdict["checks"] if check["name"] in REHEARSED]
    if not checks:
        return page.note("Not computed: the evidence could not be gathered.")
    note = (
        "A model server of its own was started with the candidate, and asked with rows of the log as the gateway asks; "
        "what it answered is held against what the trained models say of the same rows."
    )
    return _listed(checks) + page.note(note)


def _changes(material: _Material) -> str:
    before = material.verdict.get("champion_manifest")
    if material.verdict["first_release"]:
        return "<p>There is no champion: this would be the first release.</p>"
    if not before:
        return "<p>Not known: champion and candidate could not be compared; see the checks.</p>"
    old, new = before.get("data_window") or {}, material.window
    parts = [("Data", _differences(old, new, before["release"]), "the candidate saw the window that the champion saw.")]
    old = {name: before.get(name, {}) for name in ("recall", "rank")}
    old |= {"weight": before.get("weights", {}), "fusion": before.get("fusion")}
    new = {**material.models, "weight": material.weights["weights"], "fusion": material.weights["fusion"]}
    parts.append(
        ("Parameters", _differences(old, new, before["release"]), "parameters and weights are the champion's.")
    )
    parts.append(("Features", _features(material, before), "both models read what the champion's read."))
    changed = "".join(
        f"<h3>{title}</h3>{table or f'<p>No change: {otherwise}</p>'}" for title, table, otherwise in parts
    )
    then = before.get("metrics", {}).get("recall", {})
    now = material.figures["recall"]["test"]
    figures = [[name, page.number(then[name]), page.number(now[name])] for name in now if name in then]
    measured = ""
    if figures:
        note = "Each on the test slice of its own time, so not the same rows; the AUCs above are on the same rows."
        measured = "<h3>Recall, each in its own time</h3>"
        measured += page.table(["Figure", f"Champion {before['release']}", "Candidate"], figures) + page.note(note)
    when, by = before.get("created_at", "at an unknown time"), before.get("approved_by", "nobody named")
    who = (
        f"<p>Champion {before['release']} was released {page.text(page.value(when))}, approved by {page.text(by)}.</p>"
    )
    if forced := before.get("forced"):
        who += (
            f'<p class="verdict rejected">The champion was forced against the gate by {page.text(forced["by"])}: '
            f"“{page.text(forced['reason'])}”. The gate had said: {page.text(forced['verdict'])}</p>"
        )
    return who + changed + measured


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], champion: int) -> str:
    """A table of what is not the same in both; empty if all is."""
    old, new = (dict(_flat(_short(document))) for document in (before, now))
    rows = [
        [name, page.value(old.get(name)), page.value(new.get(name))]
        for name in [*new, *(name for name in old if name not in new)]
        if old.get(name) != new.get(name)
    ]
    return page.table(["What", f"Champion {champion}", "Candidate"], rows, figures=False) if rows else ""


def _short(document: Mapping[str, Any]) -> dict[str, Any]:
    """Digests by their first letters: whole ones are for machines."""
    digests = {"digests": {name: digest[:12] for name, digest in document.get("digests", {}).items()}}
    return {**document, **(digests if "digests" in document else {})}


def _features(material: _Material, before: Mapping[str, Any]) -> str:
    """Inputs that either model reads now and did not before, and the reverse; empty if there are none."""
    former = before.get("inputs")
    if former is None:
        return page.note("Not known: the champion's manifest does not name what its models read.")
    rows = []
    for name in material.models:
        now, then = set(material.figures[name]["inputs"]), set(former[name])
        if now != then:
            rows.append([f"{name} model", ", ".join(sorted(now - then)) or "–", ", ".join(sorted(then - now)) or "–"])
    return page.table(["Who", "Reads, the champion did not", "No longer reads"], rows) if rows else ""


def _training(material: _Material) -> str:
    panels = []
    for name, history in material.history.items():
        if not history:
            continue
        figure = Figure(figsize=(4, 3), layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"{name}: {material.models[name]['model']}")
        epochs = [row["epoch"] for row in history]
        # a sampled loss has no fellow on the validation slice: there the ranking of all items is measured
        ranked = all("val_ndcg" in row for row in history)
        curves = [("loss", "training loss", "-", axes)]
        if ranked:
            curves.append(("val_ndcg", "validation NDCG, right", "--", axes.twinx()))
        else:
            curves.append(("val_loss", "validation loss", "--", axes))
        lines = []
        for key, words, style, beside in curves:
            if all(key in row for row in history):
                values = [row[key] for row in history]
                lines += beside.plot(epochs, values, style, marker="o", ms=3.5, color=page.CANDIDATE, label=words)
        axes.set(xlabel="epoch", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(handles=lines, loc="outside lower center", ncols=2)
        panels.append(page.figure(figure, f"{name} model by epoch"))
    gates = material.figures["rank"].get("gates")
    note = ""
    if gates:
        panels.append(page.figure(_gates(gates), "shares of experts by task"))
        note = page.note(
            "How each task mixes the experts of the rank model: the mean share over the validation slice, and the span "
            "of eight rows in ten. A gate that asks one expert for every row has collapsed."
        )
    return f'<div class="panels">{"".join(panels)}</div>' + note


def _gates(gates: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    experts = len(next(iter(gates.values()))["mean"])
    figure = Figure(figsize=(min(1.6 + 0.12 * experts * len(gates), 9), 3), layout="constrained")
    axes = figure.subplots()
    axes.set_title("rank: shares of experts")
    width = 0.8 / experts
    for expert in range(experts):
        places = np.arange(len(gates)) + (expert - (experts - 1) / 2) * width
        mean, low, high = (np.array([one[part][expert] for one in gates.values()]) for part in ("mean", "low", "high"))
        axes.bar(places, mean, 0.9 * width, color=page.CANDIDATE, alpha=0.45)
        axes.vlines(places, low, high, color=page.CANDIDATE, linewidth=1.5)
    axes.axhline(1 / experts, color=page.FAINT, linewidth=1, zorder=0)
    axes.set(xticks=range(len(gates)), xticklabels=[_words(task) for task in gates], ylim=(0, None), ylabel="share")
    axes.tick_params(axis="x", labelrotation=30)
    return figure


def _data(material: _Material) -> str:
    window = [[name.replace("_", " "), page.value(value)] for name, value in _flat(_short(material.window))]
    parameters = [[name, page.value(value)] for name, value in _flat(material.models)]
    inputs = "".join(
        f"<p>The {name} model reads {page.text(', '.join(material.figures[name]['inputs']))}.</p>"
        for name in material.models
    )
    return (
        page.table(["Data window", "Value"], window, figures=False)
        + page.table(["Parameter", "Value"], parameters, figures=False)
        + inputs
    )


def _policy(verdict: Mapping[str, Any]) -> str:
    """Every threshold, those that are not the default first."""
    default = dict(_flat(json.loads(json.dumps(dataclasses.asdict(Policy())))))
    used = dict(_flat(verdict["policy"]))
    rows = []
    for name in [*used, *(name for name in default if name not in used)]:
        value, usual = (page.value(_plain(one.get(name))) for one in (used, default))
        words, differs = name.replace("_", " "), used.get(name) != default.get(name)
        rows.append([f"≠ {words}", value, f"default {usual}"] if differs else [words, value, ""])
    rows.sort(key=lambda row: not row[2])
    changed = sum(bool(row[2]) for row in rows)
    note = "Every threshold is the default."
    if changed:
        note = f"Thresholds that are not the default come first, with ≠: {changed} of {len(rows)}."
    return page.note(note) + page.table(["Threshold", "Here", "Default"], rows, figures=False)


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _roll_back(verdict: Mapping[str, Any]) -> str:
    if verdict["first_release"]:
        return "<p>There is no release before this one to go back to. Later releases can be rolled back to it.</p>"
    former = f" ({verdict['champion']})" if verdict["champion"] else ""
    return (
        "<p>After a promotion, <code>airflow dags trigger rollback</code> brings the former "
        f"release back{former}: recall model, item index, rank model and weights at once. "
        "Nothing is retrained; the release is still on disk. Without Airflow, "
        "<code>python -m serving.rollout rollback --by NAME --reason WHY</code> does the same. "
        "While it is a canary, turning down its promotion is enough.</p>"
    )


def _words(name: str) -> str:
    return name.replace("_", " ").replace("gauc", "GAUC").replace("auc", "AUC").replace("ndcg", "NDCG")
