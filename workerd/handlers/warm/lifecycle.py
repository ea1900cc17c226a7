"""The states of a warm process, as a table. Pure.

    starting    the process has not said that it is ready
    failed      it did not become ready; what it says no longer counts
    ready       it takes jobs
    leaving     it does the jobs that it has, takes no other, and then reads the end of its input
    ending      it has been sent SIGTERM; what it still answers counts
    broken      it has broken the protocol; what it says no longer counts
    ended       it is gone

`TRANSITIONS` says which input moves it where. Any other input is a mistake of whoever reports it:
it raises AssertionError, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

State = Literal["starting", "failed", "ready", "leaving", "ending", "broken", "ended"]
#: What happens: it says that it is ready; it does not become ready; it is to leave; it is sent
#: SIGTERM; it breaks the protocol; it is over.
Input = Literal["ready", "unfit", "leave", "end", "breach", "over"]

TRANSITIONS: Mapping[State, Mapping[Input, State]] = {
    "starting": {"ready": "ready", "unfit": "failed", "end": "ending"},
    "failed": {"over": "ended"},
    "ready": {"leave": "leaving", "end": "ending", "breach": "broken", "over": "ended"},
    "leaving": {"end": "ending", "breach": "broken", "over": "ended"},
    # A second reason to end it changes nothing.
    "ending": {"end": "ending", "breach": "broken", "over": "ended"},
    "broken": {"end": "broken", "over": "ended"},
    "ended": {},
}


class Lifecycle:
    """The state of one process."""

    def __init__(self) -> None:
        self.state: State = "starting"

    def move(self, event: Input) -> None:
        """This has happened. Raises AssertionError when it cannot happen in this state."""
        after = TRANSITIONS[self.state].get(event)
        if after is None:
            raise AssertionError(f"{event!r} of a process that is {self.state}")
        self.state = after
