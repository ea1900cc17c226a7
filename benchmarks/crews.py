"""How each worker is started for a job, at the settings that its documentation recommends.

All of them: a durable queue of the same type, persistent messages, acknowledgement after the work,
confirmed publishing where the worker publishes. Two processes for Python jobs, four at once for
commands.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pika

from benchmarks.peers import spawn
from benchmarks.rig import QUEUE, SENT, Crew, Message, Rig
from tests.harness.processes import MissingTool
from tests.harness.tables import Table, config, private

APPS = "benchmarks.peers."
PROCESSES = 2
COMMANDS = 4


@dataclass(frozen=True)
class Worker:
    """One worker at one setting.

    `start` runs it for a kind of job (`noop`, `stamp`, `slow`, or a command's `read`, `clock`);
    `messages` makes that job's messages.
    """

    name: str
    setting: str
    start: Callable[[Rig, str], Crew]
    messages: Callable[[Rig, str, int], list[Message]] = field(repr=False)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.setting})" if self.setting else self.name


# workerd

#: The programs of the command jobs. `read` reads its input, since amqp-consume ends when a program
#: does not; `clock` notes how late it is.
PROGRAMS = {
    "read": spawn.COMMAND,
    "clock": [str(Path(spawn.__file__).with_name("clock.sh"))],
}


def configuration(
    rig: Rig,
    *,
    queue: Table | None = None,
    handlers: Mapping[str, Table] | None = None,
    tables: Mapping[str, Table] | None = None,
) -> Path:
    """The configuration that the fault tests use, and what is set here for speed.

    So the memory of finished jobs is on disk, and every event is logged.
    """
    text = config(
        rig.broker.url,
        ["/bin/true"],
        queues={QUEUE: {"type": rig.queue_type, **(queue or {})}},
        **{f"handlers.{name}": keys for name, keys in (handlers or {}).items()},
        **(tables or {}),
    )
    return private(rig.turn_folder, text)


def run_workerd(rig: Rig, file: Path, queue: str = QUEUE, instances: int = 1) -> Crew:
    """So many instances, when all of them consume `queue`."""
    command: list[str | Path] = [sys.executable, "-m", "workerd", "run", "--config", file]
    commands = [[*command, "--instance", str(number)] for number in range(1, instances + 1)]
    crew = Crew(rig, commands, rig.environment())
    crew.await_consumers(instances, queue)
    return crew


def workerd_python(prefetch: int = 0, instances: int = 1) -> Worker:
    """`prefetch` is that of all instances together; 0: its default, and that of all the rest."""
    processes = PROCESSES // instances
    setting = f"{processes} process{'es' if processes > 1 else ''}"
    queue: Table = {}
    quick: Table = {}
    if prefetch:
        queue = {"concurrency": processes, "prefetch": prefetch // instances}
        quick = {"recycle_after": 0}
        setting += f", prefetch {queue['prefetch']}"

    def start(rig: Rig, job: str) -> Crew:
        python = f"{APPS}workerd_jobs:{job}"
        handler = {"python": python, "queue": QUEUE, "processes": processes, **quick}
        file = configuration(rig, queue=queue, handlers={job: handler})
        return run_workerd(rig, file, instances=instances)

    return _workerd(instances, setting, start)


def workerd_commands(prefetch: int = COMMANDS, instances: int = 1) -> Worker:
    """`prefetch` is that of all instances together."""
    queue = {"concurrency": COMMANDS // instances, "prefetch": prefetch // instances}

    def start(rig: Rig, job: str) -> Crew:
        command = {"command": PROGRAMS[job], "queue": QUEUE}
        file = configuration(rig, queue=queue, handlers={job: command})
        return run_workerd(rig, file, instances=instances)

    setting = f"{queue['concurrency']} at once, prefetch {queue['prefetch']}"
    return _workerd(instances, setting, start)


def _workerd(instances: int, setting: str, start: Callable[[Rig, str], Crew]) -> Worker:
    if instances == 1:
        return Worker("workerd", setting, start, _workerd_messages)
    return Worker(f"workerd, {instances} instances", f"each {setting}", start, _workerd_messages)


def _workerd_messages(_rig: Rig, job: str, count: int) -> list[Message]:
    body = _body(job)
    return [
        (body, pika.BasicProperties(type=job, message_id=str(uuid.uuid4()), delivery_mode=2))
        for _ in range(count)
    ]


def _body(job: str) -> bytes:
    bodies = {"stamp": SENT.encode(), "clock": f"{SENT}\n".encode(), "read": spawn.BODY}
    return bodies.get(job, b"")


# The others


def dramatiq(setting: str, *, threads: int, prefetch: int = 0) -> Worker:
    """`prefetch` is per process; 0 is its default, twice the threads."""

    def start(rig: Rig, _job: str) -> Crew:
        command = [sys.executable, "-m", "dramatiq", APPS + "dramatiq_app"]
        command += ["--processes", str(PROCESSES), "--threads", str(threads)]
        environment = rig.environment(
            dramatiq_queue_prefetch=str(prefetch), dramatiq_restart_delay="500"
        )
        crew = Crew(rig, [command], environment)
        crew.await_consumers(PROCESSES)
        return crew

    return Worker(
        "dramatiq", setting, start, lambda rig, job, n: rig.encoded("dramatiq_app", job, n)
    )


def celery(setting: str, *, multiplier: int) -> Worker:
    def start(rig: Rig, _job: str) -> Crew:
        command = [sys.executable, "-m", "celery"]
        command += ["-A", APPS + "celery_app", "worker"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        command += ["--pool", "prefork", "--concurrency", str(PROCESSES)]
        environment = rig.environment(BENCHMARK_PREFETCH=str(multiplier))
        crew = Crew(rig, [command], environment)
        crew.await_consumers(1)
        return crew

    return Worker("celery", setting, start, lambda rig, job, n: rig.encoded("celery_app", job, n))


def plain_pika(setting: str, *, prefetch: int) -> Worker:
    def start(rig: Rig, job: str) -> Crew:
        rig.declare()
        command = [sys.executable, "-m", APPS + "pika_worker", job, str(prefetch)]
        crew = Crew(rig, [command] * PROCESSES, rig.environment())
        crew.await_consumers(PROCESSES)
        return crew

    return Worker("pika", setting, start, _plain_messages)


def amqp_consume(setting: str) -> Worker:
    def start(rig: Rig, job: str) -> Crew:
        if shutil.which("amqp-consume") is None:
            raise MissingTool("amqp-consume is not installed")
        rig.declare()
        command = ["amqp-consume", f"--url={rig.broker.url}", f"--queue={QUEUE}", "-p", "1"]
        crew = Crew(rig, [[*command, *PROGRAMS[job]]] * COMMANDS, rig.environment())
        crew.await_consumers(COMMANDS)
        return crew

    return Worker("amqp-consume", setting, start, _plain_messages)


def _plain_messages(_rig: Rig, job: str, count: int) -> list[Message]:
    return [(_body(job), pika.BasicProperties(delivery_mode=2))] * count
