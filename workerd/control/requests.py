"""What a running instance answers on its local socket: how it is, and what it is told to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from workerd import __version__, log
from workerd.config.text import did_you_mean
from workerd.control.metrics import at_broker, in_hand, metrics
from workerd.control.peer import Peer, member_of
from workerd.control.session import Reply, Request
from workerd.control.submit import accept
from workerd.core.job import Run, submitter
from workerd.core.submission import is_short_text
from workerd.errors import EX_NOPERM, EX_UNAVAILABLE, EX_USAGE, CommandError
from workerd.worker.broker_ping import BrokerPing
from workerd.worker.queue_depths import QueueDepths

if TYPE_CHECKING:
    from workerd.worker.worker import Worker

#: Running jobs that an answer names; there may be more.
MOST_JOBS = 1000


class Requests:
    """What each request does; ``instance`` is the name of this one."""

    def __init__(self, worker: Worker, instance: str) -> None:
        self._worker = worker
        self._instance = instance
        self._began = time.monotonic()
        self._started = time.time()
        self._depths = QueueDepths(worker)
        self.ping = BrokerPing(worker)
        self._requests: dict[str, Callable[[Request, Peer], Reply | Coroutine[Any, Any, Reply]]] = {
            "status": self._status,
            "health": self._health,
            "metrics": self._metrics,
            "pause": self._pause,
            "resume": self._resume,
            "cancel": self._cancel,
        }
        self._operators: tuple[str | None, Callable[[Peer], bool]] = (None, lambda _peer: False)
        self._is_operator(Peer(0, 0, frozenset()))  # looks the group up now

    def answer(
        self, request: Request, body: bytes, peer: Peer
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """See `control.Requests`."""
        name = request.get("request")
        if name == "submit":
            return accept(self._worker, request, body, peer)
        handle = self._requests.get(name) if isinstance(name, str) else None
        if handle is None:
            raise CommandError(EX_USAGE, f"there is no request {str(name)[:40]!r}")
        return handle(request, peer)

    # Looking.

    def _status(self, request: Request, _peer: Peer) -> Reply:
        worker = self._worker
        recent = worker.status.recent
        depths = self._depths.glance() if request.get("depths") is True else None
        consumer, ledger = worker.consumer, worker.ledger
        why_not = self._why_not_consuming()
        begun = [run for run in ledger.running if not run.dispatched]
        jobs = sorted(begun, key=lambda run: self._age(run) or 0.0, reverse=True)
        return {
            "instance": self._instance,
            "pid": os.getpid(),
            "release": __version__,
            "uptime": round(time.monotonic() - self._began, 1),
            "state": self._state,
            "healthy": not why_not,
            "why": why_not or None,
            "degraded": worker.status.degraded(),
            "status": worker.status.line(),
            "notes": worker.status.notes(),
            "broker": consumer.broker or None,
            "rabbitmq": ".".join(map(str, consumer.version)) if consumer.broker else None,
            "drain_left": round(worker.drain.seconds_left, 1) if ledger.draining else None,
            "done": worker.counters.total("done"),
            "retried": worker.counters.total("retried"),
            "failed": worker.counters.total("dead"),
            "pace": recent.pace(time.monotonic()),
            "failures": [asdict(failure) for failure in recent.failures],
            "submissions": worker.submissions,
            "queues": [self._queue(name, depths) for name in sorted(ledger.slots.concurrency)],
            "running": ledger.slots.in_use,
            "jobs": [self._job(run) for run in jobs[:MOST_JOBS]],
        }

    def _queue(self, name: str, depths: Mapping[str, int] | None) -> Reply:
        worker = self._worker
        consumer = worker.consumer
        paused = consumer.paused.get(name)
        if name in consumer.operator_paused:
            paused = "by an operator"
        refused = [text for run, text in worker.outbox.refused.items() if run.job.queue == name]
        return {
            **in_hand(worker, name),
            "paused": paused or next(iter(refused), None),
            **({} if depths is None else at_broker(name, depths)),
        }

    def _job(self, run: Run) -> Reply:
        job = run.job
        progress = self._worker.attempts.progress.get(run)
        age = self._age(run)
        return {
            "id": job.id,
            "type": job.type,
            "handler": job.type if job.type in self._worker.attempts.handlers else None,
            "queue": job.queue,
            "attempt": job.attempt,
            "age": None if age is None else round(age, 1),
            "pid": progress.pid if progress else None,
            "ending": progress is None or progress.stop.done(),
            "submitter": submitter(job.message),
        }

    def _age(self, run: Run) -> float | None:
        """For how many seconds its handler has been at it."""
        progress = self._worker.attempts.progress.get(run)
        began = progress.began if progress else None
        return None if began is None else time.monotonic() - began

    async def _metrics(self, _request: Request, _peer: Peer) -> Reply:
        # A broker that is silent would only make the question a reason to give it up.
        depths = {} if self.ping.silent_for else await self._depths.look()
        return {
            "instance": self._instance,
            "state": self._state,
            "started": self._started,
            "healthy": not self._why_not_consuming(),
            **metrics(self._worker, depths),
        }

    @property
    def _state(self) -> str:
        return "draining" if self._worker.drain.wanted.is_set() else "running"

    def _health(self, _request: Request, _peer: Peer) -> Reply:
        why_not = self._why_not_consuming()
        return {
            "healthy": not why_not,
            "why": why_not or None,
            "degraded": self._worker.status.degraded(),
        }

    def _why_not_consuming(self) -> str:
        """What keeps this instance from taking work, "" when nothing does."""
        worker = self._worker
        consumer = worker.consumer
        queues = worker.ledger.slots.concurrency
        if worker.drain.wanted.is_set():
            return worker.status.line() if worker.ledger.draining else "draining"
        if consumer.outage:
            return consumer.outage
        for name in sorted(queues):
            if name in consumer.paused:
                return f"{name} paused: {consumer.paused[name]}"
        if not any(name in consumer.channels for name in queues):
            return worker.status.line()
        silent = self.ping.silent_for
        if silent > BrokerPing.PATIENCE:
            return f"{consumer.broker} has not answered for {silent:.0f} s"
        return ""

    # Steering.

    def _pause(self, request: Request, peer: Peer) -> Reply:
        return self._set_paused(request, peer, "pause")

    def _resume(self, request: Request, peer: Peer) -> Reply:
        return self._set_paused(request, peer, "resume")

    def _set_paused(self, request: Request, peer: Peer, what: str) -> Reply:
        self._may_steer(peer, what)
        worker = self._worker
        if worker.drain.wanted.is_set():
            raise CommandError(EX_UNAVAILABLE, "it is draining: nothing starts any more")
        known = set(worker.ledger.slots.concurrency)
        queue = request.get("queue")
        if queue is None:
            named = known
        elif isinstance(queue, str) and queue in known:
            named = {queue}
        else:
            text = str(queue)[:200]
            hint = did_you_mean(text, known)
            raise CommandError(EX_USAGE, f"this instance consumes no queue {text!r}{hint}")
        before = worker.consumer.operator_paused
        after = before | named if what == "pause" else before - named
        changed = sorted(before ^ after)
        if changed:
            worker.pause_by_operator(after)
            event = "paused" if what == "pause" else "resumed"
            log.event(event, queues=", ".join(changed), uid=peer.uid, pid=peer.pid)
        running = sum(worker.ledger.slots.busy(name) for name in named)
        return {"queues": sorted(named), "changed": changed, "running": running}

    def _cancel(self, request: Request, peer: Peer) -> Reply:
        job_id = request.get("id")
        if not isinstance(job_id, str) or not is_short_text(job_id):
            raise CommandError(EX_USAGE, "cancel: the id of a job")
        worker = self._worker
        owner = None if self._is_operator(peer) else peer.uid
        runs = [run for run in worker.attempts.progress if run.job.id == job_id]
        if owner is not None and any(submitter(run.job.message) != owner for run in runs):
            whose = "who submitted the job, "
            raise CommandError(EX_NOPERM, self._refusal(f"cancel {job_id}", whose))
        ended = worker.attempts.cancel(job_id, owner)
        log.event("cancelled", job_id=job_id, running=len(ended), uid=peer.uid, pid=peer.pid)
        return {
            "id": job_id,
            "own_only": owner is not None,
            "ended": [self._job(run) for run in ended],
        }

    def _may_steer(self, peer: Peer, what: str) -> None:
        if not self._is_operator(peer):
            raise CommandError(EX_NOPERM, self._refusal(what, ""))

    def _refusal(self, what: str, also: str) -> str:
        group = self._worker.settings.control.operators
        who = f"{also}root, the daemon's own user, and " + (
            f"members of the group {group}" if group else "the group in [control] operators (none)"
        )
        remedy = f"adduser USER {group}" if group else "set [control] operators, and reload"
        return f"{what}: only {who} may do that: use sudo, or ask an administrator: {remedy}"

    def _is_operator(self, peer: Peer) -> bool:
        name = self._worker.settings.control.operators
        if self._operators[0] != name:
            self._operators = (name, member_of(name))
        return peer.uid in (0, os.geteuid()) or self._operators[1](peer)
