"""The ledger: which jobs run, which delivery each will settle, what a redelivery means.

The pure core of workerd: no I/O, no clock, no tasks. The shell reports four things
(`delivered`, `finished`, `lost` or `retired`, `drain`) and does what is returned.
Being in one of the collections *is* the state of a job:

    waiting     delivered, not started: a slot of its queue must become free first
    running     a handler works on it, or its dead letter is being published
    finished    remembered by its key, to settle what the broker sends again

The rules, in the order in which `delivered` applies them to a delivery:

1.  A redelivery with the key of a run whose own delivery was lost *rejoins* that run:
    when it ends, this delivery is settled. No run ever has two deliveries to settle, so
    of two equal messages each needs a run of its own, and none is dropped.
2.  A redelivery of a *named* job (one with a message id) whose key is in the memory of
    finished jobs is settled at once, if the channel on which that verdict was sent is
    gone; otherwise the earlier settlement stands and this is another message. Anonymous
    jobs are never settled from memory: equal ones cannot be told apart.
3.  While draining it is held, to be given back.
4.  It starts when its queue has a free slot, and waits otherwise.

A delivery that goes back to the broker unfinished will come again flagged as
redelivered. An equal job may be finished before it does, and that memory must not settle
it, or it would be gone without ever having run. So the ledger counts what went back: so
many redeliveries of that key run before one is settled from memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from workerd.job import Delivery, Job
from workerd.retry import Verdict


@dataclass(slots=True, eq=False)
class Run:
    """A job that is being worked on. ``delivery`` is None once its channel is lost."""

    job: Job
    delivery: Delivery | None


@dataclass(frozen=True, slots=True)
class Rejoined:
    """A redelivery belongs to ``run``, which is still going on here."""

    run: Run


@dataclass(frozen=True, slots=True)
class Settle:
    """An order to settle ``delivery``, now, on the channel it came on."""

    delivery: Delivery
    verdict: Verdict


class Memory:
    """How many jobs there are of each key, by the channel on which their verdict was sent.

    Keeps between ``size`` × 3/4 and ``size`` of the newest keys, in generations, so that
    forgetting costs nothing.
    """

    GENERATIONS = 4
    #: Stands for a channel where there was none.
    NEVER_SENT = 0

    def __init__(self, size: int = 100_000) -> None:
        self._limit = max(1, size // self.GENERATIONS)
        self._generations: deque[dict[int, dict[bytes, int]]] = deque([{}], self.GENERATIONS)

    def add(self, key: bytes, channel: int = NEVER_SENT) -> None:
        if sum(map(len, self._generations[0].values())) >= self._limit:
            self.age()
        counts = self._generations[0].setdefault(channel, {})
        counts[key] = counts.get(key, 0) + 1

    def take(self, key: bytes, usable: Callable[[int], bool] = lambda _channel: True) -> bool:
        """Use up one job of this key whose channel is ``usable``, if there is one."""
        for generation in self._generations:
            for channel, counts in generation.items():
                if key in counts and usable(channel):
                    counts[key] -= 1
                    if not counts[key]:
                        del counts[key]
                    return True
        return False

    @property
    def unsent(self) -> bool:
        """Whether there is a job whose verdict was never sent."""
        return any(generation.get(self.NEVER_SENT) for generation in self._generations)

    def age(self) -> None:
        """Begin a new generation; the oldest of four is forgotten."""
        self._generations.appendleft({})

    def __len__(self) -> int:
        return sum(len(counts) for each in self._generations for counts in each.values())


class Ledger:
    """The state of every job that this process holds. See the rules above."""

    def __init__(self, concurrency: Mapping[str, int], memory: Memory | None = None) -> None:
        self.concurrency = dict(concurrency)
        self.memory = memory or Memory()
        self.running: set[Run] = set()
        self.draining = False
        self._waiting: dict[str, deque[Delivery]] = {queue: deque() for queue in concurrency}
        self._busy = dict.fromkeys(concurrency, 0)
        #: Runs that a redelivery may rejoin, by key: their channel was lost or retired.
        self._orphans: dict[bytes, list[Run]] = {}
        #: Jobs that went back unfinished, and must run when they come again.
        self._returned = Memory()
        #: Channels that still consume. A verdict sent on any other may have been lost.
        self._live: set[int] = set()

    def opened(self, channel: int) -> None:
        """A channel begins to consume; deliveries may name it from now on."""
        self._live.add(channel)

    def delivered(self, delivery: Delivery) -> Run | Settle | Rejoined | None:
        """What to do with a delivery: run it, settle it, or nothing (it rejoined, or waits)."""
        job = delivery.job
        assert delivery.channel in self._live, "a delivery came on a channel that is gone"
        if job.redelivered:
            orphan = self._adopt(job.key)
            if orphan is not None:
                orphan.delivery = delivery
                return Rejoined(orphan)
            if job.named and self._remembers(job.key):
                self.memory.add(job.key, delivery.channel)
                return Settle(delivery, Verdict.DONE)
        self._waiting[job.queue].append(delivery)
        return self.next(job.queue)

    def next(self, queue: str) -> Run | None:
        """The longest waiting job of a queue, started, if there is one and a slot is free."""
        waiting = self._waiting[queue]
        if self.draining or not waiting or self._busy[queue] >= self.concurrency[queue]:
            return None
        delivery = waiting.popleft()
        run = Run(delivery.job, delivery)
        self.running.add(run)
        self._busy[queue] += 1
        return run

    def finished(self, run: Run, verdict: Verdict) -> Settle | None:
        """A run has its verdict: the delivery to settle now, or None when that was lost."""
        self.running.remove(run)
        self._busy[run.job.queue] -= 1
        self._disown(run)
        if not verdict.remembered:
            self._went_back(run.job)
        elif run.job.named:
            sent_on = run.delivery.channel if run.delivery else Memory.NEVER_SENT
            self.memory.add(run.job.key, sent_on)
        return Settle(run.delivery, verdict) if run.delivery else None

    def lost(self, channel: int) -> None:
        """A channel is gone, and every delivery that came on it: its runs go on as orphans.

        Must be called the moment it is known, before any other report: a job that ends in
        between would be settled on a dead channel and forgotten.
        """
        self._live.discard(channel)
        for run in self.running:
            if run.delivery and run.delivery.channel == channel:
                self._orphan(run)
                run.delivery = None
        for waiting in self._waiting.values():
            gone = [delivery for delivery in waiting if delivery.channel == channel]
            self._drop(waiting, gone)

    def retired(self, channel: int, stale_before: float) -> list[Delivery]:
        """The broker cancelled the consumer of a channel that itself stays open.

        Its runs may still be settled there, except for deliveries received before
        ``stale_before``: those have timed out and were taken back. All may be rejoined by
        a redelivery on another channel. Returns the waiting ones, to be given back.
        """
        self._live.discard(channel)
        for run in self.running:
            if run.delivery and run.delivery.channel == channel:
                self._orphan(run)
                if run.delivery.received < stale_before:
                    run.delivery = None
        back = []
        for waiting in self._waiting.values():
            mine = [delivery for delivery in waiting if delivery.channel == channel]
            self._drop(waiting, mine)
            back += [delivery for delivery in mine if delivery.received >= stale_before]
        return back

    def holds(self, channel: int) -> bool:
        """Whether a run still has to be settled on this channel."""
        return any(run.delivery and run.delivery.channel == channel for run in self.running)

    def drain(self) -> None:
        """Start nothing from now on; what still arrives is held, for `unstarted` to return."""
        self.draining = True

    def unstarted(self) -> list[Delivery]:
        """Take out everything that waits, in the order in which it came, to be given back."""
        back = [delivery for waiting in self._waiting.values() for delivery in waiting]
        for waiting in self._waiting.values():
            self._drop(waiting, list(waiting))
        return sorted(back, key=lambda delivery: (delivery.channel, delivery.tag))

    def busy(self, queue: str) -> int:
        """How many jobs of a queue are running."""
        return self._busy[queue]

    def waiting(self, queue: str) -> int:
        """How many delivered jobs of a queue wait for a slot."""
        return len(self._waiting[queue])

    def owes(self) -> bool:
        """Whether a redelivery would let something be settled that cannot be settled now."""
        return self.memory.unsent or any(run.delivery is None for run in self.running)

    def age(self) -> None:
        """Let the memory grow older by a third of the time that jobs are remembered."""
        self.memory.age()
        self._returned.age()

    def _remembers(self, key: bytes) -> bool:
        """Whether a redelivery is one of a finished job; that memory is used up by it."""
        if self._returned.take(key):
            return False
        # One whose verdict was never sent is sure to come again.
        return self.memory.take(key, lambda channel: channel == Memory.NEVER_SENT) or (
            self.memory.take(key, lambda channel: channel not in self._live)
        )

    def _orphan(self, run: Run) -> None:
        owners = self._orphans.setdefault(run.job.key, [])
        if run not in owners:
            owners.append(run)

    def _adopt(self, key: bytes) -> Run | None:
        runs = self._orphans.get(key)
        if not runs:
            return None
        # One that has nothing to settle comes before one whose retired channel still could.
        run = next((run for run in runs if run.delivery is None), runs[0])
        self._disown(run)
        return run

    def _disown(self, run: Run) -> None:
        runs = self._orphans.get(run.job.key)
        if runs and run in runs:
            runs.remove(run)
            if not runs:
                del self._orphans[run.job.key]

    def _drop(self, waiting: deque[Delivery], gone: list[Delivery]) -> None:
        for delivery in gone:
            waiting.remove(delivery)
            self._went_back(delivery.job)

    def _went_back(self, job: Job) -> None:
        if job.named:
            self._returned.add(job.key)
