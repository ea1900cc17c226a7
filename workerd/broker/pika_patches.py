"""Where pika's connection is slow or fragile, and what is done instead."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils import connection_workflow, io_services_utils

from workerd.broker.codec import Incoming
from workerd.broker.errors import TCP_TIMEOUT
from workerd.broker.frames import arrival_at
from workerd.errors import BrokerError, ErrorKind


class PikaConnection(AsyncioConnection):  # type: ignore[misc]
    """pika's connection, with shorter ways for what there is most of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Who gets the messages of each channel that consumes, by its number.
        self.consumers: dict[int, Callable[[Incoming], None]] = {}
        super().__init__(*args, **kwargs)

    def _on_data_available(self, data_in: bytes) -> None:
        self._frame_buffer += data_in
        while self._frame_buffer:
            self._take_deliveries()
            consumed, frame = self._read_frame()
            if not frame:
                return
            self._trim_frame_buffer(consumed)
            self._process_frame(frame)

    def _take_deliveries(self) -> None:
        """Hand over the messages at the beginning of the buffer that are all there."""
        arrivals = []
        end = 0
        while (arrival := arrival_at(self._frame_buffer, end)) is not None:
            if arrival.channel not in self.consumers:
                break
            arrivals.append(arrival)
            end = arrival.end
        self._trim_frame_buffer(end)
        for channel, incoming, _ in arrivals:
            consumer = self.consumers.get(channel)  # unless one of those before has ended it
            if consumer is not None:
                consumer(incoming)

    def send(self, frames: bytes) -> None:
        """Send what is encoded already."""
        super()._output_marshaled_frames([frames])

    def _output_marshaled_frames(self, frames: list[bytes]) -> None:
        # Only a body goes into several frames. RabbitMQ would end the connection.
        if len(frames) > 1 and len(frames[1]) > self.params.frame_max:
            size, most = len(frames[1]), self.params.frame_max
            text = f"properties and headers take {size} bytes; a frame of this broker has {most}"
            raise BrokerError(ErrorKind.TOO_LARGE, text)
        # A message of one body frame goes in one piece, not in three. Not more of them: what a
        # full socket does not take is copied again and again.
        super()._output_marshaled_frames(frames if len(frames) > 3 else [b"".join(frames)])


class Parameters(pika.ConnectionParameters):  # type: ignore[misc]
    """What pika is told, and which addresses it has tried with what result; None: none yet."""

    def __init__(self, **settings: Any) -> None:
        self.attempts: dict[str, BaseException | None] = {}
        super().__init__(**settings)


class Connector(connection_workflow.AMQPConnector):  # type: ignore[misc]
    """pika's attempt to reach one address, which fails like any other when it gets no socket.

    pika (1.2.0 to 1.4.4) lets that error out of a callback of the event loop, and the attempt
    would never end.
    """

    def start(self, addr_record: Any, conn_params: Any, on_done: Callable[[Any], None]) -> None:
        address = addr_record[4][0]
        # Whoever else uses pika in this process has parameters of its own kind.
        attempts = getattr(conn_params, "attempts", {})
        attempts[address] = None

        def done(result: Any) -> None:
            if isinstance(result, BaseException):
                attempts[address] = result
            on_done(result)

        try:
            super().start(addr_record, conn_params, done)
        except OSError as error:
            done(connection_workflow.AMQPConnectorSocketConnectError(error))


class Workflow(connection_workflow.AMQPConnectionWorkflow):  # type: ignore[misc]
    """pika's way through the addresses of a name, each of which gets its share of the time.

    pika gives each address all of it, so that one that does not answer would leave none for the
    others. They come in random order: one that takes a connection and then says nothing ends the
    attempt, and must not be the first at each.
    """

    def _on_getaddrinfo_async_done(self, found: Any) -> None:
        if not isinstance(found, BaseException):
            found = random.sample(found, len(found))
            for each in self._connection_configs:
                each.socket_timeout = TCP_TIMEOUT / len(found)
        super()._on_getaddrinfo_async_done(found)


connection_workflow.AMQPConnector = Connector
connection_workflow.AMQPConnectionWorkflow = Workflow

# pika reads 4 kB at a time: of two large messages, parts.
io_services_utils._AsyncTransportBase._MAX_RECV_BYTES = 1 << 16  # noqa: SLF001

# pika logs every failed attempt with a traceback; the same facts reach our log as events.
logging.getLogger("pika").setLevel(logging.CRITICAL + 1)
