"""A wall clock that jumps, for the processes that are started with it, and for nobody else.

The monotonic clock goes on as it is.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.harness.processes import MissingTool

# Not with libfaketime, with whose 0.9.10 Python's sleep fails unless the monotonic clock jumps too.
DAEMON = """
import runpy, sys, time
path = sys.argv.pop(1)
clock, clock_ns = time.time, time.time_ns
def offset():
    with open(path) as file:
        return int(file.read())
time.time = lambda: clock() + offset()
time.time_ns = lambda: clock_ns() + offset() * 10**9
runpy.run_module("workerd", run_name="__main__", alter_sys=True)
"""


class Clock:
    """A wall clock, right until `jump`. What it needs is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offset = folder / "clock"
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """From now on it differs by so much from the true time."""
        # In one step: whoever looks meanwhile must not find an empty file.
        new = self._offset.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(self._offset)

    def daemon(self, config: Path) -> list[str | Path]:
        """The command of a daemon that goes by this clock."""
        return [sys.executable, "-c", DAEMON, self._offset, "run", "--config", config]

    def program(self, folder: Path | str) -> dict[str, str]:
        """The environment of any other program that goes by it, and sees the folder as `folder`."""
        libraries = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not libraries:
            raise MissingTool("libfaketime is not installed")
        shutil.copy(libraries[0], self._folder / "libfaketime.so")
        return {
            "LD_PRELOAD": f"{folder}/libfaketime.so",
            "FAKETIME_TIMESTAMP_FILE": f"{folder}/{self._offset.name}",
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
