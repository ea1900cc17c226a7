"""The program that a handler names: where it is, its environment, its working directory."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from workerd.config.model import Handler

#: What the kernel's own words leave out.
_HINTS = {errno.EAGAIN: ": no process is left (TasksMax=, ulimit -u)"}

_PRIVATE = re.compile(
    "NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|JOURNAL_STREAM|INVOCATION_ID|CREDENTIALS_DIRECTORY"
    "|.*_DIRECTORY|WORKERD_BROKER_URL|WORKERD_.*"
)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The daemon's environment without its secrets and without what systemd gave it alone."""
    return {name: value for name, value in environ.items() if not _PRIVATE.fullmatch(name)}


def find_program(handler: Handler, name: str, environ: Mapping[str, str]) -> Path | None:
    """The executable file that ``name`` means to a process of this handler, None without one.

    The PATH is that of the process; what is relative counts from the working directory.
    """
    directory = handler.working_directory or Path()
    if "/" in name:
        return _executable(directory / name)
    search = os.get_exec_path({**environ, **handler.environment})
    return next(filter(None, (_executable(directory / place / name) for place in search)), None)


def _executable(path: Path) -> Path | None:
    return path if os.path.isfile(path) and os.access(path, os.X_OK) else None


class Program:
    """A program of a handler's.

    ``path`` is where it was when it was last looked for, ``environment`` what every one of
    its processes gets, ``directory`` where they start; None: where the daemon is.
    """

    def __init__(self, name: str, settings: Handler, environ: Mapping[str, str]) -> None:
        inherited = clean_environment(environ).items()
        # What comes from a message or the configuration is UTF-8, in whatever locale we run.
        self.environment = {os.fsencode(name): os.fsencode(value) for name, value in inherited} | {
            name.encode(): value.encode() for name, value in settings.environment.items()
        }
        self.directory = str(settings.working_directory) if settings.working_directory else None
        self._name = name
        self._settings = settings
        self._environ = environ
        self.path = self._find()

    def cannot_run(self, error: OSError) -> str:
        """Why it could not be started. The next time it is looked for anew."""
        self.path = self._find()  # it may have moved: a deploy, another PATH entry
        where = f" in {self.directory}" if self.directory else ""
        hint = _HINTS.get(error.errno or 0, "")
        return f"cannot run {self._name}{where}: {error.strerror}{hint}"

    def _find(self) -> bytes:
        found = find_program(self._settings, self._name, self._environ)
        return self._name.encode() if found is None else os.fsencode(found)
