"""The plainest worker there is, with pika: `python -m benchmarks.peers.pika_worker JOB PREFETCH`.

It acknowledges after the work. Without a connection it tries again twenty times a second.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pika
import pika.exceptions

from benchmarks.peers import work

QUEUE = "jobs"


def main(job: str, prefetch: int) -> None:
    def handle(channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        if job == "stamp":
            work.stamp(body.decode())
        elif job == "slow":
            work.slow()
        else:
            work.noop()
        channel.basic_ack(method.delivery_tag)

    while True:
        try:
            connection = pika.BlockingConnection(pika.URLParameters(os.environ["BENCHMARK_URL"]))
            channel = connection.channel()
            channel.basic_qos(prefetch_count=prefetch)
            channel.basic_consume(QUEUE, handle)
            channel.start_consuming()
        except pika.exceptions.AMQPError:
            time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
