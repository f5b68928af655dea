"""What one DAG leaves for the next, and how the newest is found."""

from __future__ import annotations

from typing import Any

from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowFailException

EXAMPLES = Asset(name="examples", uri="penstock://examples")
CANDIDATE = Asset(name="candidate", uri="penstock://candidate")
TURNED_DOWN = Asset(name="turned_down", uri="penstock://turned_down")
"""A candidate that the gate has rejected: nothing starts by it, a person may force its release."""


def newest(asset: Asset, context: Any, otherwise: str) -> dict[str, Any]:
    """What the newest event of `asset` says: the one that triggered this run, or the last there was.

    The task must name the asset in its `inlets`.

    Raises:
        AirflowFailException: there was none yet; `otherwise` says what to do.
    """
    events = list(context["triggering_asset_events"].get(asset, ())) or list(context["inlet_events"][asset])
    if not events:
        raise AirflowFailException(otherwise)
    return dict(events[-1].extra)
