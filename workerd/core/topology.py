"""Every queue and exchange that workerd declares: names, arguments, delay levels. Pure.

The arguments are frozen: a queue cannot be declared again with others (406), so one set
serves every broker version from 3.10 on. docs/topology.md lists them for administrators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from workerd.config.model import Queue

#: Level k delays by 2**k seconds; all together 2**25 - 1 seconds, a little over a year.
LEVELS = 25
MAX_DELAY = 2**LEVELS - 1
DUE = "workerd.due"
UNROUTABLE = "workerd.unroutable"

# Never -1: RabbitMQ 3.10 would drop a message at its first return. Never absent: 4.x
# would drop it at the 21st.
_DELIVERY_LIMIT = 1_000_000
_QUORUM: dict[str, object] = {"x-queue-type": "quorum", "x-delivery-limit": _DELIVERY_LIMIT}
# At-least-once dead-lettering needs reject-publish; without it RabbitMQ falls back silently.
_AT_LEAST_ONCE: dict[str, object] = {
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}

_NO_ARGUMENTS: Mapping[str, object] = MappingProxyType({})


class DeclareQueue(NamedTuple):
    name: str
    arguments: Mapping[str, object] = _NO_ARGUMENTS


class DeclareExchange(NamedTuple):
    name: str
    type: str
    arguments: Mapping[str, object] = _NO_ARGUMENTS


class BindQueue(NamedTuple):
    queue: str
    exchange: str
    pattern: str


class BindExchange(NamedTuple):
    destination: str
    source: str
    pattern: str


Step = DeclareQueue | DeclareExchange | BindQueue | BindExchange
Steps = Iterable[Step]


def dead(queue: str) -> str:
    """The queue that holds the dead letters of ``queue``."""
    return f"{queue}.dead"


def due(queue: str) -> str:
    """The queue where the delayed jobs of ``queue`` come due."""
    return f"{queue}.due"


def no_work_queue(queue: str, kind: str) -> str:
    """Why a queue of this type cannot hold jobs; "" when it can, or nobody knows its type."""
    if kind in ("classic", "quorum", ""):
        return ""
    return (
        f"{queue} is a queue of type {kind}, which cannot hold jobs: what is acknowledged stays "
        "there, and what is returned never comes again; name another queue, or delete this one"
    )


def work_queue(queue: Queue) -> DeclareQueue:
    """The work queue itself, as ``declare = "create"`` or ``"plain"`` makes it."""
    if queue.declare == "plain":
        # What the RabbitMQ tutorial's own declare accepts: durable, and nothing else.
        return DeclareQueue(queue.name)
    arguments: dict[str, object] = {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead(queue.name),
    }
    if queue.type == "quorum":
        arguments |= _QUORUM | _AT_LEAST_ONCE
    else:
        arguments["x-queue-type"] = "classic"
        if queue.max_priority:
            arguments["x-max-priority"] = queue.max_priority
    if queue.max_length:
        arguments |= {"x-max-length": queue.max_length, "x-overflow": "reject-publish"}
    return DeclareQueue(queue.name, arguments)


def dead_letters(queue: Queue) -> Iterator[Step]:
    """Where the dead letters of a work queue go."""
    yield DeclareQueue(dead(queue.name), _QUORUM)


def due_jobs(queue: Queue) -> Iterator[Step]:
    """Where the delayed jobs of a work queue come due; after the delay levels."""
    yield DeclareQueue(due(queue.name), _QUORUM)
    # One star for each bit, so that the key of a queue whose name ends like this one's
    # does not match as well.
    yield BindQueue(due(queue.name), DUE, ".".join(["*"] * LEVELS + [queue.name]))


def delay_levels() -> Iterator[Step]:
    """The binary delay levels, common to all queues of a virtual host.

    A message enters at the exchange of the highest set bit of its delay. The routing key
    holds the 25 bits, highest first, then the queue. Exchange k sends a message with bit k
    set through queue k, which holds it for 2**k seconds and dead-letters it to exchange
    k - 1, and all others straight to exchange k - 1.
    """
    yield DeclareQueue(UNROUTABLE, _QUORUM)
    yield DeclareExchange(UNROUTABLE, "fanout")
    yield BindQueue(UNROUTABLE, UNROUTABLE, "")
    # A job whose queue is gone must not block the level for the jobs of all others.
    yield DeclareExchange(DUE, "topic", {"alternate-exchange": UNROUTABLE})
    for level in range(LEVELS):
        name = level_name(level)
        below = level_name(level - 1) if level else DUE
        ttl = {"x-message-ttl": 2**level * 1000, "x-dead-letter-exchange": below}
        yield DeclareExchange(name, "topic")
        yield DeclareQueue(name, _QUORUM | _AT_LEAST_ONCE | ttl)
        stars = ["*"] * (LEVELS - 1 - level)
        yield BindQueue(name, name, ".".join([*stars, "1", "#"]))
        yield BindExchange(below, name, ".".join([*stars, "0", "#"]))


def level_name(level: int) -> str:
    """The name of both the exchange and the queue of a delay level."""
    return f"workerd.delay.{level:02d}"


def delayed(queue: str, seconds: int) -> tuple[str, str]:
    """The exchange and the routing key that bring a message to ``queue`` after a delay.

    ``seconds`` is from 0 (straight to where delayed jobs come due) to MAX_DELAY.
    """
    if not 0 <= seconds <= MAX_DELAY:
        raise ValueError(f"a delay is from 0 to {MAX_DELAY} seconds, not {seconds}")
    if seconds == 0:
        return "", due(queue)
    bits = ".".join(f"{seconds:0{LEVELS}b}")
    return level_name(seconds.bit_length() - 1), f"{bits}.{queue}"
