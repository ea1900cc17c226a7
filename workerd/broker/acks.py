"""The acknowledgements of a channel, in as few frames as can be. Pure."""

from __future__ import annotations


class Acks:
    """Which of the messages that came on a channel are settled, by their tags.

    A broker counts what it sends on a channel from 1. Acknowledging ``multiple`` is for all that
    came before as well, so it is for those alone of which each is settled.
    """

    def __init__(self) -> None:
        #: The lowest tag that is not settled, and those above it that are.
        self._lowest = 1
        self._settled: set[int] = set()
        #: What is yet to be acknowledged.
        self._waiting: list[int] = []

    def __bool__(self) -> bool:
        """Whether something is yet to be acknowledged."""
        return bool(self._waiting)

    def add(self, tag: int) -> None:
        """This one is to be acknowledged."""
        self._waiting.append(tag)
        self.settled(tag)

    def settled(self, tag: int) -> None:
        """The broker need not be told of this one any more, now or later."""
        self._settled.add(tag)

    def take(self) -> list[tuple[int, bool]]:
        """What to acknowledge now: tags, and whether ``multiple``."""
        while self._lowest in self._settled:
            self._settled.remove(self._lowest)
            self._lowest += 1
        waiting, self._waiting = self._waiting, []
        below = [tag for tag in waiting if tag < self._lowest]
        # Not of a tag that the broker has forgotten, as one that went back.
        together = [(max(below), len(below) > 1)] if below else []
        return together + [(tag, False) for tag in waiting if tag >= self._lowest]
