"""The rig: one private broker, crews of worker processes on it, queues that fill and empty."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pika

from benchmarks.peers import pika_bulk
from tests.harness import processes
from tests.harness.broker import Broker
from tests.harness.processes import MissingTool
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import until

QUEUE = "jobs"
#: Seconds that anything may take at most: a start, a stop, a queue to be emptied.
TIMEOUT = 300.0

Message = pika_bulk.Message
#: Stands for the moment of publishing in the body of a message.
SENT = "@sent@"


class Rig:
    """One broker, a folder on disk, and the virtual host of the turn that is being played."""

    def __init__(self, queue_type: str, rabbitmq: str, *, quick: bool) -> None:
        self.queue_type = queue_type
        #: Play with a fifth of the jobs.
        self.quick = quick
        #: The file for a profile, while workerd is to be profiled.
        self.profile: Path | None = None
        # On disk, as the memory of a daemon is; and a name short enough for sockets in it.
        self._folder = tempfile.TemporaryDirectory(
            prefix="workerd-bench-", dir="/var/tmp", ignore_cleanup_errors=True
        )
        self.folder = Path(self._folder.name)
        self.broker = Broker(self.folder / "rabbitmq", rabbitmq)
        self._encoded: dict[tuple[str, str, int], list[Message]] = {}
        self._turns = 0
        #: The crews that run now.
        self.crews: list[Crew] = []

    def __enter__(self) -> Rig:
        self.broker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end_turn()
        self.broker.close()
        self._folder.cleanup()

    def jobs(self, count: int) -> int:
        """So many, or a fifth of them in a quick turn."""
        return count // 5 if self.quick else count

    # A turn

    def begin_turn(self) -> None:
        """A fresh virtual host and a fresh folder; the broker is back if a turn has lost it."""
        self._turns += 1
        if not self.broker.running:
            self.broker.close()
            self.broker = Broker(self.folder / f"rabbitmq-{self._turns}", self.broker.version)
            self.broker.start()
        self.turn_folder.mkdir()
        self.broker.fresh_vhost()

    def end_turn(self) -> None:
        """End whatever runs, and forget what it wrote."""
        for crew in self.crews[:]:
            crew.close()
        if self._turns:
            shutil.rmtree(self.turn_folder, ignore_errors=True)

    @property
    def turn_folder(self) -> Path:
        return self.folder / str(self._turns)

    @property
    def notes(self) -> Path:
        """The file in which jobs note that they ran."""
        return self.turn_folder / "notes"

    def noted(self) -> bytes:
        return self.notes.read_bytes() if self.notes.exists() else b""

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of every program of this turn."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("WORKERD_", "PYTHON", "CELERY", "dramatiq"))
        }
        return {
            **inherited,
            "PYTHONPATH": str(CHECKOUT),
            "RUNTIME_DIRECTORY": str(self.turn_folder / "run"),
            "STATE_DIRECTORY": str(self.turn_folder / "state"),
            "BENCHMARK_URL": self.broker.url,
            "BENCHMARK_NOTES": str(self.notes),
            "BENCHMARK_QUEUE_TYPE": self.queue_type,
            **changes,
        }

    # Queues

    def declare(self, queue: str = QUEUE) -> None:
        """A durable queue, for workers that declare none themselves."""
        with self.channel() as channel:
            arguments = {"x-queue-type": self.queue_type}
            channel.queue_declare(queue, durable=True, arguments=arguments)

    def channel(self) -> Connected:
        return Connected(self.broker.url)

    def load(self, messages: Iterable[Message]) -> int:
        """Publish all of them, confirmed; returns how many."""
        return pika_bulk.publish(self.broker.url, QUEUE, messages, TIMEOUT)

    def left(self) -> tuple[int, int]:
        """How many messages of the queue wait, and how many are unacknowledged, now."""
        depth = self.broker.queues().get(QUEUE)
        return (0, 0) if depth is None else (depth.ready, depth.unacked)

    def empty(
        self, channel: Any, crew: Crew, sample: Callable[[int], None] = lambda _: None
    ) -> float:
        """Wait until a crew has acknowledged every message; returns that moment, some 10 ms late.

        What waits is asked for fifty times a second, which costs the broker next to nothing, and
        `sample` gets it; what is unacknowledged only at the end.
        """
        deadline = time.monotonic() + TIMEOUT
        pause = 0.02
        while time.monotonic() < deadline:
            crew.check()
            ready = channel.queue_declare(QUEUE, passive=True).method.message_count
            sample(ready)
            if ready == 0:
                if self.left() == (0, 0):
                    return time.monotonic()
                pause = 0.002
            time.sleep(pause)
        raise AssertionError(f"{self.left()} jobs are left after {TIMEOUT:g} s:\n{crew.tail()}")

    def dead(self) -> int:
        """Messages in any other queue: dead letters, or jobs that wait for another attempt."""
        return sum(
            depth.ready + depth.unacked
            for name, depth in self.broker.queues().items()
            if name != QUEUE
        )

    def encoded(self, module: str, job: str, count: int) -> list[Message]:
        """Messages that a peer's own library makes for a job; made once and used every turn."""
        key = (module, job, count)
        if key not in self._encoded:
            arguments = [SENT] if job == "stamp" else []
            printed = subprocess.run(
                [sys.executable, "-m", f"benchmarks.peers.{module}", job, str(count), *arguments],
                env=self.environment(BENCHMARK_NOTES="/dev/null"),
                cwd=CHECKOUT,
                stdout=subprocess.PIPE,
                timeout=TIMEOUT,
                check=True,
            ).stdout
            self._encoded[key] = [_message(json.loads(line)) for line in printed.splitlines()]
        return self._encoded[key]


