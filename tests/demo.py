"""`make demo`: RabbitMQ's work-queue tutorial, with the broker restarted in the middle.

A private RabbitMQ in a temporary folder, the daemon on it, eight jobs that sleep for as many
seconds as they say. At the end the jobs' own journal shows how often each of them ran.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pika

from tests.harness import processes
from tests.harness.broker import Broker
from tests.harness.oracle import Oracle
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import until

PROGRAMS = Path(sys.executable).parent

CONFIGURATION = """\
[broker]
urls = ["{url}"]

[queues.default]
concurrency = 4
default_handler = "sleep"

[handlers.sleep]
command = [{command}]

[log]
format = "console"
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="workerd-demo-") as folder:
        return demonstrate(Path(folder))


def demonstrate(folder: Path) -> int:
    broker = Broker(folder / "rabbitmq")
    oracle = Oracle(str(folder))
    # A job notes its start and its end in a file, and sleeps in between.
    command = [*oracle.command()[:2], "{id}", "{body}"]
    configuration = folder / "workerd.toml"
    say("a private RabbitMQ starts on a free port")
    broker.start()
    try:
        written = CONFIGURATION.format(
            url=broker.url, command=", ".join(f'"{word}"' for word in command)
        )
        configuration.write_text(written)
        print(written)
        say(f"workerd run --config {configuration}")
        daemon = processes.spawn(
            [PROGRAMS / "workerd", "run", "--config", configuration, "--instance", "demo"],
            env={**os.environ, "RUNTIME_DIRECTORY": str(folder / "run")},
            cwd=CHECKOUT,
            stderr=None,
        )
        try:
            return restart_under_jobs(broker, oracle, configuration, daemon)
        finally:
            processes.end(daemon)
    finally:
        broker.close()


def restart_under_jobs(
    broker: Broker, oracle: Oracle, configuration: Path, daemon: subprocess.Popen[bytes]
) -> int:
    until(lambda: "default" in broker.queues(), "the queue is declared")
    say("submitting the tutorial's jobs")
    ids = [submit(configuration, seconds) for seconds in ("4", "5", "3", "2", "1", "1", "2")]
    send_like_the_tutorial(broker.url, b"1")
    until(lambda: len(oracle.journal.splitlines()) >= len(ids), "some jobs are done, some run")

    say("the broker is restarted under the running jobs")
    broker.restart()
    say("the broker is back")
    until(lambda: oracle.journal.count("finish ") == len(ids) + 1, "all jobs are done")
    until(lambda: broker.queues()["default"][:2] == (0, 0), "all jobs are acknowledged")

    say("kill -TERM: a drain, with nothing left to do")
    os.kill(daemon.pid, signal.SIGTERM)
    status = daemon.wait()

    say("what the jobs themselves have noted")
    # The tutorial's job has an id that was made for the log.
    report = oracle.report({*ids, *(line.split()[1] for line in oracle.journal.splitlines())})
    for job, starts in report.starts.items():
        print(f"    {job}  started {starts} time{'s' * (starts != 1)}")
    print(f"    queue default: {broker.queues()['default'].ready} jobs left")
    print(f"    dead letters:  {broker.queues()['default.dead'].ready}")
    print(f"    exit status of the daemon: {status}")
    starts_in_all = sum(report.starts.values())
    once = starts_in_all == len(ids) + 1 and not report.problems() and status == 0
    say("every job ran once" if once else f"SOMETHING IS WRONG: {report}")
    return 0 if once else 1


def submit(configuration: Path, seconds: str) -> str:
    command = ["submit", "sleep", seconds]
    result = subprocess.run(
        [PROGRAMS / command[0], "--config", configuration, *command[1:]],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(f"$ {' '.join(command)}\n{result.stdout.strip()}")
    return result.stdout.strip()


def send_like_the_tutorial(url: str, body: bytes) -> None:
    """What the tutorial's new_task.py does: a message with nothing but a body."""
    say("one more from the tutorial's new_task.py, which knows nothing of workerd")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    connection.channel().basic_publish("", "default", body)
    connection.close()


def say(text: str) -> None:
    # Lines of the daemon's log come in between, with the same clock.
    print(f"\n--- {time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
