"""Who asks over the local socket, as the kernel knows it."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from workerd.config.permissions import group_id

#: SO_PEERGROUPS of <asm-generic/socket.h>, which Python has no name for.
_SO_PEERGROUPS = 59
#: The most that Python asks for, in bytes: 256 groups.
_GROUPS_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks, as the kernel knows it."""

    uid: int
    pid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        pid, uid, gid = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        groups: tuple[int, ...] = ()
        # Whoever is in more of them than this has the first one alone.
        with contextlib.suppress(OSError):
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
            groups = struct.unpack(f"{len(raw) // 4}I", raw)
        return cls(uid, pid, frozenset((gid, *groups)))


def member_of(name: str | None) -> Callable[[Peer], bool]:
    """Whether a peer is in this group, which is looked up now."""
    gid = group_id(name) if name else None
    return lambda peer: gid is not None and gid in peer.groups