class Connected:
    """A channel of its own connection, for `with`."""

    def __init__(self, url: str) -> None:
        parameters = pika.URLParameters(url)
        parameters.heartbeat = 0  # it may be silent for long
        self._connection = pika.BlockingConnection(parameters)

    def __enter__(self) -> Any:
        return self._connection.channel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._connection.is_open:
            self._connection.close()


class Crew:
    """The processes of one worker: the commands that were started and all that is below them."""

    def __init__(
        self, rig: Rig, commands: Sequence[Sequence[str | Path]], environment: Mapping[str, str]
    ) -> None:
        self._rig = rig
        self.log = rig.turn_folder / f"log-{len(rig.crews)}"
        with self.log.open("ab") as log:
            self._started = [
                processes.spawn(command, env=environment, cwd=CHECKOUT, stdout=log, stderr=log)
                for command in commands
            ]
        rig.crews.append(self)

    @property
    def pid(self) -> int:
        """The first process."""
        return self._started[0].pid

    def pids(self) -> list[int]:
        return [
            pid
            for process in self._started
            for pid in (process.pid, *processes.descendants(process.pid))
        ]

    def await_consumers(self, count: int, queue: str = QUEUE) -> None:
        """Wait until so many consumers are at a queue."""

        def there() -> bool:
            self.check()
            depth = self._rig.broker.queues().get(queue)
            return depth is not None and depth.consumers == count

        until(there, f"{count} consumers of {queue}", TIMEOUT)

    def check(self) -> None:
        """Raise AssertionError if one of its processes has ended."""
        ended = [process.returncode for process in self._started if process.poll() is not None]
        assert not ended, f"ended with {ended}:\n{self.tail()}"

    def freeze(self) -> None:
        """Stop all of its processes in their tracks; `thaw` lets them go on."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in reversed(self.pids()):
            os.kill(pid, signal.SIGCONT)

    def pss(self) -> float:
        """Their memory in MB: proportional set size, in which shared pages count once.

        Raises MissingTool where a daemon's memory is for root alone to see.
        """
        try:
            return sum(_field(pid, "smaps_rollup", "Pss") for pid in self.pids()) * 1024 / 1e6
        except PermissionError:
            raise MissingTool("its memory is for root alone to see") from None

    def rss(self) -> float:
        """Resident memory of the first process in MB."""
        return _field(self.pid, "status", "VmRSS") * 1024 / 1e6

    def tail(self) -> str:
        return self.log.read_bytes()[-2000:].decode(errors="replace")

    def close(self) -> None:
        """End all of its processes at once; what they did has been counted."""
        processes.kill_trees(self.pids())
        for process in self._started:
            processes.end(process)
        if self in self._rig.crews:
            self._rig.crews.remove(self)


def _message(encoded: dict[str, Any]) -> Message:
    properties = pika.BasicProperties(delivery_mode=2, **encoded["properties"])
    return encoded["body"].encode(), properties


def _field(pid: int, file: str, name: str) -> int:
    """A value in kB of a file in /proc."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {name} in /proc/{pid}/{file}")
