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
from workerd.paths import entered, is_instance, is_locked, open_file, runtime_directory


def make_folder(folder: Path) -> None:
    """The runtime folder of an instance, which others may enter whatever our umask is.

    What is in it is guarded by itself. Raises OSError.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Of a link in its place, the target must not be opened to everybody.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with contextlib.suppress(PermissionError):  # somebody else's
        os.fchmod(descriptor, 0o755)
    os.close(descriptor)


def lock(instance: str) -> int:
    """Hold the instance's name on this host, for as long as the returned descriptor is open.

    Raises SettingsError when another daemon holds it, or the folder cannot be made.
    """
    try:
        path = runtime_directory() / instance / "lock"
        make_folder(path.parent)
        with entered(path.parent) as inside:
            descriptor = open_file(inside, path.name, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise SettingsError(f"{path.parent / str(error.filename)}: {error.strerror}") from None
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
        with entered(folder) as inside:
            # It is the lock that makes it an instance, for those who look.
            lock = open_file(inside, "lock", os.O_RDWR | os.O_CREAT)
            os.close(lock)
            if ours or not is_locked(inside, "lock"):
                _write(inside, why[:MAX_FAILURE] + "\n")


def _write(inside: int, why: str) -> None:
    # A new file: what is there may be a link, or somebody else's.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(FAILURE, dir_fd=inside)
    descriptor = open_file(inside, FAILURE, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with open(descriptor, "w", errors="backslashreplace") as file:
        file.write(why)
        # Members of the group may look at instances.
        with contextlib.suppress(KeyError, PermissionError):
            os.fchown(descriptor, -1, grp.getgrnam(protocol.GROUP).gr_gid)
        os.fchmod(descriptor, 0o640)


def well(folder: Path) -> None:
    """The instance runs: why it did not before is forgotten."""
    with contextlib.suppress(OSError), entered(folder) as inside:
        os.unlink(FAILURE, dir_fd=inside)
