"""Jobs that come over the local socket, published on the daemon's own connection.

Who submits says what the job is; where it goes and how, the daemon decides: nobody can make it
publish to anything but the queues of its configuration.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

from workerd import log
from workerd.backoff import backoff
from workerd.control.peer import Peer
from workerd.control.protocol import NotServedHere
from workerd.control.session import Reply, Request
from workerd.core import times
from workerd.core.job import SUBMITTER, Message
from workerd.core.jobspec import JobSpec
from workerd.core.submission import Submission, explained, is_short_text, prepare
from workerd.errors import EX_DATAERR, EX_UNAVAILABLE, BrokerError, CommandError, ErrorKind
from workerd.worker.worker import Worker

#: In seconds; a client that wants to wait longer than the second asks again.
_USUAL_WAIT = 30.0
_LONGEST_WAIT = 86_400.0

#: Of any key. Instants are much smaller, in seconds.
_LARGEST_NUMBER = 1e15

#: The keys of the request, and the types of their values; None, or absent: not given.
_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "type": str,
    "queue": str,
    "id": str,
    "due": (int, float),
    "ttl": (int, float),
    "priority": int,
    "attempts": int,
    "headers": dict,
    "copy_id": str,
    "timestamp": int,
    "timeout": (int, float),
    "config": str,
}
#: Those of them that are in a JobSpec as they are.
_SAID = ("type", "queue", "id", "due", "ttl", "priority", "attempts")


def accept(worker: Worker, request: Request, body: bytes, peer: Peer) -> Coroutine[Any, Any, Reply]:
    """Publish the job of a request; what is returned brings the answer once it is confirmed.

    Raises CommandError; NotServedHere, when it has to be submitted in another way.
    """
    if worker.stopping:
        raise NotServedHere(EX_UNAVAILABLE, "the instance is draining")
    found = _checked(request)
    config: str | None = found["config"]
    if config is not None and not _is_among(config, worker):
        raise NotServedHere(EX_UNAVAILABLE, "the instance has another configuration")
    spec = JobSpec(headers=found["headers"] or {}, **{key: found[key] for key in _SAID})
    wanted = prepare(spec, worker.settings, time.time())
    if wanted.queue not in worker.settings.queues:
        raise NotServedHere(EX_UNAVAILABLE, f"the instance knows no queue {wanted.queue!r}")
    if wanted.due is not None and not worker.comes_due(wanted.queue):
        raise NotServedHere(EX_UNAVAILABLE, "the instance does not know of delays there")
    message = wanted.message(body, _timestamp(found["timestamp"]), found["copy_id"])
    message = replace(message, headers={**message.headers, SUBMITTER: peer.uid})
    patience = _USUAL_WAIT if found["timeout"] is None else found["timeout"]
    deadline = time.monotonic() + min(patience, _LONGEST_WAIT)

    async def publish() -> Reply:
        worker.counters.submitting += 1
        try:
            await _publish(worker, wanted, message, deadline)
        finally:
            worker.counters.submitting -= 1
        worker.counters.submitted[wanted.queue] += 1
        log.event(
            "submitted",
            worker.settings.log.routine,
            job_id=str(message.message_id),
            job_type=spec.type,
            queue=wanted.queue,
            uid=peer.uid,
            pid=peer.pid,
        )
        due = None if wanted.due is None else times.utc(wanted.due)
        return {"id": message.message_id, "queue": wanted.queue, "due": due}

    return publish()


def _checked(request: Request) -> dict[str, Any]:
    """The value of every key, of its type, or None. Raises CommandError."""
    found: dict[str, Any] = {key: request.get(key) for key in _KEYS}
    for key, value in found.items():
        if value is not None and (not isinstance(value, _KEYS[key]) or isinstance(value, bool)):
            raise CommandError(EX_DATAERR, f"submit: {key} is of another type")
        # What is not a number is not less than one either.
        if isinstance(value, int | float) and not abs(value) < _LARGEST_NUMBER:
            raise CommandError(EX_DATAERR, f"submit: {key} is out of range")
    if found["copy_id"] is not None and not is_short_text(found["copy_id"]):
        raise CommandError(EX_DATAERR, "submit: copy_id is a short text")
    if not all(isinstance(value, str) for value in (found["headers"] or {}).values()):
        raise CommandError(EX_DATAERR, "submit: headers are texts")
    if found["type"] is None:
        raise CommandError(EX_DATAERR, "submit: a type is needed")
    return found


def _timestamp(said: int | None) -> int:
    """When the job was submitted, in seconds since 1970."""
    now = time.time()
    # Whoever lets it begin elsewhere is not believed either.
    return said if said is not None and 0 < said <= now + 86_400 else int(now)


def _is_among(config: str, worker: Worker) -> bool:
    """Whether this file, by its real path, is one that the instance has read."""
    # Ours alone are looked up: where somebody else's path leads, the loop might have to wait.
    return any(os.path.realpath(file) == config for file in worker.settings.files)


async def _publish(
    worker: Worker, submission: Submission, message: Message, deadline: float
) -> None:
    """Publish until it is confirmed: again, under the same id, after a lost connection.

    Raises BrokerError, Unencodable.
    """
    publisher = worker.publisher
    trouble = BrokerError(
        ErrorKind.AWAY, worker.inspector.outage or "the broker did not confirm in time"
    )
    for delay in backoff(0.2, 2.0):
        publish = submission.publish_at(message, time.time())
        publishing = publisher.publish(*publish)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await publishing
        except TimeoutError:
            break
        except BrokerError as error:
            trouble = explained(error, publish.exchange, submission.queue)
            if trouble.kind is not ErrorKind.AWAY:
                raise trouble from None
        if time.monotonic() + delay >= deadline:
            break
        await asyncio.sleep(delay)
    if publisher.blocked:
        raise BrokerError(
            ErrorKind.BUSY, f"the broker takes nothing at present: {publisher.blocked}"
        )
    raise trouble
