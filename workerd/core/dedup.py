"""What is remembered of jobs: which are finished, and which went back to be run again. Pure.

What is kept on disk, and learnt from other instances, is the business of `runlog.writer`.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable

from workerd.core.keyset import KeySet

#: In place of a channel: the verdict could not be sent, for want of one.
NEVER_SENT = 0
#: In place of a channel: an earlier process of this instance sent it and closed all in order.
ALL_CLOSED = -1
#: In place of a channel: it was sent on one that was retired, or that an earlier process of
#: this instance has lost.
GONE = -2


class Elsewhere(enum.Enum):
    """What the other instances of this host know of a job that was redelivered here."""

    UNKNOWN = enum.auto()
    #: It has a delivery in hand there that waits for a slot.
    WAITING = enum.auto()
    #: It runs there, or has just run; the channel it came on is not known to be lost.
    ATTACHED = enum.auto()
    #: A living instance writes a run log that this version does not understand.
    MAY_RUN = enum.auto()
    #: It runs there, and its channel was lost: this redelivery belongs to that run.
    ORPHANED = enum.auto()
    #: It has its verdict, and the channel on which that was sent is gone.
    FINISHED = enum.auto()


class Dedup:
    """How many jobs of each key are finished, by the channel on which their verdict was sent.

    Keeps between ``size`` × 3/4 and ``size`` of the newest keys, in generations, so that
    forgetting costs nothing.
    """

    GENERATIONS = 4
    #: Why what is told here does not outlive this process, "" when nothing keeps it from that.
    failure = ""

    def __init__(self, size: int = 100_000) -> None:
        self._limit = max(1, size // self.GENERATIONS)
        self._generations: deque[dict[int, KeySet]] = deque([{}], self.GENERATIONS)
        #: How many jobs of each key went back, and have not come again since.
        self._returned: deque[dict[bytes, int]] = deque([{}], self.GENERATIONS)
        self._spent: dict[bytes, int] = {}

    # What the ledger tells.

    def waits(self, key: bytes) -> None:
        """A delivery is in hand, and its job cannot start yet."""

    def dropped(self, key: bytes) -> None:
        """A delivery that waited does not start, and does not go back either."""

    def started(self, key: bytes, channel: int, begun: bool = True) -> None:
        """A run has its slot, for a delivery of this channel; it has ``begun``, or will."""

    def begun(self, key: bytes) -> None:
        """A run that had not begun begins: from now on it is an attempt."""

    def settled(self, key: bytes, channel: int, ran: bool = True) -> None:
        """A run has its verdict, or (not ``ran``) a redelivery of it was settled: sent there."""
        if sum(map(len, self._generations[0].values())) >= self._limit:
            self.age()
        self._put(key, channel)
        self._spent.pop(key, None)

    def forgotten(self, key: bytes) -> None:
        """A run has its verdict, which must not settle a redelivery."""
        self._spent.pop(key, None)

    def returned(self, key: bytes, ran: bool) -> None:
        """A job goes back: after a run (``ran``), or without one."""
        newest = self._returned[0]
        newest[key] = newest.get(key, 0) + 1

    def spent(self, key: bytes) -> None:
        """The run after which a job goes back was an attempt, as if it had been cut off."""
        self._spent[key] = self._spent.get(key, 0) + 1

    def lost(self, channel: int) -> None:
        """A channel is gone, and perhaps what was sent on it."""

    def closed(self, channel: int) -> None:
        """A channel was closed in order: the broker has read all that was sent on it."""

    def age(self) -> None:
        """Begin a new generation; the oldest of four is forgotten."""
        self._generations.appendleft({})
        self._returned.appendleft({})

    def flush(self) -> None:
        """What was told until now outlives this process, whatever comes."""

    # What the ledger asks.

    def look(self) -> None:
        """Learn what others have told since; to be called before the questions below."""

    def recall(self, key: bytes, begun: bool = False) -> bool:
        """Whether a redelivery is of a job that went back, and must run; true once for each.

        What waits at another instance, or has ``begun`` there, counts as back already: that
        instance may have lost it without knowing, or be dead without our knowing.
        """
        for counts in self._returned:
            if key in counts:
                counts[key] -= 1
                if not counts[key]:
                    del counts[key]
                return True
        return False

    def take(self, key: bytes, usable: Callable[[int], bool] = lambda _channel: True) -> bool:
        """Use up one finished job of this key whose channel is ``usable``, if there is one."""
        for generation in self._generations:
            for channel, keys in generation.items():
                if usable(channel) and keys.remove(key):
                    return True
        return False

    def cut_off(self, key: bytes) -> int | None:
        """How many attempts of a job ended with the daemon that had started them.

        None when it has to do with no such end. 0 is possible: a process may have come to it.
        """
        return self._spent.get(key)

    def elsewhere(self, key: bytes) -> Elsewhere:
        """What is known of a job that came here as a redelivery; FINISHED only once."""
        return Elsewhere.UNKNOWN

    def runs_elsewhere(self, key: bytes) -> bool:
        """Whether another instance has such a job in hand that no redelivery was taken for."""
        return False

    @property
    def unsent(self) -> bool:
        """Whether there is a verdict that was never sent."""
        return any(generation.get(NEVER_SENT) for generation in self._generations)

    def __len__(self) -> int:
        return sum(len(keys) for each in self._generations for keys in each.values())

    def _put(self, key: bytes, channel: int) -> None:
        newest = self._generations[0]
        keys = newest.get(channel)
        if keys is None:
            keys = newest[channel] = KeySet()
        keys.add(key)
