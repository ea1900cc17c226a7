"""RabbitMQ, through pika: the only module that imports it.

A `Link` is one AMQP connection, a `Channel` one channel of it. Neither is ever reopened
or reused: when one ends, its ``ended`` future says why, and its owner makes a new one.
Everything runs in one asyncio loop; nothing here decides what becomes of a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import re
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pika
import pika.data
import pika.exceptions
import pika.spec
from pika.adapters.asyncio_connection import AsyncioConnection

from workerd import __version__
from workerd.errors import Kind, SettingsError, Trouble, Unencodable, Unroutable
from workerd.job import UNREADABLE, Message
from workerd.retry import backoff
from workerd.settings import TLS, Broker, BrokerURL, password_for
from workerd.topology import BindExchange, BindQueue, DeclareExchange, DeclareQueue, Step

#: Seconds for TCP, TLS, login and opening, all together.
CONNECT_TIMEOUT = 10.0
#: Seconds for the answer to one request; then the connection counts as dead.
ANSWER_TIMEOUT = 15.0
#: Seconds for a publish to be confirmed while the broker is not blocking us.
CONFIRM_TIMEOUT = 60.0
#: The first pause before a new attempt to connect, in seconds.
FIRST_PAUSE = 0.2

# pika logs every failed attempt with a traceback; the same facts reach our log as events.
logging.getLogger("pika").setLevel(logging.CRITICAL + 1)

_serials = itertools.count(1)


def _decode_headers(encoded: bytes, offset: int) -> tuple[dict[Any, Any], int]:
    """pika's decoder, except that a table it cannot decode does not end the connection.

    A timestamp in milliseconds (pika issue 1698) or a thousand nested arrays would raise
    inside frame processing, the broker would send the message again, and so for ever.
    """
    (size,) = struct.unpack_from(">I", encoded, offset)
    end = offset + 4 + size
    try:
        table, _ = pika.data.decode_table(encoded, offset)
    except Exception:
        table = None
    if table is None or _depth_exceeds(table, 32):
        table = {UNREADABLE: encoded[offset + 4 : end]}
    return table, end


def _depth_exceeds(value: object, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


# pika.spec reads header tables through its name `data`; tables inside tables go through
# pika.data itself, so that only the outermost one is guarded.
pika.spec.data = SimpleNamespace(**{**vars(pika.data), "decode_table": _decode_headers})


class Incoming:
    """A message as it came: raw, its tag, and whether the broker sent it before."""

    __slots__ = ("message", "redelivered", "tag")

    def __init__(self, tag: int, redelivered: bool, message: Message) -> None:
        self.tag = tag
        self.redelivered = redelivered
        self.message = message


class Channel:
    """One channel. ``serial`` is unique in this process, ``ended`` says why it ended.

    Every request raises Trouble when the broker refuses it (which ends the channel) or
    does not answer in time (which ends the connection).
    """

    def __init__(self, link: Link, channel: Any) -> None:
        self.link = link
        self.serial = next(_serials)
        self.ended: asyncio.Future[Trouble] = asyncio.get_running_loop().create_future()
        #: Set when the broker itself cancelled the consumer: queue deleted, or (RabbitMQ
        #: 4.3) deliveries not acknowledged in time. The channel stays open.
        self.cancelled = asyncio.Event()
        self._channel = channel
        self._requests: set[asyncio.Future[Any]] = set()
        self._consumer_tag = ""
        self._on_lost: Callable[[Channel], None] | None = None
        self._published = 0
        self._confirms: dict[int, asyncio.Future[None]] = {}
        self._ids: dict[int, tuple[str, str]] = {}
        self._returned: set[int] = set()
        channel.add_on_close_callback(self._closed)
        channel.add_on_cancel_callback(lambda _frame: self.cancelled.set())

    @property
    def open(self) -> bool:
        return bool(self._channel.is_open)

    async def declare(self, step: Step) -> None:
        """Declare a queue or an exchange, or make a binding."""
        match step:
            case DeclareQueue(name, arguments):
                await self._ask(
                    self._channel.queue_declare, queue=name, durable=True, arguments=arguments or None
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

    async def count(self, queue: str) -> tuple[int, int]:
        """The ready messages and the consumers of a queue that must exist."""
        answer = await self._ask(self._channel.queue_declare, queue=queue, passive=True)
        return answer.method.message_count, answer.method.consumer_count

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

        def deliver(_channel: Any, method: Any, properties: Any, body: bytes) -> None:
            on_message(
                self, Incoming(method.delivery_tag, method.redelivered, _message(properties, body))
            )

        self._on_lost = on_lost
        self._consumer_tag = consumer_tag
        # Per consumer: RabbitMQ refuses (3.x) or converts (4.3) the global kind.
        await self._ask(self._channel.basic_qos, prefetch_count=prefetch, global_qos=False)
        await self._ask(
            self._channel.basic_consume,
            queue=queue,
            on_message_callback=deliver,
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

    def ack(self, tag: int) -> None:
        self._channel.basic_ack(tag)

    def give_back(self, tag: int) -> None:
        # nack, not reject: RabbitMQ 4.3 counts a reject as a failed delivery.
        self._channel.basic_nack(tag, requeue=True)

    def reject(self, tag: int) -> None:
        """Let the broker dead-letter the message untouched, or drop it where it does not."""
        self._channel.basic_reject(tag, requeue=False)

    async def confirm(self) -> None:
        """Make the broker confirm what is published on this channel."""
        self._channel.add_on_return_callback(self._on_return)
        await self._ask(self._channel.confirm_delivery, self._on_confirm)

    def publish(self, exchange: str, key: str, message: Message) -> asyncio.Future[None]:
        """Publish, persistent and mandatory; the future is done when the broker confirms.

        It raises Unroutable, Trouble(BUSY) when the broker refuses the message, or the
        Trouble that ended the channel: then nobody knows whether the message arrived.
        Raises Unencodable at once for what AMQP cannot carry.
        """
        try:
            self._channel.basic_publish(
                exchange, key, message.body, _properties(message), mandatory=True
            )
        except (pika.exceptions.AMQPConnectionError, pika.exceptions.AMQPChannelError) as error:
            raise diagnose(error) from error
        except (pika.exceptions.AMQPError, struct.error, ValueError, AttributeError, TypeError) as error:
            raise Unencodable(f"the message cannot be encoded: {error!r}") from error
        self._published += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._confirms[self._published] = future
        self._ids[self._published] = (key, str(message.message_id))
        return future

    async def close(self) -> None:
        """Close, and wait for the answer: the proof that the broker has read our acks."""
        if self.open:
            self._channel.close()
        async with asyncio.timeout(ANSWER_TIMEOUT):
            await asyncio.shield(self.ended)

    async def _ask(self, request: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests.add(answer)
        try:
            request(*args, callback=lambda frame: answer.done() or answer.set_result(frame), **kwargs)
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await answer
        except TimeoutError:
            text = f"no answer within {ANSWER_TIMEOUT:.0f} s"
            self.link.abort(text)
            raise Trouble(Kind.AWAY, text) from None
        except pika.exceptions.AMQPError as error:
            raise diagnose(error) from error
        finally:
            self._requests.discard(answer)

    def _closed(self, _channel: Any, reason: BaseException) -> None:
        trouble = diagnose(reason)
        if self._on_lost:
            self._on_lost(self)
        for future in (*self._requests, *self._confirms.values()):
            if not future.done():
                future.set_exception(trouble)
                future.exception()  # somebody may have stopped waiting for it
        self._confirms.clear()
        self._ids.clear()
        if not self.ended.done():
            self.ended.set_result(trouble)

    def _on_return(self, _channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
        # A return carries no number. It comes before the confirm of its message, and
        # returns come in the order of publishing.
        for number, (_key, message_id) in self._ids.items():
            if message_id == str(properties.message_id) and number not in self._returned:
                self._returned.add(number)
                return

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        last = method.delivery_tag
        numbers = [n for n in self._confirms if n <= last] if method.multiple else [last]
        for number in numbers:
            future = self._confirms.pop(number, None)
            key, _ = self._ids.pop(number, ("", ""))
            returned = number in self._returned
            self._returned.discard(number)
            if future is None or future.done():
                continue
            if isinstance(method, pika.spec.Basic.Nack):
                future.set_exception(Trouble(Kind.BUSY, f"the broker refused it: {key} is full"))
            elif returned:
                future.set_exception(Unroutable(key))
            else:
                future.set_result(None)


class Link:
    """One AMQP connection; ``ended`` says why it is over.

    ``blocked`` is the broker's reason while an alarm keeps it from reading what we publish.
    """

    def __init__(self, connection: AsyncioConnection, url: BrokerURL) -> None:
        self.url = url
        self.blocked = ""
        self.ended: asyncio.Future[Trouble] = asyncio.get_running_loop().create_future()
        self._connection = connection

    @classmethod
    async def open(cls, url: BrokerURL, broker: Broker, name: str, environ: Mapping[str, str]) -> Link:
        """Connect, log in and open, within CONNECT_TIMEOUT. Raises Trouble.

        The password and the certificates are read anew each time. ``name`` is what
        ``rabbitmqctl list_connections`` shows.
        """
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = loop.create_future()
        connection = AsyncioConnection(
            _parameters(url, broker, name, environ),
            on_open_callback=lambda _c: opened.done() or opened.set_result(None),
            on_open_error_callback=lambda _c, error: (
                opened.done() or opened.set_exception(diagnose(error))
            ),
            on_close_callback=lambda _c, error: link._closed(error),  # noqa: SLF001
            custom_ioloop=loop,
        )
        link = cls(connection, url)
        connection.add_on_connection_blocked_callback(
            lambda _c, frame: setattr(link, "blocked", str(frame.method.reason) or "alarm")
        )
        connection.add_on_connection_unblocked_callback(
            lambda _c, _frame: setattr(link, "blocked", "")
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await opened
        except (TimeoutError, asyncio.CancelledError) as error:
            if not (connection.is_closing or connection.is_closed):
                connection.close()  # while opening this only drops the socket
            if isinstance(error, TimeoutError):
                text = f"no AMQP answer within {CONNECT_TIMEOUT:.0f} s"
                raise Trouble(Kind.AWAY, text) from None
            raise
        return link

    @property
    def version(self) -> tuple[int, ...]:
        """RabbitMQ's version, such as (3, 10, 8); (0,) when a proxy hides it."""
        properties = self._connection.server_properties or {}
        return tuple(map(int, re.findall(r"\d+", str(properties.get("version", "0")))[:3]))

    async def channel(self) -> Channel:
        """Open a channel. Raises Trouble."""
        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            channel = self._connection.channel(
                on_open_callback=lambda ch: opened.done() or opened.set_result(ch)
            )
        except pika.exceptions.AMQPError as error:
            raise diagnose(error) from error
        await asyncio.wait({opened, self.ended}, timeout=ANSWER_TIMEOUT, return_when="FIRST_COMPLETED")
        if opened.done():
            return Channel(self, channel)
        if self.ended.done():
            raise self.ended.result()
        text = f"no answer within {ANSWER_TIMEOUT:.0f} s"
        self.abort(text)
        raise Trouble(Kind.AWAY, text)

    async def close(self, timeout: float) -> None:
        """Close politely; after ``timeout`` seconds drop the socket."""
        if self._connection.is_open:
            self._connection.close()
        await asyncio.wait({self.ended}, timeout=timeout)
        self.abort("closing took too long")

    def abort(self, text: str) -> None:
        """Drop the socket: the peer does not answer."""
        if not self._connection.is_closed:
            # pika has no public way to give up an open connection without the peer's help.
            self._connection._terminate_stream(pika.exceptions.StreamLostError(text))  # noqa: SLF001

    def _closed(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_result(diagnose(error))


async def links(
    broker: Broker,
    name: str,
    environ: Mapping[str, str],
    on_outage: Callable[[str, Trouble, float], None],
    wake: asyncio.Event,
) -> AsyncIterator[Link]:
    """Open connections, for ever: each is yielded once, when the one before has ended.

    The brokers are tried in random order; when none answers there is a pause, longer each
    time up to ``reconnect_max``, and cut short by ``wake``. ``on_outage`` hears of each
    failed attempt and each lost connection, and in how many seconds the next attempt comes.
    """
    clock = asyncio.get_running_loop().time
    delays = backoff(FIRST_PAUSE, broker.reconnect_max)
    while True:
        for url in random.sample(broker.urls, len(broker.urls)):
            try:
                link = await Link.open(url, broker, name, environ)
            except Trouble as trouble:
                last = trouble
                continue
            opened_at = clock()
            try:
                yield link
                last = await asyncio.shield(link.ended)
            finally:
                link.abort("no longer wanted")
            if clock() - opened_at > broker.reconnect_max:
                delays = backoff(FIRST_PAUSE, broker.reconnect_max)
            break
        # What only a human can mend is not asked for every second.
        delay = broker.reconnect_max if last.kind is Kind.REFUSED else next(delays)
        on_outage(url.host, last, delay)
        wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), delay)


