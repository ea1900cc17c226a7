"""Side by side with programs that know nothing of workerd: the tutorial's, and Debian's tools."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.processes import MissingTool
from tests.harness.programs import Program, run
from tests.harness.waiting import until

Start = Callable[..., Daemon]

CONFIG = """
[broker]
urls = ["{url}"]

[worker]
ready_wait = "0.2s"

[queues.{queue}]
declare = "{declare}"
concurrency = 1
default_handler = "echo"

[handlers.echo]
command = ["echo", "did {{body}}"]
"""

# RabbitMQ's tutorial "Work Queues", except for where the broker is.

NEW_TASK = """
import pika
conn = pika.BlockingConnection(pika.URLParameters('{url}'))
channel = conn.channel()
channel.queue_declare(queue='task_queue', durable=True)

import sys
message = ' '.join(sys.argv[1:]) or 'Hello World!'

channel.basic_publish(exchange='',
                      routing_key='task_queue',
                      body=message,
                      properties=pika.BasicProperties(
                         delivery_mode = 2,
                      ))

print(" [x] Sent %r" % message)
conn.close()
"""

WORKER = """
import time
import pika
conn = pika.BlockingConnection(pika.URLParameters('{url}'))
channel = conn.channel()
channel.queue_declare(queue='task_queue', durable=True)

def complex_callback(ch, method, properties, body):
    print(" [x] Waited %r" % body)
    try:
        t = int(body.decode('utf-8'))
    except:
        t = 2
    time.sleep(t)
    print(" [x] Done " + str(t) + ' seconds')

    ch.basic_ack(delivery_tag=method.delivery_tag)

channel.basic_qos(prefetch_count=1)
channel.basic_consume(queue='task_queue',
                      on_message_callback=complex_callback)

print(' [*] Waiting for messages. To exit press CTRL+C')

channel.start_consuming()
"""

# Its first part, "Hello World", with a queue that is not durable.

SEND = """
import pika
conn = pika.BlockingConnection(pika.URLParameters('{url}'))
channel = conn.channel()
channel.queue_declare(queue='hello')
channel.basic_publish(exchange='',
                      routing_key='hello',
                      body='Hello World!')
print(" [x] Sent 'Hello World!'")
conn.close()
"""

RECEIVE = """
import pika
conn = pika.BlockingConnection(pika.URLParameters('{url}'))
channel = conn.channel()
channel.queue_declare(queue='hello')

def callback(ch, method, properties, body):
    print(" [x] Received %r" % body)

channel.basic_consume(queue='hello',
                      on_message_callback=callback,
                      auto_ack=True)

