"""Answering over HTTP on a socket that systemd hands over, until nobody has asked for a while."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import sys
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from workerd.errors import EX_UNAVAILABLE, CommandError

#: Seconds without a client after which the process ends; systemd starts another one.
IDLE = 300.0
#: Seconds for a client to go on with its request, and with the reading of its answer.
QUIET = 10.0
#: Clients at once. One more, and the one that came first is dropped.
MOST_CLIENTS = 16

#: sd_listen_fds(3): the first of the sockets.
_FIRST = 3


def serve(application: Callable[..., Iterable[bytes]]) -> None:
    """Answer until nobody has asked for IDLE seconds. Raises CommandError without a socket."""
    with Server(_inherited(), application) as server:
        while not server.idle:
            server.handle_request()


def _inherited() -> socket.socket:
    """The one socket that systemd has handed over. Raises CommandError."""
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    number = os.environ.get("LISTEN_FDS", "0") if ours else "0"
    if number != "1":
        raise CommandError(
            EX_UNAVAILABLE,
            f"metrics --serve: {number} sockets from systemd instead of one: start "
            "workerd-metrics.socket, which has one ListenStream=, or try: "
            "systemd-socket-activate --listen=127.0.0.1:15693 workerd metrics --serve",
        )
    inherited = socket.socket(fileno=_FIRST)
    if inherited.family not in (socket.AF_INET, socket.AF_INET6):
        raise CommandError(EX_UNAVAILABLE, "metrics --serve: the socket is none of TCP's")
    return inherited


class _Request(WSGIRequestHandler):
    """One request; its connection ends with it."""

    timeout = QUIET

    def log_message(self, *_: object) -> None:
        """Scrapes are no news."""


class Server(ThreadingMixIn, WSGIServer):
    """A thread for each client, and never more than MOST_CLIENTS."""

    daemon_threads = True
    timeout = IDLE

    def __init__(
        self, listening: socket.socket, application: Callable[..., Iterable[bytes]]
    ) -> None:
        host, self.server_port = listening.getsockname()[:2]
        self.server_name = host
        self.idle = False
        #: Those that are being served, in the order in which they came.
        self._clients: dict[socket.socket, None] = {}
        # Not that of TCPServer, which makes a socket of its own.
        socketserver.BaseServer.__init__(self, (host, self.server_port), _Request)
        self.socket = listening
        self.setup_environ()
        self.set_app(application)

    def process_request(self, request: Any, client_address: Any) -> None:
        while len(self._clients) >= MOST_CLIENTS:
            self._drop_oldest()
        self._clients[request] = None
        super().process_request(request, client_address)

    def _drop_oldest(self) -> None:
        """Whatever its thread waits for comes to an end."""
        # Its thread may end and forget it meanwhile.
        for client in list(self._clients)[:1]:
            self._clients.pop(client, None)
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_timeout(self) -> None:
        self.idle = not self._clients

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is slow, or gone, is no error of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)
