"""What the broker must have confirmed before a job is settled: next attempts, dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from workerd import log
from workerd.aio import first
from workerd.backoff import backoff
from workerd.config.model import Settings
from workerd.core import topology
from workerd.core.job import Report, Run
from workerd.core.republish import Publish
from workerd.core.retry import Decision, Verdict
from workerd.errors import BrokerError, ErrorKind, Unencodable, Unroutable, WorkerdError
from workerd.worker.consumer import Consumer
from workerd.worker.publisher import Publisher
from workerd.worker.stop import Stop

#: Seconds for the broker to confirm a copy that is under way when running jobs must end.
LAST_CONFIRM = 1.0
#: The first pause before a copy is published again, in seconds.
FIRST_PAUSE = 0.5


class RefusedForGood(WorkerdError):
    """The broker will never take a copy, because of what it is; ``verdict`` is what is left."""

    def __init__(self, verdict: Verdict, text: str) -> None:
        super().__init__(text)
        self.verdict = verdict


class Outbox:
    """Publishes what a decision needs until it is confirmed, on a connection of its own.

    Until then the original stays unacknowledged. While the broker refuses a copy, its queue is
    paused: what comes next would need a copy as well, or could not be told from it.
    """

    def __init__(
        self,
        settings: Settings,
        publisher: Publisher,
        consumer: Consumer,
        stop: Stop,
        refusals_changed: Callable[[], object],
    ) -> None:
        """``refusals_changed`` is called when a queue has to be paused, or need not be any more."""
        #: The runs whose copies the broker does not take, and its words.
        self.refused: dict[Run, str] = {}
        self._publisher = publisher
        self._consumer = consumer
        self._stop = stop
        self._refusals_changed = refusals_changed
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Work with these settings from now on."""
        self._longest_pause = settings.broker.reconnect_max
        self._routine = settings.log.routine

    async def publish(self, run: Run, decision: Decision, report: Report) -> Verdict:
        """Publish what the decision needs; returns the verdict that the job has then."""
        if not decision.publishes:
            return decision.verdict
        if decision.dropped:
            log.warning("headers dropped", names=", ".join(decision.dropped))
        if decision.patience is not None:
            return await self.republish(decision)
        for publish in decision.publishes:
            try:
                if not await self._confirmed(run, publish, decision):
                    return decision.unconfirmed
            except RefusedForGood as refused:
                log.warning("moved untouched", reason=report.reason, text=str(refused))
                return refused.verdict
        self._log(decision, report)
        return decision.verdict

    async def republish(self, decision: Decision) -> Verdict:
        """Publish once, within the decision's patience; returns the verdict."""
        for publish in decision.publishes:
            try:
                await asyncio.wait_for(self._publisher.publish(*publish), decision.patience)
            except (TimeoutError, BrokerError, Unencodable):
                return decision.unconfirmed
        return decision.verdict

    async def _confirmed(self, run: Run, publish: Publish, decision: Decision) -> bool:
        """Publish until the broker has confirmed it; False: running jobs must end before.

        Raises RefusedForGood, where the decision knows what to do then.
        """
        if publish.exchange:
            # A daemon that has just begun to consume may still be declaring the levels.
            await first(self._consumer.declarations.levels.wait(), self._stop.interrupted())
        known = ""
        try:
            for pause in backoff(FIRST_PAUSE, self._longest_pause):
                publishing = asyncio.ensure_future(self._publish(run, publish))
                await first(asyncio.wait({publishing}), self._stop.interrupted())
                if not publishing.done():
                    # Without the answer the original goes back as well, and both run.
                    await asyncio.wait({publishing}, timeout=LAST_CONFIRM)
                if not publishing.done():
                    publishing.cancel()
                    return False
                try:
                    publishing.result()
                except (BrokerError, Unencodable) as error:
                    if str(error) != known:
                        known = str(error)
                        _log_refusal(decision.verdict, known)
                    kind = None if isinstance(error, Unencodable) else error.kind
                    of_one_message = kind is None or kind.of_one_message
                    if of_one_message and decision.refused:
                        raise RefusedForGood(decision.refused, known) from None
                    # One that is away is logged already, and one message that cannot be sent
                    # is no reason to hold up others.
                    if not of_one_message and kind is not ErrorKind.AWAY:
                        self.refused[run] = known
                        self._refusals_changed()
                else:
                    return True
                if await self._stop.interrupts_within(pause):
                    return False
            raise AssertionError("backoff never ends")
        finally:
            if self.refused.pop(run, ""):
                self._refusals_changed()

    async def _publish(self, run: Run, publish: Publish) -> None:
        """Publish once. Raises BrokerError, Unencodable."""
        due = topology.due(run.job.queue)
        # The broker would take it, and notice only when it comes due.
        if publish.exchange and due in self._consumer.missing:
            raise Unroutable(due)
        await self._publisher.publish(*publish)

    def _log(self, decision: Decision, report: Report) -> None:
        note = report.note or None
        match decision.verdict:
            case Verdict.RETRY:
                log.event("retry", seconds=decision.delay, reason=report.reason, note=note)
            case Verdict.POSTPONE:
                log.event("postponed", self._routine, seconds=decision.delay)
            case Verdict.DEAD:
                to = decision.publishes[0].key
                log.warning("dead letter", reason=report.reason, note=note, to=to)


def _log_refusal(verdict: Verdict, text: str) -> None:
    match verdict:
        case Verdict.RETRY:
            log.warning("retry refused", text=text)
        case Verdict.POSTPONE:
            log.warning("postponement refused", text=text)
        case _:
            log.warning("dead letter refused", text=text)
