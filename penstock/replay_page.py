"""What a replay has shown, as a page for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from penstock import page
from penstock.replay import Compared, Replay, percent


def write_replay(found: Replay, out: Path) -> tuple[Path, Path]:
    """Writes out/replay.html and out/replay.json, and returns them."""
    out.mkdir(parents=True, exist_ok=True)
    pages, figures = out / "replay.html", out / "replay.json"
    with matplotlib.rc_context(page.RC):
        pages.write_text(_page(found), encoding="utf-8")
    figures.write_text(json.dumps(found.document, indent=1))
    return pages, figures


def _page(found: Replay) -> str:
    parts = [
        ("What was compared", _compared(found)),
        ("By feature", _by_feature(found)),
        ("Values that differ", _examples(found)),
        ("How stale features are", _stale(found)),
    ]
    kind = "approved" if found.reached else "rejected"
    return page.document(
        f"Penstock: replay for release {found.release}",
        f"""<h1>Penstock replay for release {found.release}</h1>
<p class="verdict {kind}">{page.text(found.sentence)}</p>
{_summary(found)}
{page.sections(parts)}""",
    )


def _summary(found: Replay) -> str:
    facts = [("Logged requests", f"{found.served.requests:,}"), ("Their vectors", f"{found.served.vectors:,}")]
    facts += [("Equal", percent(found.served.share))] if found.served.share is not None else []
    if found.probe is not None and found.probe.share is not None:
        facts += [("Probed vectors", f"{found.probe.vectors:,}"), ("Equal", percent(found.probe.share))]
    return page.facts([*facts, ("Features of a vector", f"{len(found.served.features)}")])


def _compared(found: Replay) -> str:
    said = (
        "A vector is everything that the rank model is given for one item of one request. What was served is in the "
        "gateway's log of vectors; what training is given is joined anew from the log and the feedback since: features "
        "that change with a materialisation at the snapshot the answer was made of, pushed ones at the request's own "
        "time. Integers, texts and lists must be the same, floating point to the last bit."
    )
    rows = [["replayed", f"{found.served.requests:,}"]]
    rows += [[f"left out: {reason}", f"{count:,}"] for reason, count in found.left_out.items()]
    probed = (
        f"The probe drew {found.probe.requests:,} users and {found.probe.vectors:,} items of the store and read them "
        "as the gateway does."
        if found.probe is not None
        else f"There was no probe: {found.no_probe}."
    )
    pushed = found.behind
    late = ""
    if pushed.requests:
        late = f"Pushed features differ in {pushed.requests:,} requests. "
        late += (
            f"{pushed.earlier:,} of them were served what the user had done up to {pushed.seconds:.1f} s before: a "
            "push was still on its way."
            if pushed.earlier
            else "None of them was served an earlier state of its user: it was no push on its way."
        )
    about = [["Service", found.service], ["Log", found.log], ["Its end", page.value(found.log_end)]]
    return (
        f"<p>{page.text(said)}</p>"
        + page.table(["Logged requests", "Number"], rows)
        + page.note(f"{probed} {late}".strip())
        + page.table(["Replayed with", "Value"], about)
    )


def _by_feature(found: Replay) -> str:
    probed = {one.feature: one for one in found.probe.features} if found.probe else {}
    stale = {one.feature: one for one in found.stale.features}
    rows = []
    for one in sorted(found.served.features, key=lambda one: -_different(one, probed)):
        other = probed.get(one.feature)
        rows.append(
            [
                one.feature,
                one.view,
                f"{one.compared:,}",
                f"{one.different:,}",
                "" if other is None else f"{other.compared:,}",
                "" if other is None else f"{other.different:,}",
                f"{stale[one.feature].different:,}",
            ]
        )
    names = ["Feature", "View", "Compared", "Different", "Probed", "Different", "Stale"]
    note = (
        "What the items of a request share is compared once a request, the rest once an item. Stale: offline it was "
        "another value at the request's own time than at the snapshot; that is no difference between the two stores."
    )
    return page.table(names, rows) + page.note(note)


def _different(one: Compared, probed: Mapping[str, Compared]) -> int:
    return one.different + (probed[one.feature].different if one.feature in probed else 0)


def _examples(found: Replay) -> str:
    parts = [one for one in (found.served, found.probe) if one is not None and one.worst]
    if not parts:
        return "<p>None.</p>"
    rows = [
        [
            one.feature,
            str(example.user_id),
            "" if example.item_id is None else str(example.item_id),
            page.value(example.time),
            example.served,
            example.offline,
        ]
        for part in parts
        for one in part.worst
        for example in one.examples
    ]
    counts = dict(found.worst[:BARS])
    picture = page.figure(_bars(counts, page.BAD, "values that differ"), "Values that differ by feature")
    return picture + page.table(["Feature", "User", "Item", "Time", "Served", "Offline"], rows)


def _stale(found: Replay) -> str:
    stale = found.stale
    if stale.share is None:
        return page.note("No logged request was replayed.")
    counts = {one.feature: one.different / one.compared for one in stale.worst[:BARS]}
    said = (
        f"{stale.vectors - stale.equal:,} of {stale.vectors:,} vectors ({percent(1 - stale.share)}) would hold another "
        "value if the offline join were at the request's own time and not at the snapshot that the answer could use. "
        "This is staleness, not inconsistency: training rows are joined at the same snapshot."
    )
    if not counts:
        return f"<p>{page.text(said)}</p>"
    drawn = _bars({name: 100 * share for name, share in counts.items()}, page.CANDIDATE, "% of the values are stale")
    return f"<p>{page.text(said)}</p>" + page.figure(drawn, "Stale values by feature")


BARS = 20
"""Features in a picture, at most."""


def _bars(values: Mapping[str, float], colour: str, says: str) -> Figure:
    """A bar a feature, the longest on top."""
    figure = Figure(figsize=(5.6, 0.8 + 0.22 * len(values)), layout="constrained")
    axes = figure.subplots()
    names = sorted(values, key=lambda name: values[name])
    axes.barh(names, [values[name] for name in names], color=colour)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(says)
    return figure
