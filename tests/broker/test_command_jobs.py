"""Command handlers in the running daemon: its log, dead letters, and what goes on besides."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness import processes
from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon
from tests.harness.waiting import SCALE, until
from workerd import log_formats

Start = Callable[..., Daemon]


def configuration(broker: Broker, concurrency: int = 4, **handlers: Mapping[str, Any]) -> str:
    """Handlers of one queue; each is a table of TOML, whose values are written as JSON."""
    lines = [f'[broker]\nurls = ["{broker.url}"]\n[queues.work]\nconcurrency = {concurrency}']
    for name, options in handlers.items():
        lines += [f"[handlers.{name}]", 'queue = "work"', "retry.attempts = 1"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    return "\n".join(lines)


def shell(script: str, *arguments: str, **options: Any) -> Mapping[str, Any]:
    """A handler that runs a script with these arguments."""
    return {"command": ["sh", "-c", script, "sh", *arguments], **options}


def assert_all_settled(workerd: Daemon, broker: Broker) -> None:
    """Stop the daemon: what it has not acknowledged would be back in the queue."""
    assert workerd.stop() == 0
    broker.await_depth("work")


# What a job gets from the daemon


def test_a_job_gets_neither_the_daemons_secrets_nor_what_its_starter_left_open(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    private = {
        "WATCHDOG_USEC": "60000000",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "JOURNAL_STREAM": "8:1",
        "INVOCATION_ID": "a1b2",
        "CREDENTIALS_DIRECTORY": str(tmp_path),
        "LOGS_DIRECTORY": str(tmp_path),
        "WORKERD_BROKER_URL": broker.url,
    }
    # Some shells and supervisors leave files open, signals blocked and SIGCHLD ignored.
    starter = "import os, signal, sys\n"
    starter += "os.dup2(os.open('/dev/null', os.O_RDONLY), 77)\n"
    starter += "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    starter += "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])\n"
    starter += "os.execv(sys.executable, [sys.executable, '-m', 'workerd', 'run', *sys.argv[1:]])"
    script = f"env -0 >{tmp_path}/environment; ls /proc/self/fd; grep '^Sig[BI]' /proc/self/status"
    config = tmp_path / "workerd-1.toml"
    workerd = daemon(
        configuration(broker, job=shell(script)),
        command=[sys.executable, "-c", starter, "--config", config],
        env={**private, "MINE": "kept"},
    )
    workerd.wait_event("consuming")
    client.publish("work", type="job", message_id="7")
    workerd.wait_event("done")
    assert workerd.stop() == 0
    lines = [event["text"] for event in workerd.events("output")]
    assert lines[:-2] == ["0", "1", "2", "3", "4"]
    assert int(lines[-2].split()[1], 16) == 0
    assert int(lines[-1].split()[1], 16) & (1 << signal.SIGCHLD - 1) == 0
    found = (tmp_path / "environment").read_text().split("\0")
    assert {"MINE=kept", "WORKERD_JOB_ID=7", "WORKERD_JOB_TYPE=job"} <= set(found)
    names = {variable.partition("=")[0] for variable in found}
    assert names & {*private, "NOTIFY_SOCKET", "RUNTIME_DIRECTORY", "STATE_DIRECTORY"} == set()


# How its end is told


def test_a_dead_letter_says_how_the_job_ended(
    broker: Broker, client: Client, daemon: Start
) -> None:
    soon = f"{SCALE / 4:g}s"
    workerd = daemon(
        configuration(
            broker,
            status=shell("echo 'went wrong' >&2; exit 3"),
            killed=shell("kill -SEGV $$"),
            late=shell("trap '' TERM; sleep 60 & wait; wait", timeout=soon, kill_grace="100ms"),
            dead=shell("exit 65"),
        )
    )
    workerd.wait_event("consuming")
    expected = {
        "status": ("exit-status", 3, None, "went wrong"),
        "killed": ("signal", None, "SIGSEGV", None),
        "late": ("timeout", None, "SIGKILL", None),
        "dead": ("exit-status", 65, None, None),
    }
    for kind in expected:
        client.publish("work", type=kind, message_id=kind)
    letters = client.take("work.dead", len(expected))
    fields = ("reason", "exit-status", "signal", "error")
    assert {
        letter.id: tuple(letter.headers.get(f"x-workerd-{field}") for field in fields)
        for letter in letters
    } == expected


def test_a_temporary_failure_is_no_warning(broker: Broker, client: Client, daemon: Start) -> None:
    workerd = daemon(configuration(broker, job=shell('exit "$1"', "{body}")))
    workerd.wait_event("consuming")
    client.publish("work", b"75", type="job")
    client.publish("work", b"1", type="job")
    assert workerd.wait_event("failed", exit_status=75)["level"] == "info"
    assert workerd.wait_event("failed", exit_status=1)["level"] == "warning"


def test_a_job_that_no_program_can_be_given_is_a_dead_letter_at_once(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(
        configuration(
            broker,
            concurrency=1,
            body={"command": ["echo", "{body}"]},
            key={"command": ["echo", "{body.k}"]},
            header={"command": ["echo", "{header.h}"]},
        )
    )
    workerd.wait_event("consuming")
    bad = {
        "long": ("body", b"x" * 200_000, "too-large"),
        "nul": ("body", b"a\0b", "bad-argument"),
        "option": ("body", b"--help", "bad-argument"),
        "no-key": ("key", b"{}", "bad-body"),
        "no-json": ("key", b"\xff", "bad-body"),
        "no-header": ("header", b"", "bad-header"),
    }
    for name, (kind, body, _) in bad.items():
        client.publish("work", body, type=kind, message_id=name)
    client.publish("work", b"fine", type="body", message_id="last")
    workerd.wait_event("done", job_id="last")
    letters = {letter.id: letter for letter in client.take("work.dead", len(bad))}
    for name, (_, body, reason) in bad.items():
        assert letters[name].headers["x-workerd-reason"] == reason
        assert letters[name].headers["x-workerd-error"]
        assert letters[name].body == body
    assert_all_settled(workerd, broker)
    assert [event["text"] for event in workerd.events("output")] == ["fine"]


def test_a_large_body_reaches_the_job_or_is_left_unread(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(
        configuration(
            broker,
            reads=shell("wc -c", max_body="16MiB"),
            closes=shell("exec <&-; sleep 0.1; echo closed", max_body="16MiB"),
            ignores=shell("sleep 60", max_body="16MiB", timeout="200ms"),
        )
    )
    workerd.wait_event("consuming")
    for kind in ("reads", "closes", "ignores"):
        client.publish("work", bytes(10_000_000), type=kind)
    workerd.wait_event("output", text="10000000")
    workerd.wait_event("done", job_type="reads")
    workerd.wait_event("output", text="closed")
    workerd.wait_event("done", job_type="closes")
    workerd.wait_event("failed", job_type="ignores", reason="timeout")
    assert len(client.take("work.dead")[0].body) == 10_000_000


def test_headers_almost_too_large_for_a_frame_do_no_harm(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(
        configuration(broker, job=shell('echo "${{#1}}"; exit "$2"', "{header.h}", "{body}"))
    )
    workerd.wait_event("consuming")
    for body in (b"0", b"1"):
        client.publish("work", body, type="job", message_id="big", headers={"h": "x" * 120_000})
    workerd.wait_event("done")
    workerd.wait_event("output", text="120000", count=2)
    # Its dead letter carries facts of its own as well, and must fit a frame too.
    (letter,) = client.take("work.dead")
    assert letter.headers["x-workerd-reason"] == "exit-status"
    assert not workerd.events("disconnected")


# What goes on besides


def test_a_slow_job_holds_up_neither_the_loop_nor_other_jobs(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    workerd = daemon(
        configuration(
            broker,
            concurrency=2,
            slow=shell(f"until [ -e {flag} ]; do sleep 0.02; done"),
            quick={"command": ["touch", str(flag)]},
            other={"command": ["true"]},
        ),
        env={"WATCHDOG_USEC": "300000"},
    )
    workerd.wait_event("consuming")
    # It takes no notice of a large body either.
    client.publish("work", bytes(500_000), type="slow")
    workerd.wait_event("start", job_type="slow")
    client.publish("work", type="other")
    workerd.wait_event("done", job_type="other")
    beats = len(workerd.notifications)

    def beating() -> bool:
        later = workerd.notifications[beats:]
        return sum("WATCHDOG=1" in text for _, text in later) >= 3

    until(beating, "three beats of the watchdog while the job runs")
    assert not workerd.events("done", job_type="slow")
    client.publish("work", type="quick")
    workerd.wait_event("done", job_type="slow")


def test_a_daemonised_grandchild_does_not_hold_up_the_settlement(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    # It has inherited the job's standard output and error.
    script = f"""
    setsid sh -c 'echo $$ >{tmp_path}/pid; exec sleep 600' &
    until [ -s {tmp_path}/pid ]; do sleep 0.01; done
    """
    workerd = daemon(configuration(broker, job=shell(script)))
    workerd.wait_event("consuming")
    client.publish("work", type="job")
    workerd.wait_event("done")
    assert_all_settled(workerd, broker)
    pid = int((tmp_path / "pid").read_text())
    assert not processes.has_ended(pid, 0)
    os.kill(pid, signal.SIGKILL)


def test_a_missing_program_holds_up_only_its_own_jobs_until_it_is_back(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    workerd = daemon(
        configuration(broker, job={"command": [str(program)]}, other={"command": ["true"]})
    )
    workerd.wait_event("consuming")
    client.publish("work", type="job", message_id="patient")
    told = workerd.wait_event("handler paused", job_id="patient")
    assert (told["level"], told["reason"]) == ("error", "cannot-run")
    assert told["error"] == f"cannot run {program}: No such file or directory"
    client.publish("work", type="other")
    workerd.wait_event("done", job_type="other")
    # The same trouble is told once, another one again.
    program.write_text("#!/bin/sh\necho here\n")
    workerd.wait_event("handler paused", error=f"cannot run {program}: Permission denied")
    program.chmod(0o755)
    workerd.wait_event("done", job_id="patient", attempt=1)
    assert_all_settled(workerd, broker)
    assert client.ready("work.dead") == 0
    assert len(workerd.events("start", job_id="patient")) == 1


def test_without_descriptors_a_job_waits_for_better_times(
    broker: Broker, client: Client, daemon: Start
) -> None:
    workerd = daemon(configuration(broker, job={"command": ["true"]}))
    workerd.wait_event("consuming")
    client.publish("work", type="job", message_id="before")
    workerd.wait_event("done")
    until(lambda: len(workerd.children()) == 1, "only the guardian is left")
    highest = max(map(int, os.listdir(f"/proc/{workerd.pid}/fd")))
    before = resource.prlimit(workerd.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(workerd.pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    client.publish("work", type="job", message_id="poor")
    told = workerd.wait_event("handler paused", job_id="poor")
    assert told["error"] == "cannot run true: Too many open files"
    resource.prlimit(workerd.pid, resource.RLIMIT_NOFILE, before)
    workerd.wait_event("done", job_id="poor", attempt=1)
    assert_all_settled(workerd, broker)
    assert client.ready("work.dead") == 0


# What cannot be forged


HOSTILE = [
    'x\n{"event": "forged", "level": "info"}\n',
    "x\r\nforged\x1b[2K\x1b]0;title\x07",
    "%s %(forged)s %n {0} {forged}",
    "$(touch forged) `touch forged` ; touch forged #",
    "' \" \\ \t | & < >",
    "\u2028forged\u202e\x85\x9b",
    "../../forged",
    "é" * 127 + "x",  # 255 bytes
]


def test_no_id_type_or_header_can_forge_a_line_of_the_log_or_reach_a_shell(
    broker: Broker, client: Client, daemon: Start, tmp_path: Path
) -> None:
    script = 'printf "%s" "$WORKERD_JOB_ID" "$1" "$2" "$WORKERD_HEADER_H" "$WORKERD_CONTENT_TYPE"'
    workerd = daemon(
        configuration(broker, job=shell(f"{script} | sha256sum", "x{id}", "x{header.h}")),
        cwd=tmp_path,
    )
    workerd.wait_event("consuming")
    for text in HOSTILE:
        client.publish(
            "work", type="job", message_id=text, headers={"h": text, text: "x"}, content_type=text
        )
        client.publish("work", type=text, message_id=f"type {HOSTILE.index(text)}")
    for text in HOSTILE:
        workerd.wait_event("done", job_id=text)
    letters = client.take("work.dead", len(HOSTILE))
    assert {letter.properties.type for letter in letters} == set(HOSTILE)
    assert {letter.headers["x-workerd-reason"] for letter in letters} == {"unknown-type"}
    workerd.signal(signal.SIGUSR1)
    workerd.wait_event("state")
    assert workerd.stop() == 0
    # Every line is an event of the daemon's own, and no shell made a file.
    assert len(workerd.log) == len(workerd.output)
    assert not workerd.events("forged")
    assert [path.name for path in tmp_path.rglob("forged*")] == []
    # Byte for byte, that is what each job has been given.
    for text in HOSTILE:
        (printed,) = workerd.events("output", job_id=text)
        assert printed["text"] == f"{digest(text, 'x' + text, 'x' + text, text, text)}  -"


def digest(*texts: str) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()


# The daemon's socket to the journal is never closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("text", HOSTILE)
def test_no_id_can_forge_a_field_or_a_line_in_any_format(text: str, tmp_path: Path) -> None:
    record = (0.0, "warning", "failed", {"job_id": text, "job_type": text, "error": text})
    output = (
        0.0,
        "info",
        "output",
        {"job_id": text, "stream": "stdout", "text": log_formats.safe(text)},
    )
    for write in (log_formats.console, log_formats.prefixed, log_formats.json_lines):
        for entry in (record, output):
            (tmp_path / "log").write_bytes(b"")
            with (tmp_path / "log").open("wb") as file:
                write(file.fileno())(entry)
            written = (tmp_path / "log").read_bytes().decode()
            assert written.endswith("\n")
            assert len(written[:-1].splitlines()) == 1
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", written)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(tmp_path / "journald"))
        log_formats.journal(str(tmp_path / "journald"), log_formats.console(2))(record)
        fields = parse_journal(journald.recv(1 << 20))
    assert fields == {
        "MESSAGE": log_formats._plain(record),
        "MESSAGE_ID": log_formats.message_id("failed"),
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "workerd",
        "WORKERD_EVENT": "failed",
        "WORKERD_JOB_ID": text,
        "WORKERD_JOB_TYPE": text,
        "WORKERD_ERROR": text,
    }


def parse_journal(datagram: bytes) -> dict[str, str]:
    """The fields of an entry in the journal's native protocol, as journald reads them."""
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(datagram[:8], "little")
            value, datagram = datagram[8 : 8 + size], datagram[8 + size + 1 :]
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


