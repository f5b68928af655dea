"""The page a person approves by: one HTML file with its pictures inside, for a screen, a phone or paper."""

from __future__ import annotations

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
from penstock.metrics import Array, Integers, MetricError


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
        ("Checks", _checks(verdict)),
        ("AUC of each head", _heads(material)),
        ("ROC and calibration", _curves(material)),
        ("Output weights", _weights(material)),
        ("Recall", _recall(material)),
        ("Slices", _slices(verdict)),
        ("What changed since the champion", _changes(material)),
        ("Training", _training(material)),
        ("Data and parameters", _data(material)),
        ("How to roll back", _roll_back(verdict)),
    ]
    return page.document(
        f"Penstock: candidate {kind}",
        f"""<h1>Penstock candidate report</h1>
<p class="verdict {kind}">{page.text(verdict["sentence"])}</p>
{_summary(material)}
{page.sections(sections)}""",
    )


def _summary(material: _Material) -> str:
    verdict = material.verdict
    fused = verdict["fused"]
    passed = sum(check["passed"] for check in verdict["checks"])
    facts = [("Checks passed", f"{passed} of {len(verdict['checks'])}")]
    if fused:
        facts.append(("Fused AUC, candidate", page.number(fused["candidate"]["value"])))
        facts += [
            (f"Fused AUC, {_whose(name, verdict)}", page.number(one["value"]))
            for name, one in fused.items()
            if name != "candidate"
        ]
    facts.append(("Test rows", f"{verdict['rows']:,}"))
    facts.append(("Users", f"{verdict['users']:,}"))
    return page.facts(facts)


def _whose(name: str, verdict: Mapping[str, Any]) -> str:
    return f"champion {verdict['champion']}" if name == "champion" else name


def _checks(verdict: Mapping[str, Any]) -> str:
    rows = []
    for check in sorted(verdict["checks"], key=lambda check: bool(check["passed"])):
        mark = '<span class="pass">✓ pass</span>' if check["passed"] else '<span class="fail">✗ fail</span>'
        name = f'{mark} <b>{page.text(check["name"])}</b><span class="reason">{page.text(check["reason"])}</span>'
        interval = page.interval(check["low"], check["high"])
        rows.append([name, page.number(check["value"]), interval, page.number(check["bound"])])
    note = "Failed checks come first. An interval must lie above its bound, except that harm needs all of it below."
    return page.table(["Check", "Value", "Interval", "Bound"], rows, marked=True) + page.note(note)


def _heads(material: _Material) -> str:
    verdict = material.verdict
    if not verdict["heads"]:
        return page.note("Not computed: the candidate was rejected before any figure could mean something.")
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
        f"Intervals hold {verdict['policy']['confidence']:.0%}: DeLong's for one AUC; for differences a bootstrap of "
        f"whole users ({verdict['policy']['replicates']} draws)."
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
    figure = Figure(figsize=(4.8, 2.5), layout="constrained")
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
    return f'<div class="panels">{"".join(panels)}</div>' + page.note(note)


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


def _recall(material: _Material) -> str:
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
        return page.note("Not computed.")
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
        "rows or cases. New: not in the training slice."
    )
    return page.table(names, rows) + page.note(note)


def _changes(material: _Material) -> str:
    before = material.verdict.get("champion_manifest")
    if material.verdict["first_release"]:
        return "<p>There is no champion: this would be the first release.</p>"
    if not before:
        return "<p>Not known: champion and candidate could not be compared; see the checks.</p>"
    old = dict(_flat({name: before.get(name, {}) for name in ("recall", "rank")}))
    old |= dict(_flat({"weight": before.get("weights", {}), "window": before.get("data_window") or {}}))
    new = dict(_flat(material.models))
    new |= dict(_flat({"weight": material.weights["weights"], "window": material.window}))
    rows = [
        [name, page.value(old.get(name)), page.value(new.get(name))]
        for name in [*new, *(name for name in old if name not in new)]
        if old.get(name) != new.get(name)
    ]
    changed = "<p>Nothing: parameters, weights and data window are those of the champion.</p>"
    if rows:
        changed = page.table(["Parameter", f"Champion {before['release']}", "Candidate"], rows)
    then = before.get("metrics", {}).get("recall", {})
    now = material.figures["recall"]["test"]
    figures = [[name, page.number(then[name]), page.number(now[name])] for name in now if name in then]
    measured = ""
    if figures:
        note = "Each on the test slice of its own time, so not the same rows; the AUCs above are on the same rows."
        measured = page.table(["Figure", f"Champion {before['release']}", "Candidate"], figures) + page.note(note)
    when, by = before.get("created_at", "at an unknown time"), before.get("approved_by", "nobody named")
    who = (
        f"<p>Champion {before['release']} was released {page.text(page.value(when))}, approved by {page.text(by)}.</p>"
    )
    return who + changed + measured


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
    window = [[name.replace("_", " "), page.value(value)] for name, value in _flat(material.window)]
    parameters = [[name, page.value(value)] for name, value in _flat(material.models)]
    policy = [[name.replace("_", " "), page.value(value)] for name, value in material.verdict["policy"].items()]
    return (
        page.table(["Data window", "Value"], window)
        + page.table(["Parameter", "Value"], parameters)
        + page.table(["Policy of the gate", "Value"], policy)
    )


def _roll_back(verdict: Mapping[str, Any]) -> str:
    if verdict["first_release"]:
        return "<p>There is no release before this one to go back to. Later releases can be rolled back to it.</p>"
    former = f" ({verdict['champion']})" if verdict["champion"] else ""
    return (
        "<p>After a promotion, <code>airflow dags trigger rollback</code> brings the former "
        f"release back{former}: recall model, item index, rank model and weights at once. "
        "Nothing is retrained; the release is still on disk.</p>"
    )


def _words(name: str) -> str:
    return name.replace("_", " ").replace("gauc", "GAUC").replace("auc", "AUC").replace("ndcg", "NDCG")
