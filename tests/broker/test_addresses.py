"""A broker whose name has several addresses."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness.peer import Peer
from workerd.aio import complete
from workerd.broker import connection as connections
from workerd.broker import pika_patches
from workerd.broker.connection import Connection
from workerd.config import model
from workerd.config.url import BrokerURL
from workerd.errors import BrokerError

SILENT = "127.0.0.2"
NOBODY = "127.0.0.3"
PEER = "127.0.0.1"
#: Seconds for all addresses of a name; that is, for each of two half of them.
TCP_TIMEOUT = 0.5

Resolve = Callable[..., None]


@pytest.fixture
def broker(peer: Callable[..., Peer]) -> Peer:
    return peer()


@pytest.fixture
def silent(broker: Peer) -> Iterator[None]:
    """At the broker's port of this address every SYN is swallowed."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((SILENT, broker.port))
        listener.listen(0)
        # The kernel answers for as many as the backlog holds, and one more.
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((SILENT, broker.port))
        yield


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch, broker: Peer) -> Resolve:
    """Have every name stand for these addresses, tried in this order."""

    def stand_for(*addresses: str) -> None:
        records = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, broker.port))
            for address in addresses
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: records)
        monkeypatch.setattr(random, "sample", lambda found, _number: list(found))

    monkeypatch.setattr(pika_patches, "TCP_TIMEOUT", TCP_TIMEOUT)
    return stand_for


def connect(broker: Peer) -> str:
    """Connect to the name; the error, "" when there is none."""

    async def scenario() -> str:
        url = BrokerURL.parse(f"amqp://rabbit:{broker.port}")
        try:
            connection = await Connection.open(url, model.Broker(), "test", {})
        except BrokerError as error:
            return str(error)
        await connection.close(1.0)
        return ""

    return complete(scenario())


@pytest.mark.usefixtures("silent")
def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    broker: Peer, resolve: Resolve
) -> None:
    """The first address of a name swallows every SYN; with all of the time it would be the last."""
    resolve(SILENT, PEER)
    assert connect(broker) == ""


@pytest.mark.usefixtures("silent")
def test_of_several_addresses_each_is_named_with_what_became_of_it(
    broker: Peer, resolve: Resolve
) -> None:
    resolve(NOBODY, SILENT)
    refused, silent = (
        f"{NOBODY}: connection refused",
        f"{SILENT}: no answer to an attempt to connect",
    )
    assert connect(broker) == f"{refused}; {silent}"
    resolve(SILENT, NOBODY)
    assert connect(broker) == f"{silent}; {refused}"
    resolve(NOBODY)
    assert connect(broker) == "connection refused"


def test_an_address_that_takes_a_connection_and_says_nothing_is_named(
    broker: Peer, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT", 1.0)
    broker.silent = True
    resolve(NOBODY, PEER)
    assert connect(broker) == (f"{NOBODY}: connection refused; {PEER}: no AMQP answer within 1 s")


def test_addresses_come_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes a connection and then says nothing must not be the first for ever."""
    orders = set()

    class Recorder(pika_patches.Workflow):
        def _try_next_resolved_address(self) -> None:
            orders.add(tuple(self._addrinfo_iter))

    async def scenario() -> None:
        for _ in range(100):
            workflow: Any = Recorder()
            workflow._connection_configs = []
            workflow._on_getaddrinfo_async_done(["a", "b"])

    asyncio.run(scenario())
    assert orders == {("a", "b"), ("b", "a")}
