"""Publishing many messages with pika, 1,000 unconfirmed ones at a time, and nothing else.

As a program: `python -m benchmarks.peers.pika_bulk QUEUE < lines`, a message for each line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import pika

WINDOW = 1_000
Message = tuple[bytes, pika.BasicProperties]


def publish(url: str, queue: str, messages: Iterable[Message], timeout: float) -> int:
    """Publish all of them; return how many, when the broker has confirmed them.

    Raises RuntimeError when it refuses one, when the connection ends, or after `timeout` seconds.
    """
    pending = iter(messages)
    sent = 0
    lowest = 1  # no tag below it is unconfirmed
    exhausted = False
    trouble = ""

    def opened(connection: Any) -> None:
        connection.channel(on_open_callback=ready)

    def ready(channel: Any) -> None:
        channel.confirm_delivery(lambda frame: answered(channel, frame))
        fill(channel)

    def answered(channel: Any, frame: Any) -> None:
        nonlocal lowest, trouble
        if not isinstance(frame.method, pika.spec.Basic.Ack):
            trouble = f"refused: {frame.method}"
            connection.close()
            return
        tag = frame.method.delivery_tag
        if not frame.method.multiple:
            unconfirmed.discard(tag)
        else:
            unconfirmed.difference_update(range(lowest, tag + 1))
            lowest = tag + 1
        fill(channel)

    def fill(channel: Any) -> None:
        nonlocal sent, exhausted
        while not exhausted and len(unconfirmed) < WINDOW:
            message = next(pending, None)
            if message is None:
                exhausted = True
                break
            body, properties = message
            channel.basic_publish("", queue, body, properties)
            sent += 1
            unconfirmed.add(sent)
        if exhausted and not unconfirmed and connection.is_open:
            connection.close()

    def closed(_connection: Any, reason: BaseException) -> None:
        nonlocal trouble
        if not (exhausted and not unconfirmed):
            trouble = trouble or str(reason)
        connection.ioloop.stop()

    def late() -> None:
        nonlocal trouble
        trouble = f"not all are confirmed in {timeout:g} s"
        connection.ioloop.stop()

    unconfirmed: set[int] = set()
    connection = pika.SelectConnection(
        pika.URLParameters(url),
        on_open_callback=opened,
        on_open_error_callback=closed,
        on_close_callback=closed,
    )
    connection.ioloop.call_later(timeout, late)
    connection.ioloop.start()
    if trouble:
        raise RuntimeError(trouble)
    return sent


if __name__ == "__main__":
    persistent = pika.BasicProperties(delivery_mode=2)
    lines = ((line.rstrip(b"\n"), persistent) for line in sys.stdin.buffer)
    publish(os.environ["BENCHMARK_URL"], sys.argv[1], lines, timeout=300.0)
