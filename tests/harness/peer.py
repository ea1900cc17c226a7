"""A scripted AMQP 0-9-1 peer: a small broker of our own that does what no RabbitMQ at hand would.

Its queues are lists in memory, everything may be declared (the answer tells how many messages are
ready), every publish is confirmed, and it sends no heartbeats. A test can let it forget to answer,
and give it RabbitMQ 4.3's way with deliveries that are not acknowledged in time. It records what it
is told to settle.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pika
import pika.frame
import pika.spec

from tests.harness.waiting import TIMEOUT

T = TypeVar("T")

ANSWERS: dict[Any, Callable[[Any], Any]] = {
    pika.spec.Connection.Open: lambda _: pika.spec.Connection.OpenOk(),
    pika.spec.Connection.Close: lambda _: pika.spec.Connection.CloseOk(),
    pika.spec.Channel.Open: lambda _: pika.spec.Channel.OpenOk(),
    pika.spec.Queue.Declare: lambda asked: pika.spec.Queue.DeclareOk(asked.queue, 0, 0),
    pika.spec.Queue.Bind: lambda _: pika.spec.Queue.BindOk(),
    pika.spec.Exchange.Declare: lambda _: pika.spec.Exchange.DeclareOk(),
    pika.spec.Exchange.Bind: lambda _: pika.spec.Exchange.BindOk(),
    pika.spec.Confirm.Select: lambda _: pika.spec.Confirm.SelectOk(),
    pika.spec.Basic.Qos: lambda _: pika.spec.Basic.QosOk(),
    pika.spec.Basic.Consume: lambda asked: pika.spec.Basic.ConsumeOk(asked.consumer_tag),
    pika.spec.Basic.Cancel: lambda asked: pika.spec.Basic.CancelOk(asked.consumer_tag),
    pika.spec.Channel.Close: lambda _: pika.spec.Channel.CloseOk(),
}
SETTLEMENTS = (pika.spec.Basic.Ack, pika.spec.Basic.Nack, pika.spec.Basic.Reject)


@dataclass
class DeadLetter:
    """A message in a queue."""

    id: str
    body: bytes = b""
    redelivered: bool = False
    #: Other properties, by the names that pika has for them.
    properties: dict[str, Any] = field(default_factory=dict)


@dataclass
class Unacked:
    """A message on its way: when it was sent, and whether it was taken back since."""

    letter: DeadLetter
    sent: float
    timed_out: bool = False


@dataclass(frozen=True)
class Settled:
    """What was settled: by which method, on which channel, and of which message."""

    method: str
    channel: int
    id: str
    timed_out: bool


@dataclass(eq=False)
class Channel:
    """One channel, under a number of its own: AMQP uses a closed channel's number again."""

    connection: Connection
    number: int
    serial: int
    #: What the present consumer may hold, and what the next one may.
    prefetch: int = 0
    next_prefetch: int = 0
    tag: int = 0
    queue: str | None = None
    consumer_tag: str | None = None
    cancelled: bool = False
    confirms: int = 0
    unacked: dict[int, Unacked] = field(default_factory=dict)


