"""Which jobs are not to be run although they will come: cancelled by somebody. Pure.

Instants are in seconds since 1970.
"""

from __future__ import annotations

from workerd.core.job import REPLAY, BadJob, Job, submitter
from workerd.ids import made_at

#: For how long a cancelled job is refused when it comes, in seconds.
KEPT = 86_400.0
#: How far the clocks of hosts may differ, in seconds.
SKEW = 5.0
#: How many ids are remembered, of operators and of all others; beyond that, the oldest are
#: forgotten. Of one user, so many.
MOST = 10_000
MOST_OF_ONE = 1_000


class Cancellations:
    """The ids of cancelled jobs, for a day."""

    def __init__(self) -> None:
        #: When each id was cancelled, by whose jobs are meant (None: whoever has submitted them),
        #: in the order of those instants.
        self._by_owner: dict[int | None, dict[str, float]] = {}

    def add(self, job_id: str, owner: int | None, now: float) -> None:
        """Refuse this job from now on; with an ``owner``, only one that this user submitted."""
        mine = self._by_owner.pop(owner, {})
        mine.pop(job_id, None)
        mine[job_id] = now
        self._by_owner[owner] = mine
        if len(mine) > (MOST if owner is None else MOST_OF_ONE):
            del mine[next(iter(mine))]
        # The oldest of the user who has cancelled nothing for longest; never an operator's.
        if len(self) - len(self._by_owner.get(None, ())) > MOST:
            longest = next(each for each in self._by_owner if each is not None)
            del self._by_owner[longest][next(iter(self._by_owner[longest]))]
        self._forget(now)

    def check(self, job: Job, now: float) -> None:
        """Raises BadJob when this job was cancelled after it had been sent."""
        if not self._by_owner:
            return
        self._forget(now)
        for owner in (None, submitter(job.message)):
            when = self._by_owner.get(owner, {}).get(job.id)
            if when is not None and _sent_at(job) <= when:
                raise BadJob("cancelled", "somebody has cancelled it")

    def _forget(self, now: float) -> None:
        for owner, cancelled in list(self._by_owner.items()):
            while cancelled and next(iter(cancelled.values())) <= now - KEPT:
                del cancelled[next(iter(cancelled))]
            if not cancelled:
                del self._by_owner[owner]

    def __len__(self) -> int:
        return sum(map(len, self._by_owner.values()))


def _sent_at(job: Job) -> float:
    """When the job was submitted, or sent back from the dead letters, as far as it tells."""
    replay = job.message.headers.get(REPLAY)
    replayed = made_at(replay) if isinstance(replay, str) else None
    return replayed or (job.message.timestamp or 0) - SKEW
