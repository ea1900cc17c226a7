"""Where the files of a running instance are: its lock, its socket, its run log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from workerd.errors import SettingsError

_RUNTIME = "/run/workerd"
_STATE = "/var/lib/workerd"


def is_instance(name: str) -> bool:
    """Whether an instance may have this name, which is one step of a path and plain text."""
    return re.fullmatch(r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,32}", name) is not None


def runtime_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where locks and sockets are: systemd's $RUNTIME_DIRECTORY, else /run/workerd when that is
    ours to write, else $XDG_RUNTIME_DIR/workerd. Raises SettingsError without a home.
    """
    return _directory(environ.get("RUNTIME_DIRECTORY"), _RUNTIME, lambda: _own_runtime(environ))


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where run logs are: systemd's $STATE_DIRECTORY, else /var/lib/workerd when that
    is ours to write, else $XDG_STATE_HOME/workerd. Raises SettingsError without a home.
    """
    return _directory(environ.get("STATE_DIRECTORY"), _STATE, lambda: _own_state(environ))


def runtime_directories(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where to look for instances that run, whoever started them."""
    given = environ.get("RUNTIME_DIRECTORY")
    if given:
        return [Path(given.split(":")[0])]
    # Who has no home has no instances there.
    with contextlib.suppress(SettingsError):
        return [Path(_RUNTIME), Path(_own_runtime(environ), "workerd")]
    return [Path(_RUNTIME)]


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on this file or folder, which must exist. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _own_runtime(environ: Mapping[str, str]) -> str:
    return environ.get("XDG_RUNTIME_DIR") or _home_state("RUNTIME_DIRECTORY")


def _own_state(environ: Mapping[str, str]) -> str:
    return environ.get("XDG_STATE_HOME") or _home_state("STATE_DIRECTORY")


def _home_state(variable: str) -> str:
    try:
        return str(Path.home() / ".local/state")
    except RuntimeError:
        text = f"user {os.getuid()} has no home: set HOME, or {variable} to a folder to write in"
        raise SettingsError(text) from None


def _directory(given: str | None, system: str, own: Callable[[], str]) -> Path:
    if given:
        return Path(given.split(":")[0])
    base = Path(system)
    if os.access(base if base.is_dir() else base.parent, os.W_OK):
        return base
    return Path(own(), "workerd")
