"""The run log's disk is full, read-only or damaged: jobs go on, and none is lost."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.processes import MissingTool
from tests.harness.tables import AGAIN, config
from tests.harness.waiting import until

Start = Callable[..., Daemon]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of the test's own, of four pages."""
    if os.geteuid() != 0:
        raise MissingTool("mounting needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    subprocess.run(mount, check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_a_warning_and_no_job_and_is_used_again_when_it_has_room(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, disk: Path
) -> None:
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 20))
    text = config(broker.url, oracle.command(), worker={"remember": "3s"})
    env = {"STATE_DIRECTORY": str(disk)}
    worker = daemon(text, "1", env=env)
    warning = worker.wait_event("run log not kept", level="warning")
    assert "No space" in warning["text"]
    worker.wait_event("consuming")
    jobs = client.publish_jobs("jobs", ["a", "b"])
    worker.wait_event("done", count=2)
    broker.await_depth("jobs")
    assert len(worker.events("run log not kept")) == 1
    worker.wait_notify(lambda text: "run log not kept: [Errno 28] No space" in text)

    # No job comes any more: the disk is tried by time.
    filler.unlink()
    worker.wait_event("run log kept")
    jobs += client.publish_jobs("jobs", ["c"])
    worker.wait_event("done", job_id="c")
    broker.await_depth("jobs")
    oracle.check(jobs)


def test_a_read_only_disk_costs_a_warning_and_no_job(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    text = config(broker.url, oracle.command(), worker={"remember": "3s"})
    env = {"STATE_DIRECTORY": str(disk)}
    worker = daemon(text, "1", env=env)
    assert "Read-only" in worker.wait_event("run log not kept", level="warning")["text"]
    worker.wait_event("consuming")
    oracle.hold("a")
    jobs = client.publish_jobs("jobs", ["a", "b"])
    worker.wait_event("done", job_id="b")
    broker.close_all_connections()
    worker.wait_event("rejoined", job_id="a")
    oracle.release()
    worker.wait_event("done", job_id="a")
    broker.await_depth("jobs")
    oracle.check(jobs)
    assert len(worker.events("run log not kept")) == 1

    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    worker.wait_event("run log kept")


def damage_with_garbage(journal: Path) -> None:
    journal.write_bytes(random.Random(1).randbytes(10_000))


def damage_by_truncation(journal: Path) -> None:
    os.truncate(journal, journal.stat().st_size - 7)


def damage_by_emptying(journal: Path) -> None:
    os.truncate(journal, 0)


@pytest.mark.parametrize("damage", [damage_with_garbage, damage_by_truncation, damage_by_emptying])
def test_a_damaged_run_log_keeps_nobody_from_starting_and_loses_no_job(
    broker: Broker,
    client: Client,
    daemon: Start,
    oracle: Oracle,
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    text = config(broker.url, oracle.command(), handler=AGAIN)
    worker = daemon(text, "1")
    worker.wait_event("consuming")
    oracle.hold("b")
    jobs = client.publish_jobs("jobs", ["a", "b"])
    worker.wait_event("done", job_id="a")
    until(lambda: "start b" in oracle.journal, "a job is running")
    worker.kill()
    damage(max((tmp_path / "state" / "1").iterdir()))
    oracle.release()

    workers = [daemon(text, instance) for instance in ("1", "2")]
    until(lambda: any(each.events("done", job_id="b") for each in workers), "the other job")
    broker.await_depth("jobs")
    for later in workers:
        later.wait_event("consuming")
    oracle.check(jobs, allowed_duplicates=2)
    assert not [event for later in workers for event in later.events("run log not kept")]
