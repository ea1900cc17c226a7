"""What `workerd check` finds in the programs and functions of handlers."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.programs import WORKERD, run
from tests.harness.tables import private
from tests.harness.terminal import Terminal
from workerd.check import programs
from workerd.check.programs import check_programs, untrusted_programs
from workerd.config.model import TLS, Broker, Handler, Settings

PATH = {"PATH": os.defpath}


def problems(handler: Handler) -> list[str]:
    return check_programs(Settings(handlers={handler.name: handler}), PATH)


def command(*words: str, **options: Any) -> Handler:
    return Handler("x", command=words, **options)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_a_good_command_has_no_problems(script: Path) -> None:
    assert problems(command("sleep", "{body}")) == []
    assert problems(command(str(script))) == []
    assert problems(command("./script", working_directory=script.parent)) == []
    assert (
        problems(Handler("x", stream=("script",), environment={"PATH": str(script.parent)})) == []
    )


def test_a_missing_program_is_found(script: Path) -> None:
    assert problems(command("no-such-program")) == [
        'handlers.x.command: "no-such-program" is not a program in PATH'
    ]
    missing = f"{script}s"
    assert problems(Handler("x", stream=(missing,))) == [
        f"handlers.x.stream: {missing}: No such file or directory"
    ]
    python = Handler("x", python="os:getcwd", interpreter=Path(missing))
    assert problems(python) == [f"handlers.x.interpreter: {missing}: No such file or directory"]


def test_a_program_has_to_be_executable(script: Path) -> None:
    script.chmod(0o644)
    assert problems(command(str(script))) == [
        f"handlers.x.command: {script} is not executable for this user: chmod +x {script}"
    ]
    assert problems(command(str(script.parent))) == [
        f"handlers.x.command: {script.parent} is not a file"
    ]


def test_the_text_of_a_script_is_not_taken_for_a_file() -> None:
    text = "read line\n" * 1000
    handlers = {
        "command": Handler("command", ("sh", "-c", text)),
        "stream": Handler("stream", stream=("sh", "-c", text)),
    }
    assert untrusted_programs(Settings(handlers=handlers)) == []


def test_a_missing_working_directory_is_found(script: Path) -> None:
    (problem,) = problems(command("sleep", working_directory=Path("/no/such")))
    assert problem == "handlers.x.working_directory: /no/such: No such file or directory"
    (problem,) = problems(command("sleep", working_directory=script))
    assert problem == f"handlers.x.working_directory: {script} is not a directory"


def test_a_program_that_everyone_could_write_is_refused(script: Path) -> None:
    script.chmod(0o777)
    handler = command(str(script))
    expected = [f"handlers.x.command: {script} is writable for everyone: chmod go-w {script}"]
    assert problems(handler) == expected
    assert untrusted_programs(Settings(handlers={"x": handler}), PATH) == expected


def test_only_what_is_there_can_be_untrusted() -> None:
    settings = Settings(handlers={"x": command("no-such-program")})
    assert untrusted_programs(settings, PATH) == []


@pytest.mark.parametrize(
    "words",
    [
        ("sh", "-c", "echo {body}"),
        ("/bin/bash", "-ec", "echo {body.name}"),
        ("bash", "-o", "pipefail", "-c", "echo {header.X}"),
        ("bash", "--norc", "-c", "-x", "echo {id}"),
        ("env", "LANG=C", "dash", "-c", "echo {body}"),
    ],
)
def test_a_placeholder_in_a_shell_script_is_an_injection(words: tuple[str, ...]) -> None:
    found = [problem for problem in problems(command(*words)) if "shell script" in problem]
    assert len(found) == 1
    assert '"$1"' in found[0]


@pytest.mark.parametrize(
    "words",
    [
        ("sh", "-c", 'echo "$1"', "sh", "{body}"),
        ("sh", "-c", "echo ${{HOME}}"),
        ("sh", "script", "-c", "{body}"),
        ("sh", "./deploy.sh", "-c", "{body}"),
        ("env", "sleep", "-c", "{body}"),
    ],
)
def test_a_placeholder_outside_a_shell_script_is_none(words: tuple[str, ...]) -> None:
    assert problems(command(*words)) == []


# Python functions.


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Whoever owns the interpreter that runs the tests, it will do.
    monkeypatch.setattr(programs, "objections", lambda *_: [])
    (tmp_path / "jobs.py").write_text(
        "import os, sys\n"
        "class Photo:\n"
        "    def resize(job): ...\n"
        "    size = 1\n"
        "print('noise')\n"
        "print('more noise', file=sys.stderr)\n"
        "async def resize(job): ...\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "nosy.py").write_text(
        "import os\n"
        "if 'WORKERD_BROKER_URL' in os.environ: raise RuntimeError('seen')\n"
        "def f(job): ...\n"
    )
    return tmp_path


def function(application: Path, name: str) -> list[str]:
    interpreter = Path(sys.executable)
    handler = Handler("x", python=name, interpreter=interpreter, working_directory=application)
    environ = {**PATH, "WORKERD_BROKER_URL": "amqp://h", "PYTHONSAFEPATH": "1"}
    return check_programs(Settings(handlers={"x": handler}), environ)


@pytest.mark.parametrize("name", ["jobs:resize", "jobs:Photo.resize", "nosy:f"])
def test_a_function_in_the_working_directory_is_found(application: Path, name: str) -> None:
    assert function(application, name) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("jobs:resise", "has no attribute 'resise'"),
        ("jobs:Photo.size", "Photo.size is not a function"),
        ("absent:f", "No module named 'absent'"),
        ("broken:f", "No module named 'no_such_module'"),
        ("leaves:f", "leaves ends the process when it is imported"),
    ],
)
def test_a_function_that_cannot_be_imported_is_found(
    application: Path, name: str, reason: str
) -> None:
    (problem,) = function(application, name)
    assert problem.startswith(f"handlers.x.python: {name} cannot be used: ")
    assert reason in problem


def test_an_import_that_never_ends_is_cut_short(
    application: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (application / "hangs.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setattr(programs, "IMPORT_TIMEOUT", 0.2)
    (problem,) = function(application, "hangs:f")
    assert "took longer than 200ms" in problem


def test_an_application_that_is_imported_has_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "rogue.py").write_text(
        "import fcntl, os, termios\n"
        "def f(job): ...\n"
        "try: terminal = os.open('/dev/tty', os.O_RDWR)\n"
        "except OSError: pass\n"
        "else: raise RuntimeError('typed')\n"
        "if os.isatty(2): raise RuntimeError('typed')\n"
    )
    config = private(
        tmp_path,
        f'[handlers.x]\npython = "rogue:f"\ninterpreter = "{sys.executable}"\n'
        f'working_directory = "{tmp_path}"\n',
    )
    terminal = Terminal([*WORKERD, "check", "--config", config])
    try:
        assert terminal.wait_exit() == 0, terminal.output
    finally:
        terminal.close()
    assert terminal.output == "configuration is fine\r\n"


@pytest.mark.parametrize("planted", [".", "jobs.py", "jobs/__init__.py", "library", "script.js"])
def test_all_that_decides_what_runs_is_judged(tmp_path: Path, planted: str) -> None:
    folder = tmp_path / "app"
    for name in ("jobs", "library"):
        (folder / name).mkdir(parents=True)
    for name in ("jobs.py", "jobs/__init__.py", "library/jobs.py", "script.js"):
        (folder / name).touch()
    node = folder / "node"
    node.write_text("#!/bin/sh\n")
    node.chmod(0o755)
    (folder / planted).chmod(0o777)
    python = Handler(
        "x",
        python="jobs:f",
        interpreter=Path(sys.executable),
        working_directory=folder,
        environment={"PYTHONPATH": str(folder / "library")},
    )
    stream = Handler("x", stream=(str(node), "script.js"), working_directory=folder)
    plain = command(str(node), "-x", str(folder / "script.js"))
    reason = f"{(folder / planted)} is writable for everyone: "
    found = {
        name: untrusted_programs(Settings(handlers={"x": handler}), PATH)
        for name, handler in {"python": python, "stream": stream, "command": plain}.items()
    }
    judged = {
        ".": {"python", "stream", "command"},
        "script.js": {"stream", "command"},
    }.get(planted, {"python"})
    assert {name for name, problems in found.items() if reason in "".join(problems)} == judged
    # What the daemon refuses, `check` finds too.
    assert set(found["stream"]) <= set(problems(stream))


def test_whom_the_daemon_takes_for_its_broker_is_judged(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.touch(0o644)
    authority.chmod(0o666)
    settings = Settings(broker=Broker(tls=TLS(ca_file=authority)))
    expected = [f"broker.tls.ca_file: {authority} is writable for everyone: chmod go-w {authority}"]
    assert untrusted_programs(settings, PATH) == expected
    assert check_programs(settings, PATH) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("#!/bin/sh\r\nexit 0\r\n", "its lines end in CR LF: sed -i 's/\\r$//' "),
        ("echo hello\n", "is no program: a script begins with a line such as #!/bin/sh"),
        ("#!/no/such/interpreter -x\n", "its first line names /no/such/interpreter, which is not"),
        ("#! /bin/sh -e\n", ""),
        ("\x01\x02\n", ""),
    ],
)
def test_a_script_that_the_kernel_cannot_start_is_named(
    script: Path, content: str, reason: str
) -> None:
    script.write_text(content, newline="")
    found = "".join(problems(command(str(script))))
    assert reason in found if reason else found == ""


def test_all_stages_of_problems_are_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "rogue.py").write_text("raise RuntimeError('run')\ndef f(job): ...\n")
    config = private(
        tmp_path,
        '[worker]\nqueues = ["absent"]\n'
        '[handlers.lame]\ncommand = ["no-such-program"]\nworking_directory = "/no/such"\n'
        "[handlers.empty]\ntimeout = 7\nqueu = 1\n"
        f'[handlers.function]\npython = "rogue:f"\nworking_directory = "{tmp_path}"\n'
        f'interpreter = "{sys.executable}"\n',
    )
    result = run([*WORKERD, "check", "--config", config])
    assert result.status == 78
    for part in (
        'no queue "absent" is configured',
        "unknown key",
        "handlers.empty: needs one of",
        "/no/such: No such file",
        '"no-such-program" is not a program',
    ):
        assert part in result.stderr
    # Nothing is run while the files themselves are wrong.
    assert "RuntimeError" not in result.stderr
