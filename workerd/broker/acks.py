"""The acknowledgements of a channel, in as few frames as can be. Pure."""

from __future__ import annotations

import math


class Acks:
    """Which of the messages that came on a channel are settled, by their ascending tags.

    An acknowledgement that is ``multiple`` is for all that came before as well, so it is used only
    where each of those is settled.
    """

    def __init__(self) -> None:
        #: The tags that are not settled, ascending: never more than the broker sends ahead.
        self._unsettled: dict[int, None] = {}
        #: The tags that are yet to be acknowledged.
        self._waiting: list[int] = []

    def __bool__(self) -> bool:
        """Whether something is yet to be acknowledged."""
        return bool(self._waiting)

    def came(self, tag: int) -> None:
        """Note that a message has come, which is to be settled."""
        self._unsettled[tag] = None

    def add(self, tag: int) -> None:
        """Settle a message, by the next acknowledgement."""
        self._waiting.append(tag)
        self.settled(tag)

    def settled(self, tag: int) -> None:
        """Note that a message is settled: no acknowledgement of it is due, now or later."""
        self._unsettled.pop(tag, None)

    def take(self) -> list[tuple[int, bool]]:
        """What to acknowledge now: tags, and whether ``multiple``."""
        waiting, self._waiting = self._waiting, []
        lowest = next(iter(self._unsettled), math.inf)
        below = [tag for tag in waiting if tag < lowest]
        # Not of a tag that the broker has forgotten, as one that went back.
        together = [(max(below), len(below) > 1)] if below else []
        return together + [(tag, False) for tag in waiting if tag >= lowest]