def _parameters(
    url: BrokerURL, broker: Broker, name: str, environ: Mapping[str, str]
) -> pika.ConnectionParameters:
    try:
        password = password_for(broker, url, environ).reveal()
        tls = pika.SSLOptions(_context(broker.tls), broker.tls.server_name or url.host)
    except (SettingsError, OSError) as error:
        raise Trouble(Kind.REFUSED, str(error)) from error
    heartbeat = max(1, round(broker.heartbeat))
    return pika.ConnectionParameters(
        host=url.host,
        port=url.port,
        virtual_host=url.vhost,
        credentials=pika.PlainCredentials(url.user, password),
        heartbeat=heartbeat,
        ssl_options=tls if url.tls else None,
        connection_attempts=1,
        socket_timeout=CONNECT_TIMEOUT,
        stack_timeout=CONNECT_TIMEOUT,
        # Never `capabilities` here: pika would announce these instead of its own, and the
        # broker would send neither confirms nor cancel notifications.
        client_properties={"connection_name": name, "product": "workerd", "version": __version__},
        # A write into a dead network ends when the heartbeat would have noticed.
        tcp_options={"TCP_USER_TIMEOUT": heartbeat * 2000, "TCP_NODELAY": 1},
    )


def _context(tls: TLS) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(tls.ca_file) if tls.ca_file else None)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


