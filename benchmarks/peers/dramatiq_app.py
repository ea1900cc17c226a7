"""Dramatiq: `dramatiq benchmarks.peers.dramatiq_app`.

As a program it prints messages for its actors, a line of JSON each: `… ACTOR COUNT [ARGUMENT]`.

It acknowledges after the work by default. Publishing is confirmed; the queue is of the type that
the others use, by the one method in which Dramatiq puts a queue's arguments together.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.peers import work

QUEUE = "jobs"


class Broker(RabbitmqBroker):  # type: ignore[misc] # Dramatiq is not installed for mypy
    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        arguments = super()._build_queue_arguments(queue_name)
        return {**arguments, "x-queue-type": os.environ["BENCHMARK_QUEUE_TYPE"]}


broker = Broker(url=os.environ["BENCHMARK_URL"], confirm_delivery=True)
dramatiq.set_broker(broker)

ACTORS = {
    function.__name__: dramatiq.actor(function, queue_name=QUEUE)
    for function in (work.noop, work.stamp, work.slow)
}


def main(actor: str, count: str, *arguments: str) -> None:
    for _ in range(int(count)):
        body = ACTORS[actor].message(*arguments).encode()
        print(json.dumps({"properties": {}, "body": body.decode()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
