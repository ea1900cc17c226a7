"""`submit --lines` and `--jsonl`: each line a job, and exact about those that did not arrive."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.programs import SUBMIT, Program, Result, run
from tests.harness.waiting import SCALE, TIMEOUT, until

Start = Callable[..., Program]

CONFIG = """
[broker]
urls = ["{url}"]

[queues.default]

[handlers.sleep]
command = ["sleep", "{{body}}"]
max_body = "1KiB"
"""


@pytest.fixture
def submit(broker: Broker, tmp_path: Path) -> list[str]:
    """The beginning of a command line, for a broker where the queue default exists."""
    with Client(broker.url) as client:
        client.declare("default", x_queue_type="quorum")
    file = tmp_path / "workerd.toml"
    file.write_text(CONFIG.format(url=broker.url))
    return [*SUBMIT, "--config", str(file), "sleep"]


def numbered(count: int) -> list[str]:
    return [f"job {number}" for number in range(1, count + 1)]


def text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def fetch(client: Client, queue: str, count: int) -> dict[str, str]:
    """Take so many messages off a queue, quickly: their bodies by id. No id may come twice."""
    bodies: dict[str, str] = {}

    def take(_channel: object, _method: object, properties: object, body: bytes) -> None:
        message_id = properties.message_id  # type: ignore[attr-defined]
        assert message_id not in bodies
        bodies[message_id] = body.decode()

    def enough() -> bool:
        client.connection.process_data_events(0.1)
        return len(bodies) >= count

    client.channel.basic_consume(queue, take, auto_ack=True)
    until(enough, f"{count} messages from {queue}")
    assert len(bodies) == count
    return bodies


def resent(result: Result, lines: list[str]) -> list[str]:
    """What the command that was printed at the end makes of the input."""
    command = result.stderr.splitlines()[-1].removeprefix("submit: ")
    assert re.fullmatch(r"sed -n '[0-9,;p$]+'.*", command), result.stderr
    return run(["sh", "-c", command], text(lines)).stdout.splitlines()


def test_twenty_thousand_lines_are_confirmed_with_their_ids_in_the_order_of_the_input(
    submit: list[str], client: Client
) -> None:
    lines = numbered(20_000)
    result = run([*submit, "--lines"], text(lines))
    assert (result.status, result.stderr) == (0, "")
    ids = result.stdout.splitlines()
    bodies = fetch(client, "default", len(lines))
    # One by one: pytest would compare twenty thousand lines for minutes.
    for job_id, line in zip(ids, lines, strict=True):
        assert bodies[job_id] == line


def test_every_line_is_a_job_the_empty_and_the_unfinished_one_too(
    submit: list[str], client: Client
) -> None:
    result = run([*submit, "--lines"], b"one\n\n three \r\nlast")
    bodies = fetch(client, "default", 4)
    ids = result.stdout.splitlines()
    assert [bodies[job_id] for job_id in ids] == ["one", "", " three \r", "last"]
    assert run([*submit, "--lines"], b"").status == 0
    assert client.ready("default") == 0


def test_lines_of_json_are_checked_and_marked_as_json(submit: list[str], client: Client) -> None:
    lines = ['{"a": 1}', '{"a": ', "2", "[" * 100_000, "x" * 1025, '"last"']
    result = run([*submit, "--jsonl"], text(lines))
    assert result.status == 65
    assert [message.body.decode() for message in client.look("default")] == [
        lines[number] for number in (0, 2, 5)
    ]
    assert {m.properties.content_type for m in client.drain("default")} == {"application/json"}
    assert len(result.stdout.splitlines()) == 3
    named = re.findall(r"^submit: line (\d+): (.*)$", result.stderr, re.MULTILINE)
    assert [number for number, _ in named] == ["2", "4", "5"]
    assert named[0][1].startswith("not JSON: ")
    assert named[2][1] == "the body is larger than 1024 bytes, the handler's max_body"
    assert resent(result, lines) == [lines[number] for number in (1, 3, 4)]


def test_a_line_without_end_is_refused_without_being_held_in_memory(
    submit: list[str], client: Client
) -> None:
    script = 'ulimit -v 400000; { head -c 500000000 /dev/zero; echo; echo next; } | "$@"'
    result = run(["sh", "-c", script, "sh", *submit, "--lines"])
    assert result.status == 65
    assert result.stderr.startswith("submit: line 1: the body is larger than 1024 bytes")
    assert [message.body for message in client.drain("default")] == [b"next"]


# Failures in the middle


def test_a_queue_that_gets_full_is_told_with_exactly_the_lines_that_did_not_fit(
    submit: list[str], client: Client
) -> None:
    client.declare("small", x_queue_type="quorum", x_max_length=500, x_overflow="reject-publish")
    lines = numbered(3000)
    result = run([*submit, "--lines", "--queue", "small"], text(lines))
    assert result.status == 75
    assert "the broker refused it: small is full" in result.stderr
    ids = result.stdout.splitlines()
    assert len(ids) >= 500
    bodies = fetch(client, "small", len(ids))
    rest = resent(result, lines)
    arrived = [bodies[job_id] for job_id in ids]
    assert arrived == [line for line in lines if line not in set(rest)]
    assert sorted(arrived + rest) == sorted(lines)


def test_lines_that_arrive_although_one_before_them_did_not_are_not_sent_again(
    submit: list[str], client: Client, tmp_path: Path
) -> None:
    # There is room for the small ones, and all are published before the first confirm comes.
    client.declare("small", x_max_length_bytes=500, x_overflow="reject-publish")
    lines = [*numbered(9), "x" * 501, *numbered(9)]
    file = tmp_path / "lines"
    file.write_bytes(text(lines))
    result = run([*submit, "--lines", "--queue", "small", "--file", str(file)])
    assert result.status == 75
    ids = result.stdout.splitlines()
    bodies = fetch(client, "small", 18)
    assert [bodies[job_id] for job_id in ids] == numbered(9) * 2
    assert resent(result, lines) == ["x" * 501]


def test_a_broker_killed_in_the_middle_leaves_exactly_the_unconfirmed_lines_to_send_again(
    broker: Broker, submit: list[str], program: Start
) -> None:
    lines = numbered(3000)
    job = program(*submit, "--lines")
    job.write(text(lines[:1000]))
    ids = job.wait_lines(1000)
    # What is published from here on is in flight when the broker dies.
    broker.settle()
    broker.freeze()
    job.write(text(lines[1000:1100]))
    broker.kill()
    job.close_input()
    result = job.wait()
    assert result.status == 69
    assert result.stdout.splitlines() == ids
    assert resent(result, lines) == lines[1000:]
    broker.start()
    with Client(broker.url) as client:
        bodies = fetch(client, "default", 1000)
    assert [bodies[job_id] for job_id in ids] == lines[:1000]


@pytest.mark.parametrize(
    ("number", "status"), [(None, 69), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_broker_that_hangs_in_the_middle_is_waited_for_until_the_timeout_or_a_signal(
    broker: Broker,
    submit: list[str],
    program: Start,
    number: signal.Signals | None,
    status: int,
) -> None:
    lines = numbered(5)
    # Whoever runs the tests in the background has made them ignore SIGINT.
    command = ["env", "--default-signal=INT", *submit]
    timeout = 2 * TIMEOUT if number else SCALE
    job = program(*command, "--lines", "--timeout", f"{timeout:g}s")
    job.write(text(lines[:2]))
    ids = job.wait_lines(2)
    broker.freeze()
    job.write(text(lines[2:4]))
    if number:
        until(lambda: not job.unread(), "the last lines are read")
        job.signal(number)
    result = job.wait()
    broker.thaw()
    assert result.status == status
    assert result.stdout.splitlines() == ids
    assert resent(result, lines) == lines[2:]


def test_a_signal_that_was_to_be_ignored_is_ignored(submit: list[str], program: Start) -> None:
    job = program("env", "--ignore-signal=HUP", *submit, "--lines")
    job.write(b"1\n")
    job.wait_lines(1)
    job.signal(signal.SIGHUP)
    job.write(b"2\n")
    job.wait_lines(2)
    job.close_input()
    assert job.wait().status == 0


def test_a_failure_is_told_while_the_producer_keeps_the_input_open(
    submit: list[str], program: Start
) -> None:
    job = program(*submit, "--lines", "--queue", "nowhere")
    job.write(b"job 1\n")
    result = job.wait()
    assert result.status == 73
    assert "no queue 'nowhere'" in result.stderr
    assert resent(result, numbered(3)) == numbered(3)


def test_an_output_that_nobody_reads_any_more_ends_it_with_the_lines_that_were_not_confirmed(
    submit: list[str], client: Client, tmp_path: Path
) -> None:
    lines = numbered(3000)
    file = tmp_path / "the jobs"
    file.write_bytes(text(lines))
    script = '{ "$@"; echo $? >&3; } 3>&2 | head -1'
    command = [*submit, "--lines", "--file", str(file)]
    result = run(["sh", "-c", script, "sh", *command])
    *_, command_line, status = result.stderr.splitlines()
    assert status == "74"
    rest = run(["sh", "-c", command_line.removeprefix("submit: ")]).stdout.splitlines()
    assert sorted([*fetch(client, "default", 3000 - len(rest)).values(), *rest]) == sorted(lines)


# A slow producer


def test_a_slow_producers_lines_are_sent_and_their_ids_printed_as_they_come(
    submit: list[str], client: Client, program: Start
) -> None:
    job = program(*submit, "--lines")
    for count, line in enumerate(numbered(3), start=1):
        job.write(f"{line}\n".encode())
        ids = job.wait_lines(count)
        (message,) = client.take("default")
        assert (message.id, message.body.decode()) == (ids[-1], line)
    job.close_input()
    assert job.wait().status == 0


def test_a_broker_that_restarts_while_nothing_is_in_flight_does_no_harm(
    broker: Broker, submit: list[str], program: Start
) -> None:
    job = program(*submit, "--lines")
    job.write(b"job 1\n")
    job.wait_lines(1)
    broker.restart()
    job.write(b"job 2\n")
    job.wait_lines(2)
    job.close_input()
    result = job.wait()
    assert (result.status, result.stderr) == (0, "")
    with Client(broker.url) as client:
        bodies = fetch(client, "default", 2)
    assert [bodies[job_id] for job_id in result.stdout.splitlines()] == ["job 1", "job 2"]