class Peer:
    """The broker; it listens from the moment it is made until `close`.

    `mute` names the methods that it does not answer; a `silent` one says nothing at all. With an
    `ack_timeout` in seconds it does as RabbitMQ 4.3: it cancels the consumer that holds a delivery
    for longer, and takes back that delivery alone. `tls` makes it speak TLS. It drops the
    connection instead of the first `lost_confirms` confirms. `limits` are what it tells a client
    that connects: the most channels, and the largest frame in bytes.

    What it saw: every method in `asked`, the properties of what was `published`, what was
    `settled`, in order; the serial numbers of the
    channels that the client `closed`; and the `errors` for which RabbitMQ would have closed a
    channel or the connection.
    """

    def __init__(
        self,
        *,
        silent: bool = False,
        mute: tuple[Any, ...] = (),
        ack_timeout: float | None = None,
        tls: ssl.SSLContext | None = None,
        lost_confirms: int = 0,
        limits: tuple[int, int] = (2047, 131072),
    ) -> None:
        self.silent = silent
        self.lost_confirms = lost_confirms
        self.limits = limits
        self.mute = mute
        #: How a client may log in.
        self.mechanisms = "PLAIN"
        self.ack_timeout = ack_timeout
        self.asked: list[Any] = []
        self.published: list[pika.BasicProperties] = []
        self.settled: list[Settled] = []
        self.closed: list[int] = []
        self.errors: list[str] = []
        self.accepted = 0
        # The serial numbers of the certificates by which clients proved who they are.
        self.client_certificates: list[str] = []
        self._paused = False
        self.ready: dict[str, deque[DeadLetter]] = defaultdict(deque)
        self.channels: list[Channel] = []
        self._serials = 0
        self._tls = tls
        self._connections: list[Connection] = []
        # Guards everything, and is notified whenever a frame has been dealt with.
        self._moved = threading.Condition()
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [self._start(self._accept)]
        if ack_timeout is not None:
            self._threads.append(self._start(self._watch))

    @property
    def url(self) -> str:
        return f"amqp://127.0.0.1:{self.port}/%2F"

    def close(self) -> None:
        self._ended.set()
        # Wakes the thread that accepts; closing the socket would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def drop_connections(self) -> None:
        """End every connection; new ones are welcome."""
        for connection in self._connections:
            connection.drop()

    def publish(self, queue: str, *ids: str) -> list[str]:
        """Put messages into a queue; whoever consumes it gets them."""
        with self._moved:
            self.ready[queue].extend(map(DeadLetter, ids))
            self._deliver()
        return list(ids)

    def pause(self) -> None:
        """Deliver nothing until `resume`."""
        with self._moved:
            self._paused = True

    def resume(self) -> None:
        with self._moved:
            self._paused = False
            self._deliver()

    def channel_of(self, job: str) -> int:
        """The serial number of the channel on which this job was delivered last."""
        with self._moved:
            holders = (
                channel.serial
                for channel in reversed(self.channels)
                for entry in channel.unacked.values()
                if entry.letter.id == job
            )
            return next(holders)

    def until(self, predicate: Callable[[], T], what: str) -> T:
        """Wait until this is true; asked again after every frame."""
        with self._moved:
            if not self._moved.wait_for(predicate, TIMEOUT):
                raise AssertionError(f"{what}: not within {TIMEOUT:g} s")
            return predicate()

    # Frames

    def handle(self, connection: Connection, number: int, method: Any) -> None:
        """Deal with one method."""
        with self._moved:
            self.asked.append(method)
            channel = connection.channels.get(number)
            if isinstance(method, pika.spec.Channel.Open):
                self._serials += 1
                channel = Channel(connection, number, self._serials)
                connection.channels[number] = channel
                self.channels.append(channel)
            if isinstance(method, SETTLEMENTS):
                assert channel is not None
                self._settle(channel, method)
            elif isinstance(method, pika.spec.Channel.Close):
                assert channel is not None
                self._lose(channel)
                self.closed.append(channel.serial)
            elif isinstance(method, pika.spec.Basic.Qos):
                assert channel is not None
                # RabbitMQ's reading of it: for consumers that are yet to come.
                channel.next_prefetch = method.prefetch_count
            elif isinstance(method, pika.spec.Basic.Consume) and method.arguments:
                assert channel is not None
                # The one that there is, which asks for the type of a queue.
                self._lose(channel)
                text = f"invalid arg 'x-priority' for queue '{method.queue}' in vhost '/'"
                text = f"PRECONDITION_FAILED - {text} of queue type rabbit_quorum_queue"
                connection.send(number, pika.spec.Channel.Close(406, text, 60, 20))
                self._moved.notify_all()
                return
            elif isinstance(method, pika.spec.Basic.Consume):
                assert channel is not None
                # Even when the broker has cancelled it: RabbitMQ 4.3 keeps the consumer.
                if channel.consumer_tag == method.consumer_tag:
                    self.errors.append(f"consumer tag {method.consumer_tag} used again")
                channel.queue, channel.consumer_tag = method.queue, method.consumer_tag
                channel.prefetch = channel.next_prefetch
            elif isinstance(method, pika.spec.Basic.Cancel):
                assert channel is not None
                channel.cancelled = True
            if isinstance(method, pika.spec.Connection.StartOk):
                connection.send(0, pika.spec.Connection.Tune(*self.limits, 60))
            answer = ANSWERS.get(type(method))
            if answer and not isinstance(method, self.mute):
                reply = answer(method)
                if isinstance(method, pika.spec.Queue.Declare):
                    reply.message_count = len(self.ready[method.queue])
                connection.send(number, reply)
            self._deliver()
            self._moved.notify_all()

    def handle_message(
        self, connection: Connection, number: int, properties: pika.BasicProperties
    ) -> None:
        """A message was published."""
        with self._moved:
            self.published.append(properties)
            if self.lost_confirms:
                self.lost_confirms -= 1
                connection.drop()
                return
            channel = connection.channels[number]
            channel.confirms += 1
            connection.send(number, pika.spec.Basic.Ack(channel.confirms))
            self._moved.notify_all()

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""
        with self._moved:
            for channel in list(connection.channels.values()):
                self._lose(channel)
            self._deliver()
            self._moved.notify_all()

    # Queues

    def _deliver(self) -> None:
        for channel in self.channels:
            if channel.queue is None or channel.cancelled or self._paused:
                continue
            ready = self.ready[channel.queue]
            while ready and (not channel.prefetch or len(channel.unacked) < channel.prefetch):
                letter = ready.popleft()
                channel.tag += 1
                channel.unacked[channel.tag] = Unacked(letter, time.monotonic())
                assert channel.consumer_tag is not None
                method = pika.spec.Basic.Deliver(
                    channel.consumer_tag, channel.tag, letter.redelivered, "", channel.queue
                )
                properties = pika.BasicProperties(
                    message_id=letter.id, delivery_mode=2, **letter.properties
                )
                channel.connection.send(channel.number, method, properties, letter.body)

    def _settle(self, channel: Channel, method: Any) -> None:
        first = (
            min(channel.unacked, default=0)
            if method.delivery_tag and (getattr(method, "multiple", False))
            else method.delivery_tag
        )
        for tag in range(first, method.delivery_tag + 1):
            entry = channel.unacked.pop(tag, None)
            if entry is None:
                self.errors.append(f"{method.NAME} of unknown tag {tag} on {channel.serial}")
                continue
            name = method.NAME.removeprefix("Basic.").lower()
            settled = Settled(name, channel.serial, entry.letter.id, entry.timed_out)
            self.settled.append(settled)
            if getattr(method, "requeue", False) and not entry.timed_out:
                self._requeue(channel, entry)

    def _lose(self, channel: Channel) -> None:
        """A channel has ended: what it held goes back."""
        channel.cancelled = True
        for entry in reversed(channel.unacked.values()):
            if not entry.timed_out:
                self._requeue(channel, entry)
        channel.unacked.clear()
        del channel.connection.channels[channel.number]

    def _requeue(self, channel: Channel, entry: Unacked) -> None:
        assert channel.queue is not None
        entry.letter.redelivered = True
        self.ready[channel.queue].appendleft(entry.letter)

    # Threads

    def _watch(self) -> None:
        """Do what RabbitMQ 4.3 does with a delivery that is not acknowledged in time."""
        assert self.ack_timeout is not None
        while not self._ended.wait(self.ack_timeout / 20):
            with self._moved:
                limit = time.monotonic() - self.ack_timeout
                for channel in list(self.channels):
                    late = [
                        entry
                        for entry in channel.unacked.values()
                        if entry.sent < limit and not entry.timed_out
                    ]
                    for entry in late:
                        entry.timed_out = True
                        self._requeue(channel, entry)
                    if late and not channel.cancelled:
                        channel.cancelled = True
                        cancel = pika.spec.Basic.Cancel(channel.consumer_tag, nowait=True)
                        channel.connection.send(channel.number, cancel)
                self._deliver()
                self._moved.notify_all()

    def _accept(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                accepted, _ = self._listener.accept()
                with self._moved:
                    self.accepted += 1
                    self._moved.notify_all()
                connection = Connection(self, accepted, self._tls)
                self._connections.append(connection)
                self._threads.append(self._start(connection.run))

    @staticmethod
    def _start(target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name="peer", daemon=True)
        thread.start()
        return thread


class Connection:
    """One client's connection, read by a thread of its own."""

    def __init__(self, peer: Peer, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        self.channels: dict[int, Channel] = {}
        self._peer = peer
        self._socket = accepted
        self._tls = tls

    def drop(self) -> None:
        """Close the socket under the feet of the client."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def send(
        self,
        number: int,
        method: Any,
        properties: pika.BasicProperties | None = None,
        body: bytes = b"",
    ) -> None:
        frames: list[Any] = [pika.frame.Method(number, method)]
        if properties is not None:
            frames.append(pika.frame.Header(number, len(body), properties))
            frames += [pika.frame.Body(number, body)] if body else []
        # Who has gone meanwhile is told nothing.
        with contextlib.suppress(OSError):
            self._socket.sendall(b"".join(frame.marshal() for frame in frames))

    def run(self) -> None:
        try:
            # A client that does not trust us, or that is dropped, is no error.
            with contextlib.suppress(OSError):
                if self._tls is not None:
                    secured = self._tls.wrap_socket(
                        self._socket, server_side=True, do_handshake_on_connect=False
                    )
                    self._socket = secured
                    self._shake_hands(secured)
                    if certificate := secured.getpeercert():
                        self._peer.client_certificates.append(str(certificate["serialNumber"]))
                self._converse()
        finally:
            self._peer.lost(self)
            self._socket.close()

    def _shake_hands(self, secured: ssl.SSLSocket) -> None:
        plain = socket.socket(fileno=os.dup(secured.fileno()))
        try:
            secured.do_handshake()
        except ssl.SSLError:
            # To close with something unread would take back the alert that says why.
            plain.settimeout(TIMEOUT / 10)
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(4096):
                pass
            raise
        finally:
            plain.close()

    def _converse(self) -> None:
        unread = b""
        publishing: dict[int, tuple[pika.frame.Header, int]] = {}
        while data := self._socket.recv(65536):
            if self._peer.silent:
                continue
            unread += data
            while True:
                size, frame = pika.frame.decode_frame(unread)
                if frame is None:
                    break
                unread = unread[size:]
                if isinstance(frame, pika.frame.ProtocolHeader):
                    self.send(0, _start(self._peer.mechanisms))
                elif isinstance(frame, pika.frame.Method):
                    if not isinstance(frame.method, pika.spec.Basic.Publish):
                        self._peer.handle(self, frame.channel_number, frame.method)
                elif isinstance(frame, pika.frame.Header | pika.frame.Body):
                    number = frame.channel_number
                    if isinstance(frame, pika.frame.Header):
                        publishing[number] = (frame, frame.body_size)
                    else:
                        header, left = publishing[number]
                        publishing[number] = (header, left - len(frame.fragment))
                    header, left = publishing[number]
                    if not left:
                        self._peer.handle_message(self, number, header.properties)


def _start(mechanisms: str) -> pika.spec.Connection.Start:
    capabilities = (
        "authentication_failure_close",
        "basic.nack",
        "connection.blocked",
        "consumer_cancel_notify",
        "exchange_exchange_bindings",
        "per_consumer_qos",
        "publisher_confirms",
    )
    properties = {
        "product": "RabbitMQ",
        "version": "4.3.0",
        "capabilities": dict.fromkeys(capabilities, True),
    }
    return pika.spec.Connection.Start(0, 9, properties, mechanisms, "en_US")