def _message(properties: Any, body: bytes) -> Message:
    return Message(
        body=body,
        type=properties.type,
        message_id=properties.message_id,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        expiration=properties.expiration,
        timestamp=properties.timestamp,
        priority=properties.priority,
        headers=properties.headers or {},
    )


def _properties(message: Message) -> pika.BasicProperties:
    return pika.BasicProperties(
        type=message.type,
        message_id=message.message_id,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        expiration=message.expiration,
        timestamp=message.timestamp,
        priority=message.priority,
        headers=dict(message.headers) or None,
        delivery_mode=2,
    )


_KINDS = {
    200: Kind.AWAY,
    320: Kind.AWAY,
    403: Kind.REFUSED,
    404: Kind.MISSING,
    405: Kind.LOCKED,
    530: Kind.REFUSED,
}


def diagnose(error: BaseException) -> Trouble:
    """What an error of pika, of the broker or of the network means. The one place that knows."""
    if isinstance(error, Trouble):
        return error
    code = getattr(error, "reply_code", None)
    if isinstance(error, pika.exceptions.ConnectionClosedByClient | pika.exceptions.ChannelClosedByClient):
        return Trouble(Kind.CLOSED, "closed by workerd")
    if code is not None:
        return _by_code(code, str(error.reply_text))  # type: ignore[attr-defined]
    inner = _inner(error)
    if inner is not None:
        return diagnose(inner)
    text = str(error) or type(error).__name__
    # pika turns a refused login or virtual host into an error that holds only the repr of
    # the broker's close: "ConnectionClosedByBroker: (403) 'ACCESS_REFUSED - …'".
    quoted = re.search(r"ConnectionClosedByBroker: \((\d+)\) ['\"](.*)['\"]", text)
    if quoted:
        return _by_code(int(quoted[1]), quoted[2])
    if isinstance(error, ssl.SSLCertVerificationError):
        return Trouble(Kind.REFUSED, f"TLS: {error.verify_message}")
    if isinstance(error, pika.exceptions.ProbableAuthenticationError):
        return Trouble(Kind.AWAY, "the broker hung up during the login")
    if isinstance(error, socket.gaierror):
        return Trouble(Kind.AWAY, f"host name: {error.strerror}")
    if isinstance(error, OSError) and error.strerror:
        return Trouble(Kind.AWAY, error.strerror.lower())
    return Trouble(Kind.AWAY, _plain(error, text))


