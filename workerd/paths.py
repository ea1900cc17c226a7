"""Where the files of a running instance are: its lock, its socket, its run log."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
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


@contextlib.contextmanager
def entered(folder: Path) -> Iterator[int]:
    """A descriptor of an instance's folder, where jobs can write; not of a link in its place.

    Raises OSError.
    """
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(folder: int, name: str, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of an entered folder: whoever put it there cannot make us follow a
    link, wait for a FIFO or read a device. Raises OSError.
    """
    safely = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags | safely, 0o600, dir_fd=folder)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", name)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on this folder, which must exist. Raises OSError."""
    return _holds(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def is_locked(folder: int, name: str) -> bool:
    """Whether a process holds the lock on a file of an entered folder. Raises OSError."""
    return _holds(open_file(folder, name))


def _holds(descriptor: int) -> bool:
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
