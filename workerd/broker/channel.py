"""One AMQP channel: declaring, consuming, settling, confirmed publishing."""

from __future__ import annotations

import asyncio
import itertools
import re
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

import pika.exceptions
import pika.spec

from workerd.broker.acks import Acks
from workerd.broker.codec import Incoming, message_of, properties_of
from workerd.broker.confirms import Confirms
from workerd.broker.errors import ANSWER_TIMEOUT, diagnose
from workerd.core.job import Message
from workerd.core.topology import BindExchange, BindQueue, DeclareExchange, DeclareQueue, Step
from workerd.errors import BrokerError, ErrorKind, Unencodable

#: A basic.ack in its frame: type, channel, size; class, method, tag, multiple; end.
_ACK = struct.Struct(">BHIHHQBB")
#: RabbitMQ 3.10 forgets an acknowledgement behind so many returns to a quorum queue when the
#: channel closes, and says that it closed in order: seen behind 40, not behind 20; and never
#: behind other acknowledgements.
_MANY_RETURNS = 32
#: RabbitMQ's word for the type of a queue, in its refusals.
_QUEUE_TYPE = re.compile(r"of queue type rabbit_(\w+?)(?:_queue)?$")
#: Seconds after which a queue that works has them.
_RETURNED = 10.0
_serials = itertools.count(1)