def _by_code(code: int, text: str) -> Trouble:
    kind = _KINDS.get(code, Kind.AWAY)
    if code == 406 and "inequivalent arg" in text:
        kind = Kind.CONFLICT
    elif code == 406 and "delivery acknowledgement" in text and "timed out" in text:
        kind = Kind.ACK_TIMEOUT
    return Trouble(kind, text, code)


def _inner(error: BaseException) -> BaseException | None:
    """The cause that pika has wrapped, or None."""
    wrapped = getattr(error, "exceptions", None) or getattr(error, "args", ())
    candidates = [getattr(error, "exception", None), *reversed(tuple(wrapped))]
    return next((c for c in candidates if isinstance(c, BaseException)), None)


def _plain(error: BaseException, text: str) -> str:
    if isinstance(error, pika.exceptions.AMQPHeartbeatTimeout):
        return "no heartbeat from the broker"
    if isinstance(error, pika.exceptions.StreamLostError):
        return "connection lost: " + text.removeprefix("Stream connection lost: ")
    if "StackTimeout" in repr(error):
        return f"no AMQP answer within {CONNECT_TIMEOUT:.0f} s"
    return text


#: The text in which RabbitMQ (up to 4.2) tells its ack timeout when it closes a channel.
_ACK_TIMEOUT_TEXT = re.compile(r"Timeout value used: (\d+) ms")


def ack_timeout_in(trouble: Trouble) -> float | None:
    """The broker's acknowledgement timeout in seconds, where its message tells it."""
    found = _ACK_TIMEOUT_TEXT.search(str(trouble))
    return int(found[1]) / 1000 if found else None


__all__ = ["Channel", "Incoming", "Link", "ack_timeout_in", "diagnose", "links"]
