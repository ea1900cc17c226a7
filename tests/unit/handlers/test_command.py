"""Command handlers: what a program is given, and what becomes of its job."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.harness.commands import (
    ENVIRONMENT,
    alone,
    arguments,
    environment,
    handler,
    in_loop,
    job,
    prepared,
    refusal,
    run,
    run_one,
)
from tests.harness.waiting import SCALE
from workerd.core.job import Job, Outcome, Report


@pytest.mark.parametrize("value", ["-", "--", "-rf", "--output=/etc/passwd"])
@pytest.mark.parametrize("template", ["{body}", "{body}.txt", "{header.empty}{body}"])
def test_a_value_that_could_pass_for_an_option_is_refused(template: str, value: str) -> None:
    report = refusal(template, job=job(value.encode(), headers={"empty": ""}))
    assert report.reason == "bad-argument"
    assert "would be taken for an option" in report.error


def test_what_comes_after_two_dashes_may_begin_with_a_dash() -> None:
    # SHOW_ARGUMENTS ends in two dashes.
    assert arguments("{body}", job=job(b"-rf")) == [b"-rf"]


def test_two_dashes_protect_only_what_comes_after_them() -> None:
    assert refusal("{body}", "--", job=job(b"-rf")).reason == "bad-argument"


def test_two_dashes_that_a_job_brings_protect_nothing() -> None:
    given = job(b"-rf", headers={"h": "--"})
    assert refusal("{header.h}", "{body}", job=given).reason == "bad-argument"


def test_a_handler_may_allow_dashes() -> None:
    command = ("sh", "-c", 'printf "%s\\0" "$@"', "sh", "{body}")
    report = run(handler(*command, dashes=True), job(b"-n")).report
    assert report.output == b"-n\0"


def test_a_dash_after_literal_text_is_harmless() -> None:
    command = ("sh", "-c", 'printf "%s\\0" "$@"', "sh", "--name={body}", "./{body}")
    assert run(handler(*command), job(b"-n")).report.output == b"--name=-n\0./-n\0"


@pytest.mark.parametrize("given", [job(b"a\0b"), job(message_id="a\0b"), job(content_type="\0")])
def test_a_nul_is_refused(given: Job) -> None:
    report = refusal("{body}", job=given)
    assert (report.reason, report.error) == ("bad-argument", "an argument contains a NUL byte")


@pytest.mark.parametrize(
    ("template", "given"),
    [
        ("{body}", job(b"x" * 200_000)),
        ("{header.big}", job(headers={"big": "x" * 200_000})),
        ("{body.k}{body.k}", job(b'{"k": "%s"}' % (b"x" * 100_000))),
    ],
)
def test_an_argument_that_is_too_long_is_refused_at_once(template: str, given: Job) -> None:
    assert refusal(template, job=given).reason == "too-large"


def test_a_large_body_that_is_no_argument_is_no_trouble() -> None:
    report = run(handler("wc", "-c"), job(b"x" * 200_000, headers={"big": "x" * 200_000})).report
    assert report.output == b"200000\n"


def test_a_job_has_the_daemons_environment_without_what_is_not_its_business() -> None:
    private = [
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "LISTEN_PID",
        "JOURNAL_STREAM",
        "INVOCATION_ID",
        "CREDENTIALS_DIRECTORY",
        "STATE_DIRECTORY",
        "RUNTIME_DIRECTORY",
        "CONFIGURATION_DIRECTORY",
        "WORKERD_BROKER_URL",
        "WORKERD_JOB_ID",
        "WORKERD_HEADER_FORGED",
        "WORKERD_ANYTHING",
    ]
    ours = {**dict.fromkeys(private, "secret"), **ENVIRONMENT, "LANG": "C", "MY_DIRECTORY_X": "y"}
    found = environment(job(), ours)
    assert "secret" not in found.values()
    assert {"PATH": "/usr/bin:/bin", "LANG": "C", "MY_DIRECTORY_X": "y"}.items() <= found.items()
    assert {name for name in found if not name.startswith("WORKERD_")} == {
        "PATH",
        "LANG",
        "MY_DIRECTORY_X",
    }


def test_a_handlers_own_environment_overrides_the_daemons() -> None:
    ours = {**ENVIRONMENT, "LANG": "C", "TZ": "UTC"}
    found = environment(job(), ours, environment={"LANG": "de_DE.UTF-8", "EMPTY": ""})
    assert (found["LANG"], found["TZ"], found["EMPTY"]) == ("de_DE.UTF-8", "UTC", "")


def test_a_job_is_told_the_facts_about_itself() -> None:
    given = job(
        message_id="id 7",
        type="greet",
        content_type="text/plain",
        content_encoding="gzip",
        headers={"x-workerd-attempt": 2},
        redelivered=True,
    )
    found = environment(given)
    assert {name: value for name, value in found.items() if "_HEADER_" not in name} == {
        **ENVIRONMENT,
        "WORKERD_JOB_ID": "id 7",
        "WORKERD_JOB_TYPE": "greet",
        "WORKERD_QUEUE": "work",
        "WORKERD_ATTEMPT": "3",
        "WORKERD_MAX_ATTEMPTS": "5",
        "WORKERD_REPORT": "/proc/self/fd/3",
        "WORKERD_REDELIVERED": "1",
        "WORKERD_CONTENT_TYPE": "text/plain",
        "WORKERD_CONTENT_ENCODING": "gzip",
    }


def test_a_bare_message_has_empty_facts() -> None:
    given = job(message_id=None)
    found = environment(given)
    assert found["WORKERD_JOB_ID"] == given.id != ""
    assert found["WORKERD_ATTEMPT"] == "1"
    assert found["WORKERD_REDELIVERED"] == "0"
    names = ("WORKERD_JOB_TYPE", "WORKERD_CONTENT_TYPE", "WORKERD_CONTENT_ENCODING")
    assert [found[name] for name in names] == ["", "", ""]


def headers_in(found: dict[str, str]) -> dict[str, str]:
    prefix = "WORKERD_HEADER_"
    return {name[len(prefix) :]: text for name, text in found.items() if name.startswith(prefix)}


def test_a_header_is_a_variable_named_in_capitals() -> None:
    headers = {"X-Trace.id": "a", "größe": "ß", "1=2\nPATH": "/evil", "n": 5, "l": ["a", None]}
    found = environment(job(headers=headers))
    assert headers_in(found) == {
        "X_TRACE_ID": "a",
        "GR_SSE": "ß",
        "1_2_PATH": "/evil",
        "N": "5",
        "L": '["a", null]',
    }
    assert found["PATH"] == ENVIRONMENT["PATH"]


def test_a_header_that_no_variable_can_hold_is_left_out() -> None:
    headers = {"nul": "a\0b", "bytes": b"a\0b", "long": "x" * 4093, "fits": "x" * 4092, "ok": "1"}
    assert headers_in(environment(job(headers=headers))) == {"FITS": "x" * 4092, "OK": "1"}


def test_all_headers_together_are_bounded() -> None:
    headers = {f"h{number:02}": "x" * 1021 for number in range(60)}
    found = headers_in(environment(job(headers=headers)))
    assert list(found) == [f"H{number:02}" for number in range(32)]


def test_a_trace_goes_on_in_the_job() -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert environment(job(headers={"traceparent": parent}))["TRACEPARENT"] == parent
    for headers in ({}, {"traceparent": 5}, {"traceparent": "x" * 5000}, {"traceparent": "\0"}):
        assert "TRACEPARENT" not in environment(job(headers=headers))


def test_what_a_job_is_given_does_not_depend_on_the_daemons_locale() -> None:
    # An ASCII locale stands for all that are not UTF-8.
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = alone(
        """
        given = job("→".encode(), message_id="→", type="→", headers={"h": "→"})
        script = 'printf "%s" "$1$2$WORKERD_JOB_ID$WORKERD_JOB_TYPE$WORKERD_HEADER_H$OWN$OURS"'
        command = ["sh", "-c", script, "sh", "→{id}", "{header.h}{type}{body}"]
        ours = {**ENVIRONMENT, "OURS": b"\\xfc".decode("ascii", "surrogateescape")}
        report = run(handler(*command, environment={"OWN": "→"}), job=given, environ=ours).report
        print(sys.getfilesystemencoding(), ascii(report.output), report.error)
        """,
        ascii_only,
    )
    assert said == f"ascii {'→'.encode() * 9 + bytes([0xFC])!a} \n"


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [
        (0, Outcome.DONE, ""),
        (1, Outcome.FAILED, "exit-status"),
        (75, Outcome.FAILED, "exit-status"),
        (65, Outcome.REJECTED, "exit-status"),
        (255, Outcome.FAILED, "exit-status"),
    ],
)
def test_the_exit_status_says_what_became_of_the_job(
    status: int, outcome: Outcome, reason: str
) -> None:
    report = run(handler("sh", "-c", f"exit {status}"), job()).report
    assert (report.outcome, report.reason) == (outcome, reason)
    assert (report.exit_status, report.signal) == (status, None)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (3, Outcome.DONE),
        (4, Outcome.REJECTED),
        (5, Outcome.FAILED),
        (65, Outcome.FAILED),
        (6, Outcome.FAILED),
    ],
)
def test_a_handler_may_say_what_its_exit_statuses_mean(status: int, outcome: Outcome) -> None:
    meanings = {3: "done", 4: "dead", 5: "retry"}
    command = handler("sh", "-c", f"exit {status}", exit_codes=meanings)
    assert run(command, job()).report.outcome is outcome


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGHUP", "SIGPIPE"])
def test_a_job_that_a_signal_killed_has_failed(name: str) -> None:
    number = signal.Signals[name].value
    report = run(handler("sh", "-c", f"kill -{number} $$"), job()).report
    assert (report.outcome, report.reason) == (Outcome.FAILED, "signal")
    assert (report.exit_status, report.signal) == (None, name)


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert run(handler("sh", "-c", "kill -40 $$"), job()).report.signal == "signal 40"


def test_a_job_that_takes_too_long_has_failed() -> None:
    report = run(handler("sleep", "60", timeout=0.05), job()).report
    assert (report.outcome, report.reason) == (Outcome.FAILED, "timeout")
    assert report.signal == "SIGTERM"


def test_a_job_that_ends_well_after_its_time_has_failed_nevertheless() -> None:
    script = "trap 'exit 0' TERM; while :; do sleep 0.01; done"
    report = run(handler("sh", "-c", script, timeout=0.2 * SCALE), job()).report
    assert (report.outcome, report.reason, report.exit_status) == (Outcome.FAILED, "timeout", 0)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_job_that_must_stop_is_interrupted(when: str, tmp_path: Path) -> None:
    started = tmp_path / "started"

    async def scenario() -> Report:
        loop = asyncio.get_running_loop()
        stop = loop.create_future()
        if when == "before":
            stop.set_result(None)
        else:
            loop.call_later(0.05, stop.set_result, None)
        return await run_one(
            prepared(handler("sh", "-c", f"touch {started}; sleep 60")), job(), stop
        )

    report = in_loop(scenario())
    assert (report.outcome, report.reason) == (Outcome.INTERRUPTED, "drain")


def test_the_end_of_stderr_is_told_of_a_job_that_failed() -> None:
    script = "echo first >&2; yes '0123456' | head -n 2000 >&2; printf '\\033[1mred\\n' >&2; exit 1"
    error = run(handler("sh", "-c", script), job()).report.error
    assert error.endswith("0123456\n\\x1b[1mred")
    assert "first" not in error
    assert 8000 < len(error) < 8300
    assert run(handler("sh", "-c", "echo well >&2"), job()).report.error == ""


@pytest.mark.parametrize("limit", [0, 1, 5, 64, 1 << 20])
def test_the_last_of_stdout_is_the_result(limit: int) -> None:
    whole = b"".join(b"%d\n" % number for number in range(1, 2001))
    report = run(handler("seq", "2000", output_limit=limit), job()).report
    assert report.output == (whole[-limit:] if limit else b"")
