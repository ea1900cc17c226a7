"""The instances of this host: what each says of itself, or why it says nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from workerd.control import client, protocol
from workerd.errors import CommandError
from workerd.paths import entered, is_locked, open_file

#: In an instance's runtime folder: why its last start, or its run, has failed.
FAILURE = "failure"
#: How much of that is shown, in bytes.
MAX_FAILURE = 4096
#: Instances that are asked at the same time.
_AT_ONCE = 16


def states(name: str | None, request: str = "status") -> Iterator[protocol.Reply]:
    """The state of this instance, or of every one of the host; docs/control.md has the keys.

    One that answers does so to this ``request``: `status`, or `metrics`. Raises NoAnswer when
    nothing is known of this instance.
    """
    # The daemon, which imports this module, has no use for it.
    from concurrent.futures import ThreadPoolExecutor

    found = client.folders() if name is None else {name: client.folder_of(name)}
    # At once: one that is stuck holds up nobody else.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(partial(state, request=request), found.keys(), found.values())


def state(
    instance: str, folder: Path, request: str = "status", depths: bool = False
) -> protocol.Reply:
    """The answer of an instance to this request; ``depths`` is for `status`."""
    try:
        return client.ask(folder, {"request": request, "depths": depths})
    except CommandError as refused:
        return _silent(instance, "unknown", str(refused))
    except protocol.NoAnswer as silent:
        if silent.listens:
            return _silent(instance, "stuck", "it listens, and does not answer")
    # A folder that is none, as one that nobody ever ran in.
    with contextlib.suppress(OSError), entered(folder) as inside:
        with contextlib.suppress(OSError):
            if is_locked(inside, "lock"):
                return _silent(instance, "silent", "it runs, and has no socket: it starts, or ends")
        with contextlib.suppress(OSError), open(open_file(inside, FAILURE), "rb") as file:
            why = file.read(MAX_FAILURE).decode(errors="replace").strip()
            return _silent(instance, "failed", why)
        os.stat(protocol.SOCKET, dir_fd=inside, follow_symlinks=False)
        return _silent(instance, "died", "it was killed, or the host went down")
    return _silent(instance, "stopped", None)


def _silent(instance: str, state: str, why: str | None) -> protocol.Reply:
    return {"instance": instance, "state": state, "healthy": False, "why": why}
