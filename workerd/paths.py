"""Where the files of a running instance are: its lock, its socket, its run log."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Mapping
from pathlib import Path

_RUNTIME = "/run/workerd"
_STATE = "/var/lib/workerd"


def is_instance(name: str) -> bool:
    """Whether an instance may have this name, which is one step of a path and plain text."""
    return re.fullmatch(r"(?!\.{1,2}\Z)[A-Za-z0-9_.-]{1,32}", name) is not None


def runtime_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where locks and sockets are: systemd's $RUNTIME_DIRECTORY, else /run/workerd when that is
    ours to write, else $XDG_RUNTIME_DIR/workerd.
    """
    return _directory(environ.get("RUNTIME_DIRECTORY"), _RUNTIME, _own_runtime(environ))


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where run logs are: systemd's $STATE_DIRECTORY, else /var/lib/workerd when that
    is ours to write, else $XDG_STATE_HOME/workerd.
    """
    own = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return _directory(environ.get("STATE_DIRECTORY"), _STATE, own)


def runtime_directories(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where to look for instances that run, whoever started them."""
    given = environ.get("RUNTIME_DIRECTORY")
    places = [given.split(":")[0]] if given else [_RUNTIME, f"{_own_runtime(environ)}/workerd"]
    return [Path(place) for place in places]


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
    return environ.get("XDG_RUNTIME_DIR") or str(Path.home() / ".local/state")


def _directory(given: str | None, system: str, own: str) -> Path:
    if given:
        return Path(given.split(":")[0])
    base = Path(system)
    if os.access(base if base.is_dir() else base.parent, os.W_OK):
        return base
    return Path(own, "workerd")
