"""Where the files of an instance are, also for users without a home."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from workerd import paths
from workerd.errors import SettingsError


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make us a user without HOME, without an entry in passwd, and without rights."""

    def unknown(_uid: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "access", lambda *_: False)


@pytest.mark.usefixtures("homeless")
def test_a_default_that_is_not_used_is_not_computed() -> None:
    given = {"RUNTIME_DIRECTORY": "/r:/second", "STATE_DIRECTORY": "/s"}
    assert paths.runtime_directory(given) == Path("/r")
    assert paths.state_directory(given) == Path("/s")
    assert paths.runtime_directories(given) == [Path("/r")]
    own = {"XDG_RUNTIME_DIR": "/xr", "XDG_STATE_HOME": "/xs"}
    assert paths.runtime_directory(own) == Path("/xr/workerd")
    assert paths.state_directory(own) == Path("/xs/workerd")
    # Who only looks for instances needs no folder of their own.
    assert paths.runtime_directories({}) == [Path("/run/workerd")]


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_remedy_is_named() -> None:
    with pytest.raises(SettingsError, match="has no home: set HOME, or RUNTIME_DIRECTORY"):
        paths.runtime_directory({})
    with pytest.raises(SettingsError, match="has no home: set HOME, or STATE_DIRECTORY"):
        paths.state_directory({})


@pytest.mark.parametrize("name", ["1", "a.b-c_D", "..."])
def test_the_name_of_an_instance_is_plain_text(name: str) -> None:
    assert paths.is_instance(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "\x1b[31m", "x" * 33, "1\n"])
def test_any_other_name_is_none(name: str) -> None:
    assert not paths.is_instance(name)
