"""What a candidate must show before it may replace the champion: the gate's policy, as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from penstock.events import LABELS
from penstock.fusion import KIND, OBJECTIVE

_FUSED = re.compile(rf"({KIND})_({'|'.join(LABELS)})")
RECALL_MEASURES = ("recall@50", "recall@200", "ndcg@50")
BASELINES = ("popularity", "item_item_cf")
SLICES = ("new users", "known users", "new items", "tail items", "scenarios")


def fused_measure(name: str) -> bool:
    """Whether `name` is a figure of the fused score: `mean_auc`, `auc_LABEL`, `gauc_LABEL`, `ndcg@K_LABEL`."""
    return name == OBJECTIVE or _FUSED.fullmatch(name) is not None


def measure_in_words(measure: str) -> str:
    """How a figure of the fused score is called in a sentence."""
    if measure == OBJECTIVE:
        return "mean AUC"
    kind, label = measure.split("_", 1)
    return f"{kind.upper()} of {label}"


@dataclass(frozen=True)
class Config:
    """The thresholds. Differences are candidate - champion (or a baseline); "the low end" is that of their interval.

    Attributes:
        confidence: of every interval, two-sided.
        replicates: draws of users, where an interval is found by drawing; `seed` makes them the same each time.
        primary: the figure of the fused score that must become better: `mean_auc` over the labels, `auc_LABEL`,
            `gauc_LABEL` by user, or `ndcg@K_LABEL` by session.
        margin: the low end of its difference to the champion must be above this: about what another seed of the same
            model gives, so that with many rows luck is no reason to change what is live.
        single_head_margin: a first release may be this much worse than its best single head, at the low end.
        heads: by label, how much worse the AUC of a head may be than the champion's, at the low end. With 600
            positives the interval of a paired difference is some ±0.01 to 0.02 wide: less rejects for want of data.
        guardrails: the same for figures of the fused score, and for `recall@50`, `recall@200` and `ndcg@50` of the
            recall model.
        baselines: `popularity` (of rank and recall) and `item_item_cf` (of recall), and by how much they must be
            beaten at the low end: the fused score's primary figure, and recall@50.
        slices: where harm is looked for: a mean AUC whose difference's whole interval is below 0.
        calibration_ratio: what a head predicts over what happened is to be between 1 / this and this; an interval
            wholly outside is too far off.
        calibration_slope: the same for the slope of the label's log-odds over the predicted ones.
        highest_auc, highest_gain: a head or a gain better than these is taken for a leak, not for a success.
        minimum_rows, minimum_users, minimum_cases: test rows; users; positives, and negatives, of each label.
        slice_rows, slice_cases: the same for a slice to be judged; smaller slices are only named.
        latency_ms: of a request of the rehearsal, its 99th percentile.
        score_tolerance: by how much a rehearsed score may differ from the training graph's.
    """

    confidence: float = 0.95
    replicates: int = 500
    seed: int = 20
    primary: str = OBJECTIVE
    margin: float = 0.001
    single_head_margin: float = 0.002
    heads: Mapping[str, float] = field(default_factory=lambda: {"click": 0.005, "long_view": 0.005, "like": 0.02})
    guardrails: Mapping[str, float] = field(default_factory=lambda: {"gauc_click": 0.01, "recall@50": 0.02})
    baselines: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(BASELINES, 0.0))
    slices: tuple[str, ...] = SLICES
    calibration_ratio: float = 1.25
    calibration_slope: float = 1.25
    highest_auc: float = 0.985
    highest_gain: float = 0.1
    minimum_rows: int = 1000
    minimum_users: int = 100
    minimum_cases: int = 50
    slice_rows: int = 500
    slice_cases: int = 30
    latency_ms: float = 250.0
    score_tolerance: float = 1e-4

    def faults(self) -> list[str]:
        """What is missing or makes no sense, in words; a policy with faults judges nothing."""
        found = []
        for name, value in dataclasses.asdict(self).items():
            parts: Mapping[str, Any] = value if isinstance(value, Mapping) else {"": value}
            for key, threshold in parts.items():
                called = f"{name} of {key}" if key else name
                if isinstance(threshold, str | tuple):
                    continue
                if not isinstance(threshold, int | float) or not isfinite(threshold):
                    found.append(f"{called} is {threshold!r}, which is no number")
                elif threshold < 0:
                    found.append(f"{called} is {threshold}, below 0")
        if not 0 < self.confidence < 1:
            found.append(f"confidence is {self.confidence}, not between 0 and 1")
        if not fused_measure(self.primary):
            found.append(f"primary is {self.primary!r}: there are mean_auc, auc_LABEL, gauc_LABEL and ndcg@K_LABEL")
        missing = [label for label in LABELS if label not in self.heads]
        if missing:
            found.append(f"heads has no margin for {', '.join(missing)}")
        for what, names, known in (
            ("heads", self.heads, LABELS),
            ("baselines", self.baselines, BASELINES),
            ("slices", self.slices, SLICES),
            ("guardrails", [name for name in self.guardrails if not fused_measure(name)], RECALL_MEASURES),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                found.append(f"{what} has {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        return found
