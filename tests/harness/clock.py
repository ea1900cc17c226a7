"""A wall clock that jumps, for the processes that are started with it, and for nobody else.

By Debian's libfaketime. The monotonic clock goes on as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .processes import MissingTool


class Clock:
    """A wall clock, right until `jump`. What it needs is in `folder`."""

    def __init__(self, folder: Path) -> None:
        libraries = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not libraries:
            raise MissingTool("libfaketime is not installed")
        # A copy, for those that see this folder and no other of this machine.
        shutil.copy(libraries[0], folder / "libfaketime.so")
        self._offset = folder / "clock"
        self.jump(0)

    def env(self, folder: Path | str) -> dict[str, str]:
        """The environment of a process that sees the folder under this name."""
        return {
            "LD_PRELOAD": f"{folder}/libfaketime.so",
            "FAKETIME_TIMESTAMP_FILE": f"{folder}/clock",
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: int) -> None:
        """From now on it differs by so much from the true time."""
        # In one step: whoever looks meanwhile must not find an empty file.
        new = self._offset.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(self._offset)
