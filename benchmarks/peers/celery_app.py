"""Celery: `celery -A benchmarks.peers.celery_app worker`.

As a program it prints messages for its tasks, a line of JSON each: `… TASK COUNT [ARGUMENT]`.

At-least-once on a durable queue, as its documentation says for RabbitMQ: late acknowledgement, a
quorum queue (which it then consumes without global QoS), confirmed publishing; no result backend.
"""

from __future__ import annotations

import json
import os
import sys
import uuid

from celery import Celery

from benchmarks.peers import work

QUEUE = "jobs"

app = Celery("benchmark", broker=os.environ["BENCHMARK_URL"])
app.conf.update(
    task_default_queue=QUEUE,
    task_default_queue_type=os.environ["BENCHMARK_QUEUE_TYPE"],
    task_acks_late=True,
    task_ignore_result=True,
    broker_transport_options={"confirm_publish": True},
    worker_prefetch_multiplier=int(os.environ.get("BENCHMARK_PREFETCH", "4")),
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
)

app.task(name="noop")(work.noop)
app.task(name="stamp")(work.stamp)
app.task(name="slow")(work.slow)


def main(task: str, count: str, *arguments: str) -> None:
    for _ in range(int(count)):
        message = app.amqp.as_task_v2(str(uuid.uuid4()), task, arguments, ignore_result=True)
        properties = {
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "headers": message.headers,
            "correlation_id": message.properties["correlation_id"],
        }
        print(json.dumps({"properties": properties, "body": json.dumps(message.body)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
