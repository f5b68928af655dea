"""The Data Docs of a validation: one page that needs no other file, no script and no network.

What Great Expectations found is rendered by its own renderers and templates, in a frame of ours: its frame loads
styles and scripts from other hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from components.quiet_gx import DefaultJinjaPageView, ValidationResultsPageRenderer
from components.rules import Rule
from penstock import page
from penstock.events import LABELS

if TYPE_CHECKING:
    from components.expectations import Validation

_WIDTH, _HEIGHT = 440, 120
_MOST_DAYS = 60
_MEASURES = ("rows", *LABELS)
_BAND = "#dce9f3"

# what Great Expectations' own blocks are made of, and what of a page of ours is only here
_STYLE = """
.panels { grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); }
summary { cursor: pointer; padding: .2rem 0; }
.out { color: #B5420A; font-weight: 600; }
.suite { border: 1px solid #d5d9de; border-radius: .3rem; padding: .25rem 1rem; margin: .25rem 0 1rem; }
.suite h5 { font-size: .95rem; margin: 1rem 0 0; }
.suite th:first-child { width: 4.5rem; }
.suite th:last-child { width: 13rem; }
.suite table table { width: auto; }
.suite table table th { width: auto; }
.suite strong br { display: none; }
.suite i { font-style: normal; }
.text-success { color: #0072B2; }
.text-danger { color: #B5420A; }
.fa-check-circle::before { content: "✔"; }
.fa-times::before, .fa-exclamation-triangle::before { content: "✘"; }
"""


def write_docs(
    path: Path, subject: str, found: Validation, rules: Mapping[str, Sequence[Rule]], results: Mapping[str, Any]
) -> None:
    """Writes the page.

    Args:
        subject: what was validated.
        rules: by table, as `components.rules.held` gives them.
        results: Great Expectations' own, by name of the suite.
    """
    parts = [
        ("Tables", _tables(found)),
        ("Days", _days(found.days)),
        ("Rules", _rules(found, rules)),
        ("What Great Expectations found", _suites(results)),
    ]
    put_aside, rows = sum(found.bad.values()), sum(found.rows.values())
    facts = [("Rows", f"{rows:,}"), ("Put aside", f"{put_aside:,}"), ("Rules", f"{sum(map(len, rules.values()))}")]
    if found.days.height:
        facts.append(("Days", f"{found.days['day'][0]} to {found.days['day'][-1]}"))
    said = "<br>".join(page.text(failure) for failure in found.failures) or "The log keeps the rules."
    body = f"""<style>{_STYLE}</style>
<h1>Data Docs of {page.text(subject)}</h1>
<p class="verdict {"rejected" if found.failures else "approved"}">{said}</p>
{page.facts(facts)}
{page.sections(parts)}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.document(f"Data Docs: {subject}", body), encoding="utf-8")


def _tables(found: Validation) -> str:
    return page.table(
        ["table", "rows", "put aside", "share", "rules broken, and by how many rows"],
        [
            [
                name,
                f"{rows:,}",
                f"{found.bad[name]:,}",
                f"{found.bad[name] / max(rows, 1):.3%}",
                " · ".join(f"{rule}: {count:,}" for rule, count in found.most_broken(name)),
            ]
            for name, rows in found.rows.items()
        ],
    )


def _days(days: pl.DataFrame) -> str:
    if days.is_empty():
        return page.note("There are none to hold: Penstock answered every event itself.")
    shown = days.tail(_MOST_DAYS).to_dicts()
    charts = "".join(
        f"<figure><figcaption><b>{name}</b></figcaption>{_chart(shown, name)}</figure>" for name in _MEASURES
    )
    names = ["day", *(column for name in _MEASURES for column in (name, "expected"))]
    rows = [
        [str(day["day"]), *(cell for name in _MEASURES for cell in (_value(name, day[name]), _band(day, name)))]
        for day in shown
    ]
    out = [day["day"] for day in days.to_dicts() if any(_is_out(day, name) for name in _MEASURES)]
    told = f" <span class='out'>{len(out)} outside: {', '.join(map(str, out[:10]))}</span>" if out else ""
    return f"""{
        page.note(
            "Pale: where a day is expected by the days before it; the colour of warning: outside of that. "
            "Rows that Penstock answered itself are not counted."
        )
    }
<div class="panels">{charts}</div>
<details><summary>{days.height} days{told}</summary>{page.table(names, rows)}</details>"""


def _rules(found: Validation, rules: Mapping[str, Sequence[Rule]]) -> str:
    groups = []
    for name, held in rules.items():
        if name not in found.rows and name not in ("tables", "days"):
            continue
        # the broken ones first
        held = sorted(held, key=lambda rule: -found.broken.get(rule.name, 0))
        broken = sum(rule.name in found.broken for rule in held)
        table = page.table(
            ["rule", "says", "severity", "broken by"],
            [
                [rule.name, f"{rule.column} {rule.says}", rule.severity, f"{found.broken.get(rule.name, 0):,}"]
                for rule in held
            ],
        )
        told = f"<span class='out'>{broken} broken</span>" if broken else "none broken"
        groups.append(
            f"<details{' open' if broken else ''}><summary><b>{name}</b> {len(held)} rules, {told}</summary>"
            f"{table}</details>"
        )
    return "".join(groups)


def _suites(results: Mapping[str, Any]) -> str:
    environment = DefaultJinjaPageView().env
    # theirs show times and numbers of their own run, which say nothing of the log
    template = environment.get_template("section.j2")
    parts = []
    for name, result in results.items():
        sections = ValidationResultsPageRenderer().render(result).to_json_dict()["sections"][1:]
        shown = "".join(
            template.render(section=section, section_loop={"index": f"{name}-{number}"}, utm_medium="")
            for number, section in enumerate(sections)
        )
        met, all_of_them = (result.statistics[f"{kind}_expectations"] for kind in ("successful", "evaluated"))
        parts.append(
            f"<details><summary><b>{page.text(name)}</b> {met} of {all_of_them} expectations met</summary>"
            f'<div class="suite">{shown}</div></details>'
        )
    return "".join(parts)


def _value(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if name == "rows" else f"{value:.2%}"


def _band(day: Mapping[str, Any], name: str) -> str:
    lowest, highest = day[f"{name}.lowest"], day[f"{name}.highest"]
    return "" if lowest is None else f"{_value(name, lowest)} – {_value(name, highest)}"


def _is_out(day: Mapping[str, Any], name: str) -> bool:
    value, lowest, highest = (day[f"{name}{end}"] for end in ("", ".lowest", ".highest"))
    return value is not None and lowest is not None and not lowest <= value <= highest


def _chart(days: Sequence[Mapping[str, Any]], name: str) -> str:
    """A bar a day before the band in which it is expected."""
    top = max(day[part] or 0 for day in days for part in (name, f"{name}.highest")) or 1
    step, scale = _WIDTH / len(days), _HEIGHT / top
    drawn = []
    for place, day in enumerate(days):
        lowest, highest, value = (day[part] for part in (f"{name}.lowest", f"{name}.highest", name))
        left = place * step
        if lowest is not None:
            drawn.append(_rectangle(left, highest * scale, step, (highest - lowest) * scale, _BAND))
        out, band = _is_out(day, name), _band(day, name)
        # a day of nothing is seen too
        height = max((value or 0) * scale, 3 if out else 0)
        says = f"{day['day']}: {_value(name, value) or 'no rows'}" + (f", expected {band}" if band else "")
        colour = page.BAD if out else page.CANDIDATE
        drawn.append(_rectangle(left + step * 0.2, height, step * 0.6, height, colour, says))
    low = _HEIGHT + 14
    return (
        f'<svg viewBox="0 0 {_WIDTH} {low + 4}" role="img" aria-label="{name} by day" font-size="11" fill="#5a6470">'
        f'{"".join(drawn)}<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}" stroke="{page.FAINT}"/>'
        f'<text x="0" y="{low}">{days[0]["day"]}</text>'
        f'<text x="{_WIDTH}" y="{low}" text-anchor="end">{days[-1]["day"]}</text>'
        f'<text x="0" y="10">{_value(name, top)}</text></svg>'
    )


def _rectangle(left: float, top: float, width: float, height: float, colour: str, says: str = "") -> str:
    """`top` and `height` are measured from the ground."""
    return (
        f'<rect x="{left:.1f}" y="{_HEIGHT - top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">'
        f"<title>{page.text(says)}</title></rect>"
    )
