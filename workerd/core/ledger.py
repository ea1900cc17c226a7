"""The ledger: which jobs run, which delivery each will settle, what a redelivery means.

The pure core of workerd: no I/O, no clock, no tasks. The worker tells it what happens, and does
what is returned:

    opened, closed, detached, retired, lost     of a channel
    delivered, look_again, next                 what starts, what is settled at once
    withdraw, begins, ended, finished           of a run, in the order of `states`
    drain, unstarted, age                       of the whole

and asks `draining`, `holds`, `idle` and `owes`. What starts next depends on `slots`, what is known
of jobs that are over on `dedup`; both have questions and settings of their own.

A job that has been delivered is in one of these collections, and that *is* its state:

    waiting     in `slots`: a slot of its queue must become free first
    held        redelivered, while another instance of this host may be running it
    running     a handler works on it, or a copy of it is being published
    finished    in `dedup`: remembered by its key, to settle what the broker sends again

The rules, in the order in which `delivered` applies them to a delivery:

1.  A redelivery with the key of a run whose own delivery was lost *rejoins* that run:
    when it ends, this delivery is settled. No run ever has two deliveries to settle, so
    of two equal messages each needs a run of its own, and none is dropped.
2.  A redelivery of a *named* job (one with a message id) whose key is remembered among the
    finished jobs is settled at once, if the channel on which that verdict was sent is
    gone; otherwise the earlier settlement stands and this is another message. Anonymous
    jobs are never settled so: equal ones cannot be told apart.
3.  Likewise when another instance of this host has finished it. While that instance runs
    it, the redelivery is held, without a slot: `look_again` settles it when the run has its
    verdict, and lets it run when that instance dies, or does not lose the channel it got
    the job on within PATIENCE seconds: then theirs is another message. The same when the
    run log of a living instance cannot be understood, but then for as long as it lives.
4.  A job that workerd itself has published is *unique*: another message with its key, while
    it is in hand or once it is finished, here or at another instance, is the same copy
    published twice for want of a confirm, and is settled at once. So 1 to 3 need no regard
    for twins there. Two copies may come to two instances in one instant, and wait: so the
    other instances are asked once more when a copy that has waited is about to start.
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
it, or it would be gone without ever having run. So what went back is counted: so many
redeliveries of that key run before one is settled again. What another instance has in
hand may be on its way back already, as that instance can be dead, or cut off, without anybody
knowing: it counts too. The redelivery that runs in its place claims it, by its number, and
should it go back after all, that return counts nothing.

The lines and slots of 6 and 7 are kept in `slots`, the runs that 1 may find in `orphans`, what
2 to 4 ask in `dedup`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace

from workerd.core import states
from workerd.core.decisions import Rejoined, Settle
from workerd.core.dedup import NEVER_SENT, Dedup, Elsewhere
from workerd.core.job import Delivery, Job, Run
from workerd.core.orphans import Orphans
from workerd.core.retry import Verdict
from workerd.core.slots import Slots
from workerd.core.verdict_channels import VerdictChannels

#: What makes a job of another instance the same as a copy here: it is there, or was.
_SEEN = {Elsewhere.ATTACHED, Elsewhere.ORPHANED}

#: Seconds that another instance has to notice the loss of a channel whose job came to us.
PATIENCE = 5.0


class Ledger:
    """The state of every job that this process holds. See the rules above."""

    def __init__(
        self,
        concurrency: Mapping[str, int],
        dedup: Dedup | None = None,
        begins_at_once: Callable[[Job], bool] = lambda _job: True,
        capacity: Callable[[Job], int] = lambda _job: 0,
    ) -> None:
        """A job ``begins_at_once`` if only a slot keeps it from that; ``capacity``: see `Slots`."""
        self._begins_at_once = begins_at_once
        self.slots = Slots(concurrency, capacity)
        self.dedup = Dedup() if dedup is None else dedup
        self.running: set[Run] = set()
        #: Redeliveries of what another instance may be running; see rule 3.
        self.held: list[Delivery] = []
        self._orphans = Orphans()
        self._channels = VerdictChannels()

    def opened(self, channel: int) -> None:
        """A channel begins to consume; deliveries may name it from now on."""
        self._channels.opened(channel)

    def delivered(self, delivery: Delivery) -> Run | Settle | Rejoined | None:
        """What to do with a delivery: run it, settle it, or nothing (it rejoined, or waits).

        Call `look_again` now and then while some are `held`. Raises IllegalInput for a channel that
        consumes no more.
        """
        job = delivery.job
        if delivery.channel not in self._channels:
            raise states.IllegalInput("a delivery came on a channel that is gone")
        if job.redelivered:
            self.dedup.look()
            # Rule 1.
            orphan = self._orphans.adopt(delivery)
            if orphan is not None:
                return Rejoined(orphan)
            # Rule 4.
            if job.unique and self._in_hand(job.key):
                return Settle(delivery, Verdict.DONE)
            if job.named:
                return self._known(delivery, 0.0)
        # Rule 4.
        elif job.unique:
            self.dedup.look()
            if self._in_hand(job.key):
                return Settle(delivery, Verdict.DONE)
            twin = self._settled_by_twin(delivery, _SEEN | {Elsewhere.WAITING})
            if twin:
                return twin
        # Rules 5 to 7.
        return self._line_up(delivery)

    def _in_hand(self, key: bytes) -> bool:
        waits = any(each.job.key == key for each in self._unstarted())
        return waits or any(run.job.key == key for run in self.running)

    def _known(self, delivery: Delivery, waited: float) -> Run | Settle | None:
        """Rules 2 and 3, for a redelivery that rejoins nothing, held for so many seconds."""
        job = delivery.job
        if not job.unique and self.dedup.recall(job.key):
            return self._line_up(delivery)
        # What another instance may yet lose has no verdict, whatever its equals have.
        if (job.unique or not self.dedup.runs_elsewhere(job.key)) and self._remembers(job):
            return self._settle_again(delivery)
        return self._consult(delivery, waited)

    def _settled_by_twin(self, delivery: Delivery, seen: Set[Elsewhere]) -> Settle | None:
        """Rule 4, for a copy that was never delivered before, here or elsewhere."""
        key = delivery.job.key
        known = self.dedup.elsewhere(key)
        if known is Elsewhere.FINISHED or self._remembers(delivery.job):
            return self._settle_again(delivery)
        return Settle(delivery, Verdict.DONE) if known in seen else None

    def _line_up(self, delivery: Delivery) -> Run | Settle | None:
        """Let it wait for its turn; returns the run of the job whose turn it is, if any."""
        job = delivery.job
        lost_starts = self.dedup.cut_off(job.key) if job.redelivered else None
        if lost_starts is not None:
            delivery = replace(delivery, job=job.after_lost_starts(lost_starts))
        self.slots.line_up(delivery, suspect=lost_starts is not None)
        decision = self._next(delivery)
        if job.named and (decision is None or decision.delivery is not delivery):
            self.dedup.waits(job.key)
        return decision

    def look_again(self, now: float) -> list[Run | Settle]:
        """What has become of the deliveries that are held; ``now`` is monotonic."""
        decisions = []
        self.dedup.look()
        for delivery in self.held.copy():
            self.held.remove(delivery)
            decision = self._known(delivery, now - delivery.received)
            if decision:
                decisions.append(decision)
        return decisions

    def _consult(self, delivery: Delivery, waited: float) -> Run | Settle | None:
        """Rule 3, for a delivery that has been held for so many seconds."""
        job = delivery.job
        elsewhere = self.dedup.elsewhere(job.key)
        if elsewhere is Elsewhere.FINISHED:
            return self._settle_again(delivery)
        if job.unique and elsewhere is Elsewhere.ATTACHED:
            # No other message is this job: it is over there, or will be.
            if not self.dedup.runs_elsewhere(job.key):
                return self._settle_again(delivery)
            waited = 0.0
        if elsewhere in (Elsewhere.ORPHANED, Elsewhere.MAY_RUN) or (
            elsewhere is Elsewhere.ATTACHED and waited < PATIENCE
        ):
            self.held.append(delivery)
            return None
        if waited:
            # If its run there went back, here it is; or will go back, and is here already.
            self.dedup.recall(job.key, begun=True)
        return self._line_up(delivery)

    def _settle_again(self, delivery: Delivery) -> Settle:
        self.dedup.settled(delivery.job.key, delivery.channel, ran=False)
        return Settle(delivery, Verdict.DONE)

    def next(self) -> Run | Settle | None:
        """A job that may start now, started, or settled as its twin was; None: there is none."""
        return self._next(None)

    def _next(self, asked: Delivery | None) -> Run | Settle | None:
        """The same, when just now it was asked what is known of this delivery."""
        while (run := self.slots.next()) is not None:
            delivery = run.delivery
            assert delivery
            if delivery is not asked and run.job.unique:
                known, decision = self._ask_again(delivery)
                if known:
                    self._give_up(run)
                    if decision:
                        return decision
                    continue
            begins = run.state is states.READY and self._begins_at_once(run.job)
            if begins:
                run.state = states.BEGINS[states.READY]
            self.running.add(run)
            self.dedup.started(run.job.key, delivery.channel, begins)
            return run
        return None

    def _ask_again(self, delivery: Delivery) -> tuple[bool, Settle | None]:
        """Rules 3 and 4, of a copy that has waited: its twin may have started meanwhile."""
        self.dedup.look()
        if not delivery.job.redelivered:
            twin = self._settled_by_twin(delivery, _SEEN)
            return twin is not None, twin
        known = self.dedup.elsewhere(delivery.job.key)
        if known is Elsewhere.FINISHED:
            return True, self._settle_again(delivery)
        if known in _SEEN:
            self.held.append(delivery)
        return known in _SEEN, None

    def _give_up(self, run: Run) -> None:
        """A run that was about to start does not."""
        if run.dispatched:
            self.slots.begins(run)
        run.state = states.FINISH[run.state]
        self.slots.ended(run)
        self.slots.released(run)
        self.dedup.dropped(run.job.key)

    def begins(self, run: Run) -> None:
        """The handler of a run is about to give it to a process: from now on it is an attempt."""
        before = run.state
        run.state = states.BEGINS[before]
        if before is not states.BEGUN:
            self._counts_as_begun(run, before)

    def _counts_as_begun(self, run: Run, before: states.State) -> None:
        if before in states.SLOTLESS:
            self.slots.begins(run)
        self.dedup.begun(run.job.key)

    def withdraw(self, channel: int) -> list[Run]:
        """What came on this channel and has not begun is not to begin; returns these runs.

        Some may have begun without our knowledge, and then go on.
        """
        found = [
            run
            for run in self.running
            if not run.begun and run.delivery and run.delivery.channel == channel
        ]
        for run in found:
            run.state = states.WITHDRAW[run.state]
        return found

    def ended(self, run: Run) -> None:
        """The handler of a run has ended; its verdict is still to be carried out."""
        run.state = states.ENDS[run.state]
        self.slots.ended(run)

    def finished(self, run: Run, verdict: Verdict) -> Settle | None:
        """A run has its verdict: the delivery to settle now, or None when that was lost."""
        before = run.state
        run.state = states.FINISH[before]
        if before is not states.ENDED:
            if before is not states.BEGUN:
                # Or no longer: that something has ended is told of what has begun.
                self._counts_as_begun(run, before)
            self.slots.ended(run)
        self.slots.released(run)
        self.running.remove(run)
        self._orphans.discard(run)
        if not verdict.remembered:
            self.dedup.returned(run.job.key, ran=True)
            if verdict is Verdict.SPEND:
                self.dedup.spent(run.job.key)
        elif run.job.named:
            self.dedup.settled(run.job.key, self._channels.sent_on(run.delivery))
        else:
            self.dedup.forgotten(run.job.key)
        return Settle(run.delivery, verdict) if run.delivery else None

    def lost(self, channel: int) -> None:
        """A channel is gone, and every delivery that came on it: its runs go on as orphans.

        Must be called the moment it is known, before any other report: a job that ends in
        between would be settled on a dead channel and forgotten.
        """
        self._channels.one_is_lost()
        self.retired(channel, stale_before=math.inf)

    def closed(self, channel: int) -> None:
        """We have closed a channel, with nothing left to settle on it, and the broker agreed."""
        if self.holds(channel):
            raise states.IllegalInput("a channel was closed with a delivery to settle on it")
        if channel not in self._channels:
            self.lost(channel)  # retired: the broker may have taken back what was settled here
            return
        self._channels.closed(channel)
        self.dedup.closed(channel)

    def retired(self, channel: int, stale_before: float) -> list[Delivery]:
        """The broker cancelled the consumer of a channel that itself stays open.

        Its runs may still be settled there, except for deliveries received before
        ``stale_before``: those have timed out and were taken back. All may be rejoined by
        a redelivery on another channel. Returns the waiting ones, to be given back.
        """
        self._channels.retired(channel)
        self.dedup.lost(channel)
        for run in self.running:
            if run.delivery and run.delivery.channel == channel:
                self._orphans.add(run)
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
        for delivery in self.slots.take_out(channel):
            if delivery.job.named:
                self.dedup.returned(delivery.job.key, ran=False)
            back.append(delivery)
        return back

    def holds(self, channel: int) -> bool:
        """Whether a run still has to be settled on this channel."""
        return any(run.delivery and run.delivery.channel == channel for run in self.running)

    def idle(self, channel: int) -> bool:
        """Whether nothing that came on this channel is in hand, started or not."""
        return not self.holds(channel) and all(
            each.channel != channel for each in self._unstarted()
        )

    def drain(self) -> None:
        """Start nothing from now on; what still arrives is held, for `unstarted` to return."""
        self.slots.draining = True

    @property
    def draining(self) -> bool:
        return self.slots.draining

    def unstarted(self) -> list[Delivery]:
        """Take out everything that waits, in the order in which it came, to be given back."""
        channels = {delivery.channel for delivery in self._unstarted()}
        back = [delivery for channel in channels for delivery in self.detached(channel)]
        return sorted(back, key=lambda delivery: (delivery.channel, delivery.tag))

    def _unstarted(self) -> Iterator[Delivery]:
        return itertools.chain(self.held, self.slots.in_line)

    def owes(self) -> bool:
        """Whether a redelivery would let something be settled that cannot be settled now."""
        return self.dedup.unsent or any(run.delivery is None for run in self.running)

    def age(self) -> None:
        """Let what is remembered grow older by a third of the time that jobs are remembered."""
        self.dedup.age()

    def _remembers(self, job: Job) -> bool:
        """Whether a redelivery is one of a finished job; that memory is used up by it."""
        if job.unique:
            return self.dedup.take(job.key)
        # One whose verdict was never sent is sure to come again.
        return self.dedup.take(job.key, lambda sent_on: sent_on == NEVER_SENT) or (
            self.dedup.take(job.key, self._channels.may_be_lost)
        )
