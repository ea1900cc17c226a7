"""The host runs out of descriptors, processes or memory: the daemon waits, and no job pays."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.pools import PRELUDE
from tests.harness.processes import MissingTool
from tests.harness.tables import config
from tests.harness.waiting import until
from tests.harness.wire import Wire

StartDaemon = Callable[..., Daemon]

NO_PROCESS = "Resource temporarily unavailable: no process is left (TasksMax=, ulimit -u)"


def leave_descriptors(workerd: Daemon, spare: int) -> None:
    """Let the daemon open so many descriptors more, and not one beyond that."""
    taken = {int(name) for name in os.listdir(f"/proc/{workerd.pid}/fd")}
    free = (number for number in range(len(taken) + spare + 1) if number not in taken)
    limit = [*free][spare]
    _, hard = resource.prlimit(workerd.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(workerd.pid, resource.RLIMIT_NOFILE, (limit, hard))


def enough_descriptors(workerd: Daemon) -> None:
    _, hard = resource.prlimit(workerd.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(workerd.pid, resource.RLIMIT_NOFILE, (min(hard, 1024), hard))


def reaped_faults(workerd: Daemon) -> int:
    """Page faults of children that have ended: no process ends without any (proc(5), cminflt)."""
    return int(Path(f"/proc/{workerd.pid}/stat").read_text().rpartition(")")[2].split()[8])


def check_no_busy_loop(workerd: Daemon) -> None:
    before = workerd.cpu_seconds()
    # What is measured is a time.
    time.sleep(1)
    assert workerd.cpu_seconds() - before < 0.2


def test_without_descriptors_jobs_wait_and_none_is_lost_or_blamed(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    # A job needs six descriptors for its pipes, and one for its report; three of them are closed
    # before it needs another. A handler that is paused would not even try.
    steps = range(7)
    handlers: dict[str, Any] = {
        f"handlers.with-{n}": {"command": oracle.command(), "queue": "jobs"} for n in steps
    }
    workerd = daemon(config(broker.url, oracle.command(), **handlers))
    workerd.wait_event("consuming", queue="jobs.due")
    jobs = client.publish_jobs("jobs", ["before"])
    workerd.wait_event("done")
    until(lambda: len(workerd.children()) == 1, "only the guardian is left")
    # Besides our own one to consume and one to publish.
    until(lambda: broker.connections() == 3, "all connections")
    used = workerd.fds()

    started = reaped_faults(workerd)
    for spare in steps:
        leave_descriptors(workerd, spare)
        jobs += client.publish_jobs("jobs", [f"with-{spare}"], type=f"with-{spare}")
        paused = workerd.wait_event("handler paused", job_id=f"with-{spare}")
        assert paused["error"].endswith(": Too many open files")
        assert workerd.fds() == used
        workerd.wait_event("postponed", job_id=f"with-{spare}")
    check_no_busy_loop(workerd)
    broker.await_depth("jobs")
    # Not one was started only to be killed.
    assert reaped_faults(workerd) == started

    enough_descriptors(workerd)
    workerd.wait_event("done", count=len(jobs))
    broker.await_depth("jobs")
    oracle.check(jobs)
    assert client.ready("jobs.dead") == 0
    assert {entry["attempt"] for entry in workerd.events("done")} == {1}


def test_without_descriptors_for_a_connection_it_waits_and_comes_back(
    broker: Broker, client: Client, wire: Wire, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(wire.url, oracle.command()))
    workerd.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")

    wire.cut()
    workerd.wait_event("unreachable")
    until(lambda: wire.connections() == 0, "both connections are gone")
    leave_descriptors(workerd, 0)
    wire.mend()
    workerd.wait_event("unreachable", text=lambda text: "too many open files" in text.lower())
    check_no_busy_loop(workerd)

    enough_descriptors(workerd)
    workerd.wait_event("rejoined")
    oracle.release()
    workerd.wait_event("done")
    broker.await_depth("jobs")
    oracle.check(jobs)
    assert not workerd.events("bug")


class Nobody:
    """A user without any process: as many as it may have is a matter of its own.

    (The kernel does not limit root.) It may read and write every file, so that it finds the code.
    """

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise MissingTool("to become another user needs root")
        # As unique as this process.
        user = 100_000 + os.getpid()
        self._become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        self._may = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]

    def command(self, config: Path) -> list[str | Path]:
        program = [*self._become, *self._may, sys.executable, "-m", "workerd", "run"]
        return [*program, "--config", config]

    def limit(self, workerd: Daemon, processes: int) -> None:
        """How many processes and threads the user may have, as far as the daemon is concerned."""
        change = ["prlimit", f"--pid={workerd.pid}", f"--nproc={processes}:"]
        subprocess.run([*self._become, *change], check=True)


def test_without_processes_jobs_wait_and_none_is_lost_or_blamed(
    broker: Broker,
    client: Client,
    wire: Wire,
    daemon: StartDaemon,
    oracle: Oracle,
    tmp_path: Path,
) -> None:
    nobody = Nobody()
    command = nobody.command(tmp_path / "workerd-1.toml")
    workerd = daemon(config(wire.url, oracle.command()), command=command)
    workerd.wait_event("consuming", queue="jobs.due")
    jobs = client.publish_jobs("jobs", ["before"])
    workerd.wait_event("done")

    nobody.limit(workerd, 1)
    jobs += client.publish_jobs("jobs", ["a", "b"])
    paused = workerd.wait_event("handler paused")
    assert paused["error"].endswith(f": {NO_PROCESS}")
    for job in ("a", "b"):
        workerd.wait_event("postponed", job_id=job)
    check_no_busy_loop(workerd)
    # It comes back from an outage without a thread or process more.
    mark = workerd.mark()
    wire.break_connections()
    workerd.wait_event("consuming", since=mark, queue="jobs")

    nobody.limit(workerd, 1000)
    workerd.wait_event("done", count=3)
    broker.await_depth("jobs")
    oracle.check(jobs)
    assert client.ready("jobs.dead") == 0
    assert {entry["attempt"] for entry in workerd.events("done")} == {1}


def test_without_processes_warm_handlers_go_on_with_those_they_have_and_blame_no_job(
    broker: Broker, client: Client, daemon: StartDaemon, tmp_path: Path
) -> None:
    nobody = Nobody()
    gated = f"until [ -e {tmp_path}/gate ]; do sleep 0.02; done"
    script = f"{PRELUDE}\nready; while next; do {gated}; answer; done"
    handlers: dict[str, Any] = {
        "handlers.warm": {
            "stream": ["sh", "-c", script],
            "processes": 2,
            "queue": "jobs",
            "retry": {"attempts": 1},
        }
    }
    command = nobody.command(tmp_path / "workerd-1.toml")
    workerd = daemon(config(broker.url, ["true"], **handlers), command=command)
    workerd.wait_event("consuming", queue="jobs.due")
    workerd.wait_event("child ready")

    nobody.limit(workerd, 1)
    client.publish_jobs("jobs", ["a", "b", "c"], type="warm")
    failed = workerd.wait_event("child failed", handler="warm")
    assert failed["error"].endswith(f": {NO_PROCESS}")
    workerd.wait_notify(lambda text: "handler warm short of processes: cannot run sh" in text)
    assert len(workerd.events("start")) == 1
    check_no_busy_loop(workerd)
    # The one process that it has ends without another in its place.
    os.kill(workerd.events("child ready")[0]["child"], signal.SIGKILL)
    workerd.wait_event("failed", job_id="a")
    for job in ("b", "c"):
        workerd.wait_event("postponed", job_id=job)
    workerd.wait_notify(lambda text: "handler warm paused: cannot run sh" in text)

    nobody.limit(workerd, 1000)
    workerd.wait_event("child recovered", handler="warm")
    (tmp_path / "gate").touch()
    for job in ("b", "c"):
        assert workerd.wait_event("done", job_id=job)["attempt"] == 1
    broker.await_depth("jobs")
    assert len(workerd.events("child failed")) == 1
    assert {letter.id for letter in client.look("jobs.dead")} == {"a"}


def test_a_job_that_the_kernel_kills_for_want_of_memory_fails_alone(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(broker.url, oracle.command()))
    workerd.wait_ready()
    oracle.hold("large", "small")
    jobs = client.publish_jobs("jobs", ["large", "small"])
    workerd.wait_event("start", count=2)
    (pid,) = until(
        lambda: [line.split()[2] for line in oracle.journal.splitlines() if " large " in line],
        "the large job has started",
    )
    # As the kernel does: one process, and not its group.
    os.kill(int(pid), signal.SIGKILL)
    failed = workerd.wait_event("failed", job_id="large")
    assert (failed["reason"], failed["signal"]) == ("signal", "SIGKILL")
    workerd.wait_event("dead letter", job_id="large")
    oracle.release()
    workerd.wait_event("done", job_id="small")
    broker.await_depth("jobs")
    (letter,) = client.look("jobs.dead")
    assert letter.headers["x-workerd-reason"] == "signal"
    assert letter.headers["x-workerd-signal"] == "SIGKILL"
    oracle.check(jobs, dead=["large"])


@pytest.mark.parametrize("size", [1 << 40, 1 << 50])
def test_a_job_that_gets_no_more_memory_fails_with_its_own_words(
    broker: Broker, client: Client, daemon: StartDaemon, size: int
) -> None:
    greedy = ["prlimit", "--as=1073741824", sys.executable, "-c", f"bytearray({size})"]
    workerd = daemon(config(broker.url, greedy))
    workerd.wait_ready()
    client.publish("jobs", message_id="greedy")
    workerd.wait_event("dead letter", job_id="greedy")
    (letter,) = client.look("jobs.dead")
    assert "MemoryError" in letter.headers["x-workerd-error"]
    broker.await_depth("jobs")
