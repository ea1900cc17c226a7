"""`workerd metrics`: the figures are those of what happened, and nothing else has any."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call
from tests.harness.control import submit as submit_through
from tests.harness.control import workerd as command
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.programs import WORKERD, Program
from tests.harness.tables import Table, config
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import SCALE, TIMEOUT, until
from workerd.cli.metrics_http import MOST_CLIENTS

Start = Callable[..., Daemon]
Found = dict[tuple[str, frozenset[tuple[str, str]]], float]

#: Each kind of outcome is a handler.
HANDLERS: dict[str, Table] = {
    "handlers.fine": {"command": ["true"], "queue": "jobs"},
    "handlers.fails": {"command": ["false"], "queue": "jobs", "retry": {"attempts": 1}},
    "handlers.again": {
        "command": ["sh", "-c", "exit 75"],
        "queue": "jobs",
        "retry": {"attempts": 3, "delay": "1s", "multiplier": 1.0},
    },
    "handlers.missing": {"command": ["/nowhere/program"], "queue": "jobs"},
}


def parsed(text: str) -> Found:
    return {
        (sample.name.removeprefix("workerd_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(runtime: Path, *arguments: str) -> Found:
    """What the command prints."""
    result = command(runtime, "metrics", *arguments)
    assert result.status == 0, result
    return parsed(result.stdout)


def value(found: Found, name: str, worker: str = "1", **labels: str) -> float | None:
    return found.get((name, frozenset({"worker": worker, **labels}.items())))


def is_known(found: Found, messages: str) -> bool:
    """Whether the broker has answered in time how many of these wait in the queue jobs."""
    return value(found, f"queue_{messages}_messages", queue="jobs") is not None


def jobs(found: Found) -> dict[tuple[str, str], float]:
    """The attempts by handler and outcome, but for those that are 0."""
    return {
        (dict(labels)["handler"], dict(labels)["outcome"]): number
        for (name, labels), number in found.items()
        if name == "jobs_total" and number
    }


def begin(daemon: Start, text: str, instance: str = "1") -> Daemon:
    worker = daemon(text, instance)
    worker.wait_event("consuming", queue="jobs")
    worker.wait_event("consuming", queue="jobs.due")
    return worker


def test_each_attempt_is_counted_once_by_what_became_of_it(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = begin(daemon, config(broker.url, ["true"], queues={"jobs": {}}, **HANDLERS))
    before = scrape(worker.runtime)
    # What can be foreseen is there from the first, so that an increase shows.
    for handler in ("job", "fine", "fails", "again", "missing", "no handler"):
        for outcome in ("done", "retried", "postponed", "dead", "returned"):
            labels = {"queue": "jobs", "handler": handler, "outcome": outcome}
            assert value(before, "jobs_total", **labels) == 0
    client.publish_jobs("jobs", [f"fine-{n}" for n in range(5)], type="fine")
    client.publish_jobs("jobs", ["fails-1", "fails-2"], type="fails")
    client.publish("jobs", b"", type="again", message_id="again-1")
    client.publish("jobs", b"", type="nothing-like-it", message_id="unknown-1")
    client.publish("jobs", b"", type="missing", message_id="missing-1")
    for job_id in ("fails-1", "fails-2", "again-1", "unknown-1"):
        worker.wait_event("dead letter", job_id=job_id)
    worker.wait_event("done", count=5)
    worker.wait_event("postponed", job_id="missing-1")
    expected = {
        ("fine", "done"): 5,
        ("fails", "dead"): 2,
        ("again", "retried"): 2,
        ("again", "dead"): 1,
        ("no handler", "dead"): 1,
    }

    def counted() -> Found:
        found = scrape(worker.runtime)
        # It is tried again and again.
        tried = {key: n for key, n in jobs(found).items() if key == ("missing", "postponed")}
        return found if tried and jobs(found) == {**expected, **tried} else {}

    found = until(counted, f"just {expected} is counted")
    assert value(found, "handler_paused", handler="missing") == 1
    assert value(found, "handler_paused", handler="fine") == 0
    runs = {handler: 5 if handler == "fine" else 2 for handler in ("fine", "fails")}
    for handler, number in {**runs, "again": 3}.items():
        labels = {"queue": "jobs", "handler": handler}
        assert value(found, "job_run_seconds_count", **labels) == number
        longest = value(found, "job_run_seconds_bucket", le="3600.0", **labels)
        assert longest == number
        assert 0 < (value(found, "job_run_seconds_sum", **labels) or 0) < 60 * SCALE
    # What never began has no time.
    assert value(found, "job_run_seconds_count", queue="jobs", handler="missing") is None
    until(lambda: is_known(scrape(worker.runtime), "dead"), "the dead letters are counted")


def test_submitted_jobs_are_counted_and_a_drain_is_shown(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle
) -> None:
    text = config(broker.url, oracle.command(), worker={"drain_timeout": "1h"}, queues={"jobs": {}})
    worker = begin(daemon, text)
    oracle.hold("a")
    oracle.hold("b")
    config_file = worker.runtime.parent / "workerd-1.toml"
    for job_id in ("a", "b"):
        words = ("--config", config_file, "--id", job_id, "job")
        assert submit_through(worker.runtime, *words).status == 0
        worker.wait_event("start", job_id=job_id)
    found = scrape(worker.runtime)
    assert value(found, "submissions_total", queue="jobs") == 2
    assert value(found, "running_jobs", queue="jobs") == 2
    assert value(found, "queue_concurrency", queue="jobs") == 4
    # Both came with a timestamp, which counts whole seconds.
    assert value(found, "job_wait_seconds_count", queue="jobs") == 2
    assert (value(found, "job_wait_seconds_sum", queue="jobs") or 0) < 2 * 20 * SCALE
    assert value(found, "draining") == 0
    call(worker, "cancel", id="a")
    worker.wait_event("dead letter", job_id="a")
    worker.signal(signal.SIGTERM)
    worker.wait_event("draining")
    assert value(scrape(worker.runtime), "draining") == 1
    oracle.release()


def test_the_gauges_follow_a_queue_an_operator_pauses(
    broker: Broker, client: Client, daemon: Start
) -> None:
    text = config(broker.url, ["true"], queues={"jobs": {"concurrency": 3}, "others": {}})
    worker = begin(daemon, text)
    worker.wait_event("consuming", queue="others.due")
    found = scrape(worker.runtime)
    assert value(found, "up") == value(found, "healthy") == value(found, "connected") == 1
    assert abs((value(found, "start_time_seconds") or 0) - time.time()) < 60 * SCALE
    assert value(found, "queue_consuming", queue="jobs") == 1
    assert value(found, "queue_paused", queue="jobs") == 0
    assert (value(found, "process_resident_memory_bytes") or 0) > 10_000_000
    assert (value(found, "process_open_fds") or 0) > 5
    assert (value(found, "child_processes") or 0) >= 1
    call(worker, "pause", queue="jobs")
    client.publish_jobs("jobs", ["a", "b"])

    def ready() -> Found:
        found = scrape(worker.runtime)
        return found if value(found, "queue_ready_messages", queue="jobs") == 2 else {}

    found = until(ready, "the broker's count")
    assert value(found, "queue_paused", queue="jobs") == 1
    assert value(found, "queue_consuming", queue="jobs") == 0
    assert value(found, "queue_paused", queue="others") == 0
    assert value(found, "queue_due_messages", queue="jobs") == 0
    assert value(found, "queue_dead_messages", queue="jobs") == 0


def test_a_queue_that_is_missing_has_no_depth_and_the_others_have(
    broker: Broker, client: Client, daemon: Start
) -> None:
    queues = {"jobs": {}, "absent": {"declare": "wait"}}
    worker = begin(daemon, config(broker.url, ["true"], queues=queues))
    worker.wait_event("queue paused", queue="absent")

    def known() -> Found:
        found = scrape(worker.runtime)
        return found if is_known(found, "ready") and is_known(found, "dead") else {}

    found = until(known, "the broker's counts")
    assert value(found, "queue_ready_messages", queue="absent") is None
    assert value(found, "queue_paused", queue="absent") == 1
    assert value(found, "queue_ready_messages", queue="jobs") == 0
    assert value(found, "queue_dead_messages", queue="jobs") == 0


def test_lost_connections_are_counted_and_an_outage_shows(broker: Broker, daemon: Start) -> None:
    worker = begin(daemon, config(broker.url, ["true"]))
    assert value(scrape(worker.runtime), "lost_connections_total", connection="consume") == 0
    broker.kill()
    worker.wait_event("disconnected")
    found = scrape(worker.runtime)
    assert value(found, "up") == 1
    assert value(found, "connected") == value(found, "healthy") == 0
    # Nobody knows; the last figures would be lies.
    assert value(found, "queue_ready_messages", queue="jobs") is None
    mark = worker.mark()
    broker.start()
    worker.wait_event("consuming", queue="jobs.due", since=mark)

    def lost() -> bool:
        found = scrape(worker.runtime)
        each = (
            value(found, "lost_connections_total", connection=name)
            for name in ("consume", "publish")
        )
        # However many attempts failed meanwhile.
        return [*each] == [1, 1] and value(found, "connected") == 1

    until(lost, "one loss of each")


def test_a_frozen_broker_holds_up_no_scrape(broker: Broker, daemon: Start) -> None:
    worker = begin(daemon, config(broker.url, ["true"]))
    broker.freeze()
    try:
        for _ in range(3):
            began = time.monotonic()
            found = scrape(worker.runtime)
            assert time.monotonic() - began < 3 * SCALE
            assert value(found, "up") == 1
    finally:
        broker.thaw()
    assert not worker.events("disconnected")


def test_unknown_types_and_failing_ids_add_no_series(
    broker: Broker, client: Client, daemon: Start
) -> None:
    worker = begin(daemon, config(broker.url, ["true"]))
    client.publish("jobs", b"", type="type-0", message_id="0")
    client.publish("jobs", b"", type="job", message_id="job-0")
    worker.wait_event("dead letter", job_id="0")
    worker.wait_event("done", job_id="job-0")

    def both() -> Found:
        found = scrape(worker.runtime)
        return found if len(jobs(found)) == 2 and is_known(found, "ready") else {}

    series = until(both, "both are counted").keys()
    for number in range(1, 100):
        client.publish("jobs", b"", type=f"type-{number}", message_id=str(number))
        client.publish("jobs", b"", type="job", message_id=f"job-{number}")
    worker.wait_event("dead letter", count=100)
    worker.wait_event("done", count=100)
    counts = {("no handler", "dead"): 100, ("job", "done"): 100}
    until(lambda: jobs(scrape(worker.runtime)) == counts, "all are counted")
    until(lambda: scrape(worker.runtime).keys() == series, "the series that there were")


def test_a_stopped_instance_leaves_no_ghost_and_a_killed_one_is_down(
    broker: Broker, daemon: Start, tmp_path: Path
) -> None:
    text = config(broker.url, ["true"])
    assert command(tmp_path / "run", "metrics").stdout == ""
    stopped, killed, well = (begin(daemon, text, each) for each in "abc")
    found = scrape(well.runtime)
    assert [value(found, "up", each) for each in "abc"] == [1, 1, 1]
    stopped.stop()
    killed.kill()
    found = scrape(well.runtime)
    of_a = {name for name, labels in found if ("worker", "a") in labels}
    of_b = {name for name, labels in found if ("worker", "b") in labels}
    assert of_a == set()
    assert of_b == {"up"}
    assert value(found, "up", "b") == 0
    assert value(found, "up", "c") == 1
    assert scrape(well.runtime, "--instance", "a") == {}
    unknown = command(well.runtime, "metrics", "--instance", "z")
    assert (unknown.status, unknown.stderr) == (
        69,
        "workerd: instance z does not run on this host\n",
    )


def test_one_that_is_stuck_is_down_and_holds_up_nobody(broker: Broker, daemon: Start) -> None:
    text = config(broker.url, ["true"])
    stuck, well = (begin(daemon, text, each) for each in "ab")
    stuck.signal(signal.SIGSTOP)
    try:
        found = scrape(well.runtime)
    finally:
        stuck.signal(signal.SIGCONT)
    assert (value(found, "up", "a"), value(found, "up", "b")) == (0, 1)


class Endpoint:
    """`workerd metrics --serve` on a socket that it is given as systemd gives it."""

    def __init__(self, runtime: Path, **env: str) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address: tuple[str, int] = self.listening.getsockname()
        script = 'exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@" 3<&0'
        self.program = Program(
            ["sh", "-c", script, "sh", *WORKERD, "metrics", "--serve"],
            stdin=self.listening.fileno(),
            env={"RUNTIME_DIRECTORY": str(runtime), **env},
        )

    def get(self, **headers: str) -> tuple[str, str]:
        """The content type and the text of an answer."""
        host, port = self.address
        request = urllib.request.Request(f"http://{host}:{port}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    def close(self) -> None:
        self.program.close()
        self.listening.close()


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    """A function that starts one."""
    with contextlib.ExitStack() as stack:
        yield lambda runtime, **env: stack.enter_context(
            contextlib.closing(Endpoint(runtime, **env))
        )


def test_over_http_it_is_the_same(
    broker: Broker, daemon: Start, endpoint: Callable[..., Endpoint]
) -> None:
    worker = begin(daemon, config(broker.url, ["true"]))
    http = endpoint(worker.runtime)
    until(lambda: is_known(scrape(worker.runtime), "ready"), "the broker's counts")
    kind, text = http.get()
    assert kind.startswith("text/plain; version=")
    assert parsed(text).keys() == scrape(worker.runtime).keys()
    openmetrics = "application/openmetrics-text; version=1.0.0"
    kind, text = http.get(Accept=openmetrics)
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    worker.stop()
    # What is answered is new, not what was known.
    until(lambda: http.get()[1] == "", "no ghosts")


def test_clients_that_are_stuck_hold_up_no_scrape(
    broker: Broker, daemon: Start, endpoint: Callable[..., Endpoint]
) -> None:
    worker = begin(daemon, config(broker.url, ["true"]))
    http = endpoint(worker.runtime)
    with contextlib.ExitStack() as stack:
        for number in range(100):
            client = stack.enter_context(socket.create_connection(http.address))
            client.sendall(b"GET /metrics HTTP/1.1\r\nX: " if number % 2 else b"")
        began = time.monotonic()
        assert "workerd_up" in http.get()[1]
        assert time.monotonic() - began < 5 * SCALE
        threads = len(os.listdir(f"/proc/{http.program.process.pid}/task"))
        assert threads <= 2 * MOST_CLIENTS
    assert "workerd_up" in http.get()[1]


def test_without_a_socket_it_says_where_one_comes_from(tmp_path: Path) -> None:
    result = command(tmp_path / "run", "metrics", "--serve")
    assert result.status == 69
    assert "start workerd-metrics.socket" in result.stderr


def test_without_the_library_it_says_how_to_get_it(
    tmp_path: Path, endpoint: Callable[..., Endpoint]
) -> None:
    absent = tmp_path / "prometheus_client"
    absent.mkdir()
    (absent / "__init__.py").write_text(
        "raise ModuleNotFoundError('absent', name='prometheus_client')"
    )
    path = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    result = command(tmp_path / "run", "metrics", env={"PYTHONPATH": path})
    assert result.status == 69
    assert "apt install python3-prometheus-client" in result.stderr
    http = endpoint(tmp_path / "run", PYTHONPATH=path)
    with pytest.raises(urllib.error.HTTPError) as refused:
        http.get()
    with refused.value as answer:
        assert answer.code == 503
        assert "apt install python3-prometheus-client" in answer.read().decode()
    # It need not be started anew once the library is there.
    shutil.rmtree(absent)
    assert http.get()[1] == ""
