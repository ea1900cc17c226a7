"""Which jobs are not to be run although they will come: cancelled by somebody. Pure.

Instants are in seconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass

from workerd.core.job import REPLAY, BadJob, Job, submitter
from workerd.ids import made_at

#: For how long a cancelled job is refused when it comes, in seconds.
KEPT = 86_400.0
#: How far the clocks of hosts may differ, in seconds.
SKEW = 5.0
#: How many ids are remembered; beyond that, the oldest are forgotten.
MOST = 10_000


@dataclass(frozen=True, slots=True)
class _Cancellation:
    when: float
    #: Whose jobs are meant; None: whoever has submitted it.
    owner: int | None


class Cancellations:
    """The ids of cancelled jobs, for a day."""

    def __init__(self) -> None:
        # In the order of their instants.
        self._by_id: dict[tuple[str, int | None], _Cancellation] = {}

    def add(self, job_id: str, owner: int | None, now: float) -> None:
        """Refuse this job from now on; with an ``owner``, only one that this user submitted."""
        self._by_id.pop((job_id, owner), None)
        self._by_id[job_id, owner] = _Cancellation(now, owner)
        self._forget(now)

    def check(self, job: Job, now: float) -> None:
        """Raises BadJob when this job was cancelled after it had been sent."""
        if not self._by_id:
            return
        self._forget(now)
        for owner in (None, submitter(job.message)):
            cancellation = self._by_id.get((job.id, owner))
            if cancellation and _sent_at(job) <= cancellation.when:
                raise BadJob("cancelled", "somebody has cancelled it")

    def _forget(self, now: float) -> None:
        while self._by_id:
            key, oldest = next(iter(self._by_id.items()))
            if len(self._by_id) <= MOST and oldest.when > now - KEPT:
                return
            del self._by_id[key]

    def __len__(self) -> int:
        return len(self._by_id)


def _sent_at(job: Job) -> float:
    """When the job was submitted, or sent back from the dead letters, as far as it tells."""
    replay = job.message.headers.get(REPLAY)
    replayed = made_at(replay) if isinstance(replay, str) else None
    return replayed or (job.message.timestamp or 0) - SKEW
