"""Random episodes for the memory of a host: two instances, their journals, and a model broker.

Each message is run to its end. Those that have an id of their own never run twice at once, and
again only after a run that went back, or was cut off with its instance; so do copies, which workerd
has published twice, as one. Of equal messages nobody can tell which is which: so many are run to
their end as are acknowledged. An instance may be killed while its guardian still holds its lock,
and may take a while to notice that the broker has taken its deliveries back.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from workerd.core.decisions import Rejoined, Settle
from workerd.core.decode import decode
from workerd.core.job import COPY, Delivery, Message, Run
from workerd.core.ledger import PATIENCE, Ledger
from workerd.core.retry import Verdict
from workerd.runlog.writer import RunLog

CONCURRENCY = 2
PREFETCH = 3
EVERYTHING = 1000
INSTANCES = ("1", "2")
SOME = (0, 1, EVERYTHING)
#: The id of messages that are equal in everything.
CRON = "cron"


@dataclass(eq=False)
class Wire:
    """A channel, and the settlements under way on it."""

    serial: int
    received: dict[int, float] = field(default_factory=dict)
    #: What the broker waits to have settled, and what we have not settled, by tag.
    unacked: dict[int, int] = field(default_factory=dict)
    unsettled: dict[int, int] = field(default_factory=dict)
    under_way: list[tuple[int, Verdict]] = field(default_factory=list)
    #: The broker has taken everything back, and the instance has not noticed yet.
    broken: bool = False


class Instance:
    """One process after another of one instance."""

    def __init__(self, name: str, state: Path) -> None:
        self.name = name
        self.state = state
        self.alive = False
        #: Whether the guardian of a killed process still holds the lock, and since when.
        self.guarded = False
        self.died = 0.0

    def start(self) -> None:
        self.bury()
        self.alive = True
        self.run_log = RunLog(self.state, self.name, 3600.0, pytest.fail)
        self.ledger = Ledger({"queue": CONCURRENCY}, self.run_log)
        self.wires: dict[int, Wire] = {}
        self.consuming: Wire | None = None
        self.serials = 0
        #: What each run has to settle, None when that was lost, and the message that it is of.
        self.runs: dict[Run, tuple[int, Delivery | None]] = {}

    def end(self) -> None:
        """What the kernel does when a process ends, whose guardian lives on."""
        self.alive = False
        self.run_log.close()
        self.guarded = True

    def bury(self) -> None:
        """The guardian ends too."""
        if self.guarded:
            self.guarded = False
            os.close(self.run_log._lock)


class Host:
    """A broker and the instances of a host; a message is a number."""

    def __init__(self, state: Path) -> None:
        self.story: list[str] = []
        self.ready: list[int] = []
        self.redelivered: set[int] = set()
        self.settled: set[int] = set()
        self.acked: list[int] = []
        #: The id of each.
        self.ids: list[str] = []
        self.clock = 0.0
        # By id: starts; runs that went back or were cut off; runs that came to their end;
        # acknowledgements that the broker has read.
        self.starts: Counter[str] = Counter()
        self.vain: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.acks: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        #: Those that may run twice: an instance did not notice that they were taken back.
        self.excused: set[str] = set()
        self.instances = [Instance(name, state) for name in INSTANCES]
        for instance in self.instances:
            instance.start()

    def close(self) -> None:
        for instance in self.instances:
            if instance.alive:
                instance.end()
            instance.bury()

    def publish(self, kind: str) -> None:
        number = len(self.ids)
        name = CRON if kind == CRON else f"{kind}-{number}"
        for _ in range(2 if kind == "copy" else 1):
            self.story.append(f"#{len(self.ids)} published: {name}")
            self.ready.append(len(self.ids))
            self.ids.append(name)

    def _message(self, number: int) -> Message:
        name = self.ids[number]
        return Message(message_id=name, headers={COPY: name} if name.startswith("copy") else {})

    # One instance.

    def start(self, instance: Instance) -> None:
        if not instance.alive:
            self.story.append(f"{instance.name} starts")
            instance.start()

    def deliver(self, instance: Instance, count: int) -> None:
        if not instance.alive:
            return
        wire = instance.consuming or self._connect(instance)
        if wire.broken:
            return
        for message in self.ready[: min(count, PREFETCH - len(wire.unacked))]:
            self.ready.remove(message)
            tag = len(wire.received) + 1
            wire.received[tag] = self.clock
            wire.unacked[tag] = wire.unsettled[tag] = message
            flag = message in self.redelivered
            job = decode(self._message(message), "queue", flag)
            delivery = Delivery(wire.serial, tag, self.clock, job)
            again = ", redelivered" if flag else ""
            self.story.append(f"#{message} delivered to {instance.name}/{wire.serial}{again}")
            self._act(instance, instance.ledger.delivered(delivery), delivery)

    def _connect(self, instance: Instance) -> Wire:
        instance.serials += 1
        wire = instance.consuming = Wire(instance.serials)
        instance.wires[wire.serial] = wire
        instance.ledger.opened(wire.serial)
        return wire

    def _act(
        self,
        instance: Instance,
        decision: Run | Settle | Rejoined | None,
        delivery: Delivery | None = None,
    ) -> None:
        match decision:
            case Rejoined(run):
                self.story.append("  rejoined")
                instance.runs[run] = (instance.runs[run][0], delivery)
            case Settle(settled):
                message = instance.wires[settled.channel].unsettled[settled.tag]
                self.story.append(f"  #{message} settled from memory")
                self._settle(instance, decision)
            case Run():
                assert decision.delivery
                wire = instance.wires[decision.delivery.channel]
                message = wire.unsettled[decision.delivery.tag]
                self.story.append(f"  #{message} started by {instance.name}")
                instance.runs[decision] = (message, decision.delivery)
                name = self.ids[message]
                self.starts[name] += 1
                if name != CRON and name not in self.excused:
                    running = [r.job.id for other in self._living() for r in other.runs]
                    assert running.count(name) == 1, "twice at once"
                    assert self.starts[name] <= 1 + self.vain[name], "again for nothing"

    def look_again(self, instance: Instance) -> None:
        if instance.alive:
            self.clock += PATIENCE / 4
            for other in self.instances:
                if self.clock - other.died > PATIENCE / 2:
                    self.bury(other)
            for decision in instance.ledger.look_again(self.clock):
                self._act(instance, decision)

    def finish(self, instance: Instance, which: int, verdict: Verdict) -> None:
        if not instance.alive or not instance.runs:
            return
        run = list(instance.runs)[which % len(instance.runs)]
        message, delivery = instance.runs.pop(run)
        self.story.append(f"#{message} ends in {instance.name}: {verdict.value}")
        (self.done if verdict.remembered else self.vain)[self.ids[message]] += 1
        order = instance.ledger.finished(run, verdict)
        assert order == (Settle(delivery, verdict) if delivery else None)
        if order:
            self._settle(instance, order)
        self._start_more(instance)

    def _start_more(self, instance: Instance) -> None:
        while decision := instance.ledger.next():
            self._act(instance, decision)

    def _settle(self, instance: Instance, order: Settle) -> None:
        wire = instance.wires[order.delivery.channel]
        del wire.unsettled[order.delivery.tag]
        wire.under_way.append((order.delivery.tag, order.verdict))

    def stop(self, instance: Instance) -> None:
        """An orderly stop; one job is waited for, and the others are interrupted."""
        if not instance.alive:
            return
        self.story.append(f"{instance.name} stops")
        instance.ledger.drain()
        for delivery in instance.ledger.unstarted():
            self._settle(instance, Settle(delivery, Verdict.RETURN))
        self.finish(instance, 0, Verdict.DONE)
        while instance.runs:
            self.finish(instance, 0, Verdict.RETURN)
        for wire in list(instance.wires.values()):
            self._close(instance, wire, EVERYTHING, instance.ledger.closed)
        instance.end()
        instance.bury()

    def die(self, instance: Instance, acks_read: int) -> None:
        if not instance.alive:
            return
        self.story.append(f"{instance.name} is killed")
        for message, _ in instance.runs.values():
            self.vain[self.ids[message]] += 1
        instance.end()
        instance.died = self.clock
        for wire in list(instance.wires.values()):
            self._close(instance, wire, acks_read, lambda _channel: None)

    def bury(self, instance: Instance) -> None:
        if instance.guarded:
            self.story.append(f"the guardian of {instance.name} ends")
            instance.bury()

    # Its channels.

    def cut(self, instance: Instance) -> None:
        """The broker has lost an instance, which does not notice before it is told."""
        for wire in instance.wires.values() if instance.alive else ():
            self.story.append(f"{instance.name}/{wire.serial} is broken")
            wire.broken = True
            lost = list(wire.unacked.values())
            self.excused |= {self.ids[message] for message in lost}
            wire.unacked.clear()
            self._requeue(lost)

    def notice(self, instance: Instance) -> None:
        for wire in list(instance.wires.values()) if instance.alive else ():
            if wire.broken:
                self._close(instance, wire, 0, instance.ledger.lost)

    def lose(self, instance: Instance, acks_read: int) -> None:
        if instance.alive and instance.consuming:
            self._close(instance, instance.consuming, acks_read, instance.ledger.lost)

    def retire(self, instance: Instance, taken_back: int, believed: int) -> None:
        """The broker cancels a consumer and takes its oldest deliveries back."""
        wire = instance.consuming if instance.alive else None
        if wire is None or wire.broken:
            return
        self.story.append(f"{instance.name}/{wire.serial} retired, {taken_back} taken back")
        instance.consuming = None
        received = [wire.received[tag] for tag in wire.unacked]
        self._requeue([wire.unacked.pop(tag) for tag in list(wire.unacked)[:taken_back]])
        # Deliveries of one instant are taken back together.
        stale_before = ([-1.0, *received][: believed + 1])[-1] + 0.1
        self._drop(instance, wire, stale_before)
        for delivery in instance.ledger.retired(wire.serial, stale_before):
            self._settle(instance, Settle(delivery, Verdict.RETURN))

    def detach(self, instance: Instance) -> None:
        """A reload: the instance cancels its consumer and begins another."""
        wire = instance.consuming if instance.alive else None
        if wire is None or wire.broken:
            return
        self.story.append(f"{instance.name}/{wire.serial} detached")
        for delivery in instance.ledger.detached(wire.serial):
            self._settle(instance, Settle(delivery, Verdict.RETURN))
        self._connect(instance)

    def tidy(self, instance: Instance) -> None:
        """Channels that consume no more are closed when nothing is left to settle on them."""
        for wire in list(instance.wires.values()) if instance.alive else ():
            if wire is not instance.consuming and not (
                wire.broken or instance.ledger.holds(wire.serial)
            ):
                self._close(instance, wire, EVERYTHING, instance.ledger.closed)

    def _close(
        self, instance: Instance, wire: Wire, acks_read: int, tell: Callable[[int], None]
    ) -> None:
        lost = len(wire.under_way[acks_read:])
        self.story.append(f"{instance.name}/{wire.serial} ends; {lost} acks lost")
        self._read(wire, acks_read)
        del instance.wires[wire.serial]
        if instance.consuming is wire:
            instance.consuming = None
        self._requeue(list(wire.unacked.values()))
        self._drop(instance, wire, self.clock + 1)
        tell(wire.serial)

    def _drop(self, instance: Instance, wire: Wire, received_before: float) -> None:
        """These deliveries of a channel can never be settled."""
        gone = {tag for tag, when in wire.received.items() if when < received_before}
        for run, (message, delivery) in instance.runs.items():
            if delivery and delivery.channel == wire.serial and delivery.tag in gone:
                instance.runs[run] = (message, None)
        for tag in gone:
            wire.unsettled.pop(tag, None)

    # The broker.

    def _living(self) -> list[Instance]:
        return [instance for instance in self.instances if instance.alive]

    def read(self, instance: Instance, count: int) -> None:
        for wire in instance.wires.values() if instance.alive else ():
            self._read(wire, count)

    def _read(self, wire: Wire, count: int) -> None:
        for tag, verdict in wire.under_way[:count]:
            message = wire.unacked.pop(tag, None)
            if message is None:
                continue  # taken back before
            if verdict in (Verdict.RETURN, Verdict.SPEND):
                self._requeue([message])
                continue
            self.settled.add(message)
            if verdict is Verdict.REJECT:
                self.rejected[self.ids[message]] += 1
            else:
                self.acked.append(message)
                self._count_ack(self.ids[message])
        del wire.under_way[:count]

    def _count_ack(self, name: str) -> None:
        self.acks[name] += 1
        if name.startswith("copy"):
            left = any(self.ids[each] == name for each in set(range(len(self.ids))) - self.settled)
            assert self.done[name] or self.rejected[name] or left, "gone without having been run"
        else:
            assert self.acks[name] <= self.done[name], "acknowledged without having been run"

    def _requeue(self, messages: list[int]) -> None:
        self.redelivered |= set(messages)
        self.ready[:0] = messages

    def kill(self, forgotten: int) -> None:
        """The broker is killed; it comes back without having seen the last acks."""
        for instance in self.instances:
            if not instance.alive or all(wire.broken for wire in instance.wires.values()):
                return  # an instance without any channel does not hear of it
        self.story.append("broker killed")
        for instance in self.instances:
            for wire in list(instance.wires.values()):
                self._close(instance, wire, EVERYTHING, instance.ledger.lost)
        undone = self.acked[max(0, len(self.acked) - forgotten) :]
        self.acked.clear()
        self.settled -= set(undone)
        self.acks.subtract(self.ids[message] for message in undone)
        self._requeue(undone)

    def conclude(self) -> None:
        """All troubles are over: whatever is left comes to its end."""
        self.story.append("everything comes to its end")
        for _ in range(3 * len(self.ids) + 3):
            for instance in self.instances:
                self.start(instance)
                self.notice(instance)
                self.deliver(instance, EVERYTHING)
                for _ in range(6):
                    self.look_again(instance)
                while instance.runs:
                    self.finish(instance, 0, Verdict.DONE)
                self.read(instance, EVERYTHING)
                self.tidy(instance)
        assert self.settled == set(range(len(self.ids))), "a message is lost"
        assert not any(instance.ledger.held for instance in self.instances)


@dataclass(frozen=True)
class Step:
    """Something that may happen next; does nothing without an action."""

    action: Callable[..., None] | None
    arguments: tuple[object, ...] = ()
    instance: int | None = None

    def __call__(self, host: Host) -> None:
        if self.action and self.instance is None:
            self.action(host, *self.arguments)
        elif self.action and self.instance is not None:
            self.action(host, host.instances[self.instance], *self.arguments)


def _each(action: Callable[..., None], *choices: Iterable[object], weight: int = 1) -> list[Step]:
    return [
        Step(action, arguments, instance)
        for instance in range(len(INSTANCES))
        for arguments in product(*choices)
    ] * weight


#: All of them, the likelier ones more than once.
STEPS = [
    Step(None),
    *[Step(Host.publish, (kind,)) for kind in ("own", "own", CRON, CRON, "copy")] * 2,
    *(Step(Host.kill, (forgotten,)) for forgotten in SOME),
    *_each(Host.deliver, (1, 3), weight=5),
    *_each(Host.look_again, weight=4),
    *_each(Host.finish, range(2), Verdict),
    *_each(Host.finish, range(2), [Verdict.DONE], weight=3),
    *_each(Host.read, (1, EVERYTHING), weight=2),
    *_each(Host.lose, SOME),
    *_each(Host.die, SOME),
    *_each(Host.bury),
    *_each(Host.start, weight=3),
    *_each(Host.cut),
    *_each(Host.notice, weight=2),
    *_each(Host.stop),
    *_each(Host.retire, SOME, SOME),
    *_each(Host.detach, weight=2),
    *_each(Host.tidy, weight=3),
]
