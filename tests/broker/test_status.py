"""`workerd status`, `health`, `queues` and `logs`: what they tell, of instances well and not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call, folder
from tests.harness.control import workerd as command
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.programs import WORKERD, Result, run
from tests.harness.tables import config
from tests.harness.waiting import SCALE, until
from workerd import __version__

StartDaemon = Callable[..., Daemon]


def health(daemon: Daemon) -> Result:
    return command(daemon.runtime, "health", "--instance", daemon.instance)


def await_health(daemon: Daemon, status: int, seconds: float) -> str:
    """Wait until `health` ends so; returns what it says."""
    until(lambda: health(daemon).status == status, f"health is {status}", seconds * SCALE)
    return health(daemon).stdout


def states(runtime: Path) -> dict[str, dict[str, Any]]:
    """What `status --json` says, by instance."""
    lines = command(runtime, "status", "--json").stdout.splitlines()
    return {state["instance"]: state for state in map(json.loads, lines)}


# Health


def test_health_follows_a_queue_that_is_deleted_and_comes_back(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    client.declare("jobs")
    workerd = daemon(config(broker.url, ["true"], queues={"jobs": {"declare": "wait"}}))
    workerd.wait_event("consuming", queue="jobs.due")
    assert (health(workerd).status, health(workerd).stdout) == (0, "")
    client.channel.queue_delete("jobs")
    why = "jobs paused: waiting for it to be declared\n"
    until(lambda: health(workerd).stdout == why, "health says why not", 10 * SCALE)
    assert health(workerd).status == 1
    client.declare("jobs")
    assert await_health(workerd, 0, seconds=10) == ""


def publishing(broker: Broker) -> str:
    """The broker's name for the connection on which the daemon publishes, "" without one."""
    listed = broker.ctl("list_connections", "pid", "vhost", "client_properties").splitlines()
    lines = [line for line in listed if broker.vhost in line and ' publish"' in line]
    found = [line.split("\t")[0] for line in lines]
    return found[0] if found else ""


def test_health_knows_the_connection_that_publishes(broker: Broker, daemon: StartDaemon) -> None:
    workerd = daemon(config(broker.url, ["false"]))
    workerd.wait_event("consuming", queue="jobs")
    until(lambda: publishing(broker), "it has a connection to publish on")
    broker.ctl("set_vhost_limits", "-p", broker.vhost, json.dumps({"max-connections": 1}))
    broker.ctl("close_connection", publishing(broker), "closed by the test")
    why = await_health(workerd, 1, seconds=10)
    assert why.startswith("cannot publish: 127.0.0.1: ")
    assert "connection limit" in why
    state = states(workerd.runtime)["1"]
    assert any(note.startswith("cannot publish: 127.0.0.1: ") for note in state["notes"])
    broker.ctl("clear_vhost_limits", "-p", broker.vhost)
    await_health(workerd, 0, seconds=40)


def test_health_notices_within_ten_seconds_that_the_broker_is_frozen(
    broker: Broker, daemon: StartDaemon
) -> None:
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    assert health(workerd).status == 0
    broker.freeze()
    why = await_health(workerd, 1, seconds=10)
    assert why.startswith("127.0.0.1 has not answered for ")
    # Nothing else follows from it: the connection is as patient as ever.
    assert not workerd.events("disconnected")
    broker.thaw()
    await_health(workerd, 0, seconds=10)
    assert not workerd.events("disconnected")


def test_health_tells_why_not(broker: Broker, daemon: StartDaemon, tmp_path: Path) -> None:
    missing = command(tmp_path / "run", "health")
    assert (missing.status, missing.stdout) == (1, "instance 1 does not run on this host\n")
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    call(workerd, "pause")
    assert health(workerd).stdout == "jobs paused by an operator\n"
    call(workerd, "resume")
    await_health(workerd, 0, seconds=10)
    broker.stop()
    workerd.wait_event("disconnected")
    assert "connecting to 127.0.0.1" in health(workerd).stdout
    workerd.kill()
    assert health(workerd).stdout == "instance 1 does not run on this host\n"


