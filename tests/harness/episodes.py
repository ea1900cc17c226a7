"""Random episodes for the ledger: a small model of RabbitMQ and of the worker around it.

`Episode` plays the broker (queues, channels, flags, settlements that it may never read), the
network, the handlers and other hosts. It knows what the ledger cannot: which message a delivery
really is, and which acknowledgement was read. What must hold is asserted where it shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product

from workerd.core.decisions import Rejoined, Settle
from workerd.core.decode import decode
from workerd.core.job import ATTEMPT, COPY, REPLAY, Delivery, Message, Outcome, Report, Run
from workerd.core.ledger import Ledger
from workerd.core.republish import Origin, dead_letter, next_attempt
from workerd.core.retry import Verdict

CONCURRENCY = {"narrow": 1, "wide": 2}
PREFETCH = 3
EVERYTHING = 1000
NEVER_SENT = 0
#: In place of a queue: whose jobs start only while nothing else runs.
ALONE = ""
KINDS = (
    "named",
    "nameless",
    "nameless twin",
    "twin",
    "same id, other body",
    "same id, other time",
    "next attempt",
    "replay",
    "moved dead letter",
    "copy",
)


@dataclass(eq=False)
class Sent:
    """A published message. ``alike`` is equal for messages that nobody can tell apart."""

    number: int
    queue: str
    message: Message
    alike: str
    #: The broker's flag.
    redelivered: bool = False
    #: Whether the present ledger has been given it.
    seen: bool = False
    #: Whether the broker has read its last settlement.
    settled: bool = False

    @property
    def named(self) -> bool:
        return self.message.message_id is not None

    @property
    def unique(self) -> bool:
        """Whether workerd has published it: an equal one is the same job, published twice."""
        return COPY in self.message.headers

    def __str__(self) -> str:
        return f"#{self.number}"


@dataclass(eq=False)
class Wire:
    """One channel, both ends of it, and the settlements under way from us to the broker."""

    serial: int
    queue: str
    #: The broker has cancelled the consumer; the channel stays open.
    retired: bool = False
    #: Whether the worker itself has cancelled its consumer, as after a reload.
    detached: bool = False
    #: We have cancelled the consumer.
    cancelled: bool = False
    received: dict[int, float] = field(default_factory=dict)
    #: What the broker waits to have settled.
    unacked: dict[int, Sent] = field(default_factory=dict)
    #: What we have not settled.
    unsettled: dict[int, Sent] = field(default_factory=dict)
    under_way: list[tuple[int, Verdict]] = field(default_factory=list)


def places(deliveries: Iterable[Delivery]) -> list[tuple[int, int]]:
    """Where these were delivered. The ledger may know more of their jobs than we."""
    return [(delivery.channel, delivery.tag) for delivery in deliveries]


class Episode:
    """A broker, a worker and its ledger; every public method is something that may happen.

    Its handler has room for so many jobs, slots or not.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.story: list[str] = []
        self.sent: list[Sent] = []
        self.ready: dict[str, list[Sent]] = {queue: [] for queue in CONCURRENCY}
        #: What was acked since the broker was last killed, the oldest first.
        self.acked: list[Sent] = []
        #: The open channels, and which of them consumes a queue.
        self.wires: dict[int, Wire] = {}
        self.consuming: dict[str, Wire] = {}
        self.serials = 0
        self.clock = 0
        # Per likeness: messages, runs that came to a last verdict anywhere, acks that were
        # read, and redeliveries of messages that the ledger had never seen.
        self.published: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.acks: Counter[str] = Counter()
        self.mistaken: Counter[str] = Counter()
        self.rejected: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        """A worker that knows nothing."""
        self.ledger = Ledger(
            CONCURRENCY, None, lambda _job: not self.capacity, lambda _job: self.capacity
        )
        #: The runs that have no slot yet.
        self.dispatched: set[Run] = set()
        #: What each run has to settle, None when that was lost; in the order of starting.
        self.runs: dict[Run, Delivery | None] = {}
        self.alike: dict[Run, str] = {}
        self.waiting: dict[str, list[Delivery]] = {queue: [] for queue in (ALONE, *CONCURRENCY)}
        #: Attempts that were spent by runs after which the job went back, by its key.
        self.spent: Counter[bytes] = Counter()
        # Per likeness: starts, how many of them ended without a last verdict, and the
        # channels on which last verdicts were sent.
        self.starts: Counter[str] = Counter()
        self.returns: Counter[str] = Counter()
        self.verdicts: defaultdict[str, list[int]] = defaultdict(list)
        for sent in self.sent:
            sent.seen = False

    # Publishers, and other hosts.

    def publish(self, kind: str, queue: str) -> None:
        number = len(self.sent)
        own = str(number)
        match kind:
            case "named":
                message = Message(b"body", message_id=own)
            case "nameless":
                message = Message(own.encode())
            case "nameless twin":
                message = Message(b"twin")
            case "twin":
                message = Message(b"twin", message_id="cron", timestamp=1)
            case "same id, other body":
                message = Message(own.encode(), message_id="cron", timestamp=1)
            case "same id, other time":
                message = Message(b"twin", message_id="cron", timestamp=2 + number)
            case "next attempt":
                original = self._latest()
                spent = original.headers.get(ATTEMPT, 0)
                assert isinstance(spent, int)
                message = replace(original, headers={**original.headers, ATTEMPT: spent + 1})
            case "replay":
                message = replace(self._latest(), headers={REPLAY: own})
            case "moved dead letter":  # by the broker's own tools, which set no mark
                job = decode(self._latest(), queue)
                report = Report(Outcome.FAILED, "exit-status", exit_status=1)
                message, _ = dead_letter(job, report, Origin("host", "1"), number)
            case _:
                assert kind == "copy"
                message = self._latest()
        self._publish(queue, message, kind)

    def _publish(self, queue: str, message: Message, kind: str) -> None:
        sent = Sent(len(self.sent), queue, message, repr((queue, message)))
        self.published[sent.alike] += 1
        self.sent.append(sent)
        self.ready[queue].append(sent)
        self.story.append(f"{sent} published to {queue}: {kind}")

    def _latest(self) -> Message:
        """The message with an id that was published last."""
        named = [sent.message for sent in self.sent if sent.named]
        return named[-1] if named else Message(b"body", message_id="first")

    def pass_by(self, queue: str) -> None:
        """The next message was under way to somebody, us perhaps, who did not get it."""
        fresh = [sent for sent in self.ready[queue] if not sent.redelivered]
        if fresh:
            self.story.append(f"{fresh[0]} flagged as redelivered")
            fresh[0].redelivered = True

    def take_away(self, queue: str) -> None:
        """Another host runs the next message."""
        if self.ready[queue]:
            sent = self.ready[queue].pop(0)
            self.story.append(f"{sent} run elsewhere")
            sent.settled = True
            self.done[sent.alike] += 1
            self.acks[sent.alike] += 1

    # The broker delivers.

    def deliver(self, queue: str, count: int) -> None:
        wire = self.consuming.get(queue) or self._connect(queue)
        while wire and count and self.ready[queue] and len(wire.unacked) < PREFETCH:
            if wire.cancelled:
                return
            self._deliver(wire, self.ready[queue].pop(0))
            count -= 1

    def _connect(self, queue: str) -> Wire | None:
        if self.ledger.draining and not self.ledger.owes():
            return None
        self.serials += 1
        wire = Wire(self.serials, queue)
        self.wires[wire.serial] = self.consuming[queue] = wire
        self.ledger.opened(wire.serial)
        return wire

    def _deliver(self, wire: Wire, sent: Sent) -> None:
        tag = len(wire.received) + 1
        self.clock += 1
        wire.received[tag] = self.clock
        wire.unacked[tag] = wire.unsettled[tag] = sent
        job = decode(sent.message, wire.queue, sent.redelivered)
        delivery = Delivery(wire.serial, tag, self.clock, job, delayed=sent.unique)
        flag = ", redelivered" if sent.redelivered else ""
        self.story.append(f"{sent} delivered on channel {wire.serial}{flag}")
        orphans = [run for run in self.runs if self.alike[run] == sent.alike and self._lost(run)]
        waiting = [each.job.key for line in self.waiting.values() for each in line]
        in_hand = {*waiting, *(run.job.key for run in self.runs)}
        decision = self.ledger.delivered(delivery)
        if isinstance(decision, Rejoined):
            self.story.append("  rejoined")
            assert sent.redelivered, "another job joined a run"
            assert decision.run in orphans, "joined the run of another delivery"
            self.runs[decision.run] = delivery
        elif isinstance(decision, Settle):
            self.story.append("  settled from memory")
            self._check_memory(sent, wire)
            if not (sent.unique and delivery.job.key in in_hand):
                # For the ledger the job is over, and with it what its equals have spent.
                self.spent.pop(delivery.job.key, None)
            assert not orphans or not sent.redelivered, "its run goes on"
            assert decision == Settle(delivery, Verdict.DONE)
            self._settle(decision)
        else:
            assert not (sent.redelivered and orphans), "did not rejoin"
            alone = sent.redelivered and self.spent[delivery.job.key] > 0
            line = self.waiting[ALONE if alone else wire.queue]
            line.append(delivery)
            line.sort(key=lambda each: not each.delayed)
            self._next(decision)
        self.mistaken[sent.alike] += sent.redelivered and not sent.seen
        sent.seen = True

    def _lost(self, run: Run) -> bool:
        """Whether a run has nothing to settle, or only on a channel that consumes no more."""
        delivery = self.runs[run]
        return delivery is None or self.wires[delivery.channel].retired

    def _check_memory(self, sent: Sent, wire: Wire) -> None:
        """It may be settled without a run, in place of an equal one whose ack may be lost."""
        if sent.unique:
            if self.verdicts[sent.alike]:
                self.verdicts[sent.alike] = [wire.serial]
            else:
                assert self._has_another(sent) or self._is_over(sent), "settled, and nowhere else"
            return
        assert sent.redelivered, "a new job was settled from memory"
        assert sent.named, "a nameless job was settled from memory"
        live = {wire.serial for wire in self.wires.values() if not wire.retired}
        usable = [serial for serial in self.verdicts[sent.alike] if serial not in live]
        assert usable, "settled from memory, but the verdict of no equal job can have been lost"
        self.verdicts[sent.alike].remove(min(usable))
        self.verdicts[sent.alike].append(wire.serial)

    # The worker.

    def _start_more(self) -> None:
        while started := self.ledger.next():
            assert isinstance(started, Run), "nobody else has a copy"
            self._next(started)
        self._next(None)

    def _has_another(self, sent: Sent) -> bool:
        """Whether the same job is in the broker once more."""
        return any(
            other is not sent and other.alike == sent.alike and not other.settled
            for other in self.sent
        )

    def _is_over(self, sent: Sent) -> bool:
        """Whether the same job has been done, here or elsewhere, or is a dead letter."""
        return bool(self.done[sent.alike]) or sent.alike in self.rejected

    def _may_start(self) -> list[Delivery]:
        """The deliveries of which one must start now, if there are any."""
        if self.ledger.draining or any(run.job.lost_starts for run in self.runs):
            return []
        if self.waiting[ALONE]:
            return self.waiting[ALONE][:1] if self.dispatched.issuperset(self.runs) else []
        room = len(self.runs) < self.capacity
        free = [queue for queue in CONCURRENCY if room or self._has_slot(queue)]
        return [delivery for queue in free for delivery in self.waiting[queue][:1]]

    def _busy(self, queue: str) -> int:
        return sum(run.job.queue == queue for run in self.runs if run not in self.dispatched)

    def _has_slot(self, queue: str) -> bool:
        return self._busy(queue) < CONCURRENCY[queue]

    def _next(self, run: Run | None) -> None:
        """The ledger was asked what to start next."""
        may_start = self._may_start()
        turns = dict(zip(places(may_start), may_start, strict=True))
        if run is None:
            assert not turns, "a slot stays empty"
            return
        assert run.delivery
        [place] = places([run.delivery])
        assert place in turns, "it is not its turn"
        delivery = turns[place]
        for waiting in self.waiting.values():
            if delivery in waiting:
                waiting.remove(delivery)
        sent = self.wires[delivery.channel].unsettled[delivery.tag]
        self.story.append(f"  {sent} started")
        assert run.dispatched != self._has_slot(delivery.job.queue) or run.job.lost_starts
        if run.dispatched:
            self.dispatched.add(run)
        self.runs[run] = run.delivery
        self.alike[run] = sent.alike
        self.starts[sent.alike] += 1
        running = sum(self.alike[other] == sent.alike for other in self.runs)
        assert running <= (1 if sent.unique else self.published[sent.alike]), "twice at once"
        if sent.named and (self.published[sent.alike] == 1 or sent.unique):
            assert self.starts[sent.alike] <= 1 + self.returns[sent.alike], "again for nothing"

    def begin(self, which: int, behind: bool) -> None:
        """A process could do with another job, or comes to one that lies behind its last."""
        if not self.dispatched:
            return
        run = [run for run in self.runs if run in self.dispatched][which % len(self.dispatched)]
        closed = self.ledger.draining or any(each.job.lost_starts for each in self.runs)
        closed = closed or bool(self.waiting[ALONE])
        may_begin = not closed and (behind or self._has_slot(run.job.queue))
        assert self.ledger.slots.may_begin(run, run.job.queue if behind else None) == may_begin
        if may_begin:
            self.story.append("a run begins")
            self.ledger.begins(run)
            self.dispatched.remove(run)

    def finish(self, which: int, verdict: Verdict, copies: int = 1) -> None:
        """A run ends; for want of a confirm, its copy may have been published twice."""
        if not self.runs:
            return
        run = list(self.runs)[which % len(self.runs)]
        delivery = self.runs.pop(run)
        self.dispatched.discard(run)
        alike = self.alike[run]
        self.story.append(f"a run ends: {verdict.value}")
        if verdict in (Verdict.RETRY, Verdict.POSTPONE):
            spent = run.job.attempt - (verdict is Verdict.POSTPONE)
            message, _ = next_attempt(run.job, spent, f"copy {len(self.sent)}", 0.0)
            for _ in range(copies):
                self._publish(run.job.queue, message, verdict.value)
        if verdict.remembered:
            self.done[alike] += 1
            self.spent.pop(run.job.key, None)
            if run.job.named:
                self.verdicts[alike].append(delivery.channel if delivery else NEVER_SENT)
        else:
            self.returns[alike] += 1
            self.spent[run.job.key] += verdict is Verdict.SPEND
        order = self.ledger.finished(run, verdict)
        assert (order is None) == (delivery is None)
        if order:
            self._settle(order)
        self._start_more()

    def _settle(self, order: Settle) -> None:
        wire = self.wires.get(order.delivery.channel)
        assert wire, "settled on a channel that is gone"
        assert order.delivery.tag in wire.unsettled, "settled twice"
        del wire.unsettled[order.delivery.tag]
        wire.under_way.append((order.delivery.tag, order.verdict))

    def drain(self) -> None:
        self.story.append("drain")
        self.ledger.drain()

    def requeue(self) -> None:
        """In a drain, the consumers are cancelled, and what waits is given back."""
        if not self.ledger.draining:
            return
        self.story.append("consumers cancelled")
        for wire in self.consuming.values():
            wire.cancelled = True
        held = [delivery for waiting in self.waiting.values() for delivery in waiting]
        returned = self.ledger.unstarted()
        assert places(returned) == sorted(places(held))
        for waiting in self.waiting.values():
            waiting.clear()
        for delivery in returned:
            self._settle(Settle(delivery, Verdict.RETURN))

    def restart(self) -> None:
        """The worker ends, and another one begins."""
        for wire in list(self.wires.values()):
            self._close(wire, EVERYTHING)
        self.story.append("worker restarted")
        self._begin()

    # The broker reads, takes back, and breaks.

    def read(self, count: int) -> None:
        """The broker reads settlements."""
        for wire in self.wires.values():
            self._read(wire, count)

    def _read(self, wire: Wire, count: int) -> None:
        for tag, verdict in wire.under_way[:count]:
            sent = wire.unacked.pop(tag, None)
            if sent is None:
                continue  # taken back before
            self.story.append(f"broker reads that {sent} is {verdict.value}")
            if verdict in (Verdict.RETURN, Verdict.SPEND):
                self._requeue([sent])
            else:
                sent.settled = True
            if verdict is Verdict.REJECT:
                self.rejected.add(sent.alike)
            if verdict.remembered:
                self.acked.append(sent)
                self._count_ack(sent)
        del wire.under_way[:count]

    def _count_ack(self, sent: Sent) -> None:
        self.acks[sent.alike] += 1
        allowed = self.done[sent.alike]
        if sent.unique and (self._has_another(sent) or self._is_over(sent)):
            return
        if sent.named and self.published[sent.alike] > 1:
            # Nobody can tell a redelivery of unknown origin from its finished equal.
            allowed += self.mistaken[sent.alike]
        assert self.acks[sent.alike] <= allowed, "acknowledged without having been run"

    def _requeue(self, sents: list[Sent]) -> None:
        for sent in reversed(sents):
            sent.redelivered = True
            self.ready[sent.queue].insert(0, sent)

    def lose(self, queue: str, acks_read: int) -> None:
        """The channel that consumes a queue is lost, and some of its settlements with it."""
        if queue in self.consuming:
            self._close(self.consuming[queue], acks_read)

    def close_retired(self, acks_read: int) -> None:
        """Retired channels with nothing left to settle are closed, or all of them are lost."""
        for wire in list(self.wires.values()):
            mine = any(d and d.channel == wire.serial for d in self.runs.values())
            assert self.ledger.holds(wire.serial) == mine
            if (wire.retired or wire.detached) and (acks_read < EVERYTHING or not mine):
                self._close(wire, acks_read, in_order=acks_read == EVERYTHING)

    def _close(self, wire: Wire, acks_read: int, in_order: bool = False) -> None:
        self.story.append(
            f"channel {wire.serial} ends; {len(wire.under_way[acks_read:])} acks lost"
        )
        self._read(wire, acks_read)
        del self.wires[wire.serial]
        if self.consuming.get(wire.queue) is wire:
            del self.consuming[wire.queue]
        self._requeue(list(wire.unacked.values()))
        self._drop(wire, self.clock + 1)
        (self.ledger.closed if in_order else self.ledger.lost)(wire.serial)
        self._start_more()

    def kill(self, forgotten: int) -> None:
        """The broker is killed; it comes back without having seen the last acks."""
        if not self.wires:
            return  # a worker without any channel does not hear of it
        for wire in list(self.wires.values()):
            self._close(wire, EVERYTHING)
        undone = self.acked[max(0, len(self.acked) - forgotten) :]
        self.acked.clear()
        self.story.append(f"broker killed: {len(undone)} acks undone")
        for sent in undone:
            sent.settled = False
            self.acks[sent.alike] -= 1
        self._requeue(undone)

    def retire(self, queue: str, taken_back: int, believed: int) -> None:
        """The broker cancels a consumer and takes its oldest deliveries back.

        How many the worker believes it took depends on the timeout that it was told.
        """
        wire = self.consuming.pop(queue, None)
        if wire is None:
            return
        wire.retired = True
        self.story.append(f"channel {wire.serial} retired; {taken_back} taken back")
        received = [wire.received[tag] for tag in wire.unacked]
        self._requeue([wire.unacked.pop(tag) for tag in list(wire.unacked)[:taken_back]])
        stale_before = ([0, *received][: believed + 1])[-1] + 0.5
        held = self._unstarted_of(wire)
        self._drop(wire, stale_before)
        returned = self.ledger.retired(wire.serial, stale_before)
        fresh = [delivery for delivery in held if delivery.received >= stale_before]
        assert places(returned) == places(fresh)
        for delivery in returned:
            self._settle(Settle(delivery, Verdict.RETURN))
        self._start_more()

    def detach(self, queue: str) -> None:
        """The worker cancels its own consumer, to consume otherwise on another channel."""
        wire = self.consuming.pop(queue, None)
        if wire is None:
            return
        wire.detached = True
        self.story.append(f"channel {wire.serial} detached")
        held = self._unstarted_of(wire)
        assert places(self.ledger.detached(wire.serial)) == places(held)
        for delivery in held:
            self._settle(Settle(delivery, Verdict.RETURN))
        self._start_more()

    def _unstarted_of(self, wire: Wire) -> list[Delivery]:
        """Take out what came on a channel and has not started."""
        found = [
            d for waiting in self.waiting.values() for d in waiting if d.channel == wire.serial
        ]
        for waiting in self.waiting.values():
            waiting[:] = [delivery for delivery in waiting if delivery not in found]
        return found

    def _drop(self, wire: Wire, received_before: float) -> None:
        """These deliveries of a channel can never be settled."""
        gone = {(wire.serial, tag) for tag, when in wire.received.items() if when < received_before}
        for run, delivery in self.runs.items():
            if delivery and (delivery.channel, delivery.tag) in gone:
                self.runs[run] = None
        for waiting in self.waiting.values():
            waiting[:] = [d for d in waiting if (d.channel, d.tag) not in gone]
        for _, tag in gone:
            wire.unsettled.pop(tag, None)

    # The end.

    def check(self) -> None:
        """What the ledger says of itself is so."""
        ledger = self.ledger
        assert ledger.running == set(self.runs)
        for queue in CONCURRENCY:
            dispatched = sum(run.job.queue == queue for run in self.dispatched)
            assert ledger.slots.waiting(queue) == len(self.waiting[queue]) + dispatched
            assert ledger.slots.busy(queue) == self._busy(queue)
        unsent = any(delivery is None for delivery in self.runs.values())
        unsent |= any(NEVER_SENT in sent_on for sent_on in self.verdicts.values())
        assert ledger.owes() == unsent

    def conclude(self) -> None:
        """All troubles are over: whatever is left comes to its end."""
        self.story.append("everything comes to its end")
        if self.ledger.draining:
            self.restart()
        while self.runs or any(self.ready.values()) or any(w.unacked for w in self.wires.values()):
            before = len(self.story)
            for queue in CONCURRENCY:
                self.deliver(queue, EVERYTHING)
            while self.runs:
                self.finish(0, Verdict.DONE)
            self.read(EVERYTHING)
            self.close_retired(EVERYTHING)
            assert len(self.story) > before, "nothing moves any more"
        self.check()
        assert all(sent.settled for sent in self.sent), "a message is lost"
        ended = set(self.done) | self.rejected
        assert all(sent.alike in ended for sent in self.sent), "a job was never run"