print(' [*] Waiting for messages. To exit press CTRL+C')
channel.start_consuming()
"""


def await_idle(broker: Broker, queue: str, consumers: int) -> None:
    """Wait until a queue has so many consumers, and all that it held is acknowledged."""
    until(lambda: broker.queues()[queue] == (0, 0, consumers), f"{queue} is idle")


def config(broker: Broker, queue: str, declare: str) -> str:
    return CONFIG.format(url=broker.url, queue=queue, declare=declare)


@pytest.fixture
def tutorial(broker: Broker, tmp_path: Path) -> Callable[[str], list[str]]:
    """The command that runs a program of the tutorial."""

    def command(source: str) -> list[str]:
        file = tmp_path / f"program-{abs(hash(source))}.py"
        file.write_text(source.format(url=broker.url))
        # Its prints are to be seen at once.
        return [sys.executable, "-u", str(file)]

    return command


@pytest.mark.parametrize("workerd_first", [True, False])
def test_the_tutorials_new_task_works_whichever_of_the_two_starts_first(
    broker: Broker,
    daemon: Start,
    tutorial: Callable[[str], list[str]],
    workerd_first: bool,
) -> None:
    new_task = tutorial(NEW_TASK)
    if workerd_first:
        workerd = daemon(config(broker, "task_queue", "plain"))
        workerd.wait_event("consuming", queue="task_queue")
        sent = run([*new_task, "0"])
    else:
        sent = run([*new_task, "0"])
        workerd = daemon(config(broker, "task_queue", "plain"))
    assert (sent.status, sent.stdout, sent.stderr) == (0, " [x] Sent '0'\n", "")
    workerd.wait_event("output", text="did 0")
    workerd.wait_event("done")
    assert run(new_task).status == 0
    workerd.wait_event("output", text="did Hello World!")
    workerd.wait_event("done", count=2)
    assert not workerd.events("declare failed")
    await_idle(broker, "task_queue", consumers=1)


def test_the_tutorials_worker_and_the_daemon_share_a_queue(
    broker: Broker,
    daemon: Start,
    program: Callable[..., Program],
    tutorial: Callable[[str], list[str]],
) -> None:
    worker, new_task = tutorial(WORKER), tutorial(NEW_TASK)
    first = program(*worker)
    first.wait_lines(1)
    assert run([*new_task, "60"]).status == 0
    assert first.wait_lines(2)[1] == " [x] Waited b'60'"
    # While that one is busy, the daemon has all the rest; and when it goes away, its job too.
    workerd = daemon(config(broker, "task_queue", "plain"))
    workerd.wait_event("consuming", queue="task_queue")
    assert [run([*new_task, "0"]).status for _ in range(2)] == [0, 0]
    workerd.wait_event("output", text="did 0", count=2)
    first.close()
    workerd.wait_event("output", text="did 60")
    await_idle(broker, "task_queue", consumers=1)
    # Idle ones take turns.
    second = program(*worker)
    await_idle(broker, "task_queue", consumers=2)
    assert [run([*new_task, "0"]).status for _ in range(2)] == [0, 0]
    assert second.wait_lines(3)[1:] == [" [x] Waited b'0'", " [x] Done 0 seconds"]
    workerd.wait_event("output", text="did 0", count=3)
    await_idle(broker, "task_queue", consumers=2)


def test_a_queue_of_others_that_is_not_durable_is_waited_for_and_shared(
    broker: Broker,
    daemon: Start,
    program: Callable[..., Program],
    tutorial: Callable[[str], list[str]],
) -> None:
    workerd = daemon(config(broker, "hello", "wait"))
    workerd.wait_ready()
    workerd.wait_notify(lambda text: "hello paused: waiting for it to be declared" in text)
    send = tutorial(SEND)
    assert run(send).status == 0
    workerd.wait_event("output", text="did Hello World!")
    receive = program(*tutorial(RECEIVE))
    await_idle(broker, "hello", consumers=2)
    assert [run(send).status for _ in range(2)] == [0, 0]
    workerd.wait_event("done", count=2)
    assert receive.wait_lines(2)[1] == " [x] Received b'Hello World!'"


@pytest.fixture
def tools() -> None:
    for tool in ("amqp-publish", "amqp-consume"):
        if shutil.which(tool) is None:
            raise MissingTool(f"{tool} is not installed")


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("declare", ["plain", "create"])
def test_debians_amqp_tools_publish_to_the_daemon_and_consume_beside_it(
    broker: Broker, daemon: Start, program: Callable[..., Program], declare: str
) -> None:
    workerd = daemon(config(broker, "task_queue", declare))
    workerd.wait_event("consuming", queue="task_queue")
    publish = ["amqp-publish", f"--url={broker.url}", "--routing-key=task_queue"]
    assert run([*publish, "--body=0", "--persistent"]).status == 0
    assert run(publish, b"standard input").status == 0
    workerd.wait_event("output", text="did 0")
    workerd.wait_event("output", text="did standard input")
    consume = program("amqp-consume", f"--url={broker.url}", "--queue=task_queue", "cat")
    await_idle(broker, "task_queue", consumers=2)
    assert [run([*publish, "--body=0\n"]).status for _ in range(2)] == [0, 0]
    assert consume.wait_lines(1) == ["0"]
    workerd.wait_event("done", count=3)
    await_idle(broker, "task_queue", consumers=2)
