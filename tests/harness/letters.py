"""Dead letters as workerd and RabbitMQ make them."""

from __future__ import annotations

import datetime
from typing import Any

from workerd.core.job import Message
from workerd.deadletters.letter import DeadLetter

#: The present, in seconds since 1970.
NOW = 1_800_000_000.0

FACTS: dict[str, object] = {
    "x-workerd-reason": "exit-status",
    "x-workerd-exit-status": 3,
    "x-workerd-error": "one\ntwo\x1b[31m",
    "x-workerd-attempts": 5,
    "x-workerd-attempt": 4,
    "x-workerd-queue": "jobs",
    "x-workerd-host": "host",
    "x-workerd-instance": "1",
    "x-workerd-first-failure": "2026-11-24T15:00:00.000Z",
    "x-workerd-last-failure": "2026-11-24T15:01:00.000Z",
    "x-workerd-expires": 1,
    "x-workerd-replay": "old mark",
}
EXPIRED: dict[str, object] = {
    "x-death": [
        {
            "queue": "jobs",
            "reason": "expired",
            "count": 2,
            "time": datetime.datetime.fromtimestamp(NOW - 7200, datetime.UTC),
            "exchange": "",
            "routing-keys": ["jobs"],
        }
    ],
    "x-first-death-reason": "expired",
    "x-first-death-queue": "jobs",
    "x-delivery-count": 3,
}


def letter(headers: dict[str, object] | None = None, **properties: Any) -> DeadLetter:
    return DeadLetter(Message(headers=headers or {}, **properties))
