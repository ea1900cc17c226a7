"""The folder of a running instance: the lock, the socket, why the last one failed."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
from pathlib import Path

from workerd.control import protocol
from workerd.control.instances import FAILURE, MAX_FAILURE
from workerd.errors import SettingsError
from workerd.paths import is_held, is_instance, runtime_directory


def make_folder(folder: Path) -> None:
    """The runtime folder of an instance, which others may enter whatever our umask is.

    What is in it is guarded by itself. Raises OSError.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # somebody else's
        folder.chmod(0o755)


def lock(instance: str) -> int:
    """Hold the instance's name on this host, for as long as the returned descriptor is open.

    Raises SettingsError when another daemon holds it, or the folder cannot be made.
    """
    try:
        path = runtime_directory() / instance / "lock"
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError(
            f"instance {instance} is already running on this host (it holds {path}); "
            "give this one another --instance NAME"
        ) from None
    return descriptor


def failed(instance: str, why: str, ours: bool) -> None:
    """Leave word of why an instance does not run, for `workerd status`, where that can be.

    Unless its lock is ``ours``, another process may run under its name: then it does run.
    """
    if not is_instance(instance):
        return
    # Without a home there is no folder to write in.
    with contextlib.suppress(OSError, SettingsError):
        folder = runtime_directory() / instance
        make_folder(folder)
        lock = folder / "lock"
        if ours or not (lock.exists() and is_held(lock)):
            (folder / FAILURE).write_text(why[:MAX_FAILURE] + "\n")
            _show(folder / FAILURE)
            # It is the lock that makes it an instance, for those who look.
            lock.touch(mode=0o600)


def _show(file: Path) -> None:
    """Let members of the group read it, who may look at instances."""
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(file, -1, grp.getgrnam(protocol.GROUP).gr_gid)
    file.chmod(0o640)


def well(folder: Path) -> None:
    """The instance runs: why it did not before is forgotten."""
    with contextlib.suppress(OSError):
        os.unlink(folder / FAILURE)
