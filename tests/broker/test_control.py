"""The local socket: what is asked, what is refused, and that no client disturbs a job."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import Caller, call, folder
from tests.harness.daemon import Daemon
from tests.harness.programs import Program, run
from tests.harness.tables import config, gated
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import SCALE, until
from workerd.control.server import QUIET
from workerd.control.session import IDLE

StartDaemon = Callable[..., Daemon]
KEPT = 65536
CROWD = [sys.executable, "-m", "tests.harness.crowd"]


@pytest.fixture
def workerd(broker: Broker, daemon: StartDaemon) -> Daemon:
    """A daemon that consumes."""
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    return workerd


# The socket itself


def test_the_socket_is_for_its_group_and_gone_after_the_end(workerd: Daemon) -> None:
    socket = folder(workerd) / "control.sock"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o660
    assert sorted(os.listdir(folder(workerd))) == ["control.sock", "lock"]
    workerd.stop()
    assert os.listdir(folder(workerd)) == ["lock"]


def test_what_a_killed_daemon_has_left_is_replaced(
    broker: Broker, daemon: StartDaemon, workerd: Daemon
) -> None:
    workerd.kill()
    assert (folder(workerd) / "control.sock").exists()
    again = daemon(config(broker.url, ["true"]))
    again.wait_ready()
    assert call(again, "status")["pid"] == again.pid


def test_a_second_daemon_of_that_name_leaves_the_socket_alone(
    broker: Broker, daemon: StartDaemon, workerd: Daemon
) -> None:
    second = daemon(config(broker.url, ["true"]))
    assert second.wait_exit() == 78
    assert call(workerd, "status")["pid"] == workerd.pid


def test_without_a_socket_jobs_run_all_the_same(
    broker: Broker, client: Client, daemon: StartDaemon, tmp_path: Path
) -> None:
    (tmp_path / "run/1/control.sock.new/in-the-way").mkdir(parents=True)
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("control unavailable")
    workerd.wait_ready()
    client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done", job_id="a")


def test_a_drain_can_be_watched_until_its_end(
    broker: Broker, daemon: StartDaemon, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    workerd = daemon(config(broker.url, gated(gate, ["true"])))
    workerd.wait_ready()
    with Client(broker.url) as client:
        client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")
    workerd.signal(signal.SIGTERM)
    workerd.wait_event("draining")
    answer = call(workerd, "status")
    assert (answer["state"], answer["running"]) == ("draining", 1)
    assert 50 < answer["drain_left"] <= 60
    assert call(workerd, "health")["why"].startswith("draining 1 jobs")
    gate.touch()
    assert workerd.wait_exit() == 0


# What is said on it


NO_REQUESTS = [
    (b"garbage\n", 65, "a request is a JSON object on one line"),
    (b"[1]\n", 65, "a request is a JSON object on one line"),
    (b'{"version": ' + b"[" * 50_000 + b"\n", 65, "a request is a JSON object on one line"),
    (b'{"version": 2, "request": "status"}\n', 76, "this daemon speaks version 1"),
    (b'{"request": "status"}\n', 76, "this daemon speaks version 1"),
    (b'{"version": 1, "length": -1}\n', 65, "length: a number from 0 to 4194304"),
    (b'{"version": 1, "length": 4194305}\n', 65, "length: a number from 0 to 4194304"),
    (b'{"version": 1, "length": true}\n', 65, "length: a number from 0 to 4194304"),
    (b"x" * (KEPT + 1), 65, "a request is a line of at most 65536 bytes"),
]

WRONG_REQUESTS: list[dict[str, object]] = [
    {"request": "nonsense"},
    {"request": ["status"]},
    {"request": "pause", "queue": {"a": 1}},
    {"request": "pause", "queue": "elsewhere"},
    {"request": "cancel"},
    {"request": "cancel", "id": "x" * 256},
    {"request": "cancel", "id": "\ud800"},
    {"request": "submit"},
    {"request": "submit", "type": 1},
    {"request": "submit", "type": "\udfff"},
    {"request": "submit", "type": "job", "due": 10**400},
    {"request": "submit", "type": "job", "due": float("nan")},
    {"request": "submit", "type": "job", "ttl": float("inf")},
    {"request": "submit", "type": "job", "timeout": float("nan")},
    {"request": "submit", "type": "job", "priority": True},
    {"request": "submit", "type": "job", "mark": "\ud800"},
    {"request": "submit", "type": "job", "headers": {"a": 1}},
    {"request": "submit", "type": "job", "headers": {"x-workerd-submitter": "0"}},
    {"request": "submit", "type": "job", "headers": {"\ud800": "0"}},
    {"request": "submit", "type": "job", "config": "\0"},
    {"request": "submit", "type": "job", "queue": "amq.topic"},
    {"request": "submit", "type": "job", "queue": "jobs.dead"},
]


def test_what_is_no_request_ends_the_connection(workerd: Daemon) -> None:
    for sent, status, error in NO_REQUESTS:
        with Caller(folder(workerd)) as caller:
            caller.send(sent)
            answer = json.loads(caller.await_end())
        assert (answer["ok"], answer["status"], answer["error"]) == (False, status, error)


def test_a_wrong_request_is_refused_and_the_next_one_answered(
    workerd: Daemon, client: Client
) -> None:
    with Caller(folder(workerd)) as caller:
        for keys in WRONG_REQUESTS:
            caller.send(json.dumps({"version": 1, **keys}).encode() + b"\n")
            answer = caller.answer()
            assert answer["ok"] is False, keys
            assert answer["status"] in (64, 65, 69), (keys, answer)
        assert caller.ask("health")["healthy"]
    assert not workerd.events("control bug")
    assert client.ready("jobs.dead") == 0


def test_requests_may_come_in_pieces_or_many_at_once(workerd: Daemon) -> None:
    request = b'{"version": 1, "request": "health"}\n'
    with Caller(folder(workerd)) as caller:
        for byte in request:
            caller.send(bytes([byte]))
        assert caller.answer()["healthy"]
        caller.send(request * 20)
        assert [caller.answer()["ok"] for _ in range(20)] == [True] * 20


def test_a_body_may_hold_anything(workerd: Daemon, client: Client) -> None:
    body = b'\n{"version": 1}\n\0' * 1000
    with Caller(folder(workerd)) as caller:
        assert caller.ask("submit", body, type="job", id="a")["ok"]
        assert caller.ask("health")["healthy"]
    workerd.wait_event("done", job_id="a")


# Clients without manners


#: Later, those who say nothing at all have had to go, whoever needs their places.
BEFORE_IDLE = IDLE - 5.0


def test_too_many_clients_are_refused_and_quiet_ones_make_room(workerd: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        quiet = [stack.enter_context(Caller(folder(workerd))) for _ in range(64)]
        # One of them is known to the daemon, so all are.
        assert quiet[-1].ask("health")["ok"]
        late = stack.enter_context(Caller(folder(workerd)))
        refused = late.ask("health")
        # On a machine that was asleep for so long, the quiet ones have had to go already.
        assert refused.get("code") == "busy" or time.monotonic() - began > QUIET

        def answered() -> bool:
            try:
                return bool(call(workerd, "health")["healthy"])
            except (KeyError, AssertionError):
                return False

        until(answered, "a place becomes free", BEFORE_IDLE)
        assert quiet[0].await_end() == b""


def test_bodies_that_never_come_make_room_for_others(workerd: Daemon, client: Client) -> None:
    header = b'{"version": 1, "request": "submit", "type": "job", "length": 4194304}\n'
    with contextlib.ExitStack() as stack:
        for _ in range(17):
            stack.enter_context(Caller(folder(workerd))).send(header + b"x")

        def submitted() -> bool:
            answer = call(workerd, "submit", b"x" * 1000, type="job")
            assert answer["ok"] or answer["code"] == "busy", answer
            return bool(answer["ok"])

        until(submitted, "there is room for a body", BEFORE_IDLE)


def lateness(workerd: Daemon, jobs: list[str], seconds: float) -> float:
    """By how much such a job takes longer than its sleep: half of these do by less.

    The latest one tells more of what else runs on this machine than of the daemon.
    """
    done = [workerd.wait_event("done", job_id=job)["duration_ms"] for job in jobs]
    return float(statistics.median(done)) / 1000 - seconds


def test_two_hundred_clients_half_of_them_hostile_make_no_job_late(
    broker: Broker, client: Client, daemon: StartDaemon, program: Callable[..., Program]
) -> None:
    workerd = daemon(config(broker.url, ["sleep", "0.2"], queues={"jobs": {"concurrency": 2}}))
    workerd.wait_event("consuming", queue="jobs.due")
    calm = lateness(workerd, client.publish_jobs("jobs", [f"calm-{n}" for n in range(6)]), 0.2)
    crowd = program(*CROWD, folder(workerd), "200")
    crowd.wait_lines(2)
    before = workerd.rss()
    jobs = client.publish_jobs("jobs", [f"crowd-{n}" for n in range(20)])
    late = lateness(workerd, jobs, 0.2)
    # The others are answered, and go on being answered.
    crowd.wait_lines(len(crowd.wait_lines(3)) + 2)
    assert workerd.rss() < before + (32 << 20)
    crowd.close_input()
    crowd.wait()
    assert late < calm + 0.05 * max(1.0, SCALE), (calm, late)
    assert not workerd.events("bug")
    assert not workerd.events("control bug")
    until(lambda: call(workerd, "health").get("healthy"), "all is well when they are gone")
    until(lambda: workerd.fds() < 40, "nothing is left of them")


def test_a_client_that_never_reads_is_not_read_either(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    settings: dict[str, Any] = {
        "queues": {"jobs": {"concurrency": 20}},
        "worker": {"drain_timeout": "0s"},
    }
    workerd = daemon(config(broker.url, ["sleep", "300"], **settings))
    workerd.wait_event("consuming", queue="jobs.due")
    client.publish_jobs("jobs", map(str, range(20)))
    workerd.wait_event("start", count=20)
    size = len(json.dumps(call(workerd, "status")))
    before = workerd.rss()

    def is_idle() -> bool:
        used = workerd.cpu_seconds()
        # What is measured is a time. It would use a fifth of it, if it had something to do.
        time.sleep(1)
        return workerd.cpu_seconds() - used < 0.04

    with Caller(folder(workerd)) as caller:
        sent = 0
        for _ in range(40):
            sent += caller.send_some(b'{"version": 1, "request": "status"}\n' * 100) // 36
        assert sent * size > 12 << 20
        until(is_idle, "it does no more for this client")
        assert workerd.rss() < before + (6 << 20)
        assert call(workerd, "health")["healthy"]


# What is documented


def test_the_documented_example_works(broker: Broker, daemon: StartDaemon, tmp_path: Path) -> None:
    sleep: dict[str, Any] = {"handlers.sleep": {"command": ["sleep", "0.0{body}"], "queue": "jobs"}}
    workerd = daemon(config(broker.url, ["true"], **sleep))
    workerd.wait_event("consuming", queue="jobs.due")
    page = (CHECKOUT / "docs/control.md").read_text()
    (script,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    script = script.replace("/run/workerd/1/control.sock", str(folder(workerd) / "control.sock"))
    result = run(["sh", "-c", script])
    assert (result.status, result.stdout) == (0, "True\njobs\n"), result
    workerd.wait_event("done", job_type="sleep")


def test_every_key_of_an_answer_is_documented(workerd: Daemon, client: Client) -> None:
    page = (CHECKOUT / "docs/control.md").read_text()
    client.publish_jobs("jobs", ["a"])
    status = call(workerd, "status")
    answers = [status, *status["queues"], call(workerd, "pause"), call(workerd, "cancel", id="x")]
    answers += [call(workerd, "submit", type="job"), call(workerd, "nonsense")]
    keys = {key for answer in answers for key in answer}
    assert not {key for key in keys if f"`{key}`" not in page and f'"{key}"' not in page}
