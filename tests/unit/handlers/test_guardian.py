"""A daemon that is killed takes its jobs with it, and they run again, never beside themselves.

Two things are impossible without control groups and shared memory. A process that a job has put
into a session of its own has no tie to the job left by which it could be found, so it lives on. And
another instance, idle at that moment, may get the job back while the guardian still waits for a
busy processor: then the two runs overlap for some milliseconds. So these tests restart the daemon.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.commands import alone
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.waiting import TIMEOUT, until

# Some processes, each the leader of a group; the script's end is the daemon's end.
GROUPS = """
import signal, struct, time
from workerd.handlers.guardian import Guardian

def group():
    quiet = subprocess.DEVNULL
    sleep = ["sleep", "600"]
    return subprocess.Popen(sleep, start_new_session=True, stdout=quiet, stderr=quiet).pid

"""


def configuration(broker: Broker, command: list[str]) -> str:
    return f"""
        [broker]
        urls = ["{broker.url}"]
        [queues.work]
        default_handler = "job"
        concurrency = 2
        [handlers.job]
        command = {json.dumps(command)}
    """


def test_a_killed_daemon_takes_the_process_groups_of_its_jobs_with_it(
    broker: Broker, client: Client, daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    script = f"""
    trap '' TERM HUP
    sleep 600 & echo $! >>{tmp_path}/pids
    setsid sh -c 'echo $$ >{tmp_path}/own-session; exec sleep 600' &
    until [ -s {tmp_path}/own-session ]; do sleep 0.01; done
    echo $$ >>{tmp_path}/pids
    echo up
    wait
    """
    workerd = daemon(configuration(broker, ["sh", "-c", script]))
    workerd.wait_event("consuming")
    client.publish("work")
    workerd.wait_event("output", text="up")
    workerd.kill()
    child, leader = map(int, (tmp_path / "pids").read_text().split())
    assert processes.has_ended(leader, TIMEOUT / 4)
    assert processes.has_ended(child, TIMEOUT / 4)
    escaped = int((tmp_path / "own-session").read_text())
    assert not processes.has_ended(escaped, 0)
    os.kill(escaped, signal.SIGKILL)


def endless_at_first(oracle: Oracle) -> list[str]:
    """A command whose first run of each job would take ten minutes, and any other no time."""
    program, folder, *_ = oracle.command()
    script = 'mkdir "$1/first-$2" 2>/dev/null && exec "$0" "$@" 600; exec "$0" "$@" 0'
    return ["sh", "-c", script, program, folder, "{id}"]


def test_a_job_of_a_killed_daemon_runs_again_and_never_beside_itself(
    broker: Broker, client: Client, daemon: Callable[..., Daemon], oracle: Oracle
) -> None:
    config = configuration(broker, endless_at_first(oracle))
    first = daemon(config)
    first.wait_event("consuming")
    ids = client.publish_jobs("work", ["one", "two"])
    until(lambda: oracle.journal.count("start") == 2, "two jobs at work")
    first.kill()
    # The name of the instance is free at once.
    second = daemon(config)
    second.wait_event("done", count=2)
    report = oracle.check(ids, allowed_duplicates=2)
    assert report.cut_off == {"one", "two"}


def test_only_the_jobs_that_still_run_are_killed() -> None:
    said = alone(
        GROUPS
        + """
guardian = Guardian()
running, over, gone, later, another = (group() for _ in range(5))
guardian.started(over)
guardian.started(running)
guardian.ended(over)
guardian.started(later)
guardian.started(gone)
guardian.ended(gone)
print(running, over, gone, later, another, guardian.pid, flush=True)
os._exit(0)
"""
    )
    running, over, gone, later, another, guardian = map(int, said.split())
    try:
        assert processes.has_ended(guardian, TIMEOUT / 4)
        assert processes.has_ended(running, TIMEOUT / 4)
        assert processes.has_ended(later, TIMEOUT / 4)
        assert not processes.has_ended(over, 0)
        assert not processes.has_ended(gone, 0)
        assert not processes.has_ended(another, 0)
    finally:
        processes.kill_trees(processes.strays())


def test_the_guardian_outlives_what_ends_the_daemon() -> None:
    # A terminal's ^C and a hang-up reach every process of the daemon's session.
    said = alone(
        GROUPS
        + """
guardian = Guardian()
running = group()
guardian.started(running)
numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
wanted = sum(1 << number - 1 for number in numbers)

