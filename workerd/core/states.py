"""The states of a run, and the inputs that move it from one to the next. Pure.

A job that waits has no run: it is a delivery, and the collection that it is in (`held`, or a line
of the slots) is its state. It has a run from the moment it is given to its handler until its
verdict is carried out.

1.  A run is *ready* when it has its slot, or *dispatched*: with a handler that keeps jobs in front
    of its processes, and without a slot of its own.
2.  It has *begun* once a process has the job, or may have it: from then on it is an attempt, and
    has a slot. To be told so again changes nothing: a handler that begins at once says it too.
3.  One that has not begun can be *withdrawn*, with its slot, or *recalled*, without one, and then
    it does not begin. But a process may have come to it before, and the daemon learn that only
    now: so it may still turn out to have begun.
4.  When the handler of a run has ended, the run has *ended*, and only its verdict can follow: a
    copy may still have to be published first. One that never began is withdrawn or recalled then.
5.  Every run is *finished* once, whatever it was before; nothing follows on that.

Each input has a table: the states that know it, and what each becomes by it. Any other state raises
IllegalInput, before anything has changed: that is a bug of workerd, with which the daemon ends, and
the broker gives its jobs to another.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    """What a run is."""

    DISPATCHED = enum.auto()
    READY = enum.auto()
    RECALLED = enum.auto()
    WITHDRAWN = enum.auto()
    BEGUN = enum.auto()
    ENDED = enum.auto()
    FINISHED = enum.auto()


# By themselves, as each job asks for them several times.
DISPATCHED, READY, RECALLED, WITHDRAWN, BEGUN, ENDED, FINISHED = State


class IllegalInput(Exception):
    """A bug of workerd: the ledger was told what cannot be. Only the end of the daemon helps."""


class Transitions(dict[State, State]):
    """What a run becomes by an input; raises IllegalInput for a state that does not know it."""

    def __init__(self, name: str, transitions: dict[State, State]) -> None:
        super().__init__(transitions)
        self._name = name

    def __missing__(self, state: State) -> State:
        raise IllegalInput(f"a run that is {state} cannot be told: {self._name}")


#: Its handler gives it to a process.
BEGINS = Transitions(
    "begins",
    {
        DISPATCHED: BEGUN,
        READY: BEGUN,
        RECALLED: BEGUN,
        WITHDRAWN: BEGUN,
        BEGUN: BEGUN,
    },
)

#: It is not to begin.
WITHDRAW = Transitions(
    "withdraw",
    {
        DISPATCHED: RECALLED,
        READY: WITHDRAWN,
        RECALLED: RECALLED,
        WITHDRAWN: WITHDRAWN,
    },
)

#: Its handler has ended.
ENDS = Transitions(
    "ends",
    {
        DISPATCHED: RECALLED,
        READY: WITHDRAWN,
        RECALLED: RECALLED,
        WITHDRAWN: WITHDRAWN,
        BEGUN: ENDED,
    },
)

#: It has its verdict.
FINISH = Transitions(
    "finish",
    {
        DISPATCHED: FINISHED,
        READY: FINISHED,
        RECALLED: FINISHED,
        WITHDRAWN: FINISHED,
        BEGUN: FINISHED,
        ENDED: FINISHED,
    },
)

#: Without a slot.
SLOTLESS = (DISPATCHED, RECALLED)
