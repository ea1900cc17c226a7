"""The ledger: which jobs run, which delivery each will settle, what a redelivery means.

The pure core of workerd: no I/O, no clock, no tasks. The shell reports five things
(`delivered`, `ended`, `finished`, `lost` or `retired`, `drain`) and does what is returned.
Being in one of the collections *is* the state of a job:

    waiting     delivered, not started: a slot of its queue must become free first
    held        redelivered, while another instance of this host may be running it
    running     a handler works on it, or a copy of it is being published
    finished    remembered by its key, to settle what the broker sends again

The rules, in the order in which `delivered` applies them to a delivery:

1.  A redelivery with the key of a run whose own delivery was lost *rejoins* that run:
    when it ends, this delivery is settled. No run ever has two deliveries to settle, so
    of two equal messages each needs a run of its own, and none is dropped.
2.  A redelivery of a *named* job (one with a message id) whose key is in the memory of
    finished jobs is settled at once, if the channel on which that verdict was sent is
    gone; otherwise the earlier settlement stands and this is another message. Anonymous
    jobs are never settled from memory: equal ones cannot be told apart.
3.  Likewise when another instance of this host has finished it. While that instance runs
    it, the redelivery is held, without a slot: `look_again` settles it when the run has its
    verdict, and lets it run when that instance dies, or does not lose the channel it got
    the job on within PATIENCE seconds: then theirs is another message.
4.  A job that workerd itself has published is *unique*: another message with its key, while
    it is in hand or once it is finished, is the same copy published twice for want of a
    confirm, and is settled at once. So 1 to 3 need no regard for twins there.
5.  While draining it waits, to be given back.
6.  It starts when its queue has a free slot, and waits otherwise; jobs that come due before
    those that were never delayed. A handler with warm processes may have more than that: they
    are *ahead*, and begin when a slot becomes free, or when the job before them in the same
    process ends and its slot is theirs.
7.  One whose last start ended with the daemon, or that was ahead then, starts *alone*, when no
    handler runs, and none starts until it has ended: if it brings the daemon down again,
    nobody else is blamed.

A delivery that goes back to the broker unfinished will come again flagged as
redelivered. An equal job may be finished before it does, and that memory must not settle
it, or it would be gone without ever having run. So the ledger counts what went back: so
many redeliveries of that key run before one is settled from memory.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from workerd.job import Delivery, Job
from workerd.memory import ALL_CLOSED, GONE, NEVER_SENT, Elsewhere, Memory
from workerd.retry import Verdict
from workerd.values import value

#: In place of a queue: whose jobs start only while nothing else runs.
ALONE = ""

#: Seconds that another instance has to notice the loss of a channel whose job came to us.
PATIENCE = 5.0


@dataclass(slots=True, eq=False)
class Run:
    """A job that is being worked on. ``delivery`` is None once its channel is lost.

    It has ``begun`` once its handler gives it to a process; while it is ``ahead`` it has no slot.
    One that is ``withdrawn`` before it has begun never begins.
    ``over`` says that the handler has ended; a copy of the job may still have to be published.
    """

    job: Job
    delivery: Delivery | None
    begun: bool = True
    ahead: bool = False
    withdrawn: bool = False
    over: bool = False


@value
class Rejoined:
    """A redelivery belongs to ``run``, which is still going on here."""

    run: Run


@value
class Settle:
    """An order to settle ``delivery``, now, on the channel it came on."""

    delivery: Delivery
    verdict: Verdict


class Ledger:
    """The state of every job that this process holds. See the rules above."""

    def __init__(
        self,
        concurrency: Mapping[str, int],
        memory: Memory | None = None,
        begins_at_once: Callable[[Job], bool] = lambda _job: True,
        capacity: Callable[[Job], int] = lambda _job: 0,
    ) -> None:
        """``capacity`` says how many jobs the handler of this one could have, slots or not."""
        self._begins_at_once = begins_at_once
        self._capacity = capacity
        self.memory = Memory() if memory is None else memory
        self.running: set[Run] = set()
        self.draining = False
        #: Redeliveries of what another instance may be running; see rule 3.
        self.held: list[Delivery] = []
        #: Queues of which nothing may start at present.
        self.paused: set[str] = set()
        #: Whether a job may start only while no other runs.
        self.one_at_a_time = False
        self._waiting: dict[str, deque[Delivery]] = {ALONE: deque()}
        self._busy: dict[str, int] = {}
        #: How many run of each type, whether they have begun or not.
        self._taken: Counter[str | None] = Counter()
        #: Those whose handler has not ended, the one that must be alone there, and how many of
        #: each queue have no slot.
        self._active: set[Run] = set()
        self._ahead: Counter[str] = Counter()
        self._alone: Run | None = None
        self.configure(concurrency)
        #: Runs that a redelivery may rejoin, by key: their channel was lost or retired.
        self._orphans: dict[bytes, list[Run]] = {}
        #: Channels that consume.
        self._live: set[int] = set()
        #: Channels closed in order: what was sent on them was read. But a broker that is
        #: killed forgets that, so they count only until the next channel is lost.
        self._closed: set[int] = {ALL_CLOSED}

    def configure(self, concurrency: Mapping[str, int]) -> None:
        """The slots of each queue that is consumed. Jobs that run now go on, whatever it says."""
        self.concurrency = dict(concurrency)
        for queue in concurrency:
            self._waiting.setdefault(queue, deque())
            self._busy.setdefault(queue, 0)

    def opened(self, channel: int) -> None:
        """A channel begins to consume; deliveries may name it from now on."""
        self._live.add(channel)

    def delivered(self, delivery: Delivery) -> Run | Settle | Rejoined | None:
        """What to do with a delivery: run it, settle it, or nothing (it rejoined, or waits).

        Call `look_again` now and then while some are `held`.
        """
        job = delivery.job
        assert delivery.channel in self._live, "a delivery came on a channel that is gone"
        if job.redelivered:
            self.memory.look()
            orphan = self._adopt(job.key)
            if orphan is not None:
                orphan.delivery = delivery
                return Rejoined(orphan)
            if job.unique and self._in_hand(job.key):
                return Settle(delivery, Verdict.DONE)
            if job.named and (job.unique or not self.memory.recall(job.key)):
                if self._remembers(job):
                    return self._settle_again(delivery)
                return self._consult(delivery, 0.0)
        elif job.unique:
            self.memory.look()
            if self._in_hand(job.key):
                return Settle(delivery, Verdict.DONE)
            known = Elsewhere.FINISHED if self._remembers(job) else self.memory.elsewhere(job.key)
            if known is Elsewhere.FINISHED:
                return self._settle_again(delivery)
            if known is not Elsewhere.UNKNOWN:
                return Settle(delivery, Verdict.DONE)
        return self._line_up(delivery)

    def _in_hand(self, key: bytes) -> bool:
        jobs = [run.job for run in self.running]
        jobs += [each.job for each in itertools.chain(self.held, *self._waiting.values())]
        return any(job.key == key for job in jobs)

    def _line_up(self, delivery: Delivery) -> Run | None:
        """Let it wait for its turn; returns the run of the job whose turn it is, if any."""
        job = delivery.job
        lost_starts = self.memory.cut_off(job.key) if job.redelivered else None
        line = self._waiting[job.queue]
        if lost_starts is not None:
            delivery = replace(delivery, job=job.after_lost_starts(lost_starts))
            line = self._waiting[ALONE]
        # Delayed jobs have waited before, and come first.
        place = sum(each.delayed for each in line) if delivery.delayed else len(line)
        line.insert(place, delivery)
        run = self.next()
        if job.named and (run is None or run.delivery is not delivery):
            self.memory.waits(job.key)
        return run

    def look_again(self, now: float) -> list[Run | Settle]:
        """What has become of the deliveries that are held; ``now`` is monotonic."""
        decisions = []
        self.memory.look()
        for delivery in self.held.copy():
            self.held.remove(delivery)
            decision = self._consult(delivery, now - delivery.received)
            if decision:
                decisions.append(decision)
        return decisions

    def _consult(self, delivery: Delivery, waited: float) -> Run | Settle | None:
        """Rule 3, for a delivery that has been held for so many seconds."""
        elsewhere = self.memory.elsewhere(delivery.job.key)
        if elsewhere is Elsewhere.FINISHED:
            return self._settle_again(delivery)
        if elsewhere is Elsewhere.ORPHANED or (
            elsewhere is Elsewhere.ATTACHED and waited < PATIENCE
        ):
            self.held.append(delivery)
            return None
        if waited:
            self.memory.recall(delivery.job.key)  # if its run there went back, here it is
        return self._line_up(delivery)

    def _settle_again(self, delivery: Delivery) -> Settle:
        self.memory.settled(delivery.job.key, delivery.channel)
        return Settle(delivery, Verdict.DONE)

    def next(self) -> Run | None:
        """A job that may start now, started; None when there is none."""
        if self._is_closed():
            return None
        suspect = self._suspect()
        if suspect:
            return None if self._active else self._start(ALONE, suspect)
        for queue, waiting in self._waiting.items():
            if waiting and self._is_open(queue):
                if self._has_slot(queue):
                    return self._start(queue, waiting[0])
                job = waiting[0].job
                if self._taken[job.type] < self._capacity(job):
                    return self._start(queue, waiting[0], ahead=True)
        return None

    def may_begin(self, run: Run, behind: str | None = None) -> bool:
        """Whether a job that is with its handler may begin now.

        Or, ``behind`` one of this queue in the same process, once that one has ended.
        """
        if run.withdrawn:
            return False
        if not run.ahead:
            return True
        if self._is_closed() or self._suspect() or not self._is_open(run.job.queue):
            return False
        return self._has_slot(run.job.queue) if behind is None else behind == run.job.queue

    def _is_closed(self) -> bool:
        """Whether nothing at all may start."""
        alone = self._alone is not None or (self.one_at_a_time and bool(self._active))
        return self.draining or alone

    def _suspect(self) -> Delivery | None:
        """The next job that must run alone."""
        if not self._waiting[ALONE]:
            return None
        return next((each for each in self._waiting[ALONE] if self._is_open(each.job.queue)), None)

    def _has_slot(self, queue: str) -> bool:
        return self._busy[queue] < self.concurrency[queue]

    def _is_open(self, queue: str) -> bool:
        return queue in self.concurrency and queue not in self.paused

    def _start(self, line: str, delivery: Delivery, ahead: bool = False) -> Run:
        self._waiting[line].remove(delivery)
        begun = not ahead and self._begins_at_once(delivery.job)
        run = Run(delivery.job, delivery, begun, ahead)
        self.running.add(run)
        self._taken[run.job.type] += 1
        if line == ALONE:
            self._alone = run
        if ahead:
            self._ahead[run.job.queue] += 1
        else:
            self._active.add(run)
            self._busy[run.job.queue] += 1
        self.memory.started(run.job.key, delivery.channel, run.begun)
        return run

    def begins(self, run: Run) -> None:
        """The handler of a run is about to give it to a process: from now on it is an attempt."""
        if run.ahead:
            run.ahead = False
            self._ahead[run.job.queue] -= 1
            self._active.add(run)
            self._busy[run.job.queue] += 1
        if not run.begun:
            run.begun = True
            self.memory.begun(run.job.key)

    def ended(self, run: Run) -> None:
        """The handler of a run has ended; its verdict is still to be carried out."""
        run.over = True
        self._active.discard(run)
        if self._alone is run:
            self._alone = None

    def finished(self, run: Run, verdict: Verdict) -> Settle | None:
        """A run has its verdict: the delivery to settle now, or None when that was lost."""
        self.begins(run)  # or no longer: what has ended is told of those that have
        self.ended(run)
        self.running.remove(run)
        self._busy[run.job.queue] -= 1
        self._taken[run.job.type] -= 1
        self._disown(run)
        if not verdict.remembered:
            self.memory.returned(run.job.key, ran=True)
            if verdict is Verdict.SPEND:
                self.memory.spent(run.job.key)
        elif run.job.named:
            self.memory.settled(run.job.key, self._sent_on(run.delivery))
        else:
            self.memory.forgotten(run.job.key)
        return Settle(run.delivery, verdict) if run.delivery else None

    def lost(self, channel: int) -> None:
        """A channel is gone, and every delivery that came on it: its runs go on as orphans.

        Must be called the moment it is known, before any other report: a job that ends in
        between would be settled on a dead channel and forgotten.
        """
        self._live.discard(channel)
        self._closed.clear()
        self.memory.lost(channel)
        for run in self.running:
            if run.delivery and run.delivery.channel == channel:
                self._orphan(run)
                run.delivery = None
        self.held = [delivery for delivery in self.held if delivery.channel != channel]
        for waiting in self._waiting.values():
            gone = [delivery for delivery in waiting if delivery.channel == channel]
            self._drop(waiting, gone)

    def closed(self, channel: int) -> None:
        """We have closed a channel, with nothing left to settle on it, and the broker agreed."""
        assert not self.holds(channel)
        if channel not in self._live:
            self.lost(channel)  # retired: the broker may have taken back what was settled here
            return
        self._live.discard(channel)
        self._closed.add(channel)
        self.memory.closed(channel)

    def retired(self, channel: int, stale_before: float) -> list[Delivery]:
        """The broker cancelled the consumer of a channel that itself stays open.

        Its runs may still be settled there, except for deliveries received before
        ``stale_before``: those have timed out and were taken back. All may be rejoined by
        a redelivery on another channel. Returns the waiting ones, to be given back.
        """
        self._live.discard(channel)
        self.memory.lost(channel)
        for run in self.running:
            if run.delivery and run.delivery.channel == channel:
                self._orphan(run)
                if run.delivery.received < stale_before:
                    run.delivery = None
        return [
            delivery for delivery in self.detached(channel) if delivery.received >= stale_before
        ]

    def detached(self, channel: int) -> list[Delivery]:
        """We have cancelled the consumer of a channel; its runs are still settled there.

        Returns the deliveries that have not started, to be given back.
        """
        back = [delivery for delivery in self.held if delivery.channel == channel]
        self.held = [delivery for delivery in self.held if delivery.channel != channel]
        for waiting in self._waiting.values():
            mine = [delivery for delivery in waiting if delivery.channel == channel]
            self._drop(waiting, mine)
            back += mine
        return back

    def holds(self, channel: int) -> bool:
        """Whether a run still has to be settled on this channel."""
        return any(run.delivery and run.delivery.channel == channel for run in self.running)

    def idle(self, channel: int) -> bool:
        """Whether nothing that came on this channel is in hand, started or not."""
        unstarted = itertools.chain(self.held, *self._waiting.values())
        return not self.holds(channel) and all(each.channel != channel for each in unstarted)

    def drain(self) -> None:
        """Start nothing from now on; what still arrives is held, for `unstarted` to return."""
        self.draining = True

    def unstarted(self) -> list[Delivery]:
        """Take out everything that waits, in the order in which it came, to be given back."""
        back = [delivery for waiting in self._waiting.values() for delivery in waiting]
        back += self.held
        self.held = []
        for waiting in self._waiting.values():
            self._drop(waiting, list(waiting))
        return sorted(back, key=lambda delivery: (delivery.channel, delivery.tag))

    @property
    def slots(self) -> int:
        """How many jobs have a slot."""
        return sum(self._busy.values())

    def busy(self, queue: str) -> int:
        """How many jobs of a queue have a slot."""
        return self._busy[queue]

    def is_alone(self, run: Run) -> bool:
        """Whether nothing starts until this one has ended."""
        return run is self._alone

    @property
    def has_slot_ahead(self) -> bool:
        """Whether a job that is ahead could have a slot."""
        return any(
            number and self._is_open(queue) and self._has_slot(queue)
            for queue, number in self._ahead.items()
        )

    @property
    def unbegun(self) -> list[Run]:
        """The runs that no process has come to yet."""
        return [run for run in self.running if not run.begun]

    def waiting(self, queue: str) -> int:
        """How many delivered jobs of a queue wait for a slot."""
        return len(self._waiting[queue]) + self._ahead[queue]

    @property
    def suspects(self) -> int:
        """How many jobs wait to run alone, before anything else."""
        return len(self._waiting[ALONE])

    def owes(self) -> bool:
        """Whether a redelivery would let something be settled that cannot be settled now."""
        return self.memory.unsent or any(run.delivery is None for run in self.running)

    def age(self) -> None:
        """Let the memory grow older by a third of the time that jobs are remembered."""
        self.memory.age()

    def _remembers(self, job: Job) -> bool:
        """Whether a redelivery is one of a finished job; that memory is used up by it."""
        if job.unique:
            return self.memory.take(job.key)
        # One whose verdict was never sent is sure to come again.
        return self.memory.take(job.key, lambda sent_on: sent_on == NEVER_SENT) or (
            self.memory.take(job.key, self._may_be_lost)
        )

    def _sent_on(self, delivery: Delivery | None) -> int:
        """The channel of a verdict over this delivery, as it is remembered."""
        if delivery is None:
            return NEVER_SENT
        return delivery.channel if delivery.channel in self._live else GONE

    def _may_be_lost(self, sent_on: int) -> bool:
        """Whether a verdict sent on this channel may not have arrived."""
        return sent_on not in self._live and sent_on not in self._closed

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
            if delivery.job.named:
                self.memory.returned(delivery.job.key, ran=False)
