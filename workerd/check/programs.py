"""Programs and functions of handlers: whether they can be run, and who else could change them."""

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath

from workerd.config.model import Handler, Settings
from workerd.config.permissions import objections
from workerd.config.template import Template
from workerd.config.text import toml
from workerd.handlers.program import clean_environment, find_program
from workerd.handlers.warm.pool import CHILD
from workerd.units import format_duration

IMPORT_TIMEOUT = 30.0

#: Programs that run the script which is their first argument.
_INTERPRETER = re.compile(
    r"(python|pypy|perl|ruby|node|nodejs|deno|bun|php|lua|tclsh|Rscript|sh|bash|dash|ksh|zsh)[0-9.]*"
)

Environ = Mapping[str, str]


def check_programs(
    settings: Settings, environ: Environ = os.environ, run: bool = True
) -> list[str]:
    """Every problem of what the handlers run: missing, unsafe, or not to be imported."""
    return _untrusted_authority(settings) + [
        problem
        for handler in settings.handlers.values()
        # One without is a problem already.
        if handler.command or handler.stream or handler.python
        for problem in _check_handler(settings, handler, environ, run)
    ]


def untrusted_programs(settings: Settings, environ: Environ = os.environ) -> list[str]:
    """What others could write of all that decides what runs, or whom the daemon trusts.

    Reason enough for the daemon not to start. Runs nothing, and leaves out what is missing, for
    that may still come.
    """
    problems = _untrusted_authority(settings)
    for handler in settings.handlers.values():
        problems += _untrusted(settings, handler, environ)
    return problems


def _untrusted_authority(settings: Settings) -> list[str]:
    """Who else could change whom the daemon takes for its broker."""
    file = settings.broker.tls.ca_file
    if file is None or not os.path.lexists(file):
        return []
    where = settings.where("broker", "tls", "ca_file")
    return [f"{where}: {reason}" for reason in objections(file)]


def _untrusted(settings: Settings, handler: Handler, environ: Environ) -> list[str]:
    reasons: dict[str, str] = {}
    for key, path in _what_decides(handler, environ):
        for reason in objections(path, settings.worker.trust_users):
            # A folder that many files are in is named once.
            reasons.setdefault(reason, settings.where("handlers", handler.name, key))
    return [f"{where}: {reason}" for reason, where in reasons.items()]


def _what_decides(handler: Handler, environ: Environ) -> Iterator[tuple[str, Path]]:
    """The files and folders that decide what a handler runs, with the keys that name them."""
    key, program = _program(handler)
    path = find_program(handler, program, environ)
    if path is not None:
        yield key, path
    directory = handler.working_directory or Path()
    script = _script(handler.stream or handler.command)
    # It may be no path at all, but the text of a script, as in `sh -c TEXT`.
    if script is not None and os.path.isfile(directory / script):
        yield key, directory / script
    # A warm process loads what it needs from there; for a function it comes first on sys.path.
    if key != "command" and handler.working_directory and directory.is_dir():
        yield "working_directory", directory
    if handler.python is not None and path is not None:
        steps = handler.python.partition(":")[0].split(".")
        for place in _search_path(handler, path, environ):
            for depth in range(1, len(steps) + 1):
                module = place.joinpath(*steps[:depth])
                for file in (module.with_suffix(".py"), module / "__init__.py"):
                    if os.path.isfile(file):
                        yield "python", file


def _script(words: tuple[str, ...]) -> str | None:
    """The script that an interpreter is given, as in `node render.js`, or None."""
    if not words or not _INTERPRETER.fullmatch(PurePath(words[0]).name):
        return None
    return next((word for word in words[1:] if not word.startswith("-")), None)


def _search_path(handler: Handler, interpreter: Path, environ: Environ) -> Iterator[Path]:
    """Where a function's module is looked for before the interpreter's own library."""
    if handler.working_directory:
        yield handler.working_directory
    named = {**environ, **handler.environment}.get("PYTHONPATH", "").split(os.pathsep)
    yield from (Path(place) for place in named if place.startswith("/"))
    yield from interpreter.parent.parent.glob("lib/python3*/site-packages")


