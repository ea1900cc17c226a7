"""What pika is told of a broker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from workerd import __version__
from workerd.broker.parameters import parameters
from workerd.config.model import TLS, Broker
from workerd.config.url import BrokerURL
from workerd.errors import BrokerError, ErrorKind

URL = BrokerURL.parse("amqp://me:secret@rabbit.example:5673/jobs")


def test_address_login_and_name_come_from_the_url() -> None:
    found = parameters(URL, Broker(), "workerd@1", {})
    assert (found.host, found.port, found.virtual_host) == ("rabbit.example", 5673, "jobs")
    assert (found.credentials.username, found.credentials.password) == ("me", "secret")
    assert found.client_properties == {
        "connection_name": "workerd@1",
        "product": "workerd",
        "version": __version__,
    }
    assert found.ssl_options is None


@pytest.mark.parametrize(("heartbeat", "seconds"), [(0.2, 1), (30.0, 30)])
def test_a_write_ends_when_the_heartbeat_would_have_noticed(heartbeat: float, seconds: int) -> None:
    found = parameters(URL, Broker(heartbeat=heartbeat), "n", {})
    assert found.heartbeat == seconds
    assert found.tcp_options["TCP_USER_TIMEOUT"] == 2000 * seconds


def test_a_password_file_that_cannot_be_read_refuses_the_login(tmp_path: Path) -> None:
    broker = Broker(password_file=tmp_path / "none")
    with pytest.raises(BrokerError, match=str(tmp_path / "none")) as caught:
        parameters(BrokerURL.parse("amqp://me@h"), broker, "n", {})
    assert caught.value.kind is ErrorKind.REFUSED


@pytest.mark.parametrize("key", ["ca_file", "cert_file"])
def test_a_tls_file_that_cannot_be_read_is_named(tmp_path: Path, key: str) -> None:
    broker = Broker(tls=replace(TLS(), **{key: tmp_path / "none"}))  # type: ignore[arg-type]
    with pytest.raises(BrokerError, match=str(tmp_path / "none")) as caught:
        parameters(BrokerURL.parse("amqps://me:x@h"), broker, "n", {})
    assert caught.value.kind is ErrorKind.REFUSED


def test_the_peers_name_may_differ_from_the_address() -> None:
    url = BrokerURL.parse("amqps://me:x@10.0.0.1")
    found = parameters(url, Broker(tls=TLS(server_name="rabbit")), "n", {})
    assert found.ssl_options.server_hostname == "rabbit"
    assert parameters(url, Broker(), "n", {}).ssl_options.server_hostname == "10.0.0.1"
