"""Pausing, resuming and cancelling; and who may."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call, submit, user, with_groups
from tests.harness.control import workerd as command
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.processes import MissingTool
from tests.harness.programs import WORKERD
from tests.harness.tables import config
from tests.harness.waiting import TIMEOUT, until
from tests.harness.wire import Wire

StartDaemon = Callable[..., Daemon]

# Pausing


def test_a_paused_instance_gives_back_what_waits_and_finishes_what_runs(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(
        config(broker.url, oracle.command(), queues={"jobs": {"concurrency": 1, "prefetch": 3}})
    )
    workerd.wait_event("consuming", queue="jobs.due")
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a", "b", "c"])
    workerd.wait_event("start", job_id="a")
    paused = command(workerd.runtime, "pause")
    assert paused.status == 0, paused
    assert paused.stdout == "jobs paused\n1 jobs are still running\n"
    event = workerd.wait_event("paused")
    assert (event["queues"], event["uid"]) == ("jobs", os.geteuid())
    client.await_ready("jobs", 2)
    workerd.wait_notify(lambda text: text == "STATUS=jobs paused by an operator")

    oracle.release("a")
    workerd.wait_event("done", job_id="a")
    assert client.ready("jobs") == 2
    assert command(workerd.runtime, "pause").stdout == "jobs is already paused\n"

    assert command(workerd.runtime, "resume").stdout == "jobs resumed\n"
    workerd.wait_event("done", count=3)
    broker.await_depth("jobs")
    oracle.check(jobs)
    assert {entry["attempt"] for entry in workerd.events("start")} == {1}


def test_nothing_starts_once_the_pause_is_told(
    broker: Broker, client: Client, wire: Wire, daemon: StartDaemon, oracle: Oracle
) -> None:
    workerd = daemon(config(wire.url, oracle.command()))
    workerd.wait_event("consuming", queue="jobs.due")
    # The broker does not know yet, and goes on sending.
    wire.hold("to_broker")
    call(workerd, "pause")
    jobs = client.publish_jobs("jobs", ["a", "b"])
    until(lambda: call(workerd, "status")["queues"][0]["waiting"] == 2, "they have come")
    wire.release()
    client.await_ready("jobs", 2)
    assert not workerd.events("start")
    call(workerd, "resume")
    workerd.wait_event("done", count=2)
    broker.await_depth("jobs")
    oracle.check(jobs)


def test_one_queue_is_paused_and_the_other_goes_on(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    workerd = daemon(config(broker.url, ["true"], queues={"calm": {}, "jobs": {}}))
    workerd.wait_event("consuming", queue="jobs.due")
    workerd.wait_event("consuming", queue="calm.due")
    paused = command(workerd.runtime, "pause", "calm", "--json")
    assert json.loads(paused.stdout) == {
        "instance": "1",
        "queues": ["calm"],
        "changed": ["calm"],
        "running": 0,
    }
    client.publish_jobs("calm", ["c"])
    client.publish_jobs("jobs", ["j"])
    workerd.wait_event("done", job_id="j")
    # What the broker sent before it knew of the pause goes back.
    client.await_ready("calm", 1)
    queues = {queue["queue"]: queue for queue in call(workerd, "status")["queues"]}
    assert (queues["calm"]["consuming"], queues["calm"]["paused"]) == (False, "by an operator")
    assert (queues["jobs"]["consuming"], queues["jobs"]["paused"]) == (True, None)
    command(workerd.runtime, "resume", "calm")
    workerd.wait_event("done", job_id="c")

    unknown = command(workerd.runtime, "pause", "clam")
    assert unknown.status == 64
    assert "no queue 'clam', did you mean \"calm\"?" in unknown.stderr


def test_a_pause_survives_a_reload_and_a_lost_connection_but_no_restart(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    text = config(broker.url, ["true"])
    workerd = daemon(text)
    workerd.wait_event("consuming", queue="jobs.due")
    call(workerd, "pause")
    mark = workerd.mark()
    workerd.signal(1)
    workerd.wait_event("reloaded")
    broker.close_all_connections()
    workerd.wait_event("disconnected")
    workerd.wait_event("connected", since=mark)
    client_again = Client(broker.url)
    client_again.publish_jobs("jobs", ["a"])
    workerd.wait_event("declared", since=mark)
    assert client_again.ready("jobs") == 1
    assert not workerd.events("consuming", since=mark)
    workerd.stop()
    daemon(text).wait_event("done", job_id="a")
    client_again.close()


def test_resumed_at_once_it_consumes_again(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    workerd = daemon(config(broker.url, ["true"]))
    workerd.wait_event("consuming", queue="jobs.due")
    for _ in range(20):
        call(workerd, "pause")
        call(workerd, "resume")
    client.publish_jobs("jobs", ["a"])
    workerd.wait_event("done", job_id="a")


# Cancelling


def test_a_running_job_is_ended_with_its_process_group_and_is_a_dead_letter(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    # A job with a child of its own, and one that ignores SIGTERM.
    script = "trap '' TERM; sleep 300 & echo $!; wait; sleep 300"
    handler = {"kill_grace": "100ms", "retry": {"attempts": 5}}
    workerd = daemon(config(broker.url, ["sh", "-c", script], handler=handler))
    workerd.wait_ready()
    client.publish_jobs("jobs", ["a", "b"])
    children = [int(workerd.wait_event("output", job_id=job)["text"]) for job in ("a", "b")]
    cancelled = command(workerd.runtime, "cancel", "a")
    assert cancelled.status == 0, cancelled
    (job,) = [job for job in call(workerd, "status")["jobs"] if job["id"] == "a"] or [None]
    assert job is None or job["ending"]
    assert "in instance 1, process group" in cancelled.stdout
    letter = workerd.wait_event("dead letter", job_id="a")
    assert letter["reason"] == "cancelled"
    assert processes.has_ended(children[0], within=TIMEOUT)
    assert not processes.has_ended(children[1], within=0)
    (dead,) = client.look("jobs.dead")
    assert dead.id == "a"
    assert dead.headers["x-workerd-reason"] == "cancelled"
    assert dead.headers["x-workerd-signal"] == "SIGKILL"
    event = workerd.wait_event("cancelled")
    assert (event["job_id"], event["running"], event["uid"]) == ("a", 1, os.geteuid())
    call(workerd, "cancel", id="b")
    workerd.wait_event("dead letter", job_id="b")


def test_a_cancelled_job_of_a_daemon_that_drains_is_not_given_back(
    broker: Broker, client: Client, daemon: StartDaemon
) -> None:
    workerd = daemon(config(broker.url, ["sleep", "300"]))
    workerd.wait_ready()
    client.publish_jobs("jobs", ["a"])
    workerd.wait_event("start")
    workerd.signal(15)
    workerd.wait_event("draining")
    assert call(workerd, "cancel", id="a")["ended"][0]["id"] == "a"
    assert workerd.wait_exit() == 0
    assert [letter.id for letter in client.look("jobs.dead")] == ["a"]
    broker.await_depth("jobs")


def test_a_waiting_job_is_refused_when_it_comes_by_every_instance(
    broker: Broker, client: Client, daemon: StartDaemon, oracle: Oracle
) -> None:
    text = config(broker.url, oracle.command())
    first, second = daemon(text), daemon(text, "2")
    for workerd in (first, second):
        workerd.wait_event("consuming", queue="jobs.due")
        call(workerd, "pause")
    client.publish_jobs("jobs", ["a", "b"])
    cancelled = command(first.runtime, "cancel", "a")
    assert cancelled.stdout == "a: does not run here; refused when it comes to instance 1, 2\n"
    call(second, "resume")
    assert second.wait_event("dead letter", job_id="a")["reason"] == "cancelled"
    second.wait_event("done", job_id="b")
    oracle.check(["a", "b"], dead=["a"])

    # Sent back, it is to run, wherever it comes.
    call(first, "resume")
    call(second, "pause")
    config_file = first.runtime.parent / "workerd-1.toml"
    sent = command(first.runtime, "dead", "requeue", "jobs", "--all", "--config", config_file)
    assert sent.status == 0, sent
    first.wait_event("done", job_id="a")


# Who may


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A runtime directory that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="workerd-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


MAY_ASK, OPERATORS, STRANGERS = 61001, 61002, 61003
#: Users without a name, and one with a name.
MEMBER, OTHER_MEMBER, OPERATOR, NOBODY = 61011, 61012, 61013, 65534


@pytest.fixture
def shared(broker: Broker, daemon: StartDaemon, open_folder: Path, tmp_path: Path) -> Daemon:
    """A daemon on a host with the group workerd-submit, and with a group of operators."""
    if os.geteuid() != 0:
        raise MissingTool("other users need root")
    groups = {"workerd-submit": MAY_ASK, "workerd-ops": OPERATORS}
    run = [*WORKERD, "run", "--config", str(tmp_path / "workerd-1.toml")]
    workerd = daemon(
        config(broker.url, ["sleep", "300"], control={"operators": "workerd-ops"}),
        command=with_groups(tmp_path, groups, run),
        env={"RUNTIME_DIRECTORY": str(open_folder)},
    )
    workerd.wait_event("consuming", queue="jobs.due")
    assert (open_folder / "1/control.sock").stat().st_gid == MAY_ASK
    return workerd


def test_members_look_operators_steer_and_all_others_are_told_whom_to_ask(shared: Daemon) -> None:
    runtime = shared.runtime
    member = user(MEMBER, MAY_ASK, STRANGERS)
    operator = user(OPERATOR, MAY_ASK, OPERATORS)
    stranger = user(NOBODY, STRANGERS)

    assert command(runtime, "health", become=member).status == 0
    assert command(runtime, "status", become=member).stdout.startswith("1: consuming jobs: ")
    refused = command(runtime, "pause", become=member)
    assert refused.status == 77
    assert "only root, the daemon's own user, and members of the group workerd-ops" in (
        refused.stderr
    )
    assert "adduser USER workerd-ops" in refused.stderr
    assert call(shared, "health")["healthy"]

    assert command(runtime, "pause", become=operator).stdout == "jobs paused\n"
    assert shared.wait_event("paused")["uid"] == OPERATOR
    assert command(runtime, "resume", become=operator).status == 0
    assert shared.wait_event("resumed")["uid"] == OPERATOR

    for words in (["status"], ["health"], ["pause"], ["cancel", "a"]):
        barred = command(runtime, *words, become=stranger)
        assert barred.status == 77, words
        assert "ask an administrator: adduser nobody workerd-submit" in barred.stderr
    # To submit, the broker itself would do; but for that there is no password.
    file = shared.runtime / "own.toml"
    file.write_text('broker.urls = ["amqp://mary@127.0.0.1:1"]\nhandlers.job.command = ["true"]\n')
    barred = submit(runtime, "job", "x", "--config", file, become=stranger)
    assert barred.status == 77
    assert "no password for" in barred.stderr
    assert "ask an administrator: adduser nobody workerd-submit" in barred.stderr


def test_who_submitted_a_job_may_cancel_it_and_nobody_else_of_the_group(
    shared: Daemon, client: Client, tmp_path: Path
) -> None:
    runtime = shared.runtime
    member, other = user(MEMBER, MAY_ASK), user(OTHER_MEMBER, MAY_ASK)
    sent = submit(runtime, "job", "--id", "mine", become=member)
    assert (sent.status, sent.stdout) == (0, "mine\n"), sent
    assert shared.wait_event("submitted", job_id="mine")["uid"] == MEMBER
    shared.wait_event("start", job_id="mine")

    refused = command(runtime, "cancel", "mine", become=other)
    assert refused.status == 77
    assert "only who submitted the job, root, the daemon's own user" in refused.stderr
    (job,) = call(shared, "status")["jobs"]
    assert (job["ending"], job["submitter"]) == (False, MEMBER)

    assert command(runtime, "cancel", "mine", become=member).status == 0
    assert shared.wait_event("dead letter", job_id="mine")["reason"] == "cancelled"
    (letter,) = client.look("jobs.dead")
    assert letter.headers["x-workerd-submitter"] == MEMBER

    # Sent back by an administrator, it is still theirs, and nobody else's.
    since = shared.mark()
    file = tmp_path / "workerd-1.toml"
    again = command(runtime, "dead", "requeue", "jobs", "--id", "mine", "--config", file)
    assert again.stdout == "mine\n", again
    shared.wait_event("start", job_id="mine", since=since)
    assert command(runtime, "cancel", "mine", become=other).status == 77
    assert command(runtime, "cancel", "mine", become=member).status == 0
    assert shared.wait_event("dead letter", job_id="mine", since=since)["reason"] == "cancelled"

    # One that waits: refused only if it is theirs.
    call(shared, "pause")
    client.publish_jobs("jobs", ["not-theirs"])
    assert submit(runtime, "job", "--id", "theirs", become=other).status == 0
    for job_id in ("not-theirs", "theirs"):
        assert command(runtime, "cancel", job_id, become=other).status == 0
    call(shared, "resume")
    assert shared.wait_event("dead letter", job_id="theirs")["reason"] == "cancelled"
    shared.wait_event("start", job_id="not-theirs")
    call(shared, "cancel", id="not-theirs")
