"""The judge itself: it must see every kind of wrong, or its verdicts are worth nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.oracle import Oracle, judge
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import until

WELL = "start a 1 1.0\nfinish a 1 2.0 0\n"


def test_a_job_that_ran_once_is_as_it_must_be() -> None:
    assert judge(WELL, ["a"]).problems() == []


@pytest.mark.parametrize(
    ("journal", "dead", "found"),
    [
        ("", [], "lost: 1 (a)"),
        ("start a 1 1.0\n", [], "lost: 1 (a)"),
        ("start a 1 1.0\nfinish a 1 2.0 1\n", [], "lost: 1 (a)"),
        (WELL + "start a 2 3.0\nfinish a 2 4.0 0\n", [], "duplicate runs: 1, allowed 0 (a)"),
        ("start a 1 1.0\n" + "start a 2 1.5\nfinish a 2 2.0 0\nfinish a 1 2.5 0\n", [],
         "ran twice at the same time: 1 (a)"),
        ("overlap a 2 1.0\n" + WELL, [], "ran twice at the same time: 1 (a)"),
        ("finish a 1 2.0 0\n" + WELL, [], "finished without a start: 1 (a)"),
        (WELL + "start b 2 1.0\n", [], "ran without being published: 1 (b)"),
        (WELL, ["a"], "finished well and dead as well: 1 (a)"),
        (WELL + "start a\n", [], "malformed lines: 1 (start a)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(journal: str, dead: list[str], found: str) -> None:
    assert found in judge(journal, ["a"], dead).problems()


def test_a_run_after_a_failed_one_is_no_duplicate() -> None:
    assert judge("start a 1 1.0\nfinish a 1 2.0 1\n" + WELL, ["a"]).problems() == []


def test_it_is_a_program_that_knows_nothing_of_workerd(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text(WELL)
    confirmed = tmp_path / "confirmed"
    confirmed.write_text("a\nb\n")
    program = CHECKOUT / "tests/harness/oracle.py"
    command = [sys.executable, "-I", "-S", str(program), "judge", str(tmp_path)]
    command += ["--confirmed", str(confirmed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "lost: 1 (b)" in result.stdout) == (1, True)
    assert "import workerd" not in program.read_text()


# Workers as one should not write them.

WORKER = """
import subprocess, sys, pika
url, when, *command = sys.argv[1:]

def work(channel, method, properties, body):
    if when == "early":
        channel.basic_ack(method.delivery_tag)
    for _ in range(2 if when == "twice" else 1):
        subprocess.run([word.replace("{id}", properties.message_id) for word in command])
    if when != "early":
        channel.basic_ack(method.delivery_tag)

channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
channel.basic_qos(prefetch_count=1)
channel.basic_consume("jobs", work)
channel.start_consuming()
"""


@pytest.fixture
def worker(broker: Broker, oracle: Oracle) -> Iterator[Callable[[str], int]]:
    """A function that starts one that acknowledges `early` or `late`, or runs each job `twice`."""
    started = []

    def start(when: str) -> int:
        command = [sys.executable, "-c", WORKER, broker.url, when, *oracle.command()]
        started.append(processes.spawn(command, env=dict(os.environ)))
        return started[-1].pid

    yield start
    for each in started:
        processes.end(each)


def test_a_worker_that_acknowledges_early_is_found_out(
    broker: Broker, client: Client, oracle: Oracle, worker: Callable[[str], int]
) -> None:
    jobs = client.publish_jobs(client.declare("jobs"), ["a", "b"])
    oracle.hold("a")
    pid = worker("early")
    until(lambda: "start a" in oracle.journal, "a runs")
    os.killpg(pid, signal.SIGKILL)
    worker("late")
    until(lambda: "finish b" in oracle.journal, "b is done")
    broker.await_depth("jobs")
    assert oracle.report(jobs).lost == {"a"}


def test_a_worker_that_runs_jobs_twice_is_found_out(
    broker: Broker, client: Client, oracle: Oracle, worker: Callable[[str], int]
) -> None:
    jobs = client.publish_jobs(client.declare("jobs"), ["a"])
    worker("twice")
    broker.await_depth("jobs")
    assert oracle.report(jobs).duplicates == {"a": 1}
