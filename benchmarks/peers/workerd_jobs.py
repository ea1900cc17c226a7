"""The jobs as Python functions of workerd."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import work


def noop(_job: Any) -> None:
    work.noop()


def stamp(job: Any) -> None:
    work.stamp(job.body)


def slow(_job: Any) -> None:
    work.slow()
