"""Where the password of a broker comes from, and which files are refused."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from workerd.config.load import load
from workerd.config.model import Broker
from workerd.config.passwords import password_for
from workerd.config.url import BrokerURL, Secret
from workerd.errors import SettingsError

Write = Callable[..., Path]

URL = BrokerURL.parse("amqp://jobs@rabbit1")


def test_the_password_in_the_url_comes_first(tmp_path: Path) -> None:
    broker = Broker(password_file=tmp_path / "absent")
    assert password_for(broker, BrokerURL.parse("amqp://u:own@h"), {}) == Secret("own")


def test_the_password_file_is_read_every_time(write: Write) -> None:
    file = write(" first \n", "password")
    broker = Broker(password_file=file)
    assert password_for(broker, URL, {}) == Secret(" first ")
    file.write_text("second\n\n")
    assert password_for(broker, URL, {}) == Secret("second\n")


def test_the_credential_of_systemd_is_used_without_a_password_file(tmp_path: Path) -> None:
    (tmp_path / "broker-password").write_text("sealed\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert password_for(Broker(), URL, environ) == Secret("sealed")


def test_guest_has_a_password_that_everybody_knows(tmp_path: Path) -> None:
    environ: Mapping[str, str] = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert password_for(Broker(), BrokerURL(), environ) == Secret("guest")


def test_without_a_password_the_remedy_is_named() -> None:
    with pytest.raises(SettingsError, match=r"no password for amqp://jobs@.*password_file"):
        password_for(Broker(), URL, {})


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"s3cret\n", 0o644, "everyone can read: chmod o-r"),
        (b"\n", 0o600, "empty"),
        (b"s3cret\xff", 0o600, "not UTF-8"),
    ],
)
def test_an_unusable_password_file_is_refused(
    write: Write, content: bytes, mode: int, reason: str
) -> None:
    file = write("", "password", mode)
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=reason) as caught:
        password_for(Broker(password_file=file), URL, {})
    assert "s3cret" not in str(caught.value)


def test_a_missing_password_file_is_no_problem_until_it_is_needed(write: Write, etc: Path) -> None:
    write('[broker]\npassword_file = "/nowhere/password"\n')
    broker = load(etc=etc, environ={}).broker
    with pytest.raises(SettingsError, match="/nowhere/password: No such file"):
        password_for(broker, URL, {})


def test_the_marks_of_an_editor_are_no_part_of_a_password(write: Write) -> None:
    file = write("", "password")
    file.write_bytes(b"\xef\xbb\xbfs3cret\r\n")
    assert password_for(Broker(password_file=file), URL, {}) == Secret("s3cret")