def test_what_a_job_prints_stays_lines_of_its_own_whatever_it_is(
    broker: Broker, client: Client, daemon: Start
) -> None:
    printed = b'\xff\0\x1b[31mred\n{"event": "forged"}\r\n<0>forged\n\xc3\x28\xe2\x80\xa8end'
    workerd = daemon(configuration(broker, job=shell("cat; exit 1"), err=shell("cat >&2; exit 1")))
    workerd.wait_event("consuming")
    client.publish("work", printed, type="job", message_id="job")
    client.publish("work", printed, type="err", message_id="err")
    letters = {letter.id: letter for letter in client.take("work.dead", 2)}
    workerd.wait_event("dead letter", count=2)
    lines = ["\\xff\\x00\\x1b[31mred", '{"event": "forged"}', "<0>forged", "\\xc3(\\u2028end"]
    for stream, name in (("stdout", "job"), ("stderr", "err")):
        events = workerd.events("output", job_id=name)
        assert [event["text"] for event in events] == lines
        assert {event["stream"] for event in events} == {stream}
    error = letters["err"].headers["x-workerd-error"]
    assert error == "\n".join([lines[0], lines[1] + "\\r", *lines[2:]])
    assert len(workerd.log) == len(workerd.output)
    assert not workerd.events("forged")