def blocked():
    with open(f"/proc/{guardian.pid}/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))

assert blocked() & wanted == wanted
for number in numbers:
    os.kill(guardian.pid, number)
print(running, os.getsid(guardian.pid) == guardian.pid, flush=True)
os._exit(0)
"""
    )
    running, own_session = said.split()
    try:
        assert processes.has_ended(int(running), TIMEOUT / 4)
        assert own_session == "True"
    finally:
        processes.kill_trees(processes.strays())


def test_a_guardian_that_is_stopped_or_dead_holds_up_no_job() -> None:
    said = alone(
        GROUPS
        + """
for number in (signal.SIGSTOP, signal.SIGKILL):
    guardian = Guardian()
    os.kill(guardian.pid, number)
    for _ in range(20_000):
        guardian.started(4_194_304)
        guardian.ended(4_194_304)
    guardian.close()
    os.kill(guardian.pid, signal.SIGKILL)
print("not held up")
"""
    )
    assert said == "not held up\n"


def test_the_guardian_leaves_as_soon_as_the_jobs_are_dead() -> None:
    """Until then it holds the lock of the memory, and the next daemon waits two seconds for it."""
    said = alone(
        GROUPS
        + """
import select
groups = [group() for _ in range(20)]
guardian = Guardian()
for each in groups:
    guardian.started(each)
gone = select.poll()
gone.register(os.pidfd_open(guardian.pid), select.POLLIN)
began = time.monotonic()
os.close(guardian._pipe)
gone.poll()
print(time.monotonic() - began < 5.0)
"""
    )
    assert said == "True\n", "where it waits for those that are dead, a second each"


def test_a_job_that_became_another_users_does_not_save_the_others() -> None:
    if os.geteuid() != 0:
        pytest.skip("for root alone, who may start jobs of several users")
    said = alone(
        GROUPS
        + """
from workerd.handlers import guard
theirs = group()
table = os.memfd_create("groups")
reading, writing = os.pipe()
os.close(writing)
guardian = os.fork()
if guardian == 0:
    os.setuid(65534)
    own = os.posix_spawn("/bin/sleep", ["sleep", "600"], {}, setsid=True)
    os.write(table, struct.pack("=3i", 0, theirs, own))
    guard.watch(reading, table, 4_194_304)
    print(os.waitpid(own, os.WNOHANG) == (own, signal.SIGKILL), flush=True)
    os._exit(0)
os.waitpid(guardian, 0)
os.killpg(theirs, signal.SIGKILL)
"""
    )
    assert said == "True\n"


def test_the_guardian_holds_the_lock_of_the_memory_and_nothing_else_of_the_daemons() -> None:
    if os.geteuid() != 0:
        pytest.skip("what it holds is for root alone to see")
    said = alone(
        GROUPS
        + """
lock = os.open("/dev", os.O_RDONLY)
memory = os.open("/proc", os.O_RDONLY)
guardian = Guardian(memory)
held = []
for fd in os.listdir(f"/proc/{guardian.pid}/fd"):
    with contextlib.suppress(FileNotFoundError):  # what its interpreter has just read
        held.append(os.readlink(f"/proc/{guardian.pid}/fd/{fd}"))
pipe = os.readlink(f"/proc/self/fd/{guardian._pipe}")
print(held.count("/proc"), held.count("/dev"), held.count(pipe))
guardian.close()
"""
    )
    assert said == "1 0 1\n", "of the pipe it has the end to read from alone"


def test_the_guardian_takes_little_memory() -> None:
    said = alone(
        GROUPS
        + """
import fcntl, termios

def unread():
    return struct.unpack("=i", fcntl.ioctl(guardian._pipe, termios.FIONREAD, b"    "))[0]

guardian = Guardian()
guardian.started(4_194_304)
until(lambda: unread() == 0, "a guardian that reads")
with open(f"/proc/{guardian.pid}/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("RssAnon")))
guardian.ended(4_194_304)
guardian.close()
"""
    )
    assert int(said) < 5_000, "kB of its own; a fork of the daemon would have 18,000"


def test_no_guardian_is_left_behind(broker: Broker, daemon: Callable[..., Daemon]) -> None:
    workerd = daemon(configuration(broker, ["true"]))
    workerd.wait_event("consuming")
    (guardian,) = workerd.children()
    assert workerd.stop() == 0
    until(lambda: processes.has_ended(guardian, 0), "the guardian's end")


def test_a_process_that_was_just_being_started_when_the_daemon_was_killed_ends_with_it() -> None:
    """Nobody knew of it then. The guardian leaves last: who waits for that starts no job twice."""
    if os.geteuid() != 0:
        pytest.skip("for root alone, who sees when the guardian waits")
    said = alone(
        """
import random, select, signal, time
from tests.harness.waiting import until
from workerd.handlers import guard
from workerd.handlers.guardian import Guardian
from workerd.handlers.process import Process

def is_up(guardian):
    links = []
    for fd in os.listdir(f"/proc/{guardian}/fd"):
        with contextlib.suppress(FileNotFoundError):  # what its interpreter has just read
            links.append(os.readlink(f"/proc/{guardian}/fd/{fd}"))
    return "anon_inode:[pidfd]" in links

async def wave(guardian):
    for _ in range(40):
        Process([b"/bin/sleep", b"600"], {}, None, b"", len, len, guardian)
    await asyncio.sleep(600)

def alive(daemon):
    token = b"WORKERD_SPAWN=%d-" % daemon
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            if token in environ.read():
                found.append(int(pid))
    return found

chance = random.Random(1)
lived_on = unknown = 0
for _ in range(TRIES):
    reading, writing = os.pipe()
    daemon = os.fork()
    if daemon == 0:
        guard.forbid_dumps()
        guardian = Guardian()
        until(lambda: is_up(guardian.pid), "a guardian that waits")
        os.write(writing, b"%d " % guardian.pid)
        asyncio.run(wave(guardian))
    os.close(writing)
    end = select.poll()
    guardian = int(os.read(reading, 20))
    end.register(os.pidfd_open(guardian), select.POLLIN)
    time.sleep(chance.uniform(0.0, 0.02))
    os.kill(daemon, signal.SIGKILL)
    os.waitpid(daemon, 0)
    end.poll()
    left = alive(daemon)
    lived_on += bool(left)
    for each in left:
        os.kill(each, signal.SIGKILL)
    os.close(reading)
print(lived_on)
""".replace("TRIES", "60")
    )
    assert said == "0\n", "jobs live on, unknown to their guardian"


def test_a_guardian_that_is_killed_is_replaced_and_knows_the_jobs(
    broker: Broker, daemon: Callable[..., Daemon], client: Client, tmp_path: Path
) -> None:
    script = f"echo $$ >{tmp_path}/pid; exec sleep 600"
    workerd = daemon(configuration(broker, ["sh", "-c", script]))
    workerd.wait_event("consuming")
    (guardian,) = workerd.children()
    client.publish("work")
    workerd.wait_event("start")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "a job")
    os.kill(guardian, signal.SIGKILL)
    assert workerd.wait_event("guardian ended")["level"] == "warning"
    other = workerd.wait_event("guardian replaced")["child"]
    assert other != guardian
    workerd.kill()
    job = int((tmp_path / "pid").read_text())
    assert processes.has_ended(job, TIMEOUT / 4)
    assert processes.has_ended(other, TIMEOUT / 4)


def test_as_long_as_there_is_no_guardian_that_is_said() -> None:
    said = alone(
        GROUPS
        + """
from workerd.handlers import guardian as module

module._FIRST_PAUSE = 0.01

async def scenario():
    guardian = Guardian()
    changes = asyncio.Queue()
    guardian.watch(lambda: changes.put_nowait(guardian.trouble))
    program, sys.executable = sys.executable, "/nonexistent"
    os.kill(guardian.pid, signal.SIGKILL)
    print(await changes.get())
    sys.executable = program
    while await changes.get():
        pass
    print(repr(guardian.trouble))
    guardian.close()

with logged() as events:
    asyncio.run(scenario())
print([event["event"] for event in events])
"""
    )
    assert said.splitlines() == [
        "guardian: cannot run it: No such file or directory",
        "''",
        "['guardian ended', 'guardian replaced']",
    ]


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_a_daemon_without_standard_descriptors_works_and_has_its_guardian(
    broker: Broker,
    client: Client,
    daemon: Callable[..., Daemon],
    tmp_path: Path,
    closed: str,
) -> None:
    done = tmp_path / "done"
    config = tmp_path / "workerd-1.toml"
    starter = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "workerd"]
    workerd = daemon(
        configuration(broker, ["touch", str(done)]),
        command=[*starter, "run", "--config", config, "--instance", "1"],
    )
    workerd.wait_ready()
    (guardian,) = workerd.children()
    client.publish("work")
    until(done.exists, "a job that is done")
    assert not processes.has_ended(guardian, 0)
    assert workerd.stop() == 0
