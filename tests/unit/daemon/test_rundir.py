"""The folder of a running instance."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workerd.control.instances import FAILURE, MAX_FAILURE
from workerd.daemon import rundir
from workerd.errors import SettingsError
from workerd.paths import entered, is_locked


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path / "run" / "1"


def test_an_instance_is_held_by_one_daemon_until_that_ends(folder: Path) -> None:
    lock = rundir.lock("1")
    with entered(folder) as inside:
        assert is_locked(inside, "lock")
        with pytest.raises(SettingsError, match="already running on this host"):
            rundir.lock("1")
        os.close(lock)
        assert not is_locked(inside, "lock")
    os.close(rundir.lock("1"))


def test_others_may_enter_the_folder_whatever_our_umask_is(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        os.close(rundir.lock("1"))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_why_it_failed_is_there_until_it_runs(folder: Path) -> None:
    rundir.failed("1", "x" * 2 * MAX_FAILURE, ours=False)
    assert (folder / FAILURE).read_text() == "x" * MAX_FAILURE + "\n"
    assert (folder / "lock").exists()
    rundir.well(folder)
    rundir.well(folder)
    assert not (folder / FAILURE).exists()


def test_a_second_daemon_does_not_speak_for_the_first(folder: Path) -> None:
    lock = rundir.lock("1")
    rundir.failed("1", "already running", ours=False)
    assert not (folder / FAILURE).exists()
    rundir.failed("1", "a bug", ours=True)
    assert (folder / FAILURE).read_text() == "a bug\n"
    os.close(lock)


@pytest.mark.parametrize("name", [".", "..", "a/b", "../1"])
def test_a_name_that_is_none_leaves_nothing(folder: Path, name: str) -> None:
    rundir.failed(name, "bad name", ours=False)
    assert not folder.parent.exists()
