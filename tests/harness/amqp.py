"""Publishing and reading as a test does: every call waits until the broker has answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pika
import pika.exceptions

from . import network
from .waiting import TIMEOUT, until


@dataclass(frozen=True)
class Message:
    """A message as it was read from a queue."""

    body: bytes
    properties: pika.BasicProperties
    redelivered: bool
    routing_key: str

    @property
    def id(self) -> str | None:
        message_id: str | None = self.properties.message_id
        return message_id

    @property
    def headers(self) -> dict[str, Any]:
        return self.properties.headers or {}


class Client:
    """One connection and one channel with publisher confirms.

    A broker that restarts ends it: make a new one. `netns` is the namespace it connects from.
    """

    def __init__(self, url: str, *, netns: str | None = None) -> None:
        parameters = pika.URLParameters(url)
        # A test may look away for longer than any heartbeat.
        parameters.heartbeat = 0
        parameters.socket_timeout = parameters.stack_timeout = TIMEOUT
        parameters.blocked_connection_timeout = TIMEOUT
        self.connection = network.inside(netns, lambda: pika.BlockingConnection(parameters))
        self.channel = self._open_channel()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self.connection.is_open:
            return
        # A frozen broker would never answer.
        impl = self.connection._impl
        lost = pika.exceptions.StreamLostError("no answer to close")
        impl.ioloop.call_later(TIMEOUT / 4, lambda: impl._terminate_stream(lost))
        # A broker that was killed meanwhile has closed it already.
        with contextlib.suppress(pika.exceptions.AMQPError):
            self.connection.close()

    def declare(self, queue: str, **arguments: Any) -> str:
        """Declare a durable queue and return its name. `x_queue_type` stands for `x-queue-type`."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.channel.queue_declare(queue, durable=True, arguments=named)
        return queue

    def exists(self, queue: str) -> bool:
        return self._passive(queue) is not None

    def ready(self, queue: str) -> int:
        """How many messages wait in a queue; 0 if there is none of that name."""
        return self._passive(queue) or 0

    def await_ready(self, queue: str, count: int, timeout: float = TIMEOUT) -> None:
        """Wait until exactly `count` messages wait in a queue."""
        until(lambda: self.ready(queue) == count, f"{count} messages in {queue}", timeout)

    def await_topology(self) -> None:
        """Wait until a daemon has declared everything: before that a broker cannot count queues."""
        until(lambda: self.exists("workerd.delay.24"), "the last of the delay levels")

    def publish(
        self,
        queue: str,
        body: bytes = b"",
        *,
        exchange: str = "",
        headers: Mapping[str, Any] | None = None,
        **properties: Any,
    ) -> None:
        """Publish one persistent message, and return when it is confirmed.

        Further keywords are message properties. Raises `pika.exceptions.UnroutableError` or
        `NackError` when no queue took it.
        """
        properties.setdefault("delivery_mode", 2)
        self.channel.basic_publish(
            exchange,
            queue,
            body,
            pika.BasicProperties(headers=dict(headers) if headers else None, **properties),
            mandatory=True,
        )

    def publish_jobs(
        self, queue: str, ids: Iterable[str], body: bytes = b"", **properties: Any
    ) -> list[str]:
        """Publish one message per id; return the ids that the broker has confirmed."""
        confirmed = []
        for message_id in ids:
            self.publish(queue, body, message_id=message_id, **properties)
            confirmed.append(message_id)
        return confirmed

    def take(self, queue: str, count: int = 1, timeout: float = TIMEOUT) -> list[Message]:
        """Take exactly `count` messages off a queue, waiting for them."""
        taken: list[Message] = []

        def enough() -> bool:
            while len(taken) < count and (message := self._get(queue, auto_ack=True)):
                taken.append(message)
            return len(taken) == count

        until(enough, f"{count} messages from {queue}", timeout)
        return taken

    def drain(self, queue: str) -> list[Message]:
        """Take every message that waits in a queue now."""
        taken = []
        while message := self._get(queue, auto_ack=True):
            taken.append(message)
        return taken

    def look(self, queue: str) -> list[Message]:
        """Read every waiting message and give all of them back; their order may change.

        Nobody else may consume the queue.
        """
        seen = []
        while message := self._get(queue, auto_ack=False):
            seen.append(message)
        self.channel.basic_nack(0, multiple=True, requeue=True)
        self.channel.close()
        self.channel = self._open_channel()
        # A quorum queue has them back some time after it was told.
        until(lambda: self.ready(queue) >= len(seen), f"{len(seen)} messages back in {queue}")
        return seen

    def _get(self, queue: str, *, auto_ack: bool) -> Message | None:
        method, properties, body = self.channel.basic_get(queue, auto_ack=auto_ack)
        if method is None:
            return None
        return Message(body, properties, method.redelivered, method.routing_key)

    def _passive(self, queue: str) -> int | None:
        # A missing queue closes the channel that asks, so another one asks.
        probe = self.connection.channel()
        try:
            count: int = probe.queue_declare(queue, passive=True).method.message_count
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != 404:
                raise
            return None
        probe.close()
        return count

    def _open_channel(self) -> Any:
        channel = self.connection.channel()
        channel.confirm_delivery()
        return channel
