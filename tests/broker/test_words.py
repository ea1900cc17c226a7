"""What cannot be done at a broker is said with who, what and how to mend it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika.exceptions
import pytest

from tests.harness.peer import Peer
from tests.harness.programs import SUBMIT, WORKERD, run
from tests.harness.tables import private
from workerd.broker.errors import diagnose
from workerd.errors import ErrorKind

CONFIG = '[broker]\nurls = ["{url}"]\n[handlers.sleep]\ncommand = ["sleep", "1"]\n'


class HangsUp(Peer):
    """Ends each connection at the login."""

    def handle(self, connection: Any, number: int, method: Any) -> None:
        connection.drop()


@pytest.fixture
def external() -> Iterator[Peer]:
    peer = Peer()
    peer.mechanisms = "EXTERNAL"
    yield peer
    peer.close()


def test_a_broker_without_plain_is_a_refusal_with_its_remedy(
    tmp_path: Path, external: Peer
) -> None:
    config = private(tmp_path, CONFIG.format(url=external.url))
    sent = run([*SUBMIT, "--direct", "--config", config, "sleep", "1"])
    expected = f"127.0.0.1:{external.port}: the broker takes no password: add PLAIN to its "
    assert (sent.status, sent.stderr.startswith(f"submit: {expected}")) == (77, True), sent
    checked = run([*WORKERD, "check", "--connect", "--config", config])
    assert (checked.status, "add PLAIN to its auth_mechanisms" in checked.stderr) == (78, True)


def test_a_broker_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = private(tmp_path, CONFIG.format(url=f"amqp://127.0.0.1:{port}"))
    commands: list[list[str | Path]] = [
        [*SUBMIT, "--direct", "--timeout", "3", "--config", config, "sleep", "1"],
        [*WORKERD, "queues", "--config", config],
        [*WORKERD, "dead", "list", "default", "--config", config],
        [*WORKERD, "setup", "--config", config],
    ]
    for words in commands:
        result = run(words)
        assert result.status == 69
        assert result.stderr.endswith(f": 127.0.0.1:{port}: connection refused\n")


RESET = "ConnectionResetError(104, 'Connection reset by peer')"


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (pika.exceptions.AuthenticationError("PLAIN"), "takes no password", ErrorKind.REFUSED),
        (pika.exceptions.NoFreeChannels(), "raise its channel_max", ErrorKind.AWAY),
        (
            pika.exceptions.StreamLostError(f"Stream connection lost: {RESET}"),
            "connection lost: connection reset by peer",
            ErrorKind.AWAY,
        ),
        (
            pika.exceptions.IncompatibleProtocolError(f'StreamLostError: ("lost: {RESET}",)'),
            "connection lost: connection reset by peer",
            ErrorKind.AWAY,
        ),
        (
            pika.exceptions.StreamLostError("Transport indicated EOF"),
            "connection lost: Transport indicated EOF",
            ErrorKind.AWAY,
        ),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused", ErrorKind.AWAY),
    ],
)
def test_no_bare_word_of_a_library_is_the_message(
    error: Exception, text: str, kind: ErrorKind
) -> None:
    found = diagnose(error)
    assert text in str(found)
    assert found.kind is kind
    assert "Error" not in str(found)
    assert len(str(found).split()) > 1
