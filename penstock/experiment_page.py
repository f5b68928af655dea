"""What users did with a canary, as a page for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from penstock import page
from penstock.experiment import MEASURES, VARIANTS, Experiment, Measure, Verdict

COUNTS = {"requests": "requests", "impressions": "impressions", "click": "clicks", "long_view": "long views"}


def write_experiment(found: Experiment, verdict: Verdict, out: Path) -> tuple[Path, Path]:
    """Writes out/evidence.html and out/evidence.json, and returns them."""
    out.mkdir(parents=True, exist_ok=True)
    pages, figures = out / "evidence.html", out / "evidence.json"
    with matplotlib.rc_context(page.RC):
        pages.write_text(_page(found, verdict), encoding="utf-8")
    figures.write_text(json.dumps(verdict.document, indent=1))
    return pages, figures


def measures_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names and rows of what was measured: both releases, the difference, its interval and p-value."""
    split, confidence = document["split"], document["config"]["confidence"]
    names = [
        "measure",
        f"release {split['champion']}",
        f"release {split['challenger']}",
        "difference",
        f"{confidence:.0%} interval",
        "p",
    ]
    rows = []
    for measure in MEASURES:
        if (one := document["measures"].get(measure.name)) is None:
            continue
        ends = [None if one[end] is None else measure.words(one[end], "+") for end in ("low", "high")]
        rows.append(
            [
                measure.says,
                measure.words(one["champion"]),
                measure.words(one["challenger"]),
                measure.words(one["difference"], "+"),
                "not known yet" if None in ends else f"{ends[0]} to {ends[1]}",
                f"{one['p_value']:.2g}",
            ]
        )
    return names, rows


def counts_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names and rows of how many users, requests and impressions the releases had."""
    names = ["variant", "release", "users", *COUNTS.values(), "degraded answers"]
    rows = []
    for name in VARIANTS:
        one = document["variants"][name]
        counts = [f"{one[column]:,}" for column in ("users", *COUNTS, "degraded")]
        rows.append([name, str(one["release"]), *counts])
    return names, rows


def markdown(names: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(found: Experiment, verdict: Verdict) -> str:
    document = verdict.document
    split = found.split
    kind = "rejected" if verdict.action in ("withdraw", "fail") else "approved"
    parts = [
        ("What users did", _measures(found, document)),
        ("Checks", _checks(verdict)),
        ("Who was asked", page.table(*counts_table(document))),
        ("How to read this", _how(document)),
        ("Settings", _settings(document)),
    ]
    since = datetime.fromtimestamp(split.since_ms / 1000, UTC).isoformat(timespec="seconds")
    facts = [
        ("Share of the users", f"{split.share:.1%}"),
        ("Since", page.value(since)),
        ("Looks", f"{len(found.looks):,}"),
        ("Checks passed", f"{sum(check.passed for check in verdict.checks)} of {len(verdict.checks)}"),
    ]
    return page.document(
        f"Penstock: release {split.challenger} against {split.champion}",
        f"""<h1>Penstock canary: release {split.challenger} against {split.champion}</h1>
<p class="verdict {kind}">{page.text(verdict.sentence)}</p>
{page.facts(facts)}
{page.sections(parts)}""",
    )


def _measures(found: Experiment, document: Mapping[str, Any]) -> str:
    if not found.looks:
        return page.note(f"There is no look before either release has had {found.config.first_users} users.")
    panels = "".join(
        page.figure(_sequence(found, measure), f"difference in {measure.says} over requests") for measure in MEASURES
    )
    note = (
        "Difference: the challenger's value less the champion's. The band holds the true difference, at all looks and "
        f"for all measures together, with {found.config.confidence:.0%} confidence."
    )
    return f'{page.table(*measures_table(document))}<div class="panels">{panels}</div>{page.note(note)}'


def _sequence(found: Experiment, measure: Measure) -> Figure:
    """The difference and its confidence sequence over requests, with 0 and the guardrail's margin."""
    looks = found.looks
    points = [look.points[measure.name] for look in looks]
    requests = np.array([look.requests for look in looks])
    difference, low, high = (
        measure.scale * np.array([getattr(point, name) for point in points]) for name in ("difference", "low", "high")
    )
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=page.INK, linewidth=0.8)
    known = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(
        requests, low, high, where=known.tolist(), color=page.LIGHT, linewidth=0, label="confidence sequence"
    )
    axes.plot(requests, difference, color=page.CANDIDATE, linewidth=1.5, label="difference")
    margin = found.config.guardrails.get(measure.name)
    if margin is not None:
        bound = -margin * measure.scale * np.array([point.champion for point in points])
        axes.plot(requests, bound, "--", color=page.BAD, linewidth=1, label="guardrail")
    late = known & (requests >= requests[-1] / 5)
    if late.any():  # the first looks know next to nothing, and would make the rest a line
        most = 1.15 * max(np.abs(low[late]).max(), np.abs(high[late]).max(), np.abs(difference).max())
        axes.set_ylim(-most, most)
    axes.set_title(measure.says)
    axes.set_xlabel("requests, both releases")
    axes.set_ylabel("points" if measure.unit == "%" else "seconds")
    figure.legend(loc="outside lower left", ncols=3, fontsize=7.5)
    return figure


def _checks(verdict: Verdict) -> str:
    rows = []
    for check in sorted(verdict.checks, key=lambda check: check.passed):
        mark = '<span class="pass">✓ pass</span>' if check.passed else '<span class="fail">✗ fail</span>'
        says = f'{mark} <b>{page.text(check.name)}</b><span class="reason">{page.text(check.reason)}</span>'
        rows.append([says, {"fail": "the run fails", "withdraw": "withdrawn", "ask": "told"}[check.otherwise]])
    return page.table(["Check", "Otherwise"], rows, marked=True)


def _how(document: Mapping[str, Any]) -> str:
    config = document["config"]
    said = [
        "Looking at this page as often as one likes is allowed: the band is a confidence sequence, which holds at all "
        "looks at once, and p is the always-valid p-value that belongs to it. Users, not requests, are what is "
        "independent; both account for it.",
        "A band wholly above 0 means better, wholly below 0 worse; else the two are not told apart, which is not the "
        "same as equal: the band says how large a difference may still be. It only gets narrower.",
        f"Intervals hold {config['confidence']:.0%} for the {len(MEASURES)} measures together (Bonferroni), and p is "
        "adjusted likewise. Guardrails hold as much for all of them together.",
        "A guardrail ends the canary when the challenger is worse than the champion by more than its margin (the "
        "dashed line), with confidence. A split that is not what was asked for, or a user who met both releases, means "
        "that the comparison is broken: then nothing is promoted by it.",
    ]
    return "".join(f"<p>{page.text(one)}</p>" for one in said)


def _settings(document: Mapping[str, Any]) -> str:
    flat = {
        **{name: value for name, value in document["config"].items() if not isinstance(value, Mapping)},
        **{f"guardrail of {name}": margin for name, margin in document["config"]["guardrails"].items()},
        **{f"minimum {name}": value for name, value in document["minimum"].items()},
    }
    rows = [[name.replace("_", " "), f"{value:g}"] for name, value in flat.items()]
    p_value = document["split_p_value"]
    found = [
        ["p of the split", "–" if p_value is None else f"{p_value:.2g}"],
        ["requests answered by another release", f"{document['other_requests']:,}"],
    ]
    return page.table(["Setting", "Value"], rows) + page.table(["Found", "Value"], found)
