"""What pages for people are made of: one HTML file each, its pictures inside, for a screen, a phone or paper."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers and in print
CANDIDATE, CHAMPION, POPULARITY, BAD, INK, FAINT = "#0072B2", "#E69F00", "#767676", "#B5420A", "#1d2530", "#d5d9de"
LIGHT = "#9cc9e6"  # the candidate's, where there are many of it

RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "penstock",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a929c",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1d2530; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.1rem; font-weight: 600; color: #5a6470; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid #d5d9de; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; max-width: 44rem; }
.note { color: #5a6470; font-size: .9rem; }
.verdict { border-left: .4rem solid; padding: .75rem 1rem; font-size: 1.2rem; line-height: 1.4; margin: 0 0 1rem;
  max-width: none; }
.approved { border-color: #0072B2; background: #eef5fa; }
.rejected { border-color: #B5420A; background: #fbf1ec; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0 0; font-size: .9rem; }
nav a { color: #0072B2; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2.25rem; margin: 0; }
.figures dt { color: #5a6470; font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .75rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #e6e9ec; }
th { font-weight: 600; color: #5a6470; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.reason { color: #5a6470; display: block; font-weight: 400; }
b { font-weight: 600; }
.pass { color: #0072B2; font-weight: 600; white-space: nowrap; }
.fail { color: #B5420A; font-weight: 600; white-space: nowrap; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; margin: .75rem 0; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 34rem; }
code { background: #f1f3f5; padding: .1rem .3rem; border-radius: .2rem; font-size: .9em; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1rem 1rem 3rem; }
  thead { display: none; }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid #d5d9de; }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; text-align: right;
    white-space: normal; overflow-wrap: anywhere; }
  td::before { content: attr(data-label); color: #5a6470; text-align: left; white-space: nowrap; }
  td:empty { display: none; }
  td.first { display: block; text-align: left; font-weight: 600; }
  td.first::before { content: none; }
  td.detail { display: none; }
}
@media print {
  body { font-size: 11pt; }
  nav { display: none; }
  table { font-size: 9pt; }
  th, td { padding-right: .5rem; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  tr, figure { break-inside: avoid; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  .verdict { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def document(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def sections(parts: Sequence[tuple[str, str]]) -> str:
    """(title, HTML) one below the other."""
    return "\n".join(
        f'<section id="{_anchor(title)}"><h2>{text(title)}</h2>\n{content}</section>' for title, content in parts
    )


def contents(titles: Sequence[str]) -> str:
    """Links to the sections of these titles; not on paper."""
    links = " ".join(f'<a href="#{_anchor(title)}">{text(title)}</a>' for title in titles)
    return f"<nav>{links}</nav>"


def _anchor(title: str) -> str:
    return text(title.lower().replace(" ", "-"))


def facts(named: Sequence[tuple[str, str]]) -> str:
    """(name, value) side by side."""
    entries = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in named)
    return f'<dl class="figures">{entries}</dl>'


def text(value: object) -> str:
    """`value` as it may stand in HTML."""
    return html.escape(str(value))


def note(says: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{text(says)}</p>'


def number(value: float | None) -> str:
    """A count in full, any other number to four decimals; empty for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    """Both ends, or nothing where one is not known."""
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def value(value: object) -> str:
    """Anything a document may hold; a time of ISO 8601 as people read it."""
    if value is None:
        return "–"
    if isinstance(value, str) and value.endswith("+00:00"):
        return value.removesuffix("+00:00").replace("T", " ") + " UTC"
    return f"{value:,}" if type(value) is int else str(value)


def table(names: Sequence[str], rows: Sequence[Sequence[str]], *, marked: bool = False, figures: bool = True) -> str:
    """A table, columns of figures set to the right; without `figures` there are none.

    With `marked` the first column is HTML, and says all that the others do: a phone shows it alone.
    """
    kinds = ["first"]
    for column in range(1, len(names)):
        right = figures and all(not row[column] or row[column][0] in "0123456789+-–" for row in rows)
        kinds.append(" ".join(["number"] * right + ["detail"] * marked))
    head = "".join(f'<th class="{kind}">{text(name)}</th>' for name, kind in zip(names, kinds, strict=True))
    lines = []
    for row in rows:
        cells = "".join(
            f'<td class="{kind}" data-label="{text(name)}">{cell if marked and kind == "first" else text(cell)}</td>'
            for name, kind, cell in zip(names, kinds, row, strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def figure(drawn: Figure, says: str) -> str:
    """A picture as SVG within the page; `says` is its text for those who do not see it."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{text(says)}"', 1)
    return f"<figure>{svg}</figure>"