@dataclass(frozen=True)
class Step:
    """Something that may happen next; does nothing without an action."""

    action: Callable[..., None] | None
    arguments: tuple[object, ...] = ()

    def __call__(self, episode: Episode) -> None:
        if self.action:
            self.action(episode, *self.arguments)
            episode.check()

    def __repr__(self) -> str:
        return f"{self.action.__name__}{self.arguments}" if self.action else "-"


def _each(action: Callable[..., None], *choices: Iterable[object], weight: int = 1) -> list[Step]:
    return [Step(action, arguments) for arguments in product(*choices)] * weight


SOME = (0, 1, EVERYTHING)

#: All of them, the likelier ones more than once.
STEPS = [
    Step(None),
    *_each(Episode.publish, KINDS, CONCURRENCY),
    *_each(Episode.deliver, CONCURRENCY, (1, 3), weight=6),
    *_each(Episode.begin, range(3), (False, True)),
    *_each(Episode.finish, range(3), Verdict),
    *_each(Episode.finish, range(3), [Verdict.RETRY, Verdict.POSTPONE], [2]),
    *_each(Episode.finish, range(3), [Verdict.DONE], weight=3),
    *_each(Episode.read, (1, EVERYTHING), weight=2),
    *_each(Episode.lose, CONCURRENCY, SOME),
    *_each(Episode.kill, SOME),
    *_each(Episode.retire, CONCURRENCY, SOME, SOME),
    *_each(Episode.detach, CONCURRENCY),
    *_each(Episode.close_retired, SOME),
    *_each(Episode.pass_by, CONCURRENCY),
    *_each(Episode.take_away, CONCURRENCY),
    *_each(Episode.drain),
    *_each(Episode.requeue, weight=2),
    *_each(Episode.restart),
]
