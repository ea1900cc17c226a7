"""The server that answers scrapes: how many it serves, and when it ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness.waiting import TIMEOUT, until
from workerd.cli.metrics_http import MOST_CLIENTS, Server

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def application(_environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"figures"]


@pytest.fixture
def server() -> Iterator[Server]:
    listening = socket.create_server(("127.0.0.1", 0))
    with Server(listening, application) as server:
        yield server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(server.socket.getsockname(), timeout=TIMEOUT)


def test_it_answers_and_then_it_is_idle(server: Server) -> None:
    with connect(server) as client:
        client.sendall(REQUEST)
        server.handle_request()
        assert client.makefile("rb").read().endswith(b"figures")
    assert not server.idle
    server.timeout = 0

    def idle() -> bool:
        server.handle_request()
        return server.idle

    until(idle, "nobody is there any more")


def test_it_is_not_idle_while_a_client_is_there(server: Server) -> None:
    with connect(server):
        server.handle_request()
        server.timeout = 0
        server.handle_request()
        assert not server.idle


def test_one_client_too_many_costs_the_first_its_place(server: Server) -> None:
    clients = [connect(server) for _ in range(MOST_CLIENTS)]
    for _ in clients:
        server.handle_request()
    with connect(server) as late:
        server.handle_request()
        assert clients[0].recv(1) == b""
        late.sendall(REQUEST)
        assert late.makefile("rb").read().endswith(b"figures")
    # The others have kept theirs.
    for client in clients[1:]:
        client.sendall(REQUEST)
        assert client.makefile("rb").read().endswith(b"figures")
    for client in clients:
        client.close()


def test_a_client_that_goes_away_is_no_news(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(threading.enumerate())
    client = connect(server)
    client.sendall(b"GET /met")
    server.handle_request()
    # Its end is a reset.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    until(lambda: before.issuperset(threading.enumerate()), "its thread has ended")
    assert capsys.readouterr().err == ""
