"""The daemon as its host sees it: readiness, status, locks, detaching, secrets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.tables import AGAIN, config, gated
from tests.harness.waiting import SCALE, until
from tests.harness.wire import Wire

Start = Callable[..., Daemon]

NOWHERE = "amqp://guest:guest@127.0.0.1:1/"


def said(worker: Daemon) -> list[str]:
    """The notifications so far."""
    return [text for _, text in worker.notifications]


# Readiness and status


def test_ready_is_told_only_when_something_is_consumed(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = daemon(
        config(
            broker.url,
            ["true"],
            worker={"ready_wait": "1h"},
            queues={"jobs": {"declare": "wait"}},
        )
    )
    worker.wait_event("queue paused", queue="jobs")
    assert "READY=1" not in said(worker)
    client.declare("jobs")
    worker.wait_event("ready")
    events = [entry["event"] for entry in worker.log]
    assert events.index("consuming") < events.index("ready")
    assert client.channel.queue_declare("jobs", passive=True).method.consumer_count == 1


def test_without_a_broker_ready_is_told_after_ready_wait_with_a_status_that_says_so(
    daemon: Start,
) -> None:
    worker = daemon(config(NOWHERE, ["true"], worker={"ready_wait": "600ms"}))
    worker.wait_ready()
    starting = worker.wait_event("starting")
    ready = worker.wait_event("ready")
    assert seconds_between(starting["time"], ready["time"]) >= 0.6
    before = said(worker)[: said(worker).index("READY=1")]
    assert before[-1].startswith("STATUS=waiting for broker")
    worker.wait_notify(
        lambda text: (
            text.startswith("STATUS=waiting for broker 127.0.0.1 in ")
            and text.endswith(": connection refused")
        )
    )


def test_a_broker_that_does_not_answer_is_waited_for_in_the_status_as_well(
    wire: Wire, daemon: Start
) -> None:
    wire.hold("to_daemon")
    worker = daemon(config(wire.url, ["true"], worker={"ready_wait": "100ms"}))
    worker.wait_ready()
    assert said(worker)[0] == "STATUS=waiting for broker"


def seconds_between(earlier: str, later: str) -> float:
    """Between two times of the log, which are of one day unless it is midnight."""

    def seconds(text: str) -> float:
        hours, minutes, rest = text[11:-1].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(rest)

    return (seconds(later) - seconds(earlier)) % 86_400


def test_the_status_tells_what_is_consumed_and_how_many_jobs_ran(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = daemon(config(broker.url, gated(gate, ["true"]), queues={"jobs": {"concurrency": 3}}))
    worker.wait_notify("STATUS=consuming jobs: 0/3 running, 0 done, 0 failed; 127.0.0.1")
    client.publish("jobs")
    client.publish("jobs")
    worker.wait_notify("STATUS=consuming jobs: 2/3 running, 0 done, 0 failed; 127.0.0.1")
    gate.touch()
    worker.wait_notify("STATUS=consuming jobs: 0/3 running, 2 done, 0 failed; 127.0.0.1")


def test_every_status_is_ascii_whatever_the_broker_says(broker: Broker, daemon: Start) -> None:
    url = broker.url.replace(broker.vhost, "bl%C3%BCmchen")
    worker = daemon(config(url, ["true"], broker={"reconnect_max": "60s"}))
    worker.wait_event("unreachable", text=lambda text: "vhost blümchen not found" in text)
    status = worker.wait_notify(lambda text: text.startswith("STATUS=waiting for broker"))
    assert "vhost bl?mchen not found" in status
    assert all(text.isascii() for text in said(worker))


# The notify socket


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        yield listener


def check_that_it_works(worker: Daemon, client: Client) -> None:
    worker.wait_event("consuming")
    client.publish("jobs", message_id="job")
    worker.wait_event("done", job_id="job")
    stopped = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - stopped < 2 * SCALE
    assert not [line for line in worker.output if not line.startswith("{")], "no traceback"


@pytest.mark.parametrize(
    "address", [None, "", "/nonexistent/notify", "@nobody-listens", "relative"]
)
def test_a_notify_socket_that_is_not_there_is_no_trouble(
    broker: Broker, client: Client, daemon: Start, address: str | None
) -> None:
    worker = daemon(config(broker.url, ["true"]), env={"NOTIFY_SOCKET": address})
    check_that_it_works(worker, client)


def test_a_full_notify_socket_does_not_block(
    broker: Broker, client: Client, daemon: Start, listener: socket.socket, tmp_path: Path
) -> None:
    # Not below tmp_path: a socket's name has at most 107 bytes.
    address = f"\0workerd-full-{os.getpid()}"
    listener.bind(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while filler.sendto(b"x", address):
                pass
    environment = {"NOTIFY_SOCKET": address.replace("\0", "@"), "WATCHDOG_USEC": "100000"}
    worker = daemon(config(broker.url, ["true"]), env=environment)
    check_that_it_works(worker, client)


def test_an_abstract_notify_socket_is_told(
    broker: Broker, client: Client, daemon: Start, listener: socket.socket
) -> None:
    name = f"workerd-notify-{os.getpid()}"
    listener.bind(f"\0{name}")
    listener.settimeout(20 * SCALE)
    worker = daemon(config(broker.url, ["true"]), env={"NOTIFY_SOCKET": f"@{name}"})
    while listener.recv(4096) != b"READY=1":
        pass
    check_that_it_works(worker, client)


# Exit statuses


def test_every_problem_of_a_bad_configuration_is_logged_and_the_status_is_78(
    daemon: Start,
) -> None:
    worker = daemon(
        config(
            "http://example.com",
            ["true"],
            queues={"jobs": {"concurrency": 0, "prefech": 8}},
            worker={"drain_timeout": "soon"},
        )
    )
    assert worker.wait_exit() == 78
    problems = "\n".join(event["problem"] for event in worker.events("bad configuration"))
    for place in (
        "broker.urls",
        "queues.jobs.concurrency",
        "queues.jobs.prefech",
        "worker.drain_timeout",
    ):
        assert place in problems
    assert not said(worker)


def test_a_second_daemon_of_an_instance_is_refused_and_the_first_goes_on(
    broker: Broker, client: Client, daemon: Start
) -> None:
    text = config(broker.url, ["true"])
    first = daemon(text)
    first.wait_ready()
    second = daemon(text)
    assert second.wait_exit() == 78
    (problem,) = second.events("bad configuration")
    assert "instance 1 is already running on this host" in problem["problem"]
    client.publish("jobs")
    first.wait_event("done")


def test_instances_of_different_names_run_side_by_side(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    text = config(broker.url, gated(gate, ["true"]), queues={"jobs": {"concurrency": 1}})
    workers = [daemon(text, instance=name) for name in ("1", "2")]
    for worker in workers:
        worker.wait_event("consuming")
    client.publish("jobs")
    client.publish("jobs")
    for worker in workers:
        worker.wait_event("start")
    gate.touch()
    for worker in workers:
        worker.wait_event("done")


def test_an_instance_can_be_started_again_when_its_daemon_was_killed_under_a_job(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    # At its first run the job leaves a process of another session behind, which no one finds.
    stray = """setsid sh -c 'touch "$0"; exec sleep 300' "$0" & wait"""
    script = f'[ -e "$0" ] || ({stray})'
    text = config(broker.url, ["sh", "-c", script, tmp_path / "ran"], handler=AGAIN)
    killed = daemon(text)
    killed.wait_ready()
    client.publish("jobs")
    until((tmp_path / "ran").exists, "the first run")
    killed.kill()
    again = daemon(text)
    again.wait_event("done")
    # The killed daemon's others are dying.
    until(lambda: len(processes.strays()) == 1, "one process left behind")
    processes.kill_trees(processes.strays())


def test_a_bug_is_logged_and_the_status_is_70(daemon: Start, tmp_path: Path) -> None:
    path = tmp_path / "workerd-1.toml"
    # Enough descriptors to begin with, too few for an event loop.
    command = ["prlimit", "--nofile=7", sys.executable, "-m", "workerd", "run", "--config", path]
    worker = daemon(config(NOWHERE, ["true"]), command=command)
    assert worker.wait_exit() == 70
    (bug,) = worker.events("bug", level="error")
    assert "Too many open files" in bug["traceback"]


# Signals that do not stop


def test_sighup_and_sigcont_do_not_end_the_daemon(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = daemon(config(broker.url, ["true"]))
    worker.wait_ready()
    for _ in range(20):
        worker.signal(signal.SIGHUP)
        worker.signal(signal.SIGCONT)
    client.publish("jobs")
    worker.wait_event("done")
    assert worker.stop() == 0


def test_sigusr1_logs_what_is_in_hand(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    queue = {"concurrency": 1, "prefetch": 3}
    worker = daemon(config(broker.url, gated(gate, ["true"]), queues={"jobs": queue}))
    worker.wait_ready()
    for name in ("running", "waiting"):
        client.publish("jobs", message_id=name)
    worker.wait_event("start", job_id="running")

    def state_of_queue() -> list[dict[str, object]]:
        mark = worker.mark()
        worker.signal(signal.SIGUSR1)
        worker.wait_event("state job", since=mark, job_id="running", attempt=1)
        worker.wait_event("state", since=mark, remembered=0)
        return worker.events("state queue", since=mark, queue="jobs", running=1, waiting=1)

    # The second message may still be on its way.
    until(state_of_queue, "one running and one waiting job")
    gate.touch()
    worker.wait_event("done", count=2)


# Secrets


def test_no_job_can_read_the_memory_or_the_environment_of_the_daemon(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    path = tmp_path / "workerd-1.toml"
    command = [sys.executable, "-m", "workerd", "run", "--config", path]
    if os.geteuid() == 0:
        # A service's own user has no capabilities; root would be let in by them.
        command[:0] = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    # The job's parent is the daemon, and so is the guardian's.
    script = """
        for pid in $PPID $(cat /proc/$PPID/task/*/children); do
            [ $pid = $$ ] && continue
            # The guardian, like any process, is first an interpreter that starts.
            while cat /proc/$pid/environ >/dev/null 2>&1; do :; done
            for secret in environ mem maps; do
                cat /proc/$pid/$secret >/dev/null 2>&1 && echo open: $secret of $pid
            done
            echo looked at $(cat /proc/$pid/comm)
        done
        cat /proc/$$/environ >/dev/null && echo own is open
    """
    worker = daemon(config(broker.url, ["sh", "-c", script]), command=command)
    worker.wait_ready()
    client.publish("jobs")
    worker.wait_event("done")
    printed = [event["text"] for event in worker.events("output", stream="stdout")]
    assert len([line for line in printed if line.startswith("looked at ")]) >= 2
    assert [line for line in printed if not line.startswith("looked at ")] == ["own is open"]


def test_no_password_shows_in_the_log_or_the_status(
    broker: Broker, daemon: Start, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("Hidden-in-the-file")
    with_file = daemon(
        config(
            broker.url.replace("guest:guest", "stranger"),
            ["true"],
            broker={"password_file": str(password)},
            worker={"ready_wait": "100ms"},
        ),
        instance="file",
    )
    with_url = daemon(
        config(broker.url, ["true"], worker={"ready_wait": "100ms"}),
        instance="url",
        env={"WORKERD_BROKER_URL": broker.url.replace("guest:guest", "stranger:Hidden-in-the-url")},
    )
    refused = daemon(
        config(broker.url, ["true"]),
        instance="refused",
        env={"WORKERD_BROKER_URL": "amqp://stranger:Hidden-in-the-url@host:port/"},
    )
    for worker in (with_file, with_url):
        worker.wait_event("unreachable", text=lambda text: "ACCESS_REFUSED" in text)
        worker.wait_ready()
        worker.signal(signal.SIGUSR1)
        worker.wait_event("state")
        assert worker.stop() == 0
    assert refused.wait_exit() == 78
    assert refused.events("bad configuration")
    for worker in (with_file, with_url, refused):
        everything = "\n".join([*worker.output, *said(worker)])
        assert "Hidden" not in everything