class Channel:
    """One channel. ``serial`` is unique in this process, ``ended`` says why the channel ended.

    Every request raises BrokerError when the broker refuses the request (which ends the channel)
    or does not answer in time: then ``abort`` is called, which ends the connection.
    """

    def __init__(self, channel: Any, abort: Callable[[str], None]) -> None:
        self.serial = next(_serials)
        self.ended: asyncio.Future[BrokerError] = asyncio.get_running_loop().create_future()
        #: Whether it was we who closed it, the broker agreed, and what was settled here is settled.
        self.ended_in_order = False
        #: Set when the broker itself cancelled the consumer: queue deleted, or (RabbitMQ
        #: 4.3) deliveries not acknowledged in time. The channel stays open.
        self.cancelled = asyncio.Event()
        self._channel = channel
        self._abort = abort
        #: How many messages have come.
        self.deliveries = 0
        #: Called before acknowledgements are sent.
        self.before_acks: Callable[[], None] = lambda: None
        self._acks = Acks()
        #: When the last returns were sent.
        self._returns: deque[float] = deque(maxlen=_MANY_RETURNS)
        self._requests: set[asyncio.Future[Any]] = set()
        self._consumer_tag = ""
        self._on_lost: Callable[[Channel], None] | None = None
        self._confirms = Confirms()
        channel.add_on_close_callback(self._closed)
        channel.add_on_cancel_callback(lambda _frame: self.cancelled.set())

    @property
    def open(self) -> bool:
        return bool(self._channel.is_open and self._channel.connection.is_open)

    async def declare(self, step: Step) -> None:
        """Declare a queue or an exchange, or make a binding."""
        match step:
            case DeclareQueue(name, arguments):
                await self._ask(
                    self._channel.queue_declare,
                    queue=name,
                    durable=True,
                    arguments=arguments or None,
                )
            case DeclareExchange(name, kind, arguments):
                await self._ask(
                    self._channel.exchange_declare,
                    exchange=name,
                    exchange_type=kind,
                    durable=True,
                    arguments=arguments or None,
                )
            case BindQueue(queue, exchange, pattern):
                await self._ask(
                    self._channel.queue_bind, queue=queue, exchange=exchange, routing_key=pattern
                )
            case BindExchange(destination, source, pattern):
                await self._ask(
                    self._channel.exchange_bind,
                    destination=destination,
                    source=source,
                    routing_key=pattern,
                )

    async def find(self, step: DeclareQueue | DeclareExchange) -> None:
        """Look whether a queue or exchange of this name is there. Raises BrokerError(MISSING)."""
        if isinstance(step, DeclareQueue):
            await self.count(step.name)
        else:
            await self._ask(self._channel.exchange_declare, exchange=step.name, passive=True)

    async def count(self, queue: str, timeout: float | None = ANSWER_TIMEOUT) -> tuple[int, int]:
        """Count the ready messages and the consumers of a queue, which must exist.

        With a ``timeout`` of None the connection stays, however long the answer takes.
        """
        answer = await self._ask(
            self._channel.queue_declare, queue=queue, passive=True, timeout=timeout
        )
        return answer.method.message_count, answer.method.consumer_count

    def probe(self) -> asyncio.Future[Any]:
        """Ask for what a working broker answers at once, and what changes nothing.

        The connection stays, however long the answer takes. The future raises BrokerError when
        the channel ends.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests.add(answer)
        answer.add_done_callback(self._requests.discard)

        def answered(frame: Any) -> None:
            if not answer.done():
                answer.set_result(frame)

        # A prefetch holds for consumers that are yet to come, and this channel gets none.
        try:
            self._channel.basic_qos(prefetch_count=1, global_qos=False, callback=answered)
        except pika.exceptions.AMQPError as error:
            answer.set_exception(diagnose(error))
        # Whether anybody looks at it or not.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return answer

    async def kind_of(self, queue: str) -> str:
        """Learn the type of a queue, such as "quorum"; "" when the broker does not say.

        Ends the channel. Raises BrokerError unless the queue is there and this user may read it.
        """
        # The broker looks at the rights before it finds that this is no priority: so no
        # message comes, whatever is in the queue. Its refusal (3.10 to 4.0) names the type.
        nonsense = {"x-priority": "none"}
        try:
            await self._ask(
                self._channel.basic_consume,
                queue=queue,
                on_message_callback=lambda *_: None,
                arguments=nonsense,
            )
        except BrokerError as error:
            if error.code != 406:
                raise
            found = _QUEUE_TYPE.search(str(error))
            return found[1] if found else ""
        await self.close()
        return ""

    async def consume(
        self,
        queue: str,
        prefetch: int,
        consumer_tag: str,
        on_message: Callable[[Channel, Incoming], None],
        on_lost: Callable[[Channel], None],
    ) -> None:
        """Let messages come, at most ``prefetch`` unacknowledged ones at a time.

        ``on_lost`` is called synchronously, the moment this channel is gone.
        """

        def deliver(incoming: Incoming) -> None:
            self.deliveries += 1
            self._acks.came(incoming.tag)
            on_message(self, incoming)

        def assembled(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            message = message_of(properties, body)
            deliver(Incoming(method.delivery_tag, method.redelivered, message))

        self._channel.connection.consumers[self._channel.channel_number] = deliver
        self._on_lost = on_lost
        self._consumer_tag = consumer_tag
        # Per consumer: RabbitMQ refuses (3.x) or converts (4.3) the global kind.
        await self._ask(self._channel.basic_qos, prefetch_count=prefetch, global_qos=False)
        await self._ask(
            self._channel.basic_consume,
            queue=queue,
            on_message_callback=assembled,
            consumer_tag=consumer_tag,
        )

    async def cancel(self) -> None:
        """Stop the consumer; returns when the broker has sent the last message."""
        if not self._consumer_tag or self.cancelled.is_set() or not self.open:
            return
        method = pika.spec.Basic.Cancel(consumer_tag=self._consumer_tag)
        replies = [(pika.spec.Basic.CancelOk, {"consumer_tag": self._consumer_tag})]
        # Not pika's basic_cancel: it gives back what still arrives before cancel-ok, at
        # once and by reject, and the broker sends that straight to us again.
        await self._ask(
            lambda callback: self._channel._rpc(method, callback, replies)  # noqa: SLF001
        )

    # Settling a delivery has no answer. On a channel that is going away it is of no use, and
    # of no harm: the broker will send the message again.

    def ack(self, tag: int) -> None:
        """Acknowledge a message, together with others of this turn of the loop."""
        if not self._acks:
            asyncio.get_running_loop().call_soon(self.flush)
        self._acks.add(tag)

    def flush(self) -> None:
        """Send the acknowledgements now."""
        if self._acks and self.open:
            self.before_acks()
            number = self._channel.channel_number
            acks = (_ACK.pack(1, number, 13, 60, 80, *ack, 0xCE) for ack in self._acks.take())
            self._channel.connection.send(b"".join(acks))

    def requeue(self, tag: int) -> None:
        """Return a message to its queue."""
        # nack, not reject: RabbitMQ 4.3 counts a reject as a failed delivery.
        if self.open:
            self._channel.basic_nack(tag, requeue=True)
            self._returns.append(asyncio.get_running_loop().time())
            self._acks.settled(tag)

    def reject(self, tag: int) -> None:
        """Let the broker dead-letter the message untouched, or drop it where it does not."""
        if self.open:
            self._channel.basic_reject(tag, requeue=False)
            self._acks.settled(tag)

    async def confirm(self) -> None:
        """Make the broker confirm what is published on this channel."""

        def returned(_channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
            self._confirms.returned(str(properties.message_id))

        def answered(frame: Any) -> None:
            method = frame.method
            nack = isinstance(method, pika.spec.Basic.Nack)
            self._confirms.answered(method.delivery_tag, method.multiple, nack)

        self._channel.add_on_return_callback(returned)
        await self._ask(self._channel.confirm_delivery, answered)

    def publish(self, exchange: str, key: str, message: Message) -> asyncio.Future[None]:
        """Publish, persistent and mandatory; the future is done when the broker confirms.

        The future raises Unroutable, BrokerError(BUSY) when the broker refuses the message, or the
        BrokerError that ended the channel: then nobody knows whether the message arrived.
        Raises Unencodable at once for what AMQP cannot carry, and BrokerError(TOO_LARGE) for
        headers that are larger than a frame, for which the broker would end the connection.
        """
        try:
            self._channel.basic_publish(
                exchange, key, message.body, properties_of(message), mandatory=True
            )
        except (pika.exceptions.AMQPConnectionError, pika.exceptions.AMQPChannelError) as error:
            raise diagnose(error) from error
        except (pika.exceptions.AMQPError, struct.error, ValueError, TypeError) as error:
            raise Unencodable(f"the message cannot be encoded: {error!r}") from error
        # The queue of a delay level has the name of its exchange.
        size = len(message.body)
        return self._confirms.publish(exchange or key, str(message.message_id), size)

    async def close(self) -> None:
        """Close, and wait for the answer: the proof that the broker has read our acks."""
        if self.open:
            self.flush()
            self._forget_consumer()
            self._channel.close()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await asyncio.shield(self.ended)
        except TimeoutError:
            raise self._unanswered() from None

    async def _ask(
        self,
        request: Callable[..., Any],
        *args: Any,
        timeout: float | None = ANSWER_TIMEOUT,
        **kwargs: Any,
    ) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answered(frame: Any) -> None:
            if not answer.done():
                answer.set_result(frame)

        self._requests.add(answer)
        try:
            request(*args, callback=answered, **kwargs)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise self._unanswered() from None
        except pika.exceptions.AMQPError as error:
            raise diagnose(error) from error
        finally:
            self._requests.discard(answer)

    def _unanswered(self) -> BrokerError:
        text = f"no answer within {ANSWER_TIMEOUT:.0f} s"
        self._abort(text)
        return BrokerError(ErrorKind.AWAY, text)

    def _closed(self, _channel: Any, reason: BaseException) -> None:
        error = diagnose(reason)
        self.ended_in_order = error.kind is ErrorKind.CLOSED and not self._may_have_forgotten()
        self._forget_consumer()
        if self._on_lost:
            self._on_lost(self)
        for request in self._requests:
            if not request.done():
                request.set_exception(error)
                request.exception()  # whoever asked may have stopped waiting
        self._confirms.lose(error)
        if not self.ended.done():
            self.ended.set_result(error)

    def _may_have_forgotten(self) -> bool:
        """Whether the broker may have lost an acknowledgement behind what went back."""
        many = len(self._returns) == _MANY_RETURNS
        return many and self._returns[0] > asyncio.get_running_loop().time() - _RETURNED

    def _forget_consumer(self) -> None:
        self._channel.connection.consumers.pop(self._channel.channel_number, None)
