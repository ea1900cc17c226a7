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


def run_workerd(rig: Rig, file: Path, queue: str = QUEUE) -> Crew:
    """An instance, when it consumes `queue`."""
    command: list[str | Path] = [sys.executable, "-m", "workerd", "run", "--config", file]
    crew = Crew(rig, [command], rig.environment())
    crew.await_consumers(1, queue)
    return crew


def workerd_python(setting: str, queue: Table, handler: Table) -> Worker:
    def start(rig: Rig, job: str) -> Crew:
        python = {
            "python": f"{APPS}workerd_jobs:{job}",
            "queue": QUEUE,
            "processes": PROCESSES,
            **handler,
        }
        return run_workerd(rig, configuration(rig, queue=queue, handlers={job: python}))

    return Worker("workerd", setting, start, _workerd_messages)


def workerd_commands(setting: str, queue: Table) -> Worker:
    def start(rig: Rig, job: str) -> Crew:
        command = {"command": PROGRAMS[job], "queue": QUEUE}
        return run_workerd(rig, configuration(rig, queue=queue, handlers={job: command}))

    return Worker("workerd", setting, start, _workerd_messages)


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


def celery(setting: str, *, multiplier: int = 4, solo: bool = False) -> Worker:
    """Its pool of two processes; or, `solo`, two workers without a pool."""

    def start(rig: Rig, _job: str) -> Crew:
        command = [sys.executable, "-m", "celery"]
        command += ["-A", APPS + "celery_app", "worker"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        commands = [[*command, "--pool", "prefork", "--concurrency", str(PROCESSES)]]
        if solo:
            commands = [[*command, "--pool", "solo", "-n", f"{n}@%h"] for n in range(PROCESSES)]
        environment = rig.environment(BENCHMARK_PREFETCH=str(multiplier))
        crew = Crew(rig, commands, environment)
        crew.await_consumers(len(commands))
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
