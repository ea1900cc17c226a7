"""The acknowledgements of a channel, in as few frames as can be. Pure."""

from __future__ import annotations

import math


class Acks:
    """Which of the messages that came on a channel are settled, by their tags, which ascend.

    Acknowledging ``multiple`` is for all that came before as well, so it is for those alone of
    which each is settled.
    """

    def __init__(self) -> None:
        #: Those that are not settled, in ascending order: never more than the broker sends ahead,
        #: however long one of them takes.
        self._unsettled: dict[int, None] = {}
        #: What is yet to be acknowledged.
        self._waiting: list[int] = []

    def __bool__(self) -> bool:
        """Whether something is yet to be acknowledged."""
        return bool(self._waiting)

    def came(self, tag: int) -> None:
        """This one is to be settled."""
        self._unsettled[tag] = None

    def add(self, tag: int) -> None:
        """This one is to be acknowledged."""
        self._waiting.append(tag)
        self.settled(tag)

    def settled(self, tag: int) -> None:
        """The broker need not be told of this one any more, now or later."""
        self._unsettled.pop(tag, None)

    def take(self) -> list[tuple[int, bool]]:
        """What to acknowledge now: tags, and whether ``multiple``."""
        waiting, self._waiting = self._waiting, []
        lowest = next(iter(self._unsettled), math.inf)
        below = [tag for tag in waiting if tag < lowest]
        # Not of a tag that the broker has forgotten, as one that went back.
        together = [(max(below), len(below) > 1)] if below else []
        return together + [(tag, False) for tag in waiting if tag >= lowest]
