"""Virtual environments of Pythons that are not the one that runs the tests."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from tests.harness import trixie
from tests.harness.processes import MissingTool

TRIXIE = "Debian 13's"


@functools.cache
def others() -> list[str]:
    """What `environment` takes: the oldest and the newest other one, and that of Debian 13."""
    folders = [*map(Path, os.get_exec_path()), *Path(sys.base_prefix).parent.glob("*/bin")]
    found: dict[int, str] = {}
    for minor in range(8, 20):
        for folder in folders:
            program = folder / f"python3.{minor}"
            if minor != sys.version_info.minor and minor not in found and _works(program):
                found[minor] = str(program)
    chosen = sorted({min(found), max(found)}) if found else []
    return [*(found[minor] for minor in chosen), TRIXIE]


def _works(program: Path) -> bool:
    if not os.access(program, os.X_OK):
        return False
    asked = "import ensurepip, venv"
    return subprocess.run([program, "-c", asked], capture_output=True, check=False).returncode == 0


def environment(python: str, folder: Path) -> Path:
    """Make a virtual environment in a folder, without pip; returns its interpreter."""
    if python != TRIXIE:
        subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
        return folder / "bin" / "python"
    # As a symbolic link it would be given this system's C library, which is too old for it.
    usr = trixie.root() / "usr"
    programs = sorted((usr / "bin").glob("python3.[0-9]*"))
    loaders = sorted((usr / "lib").glob("*/ld-linux*.so.*"))
    if not programs or not loaders:
        raise MissingTool(f"no Python in {trixie.root()}")
    (folder / "bin").mkdir(parents=True)
    (folder / "lib" / programs[0].name / "site-packages").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text(f"home = {usr / 'bin'}\n")
    interpreter = folder / "bin" / "python"
    interpreter.write_text(
        f'#!/bin/sh\nexec {loaders[0]} --library-path {loaders[0].parent} --argv0 "$0"'
        f' {programs[0]} "$@"\n'
    )
    interpreter.chmod(0o755)
    return interpreter
