"""Ports for servers, each of which no other test of this machine takes meanwhile."""

from __future__ import annotations

import random
import socket


class Port:
    """A port that nobody listens on: `number`. It is kept for its owner until `close`.

    A server may bind it, end and bind it again. It lies below the range that the kernel gives to
    outgoing connections (ip_local_port_range(7)), so that none of them is in the way.
    """

    def __init__(self) -> None:
        while True:
            self.number = random.randrange(10_000, 32_000)
            # An abstract name (unix(7)) belongs to one process, and is free again when that dies.
            self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                self._claim.bind(f"\0workerd-test-port-{self.number}")
                with socket.socket() as probe:
                    probe.bind(("", self.number))
            except OSError:
                self._claim.close()
            else:
                return

    def close(self) -> None:
        self._claim.close()
