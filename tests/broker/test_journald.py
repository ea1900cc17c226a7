"""The system's journal is missing, killed, restarted or frozen: the daemon works on regardless."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.control import call
from tests.harness.daemon import Daemon
from tests.harness.journald import Journald
from tests.harness.tables import config
from tests.harness.waiting import until

Start = Callable[..., Daemon]

LOG = {"level": "info", "format": "journal"}


def test_without_a_journal_the_log_goes_to_stderr_until_there_is_one(
    broker: Broker, client: Client, daemon: Start, journald: Journald, tmp_path: Path
) -> None:
    command = journald.around(tmp_path / "workerd-1.toml")
    worker = daemon(config(broker.url, ["echo", "hello"], log=LOG), command=command)
    worker.wait_ready()

    def run(job: str) -> None:
        client.publish("jobs", message_id=job)
        broker.await_depth("jobs")

    def on_stderr(job: str) -> list[str]:
        return [line for line in worker.output if line.startswith("<6>done") and job in line]

    run("missing")
    until(lambda: on_stderr("missing"), "its line")
    journald.start()
    run("there")
    journald.wait("done", job_id="there")
    journald.crash()
    run("refused")
    until(lambda: on_stderr("refused"), "its line")
    journald.start()
    run("again")
    done = journald.wait("done", job_id="again")
    assert done["PRIORITY"] == "6"
    assert journald.find("output", job_id="again", text="hello")
    assert [entry["WORKERD_JOB_ID"] for entry in journald.find("done")] == ["there", "again"]
    assert worker.stop() == 0
    assert on_stderr("missing")
    assert on_stderr("refused")
    assert not on_stderr("there")
    assert not on_stderr("again")


def test_a_frozen_journal_holds_up_nothing_and_what_is_dropped_is_counted(
    broker: Broker, client: Client, daemon: Start, journald: Journald, tmp_path: Path
) -> None:
    # More than may wait: see BACKLOG of workerd/log.py.
    lines, count = 2_000, 12
    journald.start()
    worker = daemon(
        config(
            broker.url,
            ["seq", str(lines)],
            queues={"jobs": {"concurrency": 2}},
            log={**LOG, "output_lines": lines},
        ),
        command=journald.around(tmp_path / "workerd-1.toml"),
        env={"WATCHDOG_USEC": "3000000"},
    )
    worker.wait_ready()
    journald.wait("ready")

    journald.freeze()
    jobs = client.publish_jobs("jobs", map(str, range(count)))
    # They run, and are acknowledged.
    broker.await_depth("jobs")
    journald.thaw()
    journald.wait("log dropped")
    client.publish("jobs", message_id="last")
    journald.wait("done", job_id="last")

    came = sum(
        len(journald.find(event, job_id=job))
        for event, job in itertools.product(("start", "output", "done"), jobs)
    )
    dropped = sum(int(entry["WORKERD_RECORDS"]) for entry in journald.find("log dropped"))
    assert came + dropped == count * (lines + 2)
    assert call(worker, "metrics")["log_records_dropped"] == dropped

    def beats() -> list[float]:
        return [at for at, text in worker.notifications if text == "WATCHDOG=1"]

    until(lambda: len(beats()) >= 2, "two beats of the watchdog")
    assert max(b - a for a, b in itertools.pairwise(beats())) < 3
    assert worker.stop() == 0


def test_a_journal_that_stays_frozen_does_not_hold_up_a_stop(
    broker: Broker, client: Client, daemon: Start, journald: Journald, tmp_path: Path
) -> None:
    journald.start()
    worker = daemon(
        config(broker.url, ["seq", "1000"], log=LOG),
        command=journald.around(tmp_path / "workerd-1.toml"),
    )
    worker.wait_ready()
    journald.freeze()
    client.publish("jobs", message_id="one")
    broker.await_depth("jobs")
    assert worker.stop() == 0
