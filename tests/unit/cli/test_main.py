"""What `--help` shows, to somebody on a terminal of 80 columns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.trixie import CHECKOUT
from workerd import errors
from workerd.cli import main

DEAD = ("list", "show", "requeue", "drop", "export")
STEER = ("status", "health", "metrics", "queues", "logs", "cancel", "pause", "resume")
COMMANDS = (
    *("", "run", "check", "submit", "setup", "run-once", "dead"),
    *STEER,
    *(f"dead {name}" for name in DEAD),
)


@pytest.fixture(params=COMMANDS, ids=lambda name: name or "workerd")
def shown(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The help of a command."""
    monkeypatch.setenv("COLUMNS", "80")
    words = request.param.split()
    with pytest.raises(SystemExit) as ended:
        main.parser().parse_args([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_fits_the_screen(shown: str) -> None:
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 50


def test_every_option_is_explained(shown: str) -> None:
    options = shown.partition("options:")[2].partition("\n\n")[0]
    # An option's own words, or the line after it when the option is too long.
    bare = re.findall(r"^  (-\S+(?: \S+)?(?:, --\S+(?: \S+)?)?)$(?!\n {4})", options, re.MULTILINE)
    assert bare == []


@pytest.mark.parametrize("shown", ["submit"], indirect=True)
def test_the_help_of_submit_lists_every_exit_status(shown: str) -> None:
    statuses = {value for name, value in vars(errors).items() if name.startswith("EX_")}
    # No such letter, a bug, and a daemon of another version, which is not asked a second time.
    statuses -= {errors.EX_NOINPUT, errors.EX_SOFTWARE, errors.EX_PROTOCOL}
    listed = set(map(int, re.findall(r"^  (\d+) ", shown, re.MULTILINE)))
    assert listed == statuses


def test_a_timeout_without_a_unit_counts_seconds(tmp_path: Path) -> None:
    empty = tmp_path / "workerd.toml"
    empty.touch(0o600)
    words = ["submit", "--config", str(empty), "--dry-run", "--id", "one", "sleep", "4"]

    def run(timeout: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "workerd", *words, "--timeout", timeout]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)

    well = run("30")
    assert (well.returncode, well.stdout) == (0, "one\n")
    assert run("soon").returncode == errors.EX_USAGE
