"""Warm handlers under a daemon and a broker."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call
from tests.harness.daemon import Daemon
from tests.harness.pools import PRELUDE
from tests.harness.waiting import TIMEOUT, until

Start = Callable[..., Daemon]

APP = """
import ctypes, os, sys, time
def do(job):
    if job.body.startswith(b"/"):
        print("runs", os.getpid())
        while not os.path.exists(job.body):
            time.sleep(0.01)
        return None
    return eval(job.body)
def pid(job):
    print("pid", os.getpid())
"""


class Subject:
    """A configuration with warm handlers, whose jobs each get a single attempt."""

    def __init__(self, daemon: Start, broker: Broker, folder: Path) -> None:
        self._daemon = daemon
        self.broker = broker
        self.folder = folder
        (folder / "app.py").write_text(APP)

    def text(
        self,
        *,
        worker: dict[str, Any] | None = None,
        queue: dict[str, Any] | None = None,
        **handlers: dict[str, Any],
    ) -> str:
        tables: dict[str, dict[str, Any]] = {
            "broker": {"urls": [self.broker.url], "reconnect_max": "500ms"},
            "worker": worker or {},
            "log": {"level": "debug", "format": "json"},
            "queues.default": {"concurrency": 4, **(queue or {})},
            "queues.other": {},
        }
        for name, keys in handlers.items():
            tables[f"handlers.{name}"] = {"retry.attempts": 1, **keys}
            if "python" in keys:
                tables[f"handlers.{name}"]["working_directory"] = str(self.folder)
        return "\n".join(
            "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in t.items())])
            for name, t in tables.items()
        )

    def start(self, **options: Any) -> Daemon:
        worker = self._daemon(self.text(**options))
        worker.wait_event("consuming")
        return worker

    def reload(self, worker: Daemon, **options: Any) -> None:
        (self.folder / "new.toml").write_text(self.text(**options))
        (self.folder / "new.toml").rename(self.folder / "workerd-1.toml")
        mark = worker.mark()
        worker.signal(signal.SIGHUP)
        worker.wait_event("reloaded", since=mark)


DO = {"python": "app:do"}


def test_functions_streams_and_commands_run_side_by_side(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    script = PRELUDE + 'ready; while next; do echo "got $body"; answer "$body"; done'
    worker = Subject(daemon, broker, tmp_path).start(
        function=DO, stream={"stream": ["sh", "-c", script]}, command={"command": ["cat"]}
    )
    client.publish("default", b"print('said') or 1", type="function", message_id="one")
    client.publish("default", b"x", type="stream", message_id="two")
    client.publish("default", b"y", type="command", message_id="three")
    for name, said in (("one", "said"), ("two", "got x"), ("three", "y")):
        worker.wait_event("done", job_id=name, outcome="done")
        (line,) = worker.events("output", job_id=name)
        assert line["text"] == said
        assert line["queue"] == "default"
    assert worker.stop() == 0
    assert not worker.events("child ended")


def test_a_failed_function_is_a_dead_letter_with_its_traceback(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    worker = Subject(daemon, broker, tmp_path).start(function=DO)
    client.await_topology()
    client.publish("default", b"1 / 0", type="function", message_id="failed")
    client.publish("default", b"ctypes.string_at(0)", type="function", message_id="crashed")
    for name in ("failed", "crashed"):
        worker.wait_event("dead letter", job_id=name)
    letters = {letter.id: letter.headers for letter in client.take("default.dead", 2)}
    assert "ZeroDivisionError" in letters["failed"]["x-workerd-error"]
    assert letters["crashed"]["x-workerd-signal"] == "SIGSEGV"
    assert letters["crashed"]["x-workerd-reason"] == "crashed"
    assert "app.py" in letters["crashed"]["x-workerd-error"]


def test_a_handler_that_cannot_start_holds_up_only_its_own_jobs(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    subject = Subject(daemon, broker, tmp_path)
    worker = subject.start(function={"python": "missing:f"}, command={"command": ["true"]})
    # Told before any job has come.
    failed = worker.wait_event("child failed", handler="function")
    assert failed["error"].endswith("No module named 'missing'")
    client.publish("default", type="function", message_id="waits")
    client.publish("default", type="command", message_id="goes")
    worker.wait_event("handler paused", reason="cannot-start")
    worker.wait_event("done", job_id="goes")
    (tmp_path / "missing.py").write_text("def f(job): pass")
    worker.wait_event("done", job_id="waits")
    assert not worker.events("failed")
    assert not worker.events("dead letter")


def test_a_handler_that_can_start_again_resumes_without_a_job(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    subject = Subject(daemon, broker, tmp_path)
    worker = subject.start(function={"python": "missing:f"})
    client.publish("default", type="function", message_id="waits")
    worker.wait_event("postponed", job_id="waits")
    # When it comes back, it is refused before its handler is asked.
    call(worker, "cancel", id="waits")
    worker.wait_event("rejected", job_id="waits")
    assert "handler function paused" in call(worker, "status")["status"]
    (tmp_path / "missing.py").write_text("def f(job): pass")
    assert "job_id" not in worker.wait_event("handler resumed", handler="function")
    assert not call(worker, "status")["degraded"]


def test_a_reload_starts_a_process_that_could_not_start_at_once(
    broker: Broker, daemon: Start, tmp_path: Path
) -> None:
    subject = Subject(daemon, broker, tmp_path)
    function = {"python": "missing:f"}
    worker = subject.start(function=function)
    worker.wait_event("child failed", handler="function")
    (tmp_path / "missing.py").write_text("def f(job): pass")
    subject.reload(worker, function=function)
    worker.wait_event("child recovered", handler="function")


def test_a_killed_daemon_takes_its_warm_processes_with_it(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    worker = Subject(daemon, broker, tmp_path).start(function=DO)
    body = b"__import__('subprocess').Popen(['sleep', '600']) and time.sleep(600)"
    client.publish("default", body, type="function")
    worker.wait_event("start")
    # The one that is ready for the next job, too.
    client.publish("default", b"1", type="function")
    worker.wait_event("done")
    below = until(lambda: _with(worker.children(), "sleep"), "its grandchild")
    worker.kill()
    for pid in below:
        assert processes.has_ended(pid, TIMEOUT / 4)


def test_a_job_that_waited_for_a_process_when_the_daemon_was_killed_has_spent_nothing(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    subject = Subject(daemon, broker, tmp_path)
    function = {**DO, "processes": 1, "retry.attempts": 2}
    tables: dict[str, Any] = {"queue": {"concurrency": 2}, "function": function}
    worker = subject.start(**tables)
    gate = tmp_path / "gate"
    for name in ("runs", "waits"):
        client.publish("default", bytes(gate), type="function", message_id=name)
    worker.wait_event("output", stream="stdout", job_id="runs")
    until(lambda: call(worker, "status")["running"] == 2, "the other one has come")
    worker.kill()
    gate.touch()
    again = subject.start(**tables)
    assert again.wait_event("done", job_id="waits")["attempt"] == 1
    done = again.wait_event("done", job_id="runs")
    assert done["attempt"] == 2
    # Nobody knows whether the process had come to the other one.
    alone = {entry["job_id"] for entry in again.events("start", alone=True)}
    assert alone == {"runs", "waits"}


def _with(pids: list[int], word: str) -> list[int]:
    return pids if any(word in processes.command_line(pid) for pid in pids) else []


def test_a_drain_waits_for_what_runs_gives_back_what_waits_and_ends_every_process(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    worker = Subject(daemon, broker, tmp_path).start(function={**DO, "processes": 2})
    gate = tmp_path / "gate"
    for name in ("a", "b", "c"):
        client.publish("default", bytes(gate), type="function", message_id=name)
    worker.wait_event("output", count=2, stream="stdout")
    until(lambda: call(worker, "status")["running"] == 3, "the third one has come")
    worker.signal(signal.SIGTERM)
    waited = worker.wait_event("interrupted")["job_id"]
    gate.touch()
    assert worker.wait_exit() == 0
    ended = {entry["job_id"] for entry in worker.events("done")}
    assert ended | {waited} == {"a", "b", "c"}
    assert len(ended) == 2
    client.await_ready("default", 1)


def test_what_goes_back_in_a_drain_makes_room_for_nobody(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    subject = Subject(daemon, broker, tmp_path)
    worker = subject.start(
        queue={"concurrency": 2, "prefetch": 3},
        function={**DO, "processes": 1, "queue": "other"},
        command={"command": ["true"]},
    )
    gate = tmp_path / "gate"
    for name in ("runs", "waits"):
        client.publish("default", bytes(gate), type="function", message_id=name)
    worker.wait_event("output", stream="stdout")
    client.publish("default", type="command", message_id="late")
    until(lambda: broker.queues()["default"].unacked == 3, "one that waits for a slot")
    worker.signal(signal.SIGTERM)
    worker.wait_event("interrupted")
    gate.touch()
    assert worker.wait_exit() == 0
    assert not worker.events("start", job_id="late")
    client.await_ready("default", 2)


#: One process, and room in its pipe.
AHEAD: dict[str, Any] = {
    "queue": {"concurrency": 1, "prefetch": 30},
    "function": {**DO, "processes": 1, "retry.attempts": 3},
}


def with_jobs_ahead(subject: Subject, client: Client, gate: Path, count: int = 8) -> Daemon:
    """A daemon whose process does a job that waits, with others in its pipe."""
    worker = subject.start(**AHEAD)
    # Short ones, or nothing lies in the pipe; not too short, or all that follow find room there.
    for number in itertools.count():
        body, name = b"time.sleep(0.002)", f"short {number}"
        client.publish("default", body, type="function", message_id=name)
        # On a busy machine the last may have taken long.
        if worker.wait_event("done", job_id=name)["duration_ms"] < 10 and number >= 10:
            break
    client.publish("default", bytes(gate), type="function", message_id="long")
    for number in range(count):
        client.publish("default", b"0", type="function", message_id=str(number))
    worker.wait_event("output", stream="stdout", job_id="long")
    subject.broker.await_depth("default", unacked=1 + count)
    return worker


def check_each_ran_once(worker: Daemon, *names: str) -> None:
    for name in names:
        worker.wait_event("done", job_id=name)
    starts = [entry["job_id"] for entry in worker.events("start")]
    assert len(starts) == len(set(starts))


def test_what_lies_in_the_pipe_of_a_process_goes_back_in_a_drain_at_once_and_in_order(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = with_jobs_ahead(Subject(daemon, broker, tmp_path), client, gate, 20)
    worker.signal(signal.SIGTERM)
    client.await_ready("default", 20)
    gate.touch()
    assert worker.wait_exit() == 0
    assert worker.events("done", job_id="long")
    assert not [entry for entry in worker.events("start") if entry["job_id"].isdigit()]
    back = [message.id for message in client.take("default", 20)]
    assert back == [str(number) for number in range(20)]


def test_what_lies_in_the_pipe_of_a_process_when_the_daemon_is_killed_has_spent_nothing(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    subject = Subject(daemon, broker, tmp_path)
    worker = with_jobs_ahead(subject, client, gate)
    worker.kill()
    gate.touch()
    again = subject.start(**AHEAD)
    again.wait_event("done", count=9)
    attempts = {entry["job_id"]: entry["attempt"] for entry in again.events("done")}
    assert attempts == {"long": 2, **{str(number): 1 for number in range(8)}}


def test_a_job_that_kills_the_daemon_from_the_pipe_runs_alone_and_is_counted_from_then_on(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    subject = Subject(daemon, broker, tmp_path)
    worker = with_jobs_ahead(subject, client, gate, 1)
    client.publish("default", b"os.kill(os.getppid(), 9)", type="function", message_id="killer")
    client.publish("default", b"0", type="function", message_id="behind")
    broker.await_depth("default", unacked=4)
    gate.touch()
    daemons = [worker]

    def buried() -> bool:
        if not daemons[-1].running:
            # It may be killed before it has logged anything.
            daemons.append(daemon(subject.text(**AHEAD)))
        return bool(daemons[-1].events("dead letter", job_id="killer"))

    until(buried, "its dead letter")
    # The first daemon that it ended may not have known that it had begun.
    assert len(daemons) - 1 in (3, 4)
    [letter] = client.take("default.dead")
    assert letter.headers["x-workerd-attempts"] == 3
    daemons[-1].wait_event("done", job_id="behind", attempt=1)


def test_a_lost_connection_gives_what_lies_in_the_pipe_to_whoever_gets_it_next(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = with_jobs_ahead(Subject(daemon, broker, tmp_path), client, gate)
    broker.close_all_connections()
    worker.wait_event("interrupted", reason="not begun")
    worker.wait_event("rejoined", job_id="long")
    gate.touch()
    check_each_ran_once(worker, "long", *map(str, range(8)))
    broker.await_depth("default")


def test_a_consumer_that_the_broker_cancels_begins_nothing_of_what_lies_in_the_pipe(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = with_jobs_ahead(Subject(daemon, broker, tmp_path), client, gate)
    client.channel.queue_delete("default")
    worker.wait_event("interrupted", reason="not begun")
    gate.touch()
    worker.wait_event("done", job_id="long")
    assert worker.stop() == 0
    assert not [entry for entry in worker.events("start") if entry["job_id"].isdigit()]


def test_an_operators_pause_gives_back_what_lies_in_the_pipe(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = with_jobs_ahead(Subject(daemon, broker, tmp_path), client, gate)
    call(worker, "pause")
    client.await_ready("default", 8)
    gate.touch()
    worker.wait_event("done", job_id="long")
    call(worker, "resume")
    check_each_ran_once(worker, "long", *map(str, range(8)))


def test_a_job_that_outlasts_the_drain_goes_back(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    worker = Subject(daemon, broker, tmp_path).start(function=DO, worker={"drain_timeout": "100ms"})
    client.publish("default", b"/no/such/gate", type="function", message_id="long")
    worker.wait_event("output", job_id="long")
    assert worker.stop() == 0
    assert worker.events("interrupted", job_id="long", signal="SIGTERM")
    client.await_ready("default", 1)


def test_after_a_reload_jobs_get_new_processes_and_running_ones_keep_theirs(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    subject = Subject(daemon, broker, tmp_path)
    same = {"python": "app:pid", "processes": 1}
    worker = subject.start(function={**DO, "environment.NEW": "no"}, same=same)
    gate = tmp_path / "gate"
    client.publish("default", bytes(gate), type="function", message_id="runs")
    client.publish("default", type="same", message_id="before")
    before = worker.wait_event("output", job_id="before")["text"]
    old = int(worker.wait_event("output", job_id="runs")["text"].split()[1])
    subject.reload(worker, function={**DO, "environment.NEW": "yes"}, same=same)
    client.publish("default", b"print(os.environ['NEW'])", type="function", message_id="new")
    client.publish("default", type="same", message_id="after")
    assert worker.wait_event("output", job_id="new")["text"] == "yes"
    # A handler that is as it was has kept its process.
    assert worker.wait_event("output", job_id="after")["text"] == before
    assert not processes.has_ended(old, 0)
    gate.touch()
    worker.wait_event("done", job_id="runs")
    assert processes.has_ended(old, TIMEOUT / 4)
    assert worker.stop() == 0
    assert not worker.events("child ended")


def test_a_storm_of_reloads_leaves_no_process_behind(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    subject = Subject(daemon, broker, tmp_path)
    worker = subject.start(function=DO)
    for number in range(4):
        subject.reload(worker, function={**DO, "environment.N": str(number)})
    client.publish("default", b"print(os.environ['N'])", type="function")
    assert worker.wait_event("output")["text"] == "3"
    until(lambda: len(worker.children()) == 2, "the guardian and one process")
    assert os.path.exists(f"/proc/{worker.pid}")


def test_no_more_jobs_of_a_queue_run_at_once_when_its_handler_has_those_of_another_too(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    worker = Subject(daemon, broker, tmp_path).start(
        queue={"concurrency": 1, "prefetch": 30}, function={**DO, "processes": 2}
    )
    worker.wait_event("consuming", queue="other")
    for number in range(10):
        client.publish("default", b"0", type="function", message_id=f"short {number}")
    worker.wait_event("done", count=10)
    gates = {queue: tmp_path / queue for queue in ("default", "other")}
    for queue, gate in gates.items():
        client.publish(queue, bytes(gate), type="function", message_id=f"long {queue}")
        worker.wait_event("output", stream="stdout", job_id=f"long {queue}")
    for number in range(8):
        client.publish("default", b"0", type="function", message_id=str(number))
    gates["other"].touch()
    worker.wait_event("done", job_id="long other")
    # Whatever it had in its pipe would come before this one.
    client.publish("other", b"0", type="function", message_id="another")
    worker.wait_event("done", job_id="another")
    assert not [entry for entry in worker.events("start") if entry["job_id"].isdigit()]
    gates["default"].touch()
    worker.wait_event("done", count=21)


def test_short_jobs_are_not_interrupted_by_lost_connections(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    worker = Subject(daemon, broker, tmp_path).start(**AHEAD)
    for number in range(1500):
        client.publish("default", b"time.sleep(0.001)", type="function", message_id=str(number))
    for count in (200, 500, 800):
        worker.wait_event("done", count=count)
        mark = worker.mark()
        broker.close_all_connections()
        worker.wait_event("consuming", since=mark)
    worker.wait_event("done", count=1500)
    starts = [entry["job_id"] for entry in worker.events("start")]
    assert len(starts) == len(set(starts)) == 1500
    assert not worker.events("interrupted", reason="drain")
