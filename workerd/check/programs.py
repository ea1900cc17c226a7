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
from workerd.config.permissions import writable_by_others
from workerd.config.template import Template
from workerd.config.text import toml
from workerd.handlers.program import clean_environment, find_program
from workerd.handlers.warm.pool import CHILD
from workerd.units import format_duration

IMPORT_TIMEOUT = 30.0

Environ = Mapping[str, str]


def check_programs(settings: Settings, environ: Environ = os.environ) -> list[str]:
    """Every problem of what the handlers run: missing, unsafe, or not to be imported."""
    return [
        problem
        for handler in settings.handlers.values()
        for problem in _check_handler(settings, handler, environ)
    ]


def untrusted_programs(settings: Settings, environ: Environ = os.environ) -> list[str]:
    """The programs that others could write: reason enough for the daemon not to start.

    Runs nothing, and leaves out programs that are missing: those may still come.
    """
    problems = []
    for handler in settings.handlers.values():
        key, program = _program(handler)
        path = find_program(handler, program, environ)
        reason = writable_by_others(path) if path else None
        if reason:
            problems.append(f"{settings.where('handlers', handler.name, key)}: {reason}")
    return problems


def _check_handler(settings: Settings, handler: Handler, environ: Environ) -> Iterator[str]:
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
        return
    key, program = _program(handler)
    path = find_program(handler, program, environ)
    if path is None:
        yield f"{where(key)}: {_why_not_found(handler, program)}"
        return
    reason = writable_by_others(path)
    if reason:
        # Running it to import a function would be the very thing to avoid.
        yield f"{where(key)}: {reason}"
        return
    if handler.python is not None:
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
