"""Memory pressure: fewer jobs at once while the kernel stalls those that run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.oracle import Oracle
from tests.harness.processes import MissingTool
from tests.harness.tables import config
from workerd.worker.memory_pressure import MemoryPressure, own_file

Start = Callable[..., Daemon]


def told(percent: float) -> str:
    """What the kernel writes there."""
    return (
        f"some avg10={percent:.2f} avg60=1.00 avg300=0.50 total=12345\n"
        f"full avg10={percent / 2:.2f} avg60=0.00 avg300=0.00 total=678\n"
    )


def test_it_is_short_from_a_tenth_of_the_time_on_until_that_is_halved(tmp_path: Path) -> None:
    file = tmp_path / "memory.pressure"
    pressure = MemoryPressure(file)
    seen = []
    for percent in (0, 9.99, 10, 6, 5, 4.99, 9.99, 100):
        file.write_text(told(percent))
        seen.append((pressure.look(), pressure.short))
    assert seen == [
        (False, False),
        (False, False),
        (True, True),
        (False, True),
        (False, True),
        (True, False),
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize("content", ["", "nonsense", "full avg10=99.00"])
def test_what_the_kernel_does_not_tell_is_no_pressure(tmp_path: Path, content: str) -> None:
    file = tmp_path / "memory.pressure"
    file.write_text(content)
    assert not MemoryPressure(file).look()
    assert not MemoryPressure(tmp_path / "missing").look()
    assert not MemoryPressure(None).look()


def test_the_file_is_the_kernels_own_where_there_is_one() -> None:
    file = own_file()
    assert file is None or file.read_text().startswith("some avg10=")


def test_under_memory_pressure_one_job_is_started_at_a_time(
    broker: Broker, client: Client, daemon: Start, oracle: Oracle, tmp_path: Path
) -> None:
    if not shutil.which("unshare"):
        raise MissingTool("unshare")
    # In place of the kernel's: a real limit of memory is beyond a machine of the tests.
    files = tmp_path / "cgroup"
    files.mkdir()
    file = files / "memory.pressure"
    file.write_text(told(50))
    text = config(broker.url, oracle.command())
    start = (
        f"mount --bind {files} /sys/fs/cgroup && exec {sys.executable} -m workerd run --config $0"
    )
    command = ["unshare", "--mount", "sh", "-c", start, tmp_path / "workerd-1.toml"]
    worker = daemon(text, command=command)
    worker.wait_event("consuming", queue="jobs.due")
    oracle.hold("a", "b", "c")
    client.publish("jobs", message_id="a")
    worker.wait_event("memory short")
    worker.wait_notify(lambda text: "short of memory: one job at a time" in text)
    client.publish_jobs("jobs", ["b", "c"])
    client.await_ready("jobs", 0)
    oracle.release("a")
    worker.wait_event("start", job_id="b")
    file.write_text(told(1))
    worker.wait_event("memory enough")
    worker.wait_event("start", job_id="c")
    told_of = ("start", "done", "memory enough")
    lives = [entry for entry in worker.events() if entry["event"] in told_of]
    assert [(entry["event"], entry.get("job_id")) for entry in lives] == [
        ("start", "a"),
        ("done", "a"),
        ("start", "b"),
        ("memory enough", None),
        # Beside b, which is still running.
        ("start", "c"),
    ]
