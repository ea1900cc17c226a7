"""Orphans: runs whose channel is lost or consumes no more, which a redelivery may rejoin. Pure."""

from __future__ import annotations

from workerd.core.job import Delivery, Run


class Orphans:
    """The runs that a redelivery may rejoin, by the key of their job."""

    def __init__(self) -> None:
        self._runs: dict[bytes, list[Run]] = {}

    def add(self, run: Run) -> None:
        """A redelivery may rejoin it from now on."""
        runs = self._runs.setdefault(run.job.key, [])
        if run not in runs:
            runs.append(run)

    def adopt(self, delivery: Delivery) -> Run | None:
        """The run that this redelivery rejoins, and will be settled by; None when there is none."""
        runs = self._runs.get(delivery.job.key)
        if not runs:
            return None
        # One that has nothing to settle comes before one whose retired channel still could.
        run = next((run for run in runs if run.delivery is None), runs[0])
        self.discard(run)
        run.delivery = delivery
        return run

    def discard(self, run: Run) -> None:
        """It is no orphan, or no longer."""
        runs = self._runs.get(run.job.key)
        if runs and run in runs:
            runs.remove(run)
            if not runs:
                del self._runs[run.job.key]