def _check_handler(
    settings: Settings, handler: Handler, environ: Environ, run: bool
) -> Iterator[str]:
    def where(key: str) -> str:
        return settings.where("handlers", handler.name, key)

    script = _shell_script(handler.command)
    if script is not None and Template.parse(script).placeholders:
        yield (
            f"{where('command')}: a placeholder inside a shell script lets whoever submits a job "
            'run any command: write "$1" in the script and give the placeholder as an argument '
            'of its own, as in ["sh", "-c", "convert -- \\"$1\\"", "sh", "{body}"]'
        )
    directory = handler.working_directory
    if directory and not (os.path.isdir(directory) and os.access(directory, os.X_OK)):
        why = _why_unusable(directory, stat.S_ISDIR, "a directory")
        yield f"{where('working_directory')}: {why}"
        run = False
    key, program = _program(handler)
    path = find_program(handler, program, environ)
    if path is None:
        yield f"{where(key)}: {_why_not_found(handler, program)}"
        return
    untrusted = _untrusted(settings, handler, environ)
    yield from untrusted
    if untrusted:
        # To import a function would be to run the very thing that is not trusted.
        return
    why = _why_no_program(path)
    if why:
        yield f"{where(key)}: {why}"
    elif handler.python is not None and run:
        error = _import_error(handler, path, handler.python, environ)
        if error:
            yield f"{where('python')}: {handler.python} cannot be used: {error}"


def _program(handler: Handler) -> tuple[str, str]:
    """The key that says what a handler starts, and what it starts."""
    if handler.python is not None:
        return "interpreter", str(handler.interpreter or sys.executable)
    return ("stream", handler.stream[0]) if handler.stream else ("command", handler.command[0])


def _why_not_found(handler: Handler, program: str) -> str:
    if "/" not in program:
        return f"{toml(program)} is not a program in PATH"
    path = (handler.working_directory or Path()) / program
    return _why_unusable(path, stat.S_ISREG, "a file")


def _why_unusable(path: Path, is_right: Callable[[int], bool], kind: str) -> str:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not is_right(mode):
        return f"{path} is not {kind}"
    return f"{path} is not executable for this user: chmod +x {path}"


def _why_no_program(path: Path) -> str:
    """Why the kernel cannot start this file, as far as its first bytes show; "" if it can."""
    try:
        with path.open("rb") as file:
            line, end, _ = file.read(256).partition(b"\n")
    except OSError:
        return ""  # a program need not be readable
    if line.startswith(b"\x7fELF") or not end:
        return ""
    if not line.startswith(b"#!"):
        # What is no text may be a program of a kind that binfmt_misc knows.
        is_text = line.decode("latin-1").strip("\r\t").isprintable()
        return (
            ""
            if not is_text
            else f"{path} is no program: a script begins with a line such as #!/bin/sh"
        )
    if line.endswith(b"\r"):
        return f"{path}: its lines end in CR LF: sed -i 's/\\r$//' {path}"
    words = line[2:].split()
    interpreter = Path(os.fsdecode(words[0])) if words else Path("/")
    if not interpreter.is_file():
        return f"{path}: its first line names {interpreter}, which is not there"
    return ""


def _shell_script(command: tuple[str, ...]) -> str | None:
    """The script in `sh -c SCRIPT`, whichever shell it is and whatever starts it, or None."""
    for index, argument in enumerate(command):
        name = PurePath(argument).name
        if name.endswith("sh") and "." not in name:
            script = _after_dash_c(command[index + 1 :])
            if script is not None:
                return script
    return None


def _after_dash_c(arguments: tuple[str, ...]) -> str | None:
    rest = iter(arguments)
    runs_a_script = False
    for argument in rest:
        if not re.fullmatch(r"[-+].*", argument, re.DOTALL):
            return argument if runs_a_script else None
        if re.fullmatch(r"-[A-Za-z]*c[A-Za-z]*", argument):
            runs_a_script = True
        if re.fullmatch(r"[-+][A-Za-z]*[oO]|--rcfile|--init-file", argument):
            next(rest, None)  # These options take the next argument.
    return None


def _import_error(handler: Handler, interpreter: Path, function: str, environ: Environ) -> str:
    """Why the interpreter cannot import a function, or "" if it can."""
    # Into a file: a pipe could be held open by something that the application has started.
    with open(os.memfd_create("check"), "w+b") as output:
        try:
            child = subprocess.Popen(
                [interpreter, CHILD, "--check", function],
                cwd=handler.working_directory,
                env={**clean_environment(environ), **handler.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                # What it imports must not reach the terminal of whoever checks: not for typing
                # there (TIOCSTI), nor for signals.
                start_new_session=True,
            )
        except OSError as error:
            return f"{interpreter} does not start: {error.strerror}"
        with child:
            try:
                status = child.wait(IMPORT_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                return f"importing it took longer than {format_duration(IMPORT_TIMEOUT)}"
        if status == 0:
            return ""
        output.seek(0)
        lines = output.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return toml(said[-1][:300])[1:-1] if said else f"{interpreter} ended with status {status}"
