"""Command handlers: arguments, environment, and what becomes of a job."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.harness.commands import (
    ENVIRONMENT,
    SHOW_ARGUMENTS,
    alone,
    handler,
    in_loop,
    job,
    prepared,
    run,
    run_one,
)
from tests.harness.waiting import SCALE
from workerd.core.job import Job, Outcome, Report


def arguments(*templates: str, job: Job, **options: Any) -> list[bytes]:
    """What a program is given for these arguments."""
    report = run(handler(*SHOW_ARGUMENTS, *templates, **options), job).report
    assert report.outcome is Outcome.DONE, report
    return report.output.split(b"\0")[:-1]


def refusal(*templates: str, job: Job, **options: Any) -> Report:
    """The report on a job that no program may be given."""
    report = run(handler("sh", "-c", "echo it ran", *templates, **options), job).report
    assert report.outcome is Outcome.REJECTED
    assert report.output == b"", "the program ran"
    return report


def environment(job: Job, environ: dict[str, str] = ENVIRONMENT, **options: Any) -> dict[str, str]:
    """The environment in which a job runs."""
    report = run(handler("env", "-0", **options), job, environ=environ).report
    assert report.outcome is Outcome.DONE, report
    lines = report.output.decode().split("\0")[:-1]
    return dict(line.split("=", 1) for line in lines)


# Placeholders


def test_every_placeholder_has_its_value() -> None:
    given = job(
        b'{"user": "ann"}',
        message_id="id-7",
        type="greet",
        headers={"X-Trace": "t1", "x-workerd-attempt": 2},
    )
    templates = ["{id}", "{type}", "{queue}", "{attempt}", "{body}", "{body.user}"]
    assert arguments(*templates, "{header.X-Trace}", job=given) == [
        b"id-7",
        b"greet",
        b"work",
        b"3",
        b'{"user": "ann"}',
        b"ann",
        b"t1",
    ]


def test_several_placeholders_and_text_make_one_argument() -> None:
    given = job(b'{"a": "1 2", "b": "x"}')
    assert arguments("--{body.a}={{{body.b}}}!", job=given) == [b"--1 2={x}!"]


def test_a_value_is_not_expanded_again() -> None:
    given = job(b'{"k": "{header.x}", "l": "{{"}', message_id="{body}", headers={"x": "{id}"})
    templates = ("{body.k}", "{body.l}", "{id}", "{header.x}")
    assert arguments(*templates, job=given) == [b"{header.x}", b"{{", b"{body}", b"{id}"]


def test_double_braces_are_braces() -> None:
    assert arguments("{{id}}", '{{"a": {id}}}', job=job(message_id="7")) == [b"{id}", b'{"a": 7}']


@pytest.mark.parametrize(
    "hostile",
    ["$(touch /tmp/x)", "`id`", "; id", "a b\tc", "*", "'\"", "a\nb", "\\n%s%n", "~", "$HOME", ""],
)
def test_a_value_stays_inside_its_argument_whatever_a_shell_would_make_of_it(hostile: str) -> None:
    given = job(hostile.encode(), message_id=f"i{hostile}", headers={"h": hostile})
    assert arguments("{body}", "x{header.h}", "{id}", job=given) == [
        hostile.encode(),
        b"x" + hostile.encode(),
        b"i" + hostile.encode(),
    ]


def test_any_bytes_but_nul_may_be_an_argument() -> None:
    body = bytes(range(1, 256))
    assert arguments("{body}", job=job(body)) == [body]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5", "5"),
        ("-0.5", "-0.5"),
        ("true", "true"),
        ("null", "null"),
        ('[1, {"a": "b"}]', '[1, {"a": "b"}]'),
        ('"gr\\u00fcn"', "grün"),
        ('"\\ud83d\\ude00"', "😀"),
        ('""', ""),
    ],
)
def test_a_value_of_the_body_that_is_no_text_is_given_as_json(value: str, text: str) -> None:
    given = job(b'{"k": %s}' % value.encode())
    assert arguments("{body.k}", job=given) == [text.encode()]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, b"5"),
        (True, b"true"),
        (["a", 1], b'["a", 1]'),
        (b"\xfc", b"\xfc"),
        ({b"\xfc": 1, "a": 2}, b'{"a": 2}'),
    ],
)
def test_a_header_that_is_no_text_is_given_as_json_and_bytes_as_they_are(
    value: object, text: bytes
) -> None:
    assert arguments("{header.h}", job=job(headers={"h": value})) == [text]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"other": 1}', "the body has no key 'k'"),
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b'{"k": "\xff"}', "the body is not JSON"),
        (b'["k"]', "the body is not a JSON object"),
        (b'{"k": ' + b"[" * 100_000, "the body is not JSON"),
        (b'{"k": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"k": "\\ud800"}', "the value of 'k' is half a surrogate pair"),
    ],
)
def test_a_body_without_the_value_that_is_asked_for_is_refused(body: bytes, error: str) -> None:
    report = refusal("{body.k}", job=job(body))
    assert report.reason == "bad-body"
    assert error in report.error


def test_a_missing_header_is_refused() -> None:
    report = refusal("{header.X-Trace}", job=job(headers={"x-trace": "other"}))
    assert (report.reason, report.error) == ("bad-header", "there is no header 'X-Trace'")


# Dashes


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


# What no program can be given


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


# Environment


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


# The program


def test_a_program_is_looked_up_in_the_path_that_it_will_have(tmp_path: Path) -> None:
    program(tmp_path / "mine", "echo found")
    report = run(handler("mine", environment={"PATH": f"{tmp_path}:/bin"}), job()).report
    assert report.output == b"found\n"


def test_a_relative_program_is_found_from_its_working_directory(tmp_path: Path) -> None:
    program(tmp_path / "bin/here", "pwd")
    before = os.getcwd()
    report = run(handler("./bin/here", working_directory=tmp_path), job()).report
    assert report.output == f"{tmp_path}\n".encode()
    assert os.getcwd() == before


def test_a_relative_entry_of_the_path_counts_from_the_working_directory(tmp_path: Path) -> None:
    program(tmp_path / "bin/here", "pwd")
    options = {"working_directory": tmp_path, "environment": {"PATH": "/bin:bin"}}
    report = run(handler("here", **options), job()).report
    assert report.output == f"{tmp_path}\n".encode()


def test_without_a_working_directory_a_job_is_where_the_daemon_is() -> None:
    assert run(handler("pwd"), job()).report.output == f"{os.getcwd()}\n".encode()


def program(path: Path, script: str, interpreter: str = "/bin/sh") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{interpreter}\n{script}\n")
    path.chmod(0o755)
    return path


def missing(path: Path) -> None:
    path.unlink()


def not_executable(path: Path) -> None:
    path.chmod(0o644)


def without_interpreter(path: Path) -> None:
    path.write_text("#!/nowhere/sh\necho ran\n")


def without_shebang(path: Path) -> None:
    path.write_text("echo ran\n")


def empty(path: Path) -> None:
    path.write_text("")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    "broken",
    [
        missing,
        not_executable,
        without_interpreter,
        without_shebang,
        empty,
        a_directory,
        a_dangling_link,
    ],
)
def test_a_program_that_cannot_be_started_is_not_the_jobs_fault(
    tmp_path: Path, broken: Any
) -> None:
    path = program(tmp_path / "prog", "echo ran")
    command = handler(str(path))
    broken(path)

    async def scenario() -> tuple[Report, Report]:
        runs = prepared(command)
        never = asyncio.get_running_loop().create_future()
        refused = await run_one(runs, job(), never)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        program(path, "echo ran")
        return refused, await run_one(runs, job(), never)

    refused, done = in_loop(scenario())
    assert (refused.outcome, refused.reason) == (Outcome.UNAVAILABLE, "cannot-run")
    assert refused.error.startswith(f"cannot run {path}: ")
    assert (done.outcome, done.output) == (Outcome.DONE, b"ran\n")


def test_a_program_that_is_just_being_written_is_not_the_jobs_fault(tmp_path: Path) -> None:
    path = tmp_path / "prog"
    shutil.copy("/bin/true", path)
    with path.open("ab"):
        report = run(handler(str(path)), job()).report
    assert (report.outcome, report.error) == (
        Outcome.UNAVAILABLE,
        f"cannot run {path}: Text file busy",
    )
    assert run(handler(str(path)), job()).report.outcome is Outcome.DONE


def test_a_program_that_moved_within_the_path_is_found_again(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    path = program(old / "prog", "echo ran")
    command = handler("prog", environment={"PATH": f"{old}:{new}:/bin"})

    async def scenario() -> list[Outcome]:
        runs = prepared(command)
        never = asyncio.get_running_loop().create_future()
        before = await run_one(runs, job(), never)
        new.mkdir()
        path.rename(new / "prog")
        # The first attempt finds out; it is made again after a pause.
        between = await run_one(runs, job(), never)
        return [before.outcome, between.outcome, (await run_one(runs, job(), never)).outcome]

    outcomes = in_loop(scenario())
    assert outcomes == [Outcome.DONE, Outcome.UNAVAILABLE, Outcome.DONE]


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_missing_working_directory_is_not_the_jobs_fault(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "a file":
        place.touch()
    before = os.getcwd()
    report = run(handler("true", working_directory=place), job()).report
    assert (report.outcome, report.reason) == (Outcome.UNAVAILABLE, "cannot-run")
    assert report.error.startswith(f"cannot run true in {place}: ")
    assert os.getcwd() == before


# How it ends


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
