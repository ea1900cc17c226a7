"""The watchdog is fed by the event loop itself: not while that hangs, whatever jobs do."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.tables import config, gated
from tests.harness.waiting import SCALE, until
from tests.harness.wire import Wire

Start = Callable[..., Daemon]


#: After so many seconds whatever was sent has been read, in the tests as well.
STALE = 0.1 * SCALE


def beats(worker: Daemon) -> list[float]:
    return [at for at, text in worker.notifications if text == "WATCHDOG=1"]


def test_the_watchdog_is_fed_at_a_third_of_its_patience(broker: Broker, daemon: Start) -> None:
    worker = daemon(config(broker.url, ["true"]), env={"WATCHDOG_USEC": "900000"})
    until(lambda: len(beats(worker)) >= 6, "six beats")
    first, *_, last = beats(worker)[:6]
    assert 0.25 < (last - first) / 5 < 0.6


def test_a_status_that_systemd_had_no_room_for_is_told_with_the_next_beat(
    broker: Broker, daemon: Start
) -> None:
    worker = daemon(config(broker.url, ["true"]), env={"WATCHDOG_USEC": "900000"})
    worker.wait_ready()

    def tellings() -> int:
        texts = [text for _, text in worker.notifications if text.startswith("STATUS=")]
        return texts.count(texts[-1]) if texts else 0

    # Nothing changes, and yet it is told.
    until(lambda: tellings() >= 3, "the same status three times")
    assert all(text for _, text in worker.notifications)


def test_the_watchdog_of_another_process_is_not_fed(broker: Broker, daemon: Start) -> None:
    environment = {"WATCHDOG_USEC": "900000", "WATCHDOG_PID": "1"}
    worker = daemon(config(broker.url, ["true"]), env=environment)
    worker.wait_ready()
    assert worker.stop() == 0
    assert not beats(worker)


def test_the_watchdog_is_not_fed_while_the_event_loop_hangs(
    broker: Broker, wire: Wire, daemon: Start, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("guest")
    worker = daemon(
        config(
            wire.url.replace("guest:guest@", "guest@"),
            ["true"],
            broker={"password_file": str(password)},
        ),
        env={"WATCHDOG_USEC": "600000"},
    )
    worker.wait_ready()
    until(lambda: beats(worker), "the first beat")

    # A file on a file system that hangs: reading the password for the next login takes for ever.
    password.unlink()
    os.mkfifo(password, 0o600)
    wire.break_connections()
    writer = until(lambda: open_for_writing(password), "the daemon reads the password")
    assert writer is not None
    password.unlink()
    password.touch(0o600)
    password.write_text("guest")
    silent_from = time.monotonic()
    with pytest.raises(AssertionError, match="beat"):
        until(lambda: beats(worker)[-1] > silent_from + STALE, "a beat", timeout=1.2)

    mark = worker.mark()
    os.write(writer, b"guest")
    os.close(writer)
    worker.wait_event("connected", since=mark)
    resumed = time.monotonic()
    until(lambda: beats(worker)[-1] > resumed, "another beat")


def open_for_writing(fifo: Path) -> int | None:
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_the_watchdog_is_not_fed_while_the_daemon_is_stopped_and_is_once_it_goes_on(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = daemon(config(broker.url, gated(gate, ["true"])), env={"WATCHDOG_USEC": "600000"})
    worker.wait_ready()
    client.publish("jobs", message_id="one")
    worker.wait_event("start")
    until(lambda: beats(worker), "the first beat")

    worker.signal(signal.SIGSTOP)
    until(lambda: state_of(worker) == "T", "it is stopped")
    silent_from = time.monotonic()
    with pytest.raises(AssertionError, match="beat"):
        until(lambda: beats(worker)[-1] > silent_from + STALE, "a beat", timeout=1.2)

    resumed = time.monotonic()
    worker.signal(signal.SIGCONT)
    until(lambda: beats(worker)[-1] > resumed, "another beat")
    gate.touch()
    worker.wait_event("done", job_id="one")
    assert not worker.events("disconnected")


def state_of(worker: Daemon) -> str:
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_the_watchdog_is_fed_while_jobs_flood_their_output_and_swallow_their_input(
    broker: Broker, client: Client, daemon: Start
) -> None:
    flood = "head -c 30000000 /dev/zero >&2 & yes | head -c 30000000; cat >/dev/null; wait"
    limit = 3.0
    worker = daemon(
        config(
            broker.url,
            ["sh", "-c", flood],
            handler={"max_body": "8MiB"},
            queues={"jobs": {"concurrency": 2}},
        ),
        env={"WATCHDOG_USEC": str(int(limit * 1_000_000))},
    )
    worker.wait_ready()
    until(lambda: beats(worker), "the first beat")
    for number in range(4):
        client.publish("jobs", os.urandom(5_000_000), message_id=str(number))
    worker.wait_event("done", count=4)
    ended = time.monotonic()
    until(lambda: beats(worker)[-1] > ended, "a beat after the end")
    assert max(b - a for a, b in itertools.pairwise(beats(worker))) < limit
