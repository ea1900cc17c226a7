"""What commands print: safe text, and an exit status that tells when it could not be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.programs import SUBMIT, WORKERD, environment
from tests.harness.tables import private
from workerd import output
from workerd.errors import EX_IOERR, EX_OK

CONFIG = '[handlers.sleep]\ncommand = ["sleep", "{body}"]\n'
#: How a shell leaves a program without an output that can be written.
LOST = {"closed": ">&-", "full": ">/dev/full", "unread": ""}
REASONS = {"closed": "Bad file descriptor", "full": "No space left on device"}


def run(
    words: list[str], folder: Path, redirection: str, unread: bool = False
) -> tuple[int, list[str]]:
    """The exit status and the lines on standard error of a command in a shell."""
    read, write = os.pipe()
    if unread:
        os.close(read)
    try:
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {redirection}', "sh", *words],
            env=environment({"RUNTIME_DIRECTORY": str(folder)}),
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)
        if not unread:
            os.close(read)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("name", ["submit", "lines", "status", "check", "show", "help-of-status"])
def test_an_output_that_cannot_be_written_is_74_and_one_line(
    tmp_path: Path, name: str, how: str
) -> None:
    config = ["--config", str(private(tmp_path, CONFIG))]
    lines = tmp_path / "lines"
    lines.write_text("1\n" * 5000)
    words = {
        "submit": [*SUBMIT, *config, "--dry-run", "sleep", "4"],
        "lines": [*SUBMIT, *config, "--dry-run", "--lines", "--file", str(lines), "sleep"],
        "status": [*WORKERD, "status"],
        "check": [*WORKERD, "check", *config],
        "show": [*WORKERD, "check", "--show", *config],
        "help-of-status": [*WORKERD, "status", "--help"],
    }[name]
    status, said = run(words, tmp_path, LOST[how], unread=how == "unread")
    if name.startswith("help") and how == "unread":
        # As in `workerd --help | true`: nothing was to be done.
        assert (status, said) == (EX_OK, [])
        return
    assert status == EX_IOERR
    first, *more = said
    prog = "submit" if name in ("submit", "lines") else "workerd"
    assert first.startswith(f"{prog}: standard output: {REASONS.get(how, 'Broken pipe')}")
    # Of many jobs, those that are still to be sent are named too.
    assert len(more) == (2 if name == "lines" else 0), said


def test_a_lost_output_is_one_error_however_often_it_is_flushed(tmp_path: Path) -> None:
    program = (
        "import sys; from workerd import errors, output\n"
        "for text in 'ab':\n"
        "    output.print_line(text)\n"
        "    try: output.flush()\n"
        "    except errors.CommandError as error: output.warn(text)\n"
    )
    assert run([sys.executable, "-c", program], tmp_path, ">/dev/full") == (0, ["workerd: a"])


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_an_error_that_nobody_can_read_changes_no_exit_status(
    tmp_path: Path, redirection: str
) -> None:
    config = ["--config", str(private(tmp_path, CONFIG))]
    assert run([*SUBMIT, *config, "--dry-run", "wrong", "4"], tmp_path, redirection) == (64, [])
    assert run([*SUBMIT, "--no-such-option"], tmp_path, redirection) == (64, [])


def test_what_a_locale_cannot_write_is_escaped(tmp_path: Path) -> None:
    config = private(tmp_path, CONFIG)
    done = subprocess.run(
        [*SUBMIT, "--config", str(config), "--dry-run", "--queue", "q", "--id", "é", "x", "4"],
        env=environment({"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "\\xe9\n"), done


def test_a_table_has_columns_of_safe_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([("ID", "TYPE"), ("a\x1b[31m", "x"), ("b", "")], indent="  ")
    assert capsys.readouterr().out == "  ID         TYPE\n  a\\x1b[31m  x\n  b\n"
