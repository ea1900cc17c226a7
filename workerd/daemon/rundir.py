"""The folder of a running instance: the lock, the socket, why the last one failed."""

from __future__ import annotations

import contextlib
import grp
import os
from pathlib import Path

from workerd.control import protocol
from workerd.control.instances import _MAX_FAILURE, FAILURE, _is_held


def make_folder(folder: Path) -> None:
    """The runtime folder of an instance, which others may enter whatever our umask is.

    What is in it is guarded by itself. Raises OSError.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # somebody else's
        folder.chmod(0o755)


def failed(folder: Path, why: str, ours: bool) -> None:
    """Leave word of why an instance does not run; where that cannot be, nobody is told.

    Unless its lock is ``ours``, another process may run under its name: then it does run.
    """
    with contextlib.suppress(OSError):
        make_folder(folder)
        lock = folder / "lock"
        if ours or not _is_held(lock):
            (folder / FAILURE).write_text(why[:_MAX_FAILURE] + "\n")
            _show(folder / FAILURE)
            # It is the lock that makes it an instance, for those who look.
            lock.touch(mode=0o600)


def _show(file: Path) -> None:
    """Let those read it who may look."""
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(file, -1, grp.getgrnam(protocol.GROUP).gr_gid)
    file.chmod(0o640)


def well(folder: Path) -> None:
    """It runs: what was is forgotten."""
    with contextlib.suppress(OSError):
        os.unlink(folder / FAILURE)
