"""What root reads, writes and asks in the folder of an instance, where a job can plant things."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.hostile import HostileInstance
from tests.harness.waiting import TIMEOUT
from workerd.control import client, instances, protocol
from workerd.daemon import rundir
from workerd.errors import SettingsError

SECRET = "root:secret"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def folder(runtime: Path) -> Path:
    (runtime / "9").mkdir(parents=True)
    (runtime / "9" / "lock").touch()
    return runtime / "9"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    return file


def big(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(1 << 40)


PLANTS: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda file, secret: file.symlink_to(secret),
    "a link to a device": lambda file, _: file.symlink_to("/dev/zero"),
    "a FIFO": lambda file, _: os.mkfifo(file),
    "a folder": lambda file, _: file.mkdir(),
    "a terabyte": lambda file, _: big(file),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", [instances.FAILURE, "lock", protocol.SOCKET])
def test_whatever_is_planted_in_a_folder_is_neither_followed_nor_waited_for(
    folder: Path, secret: Path, name: str, plant: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    PLANTS[plant](folder / name, secret)
    found = instances.state("9", folder)
    assert found["state"] in ("stopped", "died", "failed")
    assert SECRET not in str(found)
    assert len(found["why"] or "") <= instances.MAX_FAILURE


def test_a_link_in_the_place_of_a_folder_is_not_entered(runtime: Path, tmp_path: Path) -> None:
    other = HostileInstance(tmp_path / "other")
    (tmp_path / "other" / instances.FAILURE).write_text(SECRET)
    runtime.mkdir()
    (runtime / "9").symlink_to(tmp_path / "other")
    try:
        (found,) = instances.states(None)
        assert (found["state"], found["why"]) == ("stopped", None)
    finally:
        other.close()


def test_a_socket_of_others_is_not_asked_through_a_link(folder: Path, tmp_path: Path) -> None:
    other = HostileInstance(tmp_path / "other")
    (folder / protocol.SOCKET).symlink_to(tmp_path / "other" / protocol.SOCKET)
    try:
        with pytest.raises(protocol.NoAnswer, match="Socket operation on non-socket"):
            client.ask(folder, {"request": "health"})
    finally:
        other.close()


def test_an_answer_without_end_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MAX_ANSWER", 1 << 16)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        sent = theirs.send(b"x" * (1 << 18))
        assert sent > 1 << 16
        with pytest.raises(protocol.NoAnswer, match="without end"):
            client._read_line(ours, time.monotonic() + TIMEOUT)


@pytest.mark.parametrize("plant", [name for name in PLANTS if name != "a terabyte"])
def test_why_an_instance_failed_is_written_through_no_link(
    folder: Path, secret: Path, plant: str
) -> None:
    PLANTS[plant](folder / instances.FAILURE, secret)
    rundir.failed("9", "because", ours=True)
    assert secret.read_text() == SECRET
    if plant != "a folder":
        assert (folder / instances.FAILURE).read_text() == "because\n"
        assert stat.S_IMODE((folder / instances.FAILURE).stat().st_mode) == 0o640


def test_a_lock_is_made_through_no_link(folder: Path, tmp_path: Path) -> None:
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(tmp_path / "made")
    rundir.failed("9", "because", ours=True)
    with pytest.raises(SettingsError, match="9/lock: Too many levels of symbolic links"):
        rundir.lock("9")
    assert not (tmp_path / "made").exists()


def test_a_link_in_the_place_of_a_folder_opens_no_other_to_everybody(
    runtime: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    runtime.mkdir()
    (runtime / "9").symlink_to(tmp_path / "home")
    rundir.failed("9", "because", ours=True)
    with pytest.raises(SettingsError):
        rundir.lock("9")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert [*(tmp_path / "home").iterdir()] == []