@pytest.mark.parametrize(
    ("code", "timeout", "why"),
    [
        pytest.param("import time; time.sleep(600)", "1s", "not ready within 1 s", id="hangs"),
        pytest.param("import x_y", "1m", "ModuleNotFoundError: No module named 'x_y'", id="import"),
    ],
)
def test_a_handler_whose_process_does_not_come_up_is_seen_at_a_glance(
    broker: Broker, daemon: StartDaemon, tmp_path: Path, code: str, timeout: str, why: str
) -> None:
    handlers: dict[str, Any] = {
        "handlers.function": {
            "python": "app:f",
            "working_directory": str(tmp_path),
            "queue": "jobs",
            "start_timeout": timeout,
            "kill_grace": "100ms",
        }
    }
    module = tmp_path / "app.py"
    module.write_text(code)
    workerd = daemon(config(broker.url, ["true"], **handlers))
    workerd.wait_event("consuming", queue="jobs.due")
    # Before any job has come.
    said = f"handler function paused: {why}"
    workerd.wait_notify(lambda text: text.endswith(f"127.0.0.1; {said}"))
    assert (health(workerd).status, health(workerd).stdout) == (0, f"degraded: {said}\n")
    assert call(workerd, "health")["degraded"] == [said]
    (state,) = states(workerd.runtime).values()
    assert state["healthy"]
    assert state["degraded"] == state["notes"] == [said]
    assert command(workerd.runtime, "status").stdout.splitlines()[0].endswith(said)
    handlers = {entry.pop("handler"): entry for entry in call(workerd, "metrics")["handlers"]}
    assert handlers == {
        "function": {"paused": True, "degraded": True},
        "job": {"paused": False, "degraded": False},
    }
    assert len(workerd.events("child failed")) == 1
    told = len(workerd.notifications)
    module.write_text("def f(job): pass")
    workerd.wait_event("child recovered", handler="function")
    workerd.wait_notify(lambda text: "consuming" in text and "paused" not in text, since=told)
    assert (health(workerd).status, health(workerd).stdout) == (0, "")


def test_health_of_a_daemon_that_is_stuck_is_1(broker: Broker, daemon: StartDaemon) -> None:
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    workerd.signal(signal.SIGSTOP)
    assert (health(workerd).status, health(workerd).stdout) == (1, "it does not answer\n")
    assert states(workerd.runtime)["1"]["state"] == "stuck"
    workerd.signal(signal.SIGCONT)
    await_health(workerd, 0, seconds=10)


def test_health_is_quick_because_it_imports_little(broker: Broker, daemon: StartDaemon) -> None:
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    assert not imported(workerd, "health") & {"asyncio", "pika", "tomli", "workerd.config.load"}


def imported(daemon: Daemon, *words: str) -> set[str]:
    """What a command imports before it has done its work, and the packages of that."""
    program = [WORKERD[0], "-X", "importtime", *WORKERD[1:], *words]
    environment = {"RUNTIME_DIRECTORY": str(daemon.runtime)}
    result = run(program, env=environment)
    assert result.status == 0, result
    names = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    return names | {name.split(".")[0] for name in names}


# Status


