"""The program that a handler names: where it is looked for, and what keeps it from starting."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.harness.commands import (
    handler,
    in_loop,
    job,
    prepared,
    run,
    run_one,
)
from workerd.config.model import Handler
from workerd.core.job import Outcome, Report
from workerd.handlers.program import Program, find_program

PATH = {"PATH": os.defpath}


def test_a_program_is_looked_up_in_the_path_that_it_will_have(tmp_path: Path) -> None:
    program(tmp_path / "mine", "echo found")
    report = run(handler("mine", environment={"PATH": f"{tmp_path}:/bin"}), job()).report
    assert report.output == b"found\n"


def test_a_relative_program_is_found_from_its_working_directory(tmp_path: Path) -> None:
    program(tmp_path / "bin/here", "pwd")
    before = os.getcwd()
    report = run(handler("./bin/here", working_directory=tmp_path), job()).report
    assert report.output == f"{tmp_path}\n".encode()
    assert os.getcwd() == before


def test_a_relative_entry_of_the_path_counts_from_the_working_directory(tmp_path: Path) -> None:
    program(tmp_path / "bin/here", "pwd")
    options = {"working_directory": tmp_path, "environment": {"PATH": "/bin:bin"}}
    report = run(handler("here", **options), job()).report
    assert report.output == f"{tmp_path}\n".encode()


def test_without_a_working_directory_a_job_is_where_the_daemon_is() -> None:
    assert run(handler("pwd"), job()).report.output == f"{os.getcwd()}\n".encode()


def program(path: Path, script: str, interpreter: str = "/bin/sh") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{interpreter}\n{script}\n")
    path.chmod(0o755)
    return path


def missing(path: Path) -> None:
    path.unlink()


def not_executable(path: Path) -> None:
    path.chmod(0o644)


def without_interpreter(path: Path) -> None:
    path.write_text("#!/nowhere/sh\necho ran\n")


def without_shebang(path: Path) -> None:
    path.write_text("echo ran\n")


def empty(path: Path) -> None:
    path.write_text("")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    "broken",
    [
        missing,
        not_executable,
        without_interpreter,
        without_shebang,
        empty,
        a_directory,
        a_dangling_link,
    ],
)
def test_a_program_that_cannot_be_started_is_not_the_jobs_fault(
    tmp_path: Path, broken: Any
) -> None:
    path = program(tmp_path / "prog", "echo ran")
    command = handler(str(path))
    broken(path)

    async def scenario() -> tuple[Report, Report]:
        runs = prepared(command)
        never = asyncio.get_running_loop().create_future()
        refused = await run_one(runs, job(), never)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        program(path, "echo ran")
        return refused, await run_one(runs, job(), never)

    refused, done = in_loop(scenario())
    assert (refused.outcome, refused.reason) == (Outcome.UNAVAILABLE, "cannot-run")
    assert refused.error.startswith(f"cannot run {path}: ")
    assert (done.outcome, done.output) == (Outcome.DONE, b"ran\n")


def test_a_program_that_is_just_being_written_is_not_the_jobs_fault(tmp_path: Path) -> None:
    path = tmp_path / "prog"
    shutil.copy("/bin/true", path)
    with path.open("ab"):
        report = run(handler(str(path)), job()).report
    assert (report.outcome, report.error) == (
        Outcome.UNAVAILABLE,
        f"cannot run {path}: Text file busy",
    )
    assert run(handler(str(path)), job()).report.outcome is Outcome.DONE


def test_a_program_that_moved_within_the_path_is_found_again(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    path = program(old / "prog", "echo ran")
    command = handler("prog", environment={"PATH": f"{old}:{new}:/bin"})

    async def scenario() -> list[Outcome]:
        runs = prepared(command)
        never = asyncio.get_running_loop().create_future()
        before = await run_one(runs, job(), never)
        new.mkdir()
        path.rename(new / "prog")
        # The first attempt finds out; it is made again after a pause.
        between = await run_one(runs, job(), never)
        return [before.outcome, between.outcome, (await run_one(runs, job(), never)).outcome]

    outcomes = in_loop(scenario())
    assert outcomes == [Outcome.DONE, Outcome.UNAVAILABLE, Outcome.DONE]


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_missing_working_directory_is_not_the_jobs_fault(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "a file":
        place.touch()
    before = os.getcwd()
    report = run(handler("true", working_directory=place), job()).report
    assert (report.outcome, report.reason) == (Outcome.UNAVAILABLE, "cannot-run")
    assert report.error.startswith(f"cannot run true in {place}: ")
    assert os.getcwd() == before


# The look-up alone, by which `workerd check` judges.


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "bin" / "script"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def configured(directory: Path | None, path: str) -> Handler:
    return Handler("x", working_directory=directory, environment={"PATH": path})


def test_a_relative_entry_of_path_counts_from_the_working_directory(script: Path) -> None:
    assert find_program(configured(script.parent.parent, "bin"), "script", PATH) == script
    # An empty one is the directory itself.
    assert find_program(configured(script.parent, "/nowhere:"), "script", PATH) == script


def test_a_relative_program_counts_from_the_working_directory(script: Path) -> None:
    assert find_program(configured(script.parent.parent, "/bin"), "bin/script", PATH) == script
    assert find_program(configured(script.parent, "/bin"), "./missing", PATH) is None


def test_only_a_file_that_can_be_executed_is_a_program(script: Path) -> None:
    (script.parent / "folder").mkdir()
    script.chmod(0o644)
    for name in ("script", "folder", "missing"):
        assert find_program(configured(None, str(script.parent)), name, PATH) is None


def test_what_is_launched_is_what_was_found_and_is_looked_for_anew_when_it_fails(
    script: Path,
) -> None:
    program = Program("script", configured(script.parent.parent, "bin"), PATH)
    assert program.path == os.fsencode(script)
    script.unlink()
    text = program.cannot_run(OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
    assert text == f"cannot run script in {script.parent.parent}: No such file or directory"
    assert program.path == b"script"
