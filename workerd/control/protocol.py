"""What both ends of the local socket agree on (docs/control.md)."""

from __future__ import annotations

from typing import Any

from workerd.errors import CommandError, WorkerdError

#: Of the protocol. A daemon refuses any other.
VERSION = 1
#: The name of the socket in an instance's folder.
SOCKET = "control.sock"
#: The group whose members may look and submit.
GROUP = "workerd-submit"
#: The longest line, and the longest body, in bytes.
MAX_LINE = 64 << 10
MAX_BODY = 4 << 20

Reply = dict[str, Any]


class NoAnswer(WorkerdError):
    """Nobody answers on the socket. ``listens``: somebody is there all the same."""

    def __init__(self, text: str, listens: bool = False) -> None:
        super().__init__(text)
        self.listens = listens


class NotServedHere(CommandError):
    """The instance is not the one to ask; another way may lead to the goal."""


class Busy(CommandError):
    """There are too many clients at present; nothing was done."""
