"""Follows runs on a cluster for tasks that have given their worker back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent


class RunTrigger(BaseTrigger):
    """Fires when a run has ended, when it may not go on, or when its cluster has been away for too long.

    The event is {"error", "submitted", "run"}: an error, or the run as it ended.
    """

    def __init__(self, submitted: dict[str, str], ends_at: float | None) -> None:
        super().__init__()
        self.submitted, self.ends_at = submitted, ends_at

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "dags.following.RunTrigger", {"submitted": self.submitted, "ends_at": self.ends_at}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        from components import kubeflow

        stage, run_id = self.submitted["stage"], self.submitted["run_id"]
        try:
            cluster = kubeflow.Cluster.of()
            client = await asyncio.to_thread(kubeflow.Kubeflow, cluster)
            patience = kubeflow.Patience("follow", cluster.host)
            while True:
                # Airflow ends a trigger that is late without a word to it, and the run would go on
                if self.ends_at is not None and time.time() > self.ends_at:
                    await self.on_kill()
                    raise kubeflow.StageError("the task may not take longer; its run is cancelled")
                found = await asyncio.to_thread(client.glance, run_id, patience)
                if found and found.state in kubeflow.ENDED:
                    yield TriggerEvent({"error": "", "submitted": self.submitted, "run": asdict(found)})
                    return
                await asyncio.sleep(kubeflow.POLL_SECONDS)
        except kubeflow.StageError as error:
            yield TriggerEvent({"error": f"stage {stage}: {error}", "submitted": self.submitted, "run": {}})

    async def on_kill(self) -> None:
        """A task that is cleared, or marked by hand, takes its run with it."""
        from components import kubeflow

        client = await asyncio.to_thread(kubeflow.Kubeflow, kubeflow.Cluster.of(), kubeflow.CANCEL_SECONDS)
        await asyncio.to_thread(client.cancel, self.submitted["run_id"])
