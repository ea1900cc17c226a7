"""The confirms of one channel: which of its published messages the broker has taken.

RabbitMQ numbers the messages of a confirming channel from 1 in the order of publishing, and
answers each number with an ack or a nack, alone or together with all below it ("multiple"):
https://www.rabbitmq.com/docs/confirms.
"""

from __future__ import annotations

import asyncio
from itertools import takewhile

from workerd.broker.errors import for_message
from workerd.errors import BrokerError, ErrorKind, Unroutable


class Confirms:
    """A future for each published message, done with the broker's answer."""

    def __init__(self) -> None:
        self._published = 0
        #: What is not answered yet, by its number, ascending: the future, where the message was
        #: published to, its id, and the size of its body.
        self._waiting: dict[int, tuple[asyncio.Future[None], str, str, int]] = {}
        #: Those among them that the broker could not route.
        self._returned: set[int] = set()

    def publish(self, place: str, message_id: str, size: int) -> asyncio.Future[None]:
        """Number the message that has just been published to ``place``; returns its future.

        ``size`` is that of its body in bytes. The future raises Unroutable, BrokerError(BUSY) for
        a nack, and what `lose` says.
        """
        self._published += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[self._published] = (future, place, message_id, size)
        return future

    def returned(self, message_id: str) -> None:
        """A message has come back; its ack is still to come."""
        # A return carries no number, but returns come in the order of publishing.
        for number, (_, _, waiting, _) in self._waiting.items():
            if waiting == message_id and number not in self._returned:
                self._returned.add(number)
                return

    def answered(self, tag: int, multiple: bool, nack: bool) -> None:
        """The broker has answered message ``tag``, and where ``multiple`` all before it."""
        numbers = list(takewhile(lambda each: each <= tag, self._waiting)) if multiple else [tag]
        for number in numbers:
            future, place, _, _ = self._waiting.pop(number, (None, "", "", 0))
            returned = number in self._returned
            self._returned.discard(number)
            if future is None or future.done():
                continue
            if nack:
                text = f"the broker refused it: {place} is full"
                future.set_exception(BrokerError(ErrorKind.BUSY, text))
            elif returned:
                future.set_exception(Unroutable(place))
            else:
                future.set_result(None)

    def lose(self, error: BrokerError) -> None:
        """The channel is gone: nobody knows what became of the messages without an answer.

        Unless the broker has refused one of them: that one raises ``error`` itself, as far as it
        can be told from the others.
        """
        alone = len(self._waiting) == 1
        for future, _, _, size in self._waiting.values():
            if not future.done():
                future.set_exception(for_message(error, size, alone))
                future.exception()  # whoever published it may have stopped waiting
        self._waiting.clear()
        self._returned.clear()
