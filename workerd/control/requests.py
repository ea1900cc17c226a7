"""What a running instance answers on its local socket: how it is, and what it is told to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from typing import Any

from workerd import __version__, log
from workerd.config.text import did_you_mean
from workerd.control.metrics import metrics
from workerd.control.peer import Peer, member_of
from workerd.control.session import Reply, Request
from workerd.control.submit import accept
from workerd.core.job import submitter
from workerd.core.submission import is_short_text
from workerd.errors import EX_NOPERM, EX_UNAVAILABLE, EX_USAGE, CommandError
from workerd.worker.inspect import at_broker
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
        inspector = self._worker.inspector
        depths = self._worker.depths.glance() if request.get("depths") is True else None
        why_not = inspector.why_not_consuming()
        drain_left = inspector.drain_left
        return {
            "instance": self._instance,
            "pid": os.getpid(),
            "release": __version__,
            "uptime": round(time.monotonic() - self._began, 1),
            "state": inspector.state,
            "healthy": not why_not,
            "why": why_not or None,
            "degraded": inspector.degraded(),
            "status": inspector.line(),
            "notes": inspector.notes(),
            "broker": inspector.broker or None,
            "rabbitmq": inspector.rabbitmq or None,
            "drain_left": None if drain_left is None else round(drain_left, 1),
            "done": inspector.counters.total("done"),
            "retried": inspector.counters.total("retried"),
            "failed": inspector.counters.total("dead"),
            "pace": inspector.recent.pace(time.monotonic()),
            "failures": [asdict(failure) for failure in inspector.recent.failures],
            "submissions": inspector.counters.submitting,
            "queues": [self._queue(name, depths) for name in inspector.consumed],
            "running": inspector.running,
            "jobs": inspector.jobs()[:MOST_JOBS],
        }

    def _queue(self, name: str, depths: Mapping[str, int] | None) -> Reply:
        inspector = self._worker.inspector
        return {
            **inspector.in_hand(name),
            "paused": inspector.paused(name),
            **({} if depths is None else at_broker(name, depths)),
        }

    async def _metrics(self, _request: Request, _peer: Peer) -> Reply:
        inspector = self._worker.inspector
        # A broker that is silent would only make the question a reason to give it up.
        depths = {} if inspector.broker_is_silent else await self._worker.depths.look()
        return {
            "instance": self._instance,
            "state": inspector.state,
            "started": self._started,
            "healthy": not inspector.why_not_consuming(),
            **metrics(inspector, self._worker.settings, depths),
        }

    def _health(self, _request: Request, _peer: Peer) -> Reply:
        inspector = self._worker.inspector
        why_not = inspector.why_not_consuming()
        return {
            "healthy": not why_not,
            "why": why_not or None,
            "degraded": inspector.degraded(),
        }

    # Steering.

    def _pause(self, request: Request, peer: Peer) -> Reply:
        return self._set_paused(request, peer, "pause")

    def _resume(self, request: Request, peer: Peer) -> Reply:
        return self._set_paused(request, peer, "resume")

    def _set_paused(self, request: Request, peer: Peer, what: str) -> Reply:
        self._may_steer(peer, what)
        worker = self._worker
        if worker.stopping:
            raise CommandError(EX_UNAVAILABLE, "it is draining: nothing starts any more")
        known = set(worker.inspector.consumed)
        queue = request.get("queue")
        if queue is None:
            named = known
        elif isinstance(queue, str) and queue in known:
            named = {queue}
        else:
            text = str(queue)[:200]
            hint = did_you_mean(text, known)
            raise CommandError(EX_USAGE, f"this instance consumes no queue {text!r}{hint}")
        before = worker.paused_by_operator
        after = before | named if what == "pause" else before - named
        changed = sorted(before ^ after)
        if changed:
            worker.pause_by_operator(after)
            event = "paused" if what == "pause" else "resumed"
            log.event(event, queues=", ".join(changed), uid=peer.uid, pid=peer.pid)
        running = sum(worker.inspector.in_hand(name)["running"] for name in named)
        return {"queues": sorted(named), "changed": changed, "running": running}

    def _cancel(self, request: Request, peer: Peer) -> Reply:
        job_id = request.get("id")
        if not isinstance(job_id, str) or not is_short_text(job_id):
            raise CommandError(EX_USAGE, "cancel: the id of a job")
        worker = self._worker
        owner = None if self._is_operator(peer) else peer.uid
        runs = worker.runs_of(job_id)
        if owner is not None and any(submitter(run.job.message) != owner for run in runs):
            whose = "who submitted the job, "
            raise CommandError(EX_NOPERM, self._refusal(f"cancel {job_id}", whose))
        ended = worker.cancel(job_id, owner)
        log.event("cancelled", job_id=job_id, running=len(ended), uid=peer.uid, pid=peer.pid)
        return {
            "id": job_id,
            "own_only": owner is not None,
            "ended": [worker.inspector.job(run) for run in ended],
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
