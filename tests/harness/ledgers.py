"""A ledger by itself, the channels of a test, and the messages that come on them."""

from __future__ import annotations

from workerd.core.decisions import Rejoined, Settle
from workerd.core.decode import decode
from workerd.core.job import COPY, Delivery, Message, Run
from workerd.core.ledger import Ledger
from workerd.core.retry import Verdict

NAMED = Message(b"body", message_id="id")
NAMELESS = Message(b"body")
OTHER = Message(b"body", message_id="other")
#: What workerd itself has published.
COPIED = Message(b"body", message_id="id", headers={COPY: "mark"})


class Channel:
    """A channel that consumes a queue. ``last`` is the latest delivery on it."""

    def __init__(self, ledger: Ledger, serial: int, queue: str = "queue") -> None:
        self.ledger = ledger
        self.serial = serial
        self.queue = queue
        self.tag = 0
        ledger.opened(serial)

    def deliver(
        self,
        message: Message = NAMED,
        redelivered: bool = False,
        received: float = 0.0,
        delayed: bool = False,
    ) -> Run | Settle | Rejoined | None:
        self.tag += 1
        job = decode(message, self.queue, redelivered)
        self.last = Delivery(self.serial, self.tag, received, job, delayed)
        return self.ledger.delivered(self.last)

    def run(self, message: Message = NAMED, redelivered: bool = False) -> Run:
        """Deliver what is to start at once."""
        run = self.deliver(message, redelivered)
        assert isinstance(run, Run)
        assert run.delivery
        assert (run.delivery.channel, run.delivery.tag) == (self.serial, self.tag)
        return run

    def lose(self) -> None:
        self.ledger.lost(self.serial)


def a_ledger(concurrency: int = 2) -> Ledger:
    return Ledger({"queue": concurrency, "other": concurrency})


def order(ledger: Ledger, run: Run | Settle | None) -> list[str]:
    """Finish this run and all that start after it, one by one; returns the jobs' ids."""
    ids = []
    while isinstance(run, Run):
        ids.append(run.job.id)
        ledger.finished(run, Verdict.DONE)
        run = ledger.next()
    return ids
