"""Where a handler's program is looked for: by `workerd check` and by the launcher alike."""

import errno
import os
from pathlib import Path

import pytest

from workerd.config.model import Handler
from workerd.handlers.program import Program, find_program

PATH = {"PATH": os.defpath}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "bin" / "script"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def handler(directory: Path | None, path: str) -> Handler:
    return Handler("x", working_directory=directory, environment={"PATH": path})


def test_a_relative_entry_of_path_counts_from_the_working_directory(script: Path) -> None:
    assert find_program(handler(script.parent.parent, "bin"), "script", PATH) == script
    # An empty one is the directory itself.
    assert find_program(handler(script.parent, "/nowhere:"), "script", PATH) == script


def test_a_relative_program_counts_from_the_working_directory(script: Path) -> None:
    assert find_program(handler(script.parent.parent, "/bin"), "bin/script", PATH) == script
    assert find_program(handler(script.parent, "/bin"), "./missing", PATH) is None


def test_only_a_file_that_can_be_executed_is_a_program(script: Path) -> None:
    (script.parent / "folder").mkdir()
    script.chmod(0o644)
    for name in ("script", "folder", "missing"):
        assert find_program(handler(None, str(script.parent)), name, PATH) is None


def test_what_is_launched_is_what_was_found_and_is_looked_for_anew_when_it_fails(
    script: Path,
) -> None:
    program = Program("script", handler(script.parent.parent, "bin"), PATH)
    assert program.path == os.fsencode(script)
    script.unlink()
    text = program.cannot_run(OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
    assert text == f"cannot run script in {script.parent.parent}: No such file or directory"
    assert program.path == b"script"
