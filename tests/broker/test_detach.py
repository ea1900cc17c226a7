"""`workerd run --detach`: a daemon of its own, for hosts without systemd."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.tables import config
from tests.harness.waiting import until

Start = Callable[..., Daemon]


class Detached:
    """A daemon that went to the background, known by its files alone."""

    def __init__(self, folder: Path) -> None:
        self.pidfile = folder / "workerd.pid"
        self.log_file = folder / "workerd.log"
        self.command = [sys.executable, "-m", "workerd", "run", "--detach"]
        self.command += ["--config", str(folder / "workerd-1.toml")]
        self.command += ["--pidfile", str(self.pidfile), "--log-file", str(self.log_file)]

    @property
    def pid(self) -> int:
        return int(self.pidfile.read_text())

    def wrote(self, pid: int) -> bool:
        return self.pidfile.is_file() and self.pidfile.read_text() == f"{pid}\n"

    def events(self, name: str) -> list[dict[str, Any]]:
        text = self.log_file.read_text() if self.log_file.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == name]

    def await_event(self, name: str) -> None:
        until(lambda: self.events(name), f"event {name!r} in the log file")


@pytest.fixture
def detached(tmp_path: Path) -> Iterator[Detached]:
    detached = Detached(tmp_path)
    yield detached
    # Only a test that failed leaves one.
    processes.kill_trees([pid for pid in processes.strays() if detached.wrote(pid)])


def wait(pid: int) -> int:
    """The exit status of a process whose parents are gone: it is ours to wait for."""
    status: list[int] = []

    def ended() -> bool:
        done, word = os.waitpid(pid, os.WNOHANG)
        status.append(word)
        return done == pid

    until(ended, f"the end of process {pid}")
    return os.waitstatus_to_exitcode(status[-1])


def test_a_detached_daemon_works_is_known_by_its_pidfile_and_stops(
    broker: Broker, client: Client, daemon: Start, detached: Detached
) -> None:
    detached.log_file.write_text("a line of its predecessor\n")
    text = config(broker.url, ["sh", "-c", "umask"])
    foreground = daemon(text, command=detached.command)
    assert foreground.wait_exit() == 0
    assert foreground.output == []
    detached.await_event("ready")

    pid = detached.pid
    assert detached.pidfile.read_text() == f"{pid}\n"
    assert detached.events("starting")[0]["pid"] == pid
    assert os.getsid(pid) not in (os.getsid(0), foreground.pid)
    assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    assert os.readlink(f"/proc/{pid}/fd/2") == str(detached.log_file)

    client.publish("jobs")
    detached.await_event("done")
    ours = os.umask(0o077)
    os.umask(ours)
    assert int(detached.events("output")[0]["text"], 8) == ours, "a job has another umask"
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 0
    assert detached.events("drained")
    assert detached.log_file.read_text().startswith("a line of its predecessor\n")
    assert not detached.pidfile.exists(), "its number may soon be another's"


def test_a_log_file_that_is_rotated_is_opened_anew_on_a_hang_up(
    broker: Broker, client: Client, daemon: Start, detached: Detached
) -> None:
    """A file opened once would be written for months after its deletion."""
    assert daemon(config(broker.url, ["true"]), command=detached.command).wait_exit() == 0
    detached.await_event("ready")
    pid = detached.pid
    rotated = detached.log_file.rename(detached.log_file.with_suffix(".1"))
    os.kill(pid, signal.SIGHUP)
    detached.await_event("reloaded")
    client.publish("jobs")
    detached.await_event("done")
    assert "ready" in rotated.read_text()
    assert os.readlink(f"/proc/{pid}/fd/1") == os.readlink(f"/proc/{pid}/fd/2")

    # What cannot be opened is told in the old one.
    newer = detached.log_file.rename(detached.log_file.with_suffix(".2"))
    detached.log_file.mkdir()
    os.kill(pid, signal.SIGHUP)
    until(lambda: newer.read_text().count('"reloaded"') == 2, "the second reload")
    assert '"log not reopened"' in newer.read_text()
    assert "Is a directory" in newer.read_text()
    detached.log_file.rmdir()
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 0


def test_a_detached_daemon_holds_the_name_of_its_instance(
    broker: Broker, daemon: Start, detached: Detached
) -> None:
    text = config(broker.url, ["true"])
    assert daemon(text, command=detached.command).wait_exit() == 0
    detached.await_event("ready")
    second = daemon(text, command=detached.command)
    assert second.wait_exit() == 78
    assert "already running" in "\n".join(second.output)
    pid = detached.pid
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 0


@pytest.mark.parametrize("mistake", ["drain_timeout", "pidfile", "log_file"])
def test_what_is_wrong_before_detaching_is_told_in_the_foreground(
    daemon: Start, detached: Detached, mistake: str
) -> None:
    if mistake == "drain_timeout":
        text = config("amqp://localhost", ["true"], worker={"drain_timeout": "soon"})
    else:
        text = config("amqp://localhost", ["true"])
        getattr(detached, mistake).mkdir()
    foreground = daemon(text, command=detached.command)
    assert foreground.wait_exit() == 78
    expected = "drain_timeout" if mistake == "drain_timeout" else "Is a directory"
    assert expected in "\n".join(foreground.output)