def test_status_has_the_shape_that_is_documented(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(
        config(broker.url, oracle.command(), queues={"jobs": {"concurrency": 1, "prefetch": 2}})
    )
    workerd.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    client.publish_jobs("jobs", ["a", "b", "c"], type="job")
    workerd.wait_event("start", job_id="a")
    until(lambda: call(workerd, "status")["queues"][0]["waiting"] == 1, "b waits")
    (state,) = states(workerd.runtime).values()
    (job,) = state.pop("jobs")
    assert 0 <= job.pop("age") < 20 * SCALE
    assert job.pop("pid") in workerd.children()
    assert job == {
        "id": "a",
        "type": "job",
        "handler": "job",
        "queue": "jobs",
        "attempt": 1,
        "ending": False,
        "submitter": None,
    }
    assert 0 < state.pop("uptime") < 60 * SCALE
    pace = state.pop("pace")
    assert (pace["seconds"], pace["until"] % 5.0) == (5.0, 0.0)
    assert pace["done"] == pace["failed"] == [0] * len(pace["done"])
    assert state.pop("rabbitmq").split(".")[0] in ("3", "4")
    assert state == {
        "instance": "1",
        "pid": workerd.pid,
        "release": __version__,
        "state": "running",
        "healthy": True,
        "why": None,
        "degraded": [],
        "status": "consuming jobs: 1/1 running, 0 done, 0 failed; 127.0.0.1",
        "notes": [],
        "broker": "127.0.0.1",
        "drain_left": None,
        "done": 0,
        "retried": 0,
        "failed": 0,
        "failures": [],
        "submissions": 0,
        "queues": [
            {
                "queue": "jobs",
                "slots": 1,
                "running": 1,
                "waiting": 1,
                "held": 0,
                "consuming": True,
                "paused": None,
            }
        ],
        "running": 1,
    }
    shown = command(workerd.runtime, "status").stdout.splitlines()
    assert shown[0] == "1: consuming jobs: 1/1 running, 0 done, 0 failed; 127.0.0.1"
    assert shown[1].startswith(f"   workerd {__version__}, pid {workerd.pid}, up ")
    assert shown[3].split() == ["jobs", "1/1", "1", "0"]
    assert shown[5].split()[:3] == ["a", "job", "jobs"]
    assert max(map(len, shown)) <= 80
    oracle.release()
    workerd.wait_event("done", count=3)


def test_status_tells_of_instances_that_do_not_run_and_why(
    broker: Broker, daemon: StartDaemon, tmp_path: Path
) -> None:
    text = config(broker.url, ["true"])
    assert command(tmp_path / "run", "status").stdout.startswith("no instance of workerd")
    running, stopped, killed = daemon(text, "a"), daemon(text, "b"), daemon(text, "c")
    for workerd in (running, stopped, killed):
        workerd.wait_ready()
    stopped.stop()
    killed.kill()
    failed = daemon(text.replace("[queues.jobs]", "[queues.jobs]\ncolour = 1"), "d")
    assert failed.wait_exit() == 78
    # A start that fails beside an instance that runs says nothing of that.
    assert daemon(text.replace("[log]", "[log]\ncolour = 1"), "a").wait_exit() == 78

    told = states(running.runtime)
    assert {name: state["state"] for name, state in told.items()} == {
        "a": "running",
        "b": "stopped",
        "c": "died",
        "d": "failed",
    }
    assert "queues.jobs.colour: unknown key" in told["d"]["why"]
    assert told["c"]["why"] == "it was killed, or the host went down"
    assert [state["healthy"] for state in told.values()] == [True, False, False, False]
    shown = command(running.runtime, "status").stdout
    assert "\nb: stopped\n" in shown
    assert "\nd: failed: " in shown
    assert command(running.runtime, "status", "--instance", "e").status == 69

    # Once it runs, that is forgotten.
    daemon(text, "d").wait_ready()
    assert states(running.runtime)["d"]["state"] == "running"


# Queues


def test_queues_counts_what_waits_is_held_is_due_and_is_dead(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    client.declare("wanted")
    text = config(
        broker.url,
        oracle.command(),
        queues={
            "jobs": {"concurrency": 1, "prefetch": 2},
            "missing": {"declare": "wait"},
        },
    )
    workerd = daemon(text)
    workerd.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    client.publish_jobs("jobs", ["a", "b", "c", "d"])
    workerd.wait_event("start", job_id="a")
    until(lambda: call(workerd, "status")["queues"][0]["waiting"] == 1, "b waits")
    client.await_ready("jobs", 2)
    client.publish_jobs("jobs.dead", ["x"])
    file = workerd.runtime.parent / "workerd-1.toml"
    result = command(workerd.runtime, "queues", "--json", "--config", file)
    assert result.status == 0, result
    jobs, missing = map(json.loads, result.stdout.splitlines())
    assert jobs == {
        "queue": "jobs",
        "ready": 2,
        "consumers": 1,
        "running": 1,
        "waiting": 1,
        "due": 0,
        "dead": 1,
    }
    assert (missing["queue"], missing["ready"], missing["consumers"]) == ("missing", None, None)
    table = command(workerd.runtime, "queues", "--config", file).stdout.splitlines()
    assert table[0].split() == [
        "QUEUE", "READY", "CONSUMERS", "RUNNING", "WAITING", "DUE", "DEAD",
    ]  # fmt: skip
    assert table[1].split() == ["jobs", "2", "1", "1", "1", "0", "1"]
    oracle.release()
    workerd.wait_event("done", count=4)


# Logs


@pytest.fixture
def journalctl(tmp_path: Path) -> str:
    """A search path where `journalctl` prints what it is given."""
    program = tmp_path / "bin/journalctl"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_logs_asks_the_journal_for_the_job_in_the_units_of_this_host(
    journalctl: str, tmp_path: Path
) -> None:
    for name in ("1", "other-2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "lock").touch()
    shown = command(tmp_path / "run", "logs", "--", "-f +x", env={"PATH": journalctl})
    assert shown.stdout.splitlines() == [
        "WORKERD_JOB_ID=-f +x",
        "_SYSTEMD_UNIT=workerd@1.service",
        "_SYSTEMD_UNIT=workerd@other-2.service",
    ]
    words = ["logs", "a", "-f", "--instance", "9"]
    shown = command(tmp_path / "run", *words, env={"PATH": journalctl})
    assert shown.stdout.splitlines() == [
        "--follow",
        "--lines=all",
        "WORKERD_JOB_ID=a",
        "_SYSTEMD_UNIT=workerd@9.service",
    ]


def test_logs_without_a_journal_says_where_else_to_look(tmp_path: Path) -> None:
    # The one program that the harness itself needs.
    (tmp_path / "setpriv").symlink_to(shutil.which("setpriv") or "/usr/bin/setpriv")
    result = command(tmp_path, "logs", "a", env={"PATH": str(tmp_path)})
    assert result.status == 69
    assert "there is no journalctl here" in result.stderr


def test_a_runtime_folder_may_have_a_long_path(broker: Broker, daemon: StartDaemon) -> None:
    workerd = daemon(config(broker.url, ["true"]), "a-name-of-thirty-two-characters.")
    workerd.wait_event("consuming", queue="jobs.due")
    assert len(str(folder(workerd) / "control.sock")) > 107
    assert health(workerd).status == 0
