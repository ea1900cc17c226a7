"""The jobs as Python functions of workerd."""

from __future__ import annotations

from benchmarks.peers import work

# As in `typing`, which no job here needs.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from workerd.handlers.child import Job


def noop(_job: Job) -> None:
    work.noop()


def stamp(job: Job) -> None:
    work.stamp(job.body)


def slow(_job: Job) -> None:
    work.slow()
