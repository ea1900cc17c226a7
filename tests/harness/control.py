"""The daemon's local socket as a client of any manners sees it, and commands that use it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.harness.daemon import Daemon
from tests.harness.processes import MissingTool
from tests.harness.programs import SUBMIT, WORKERD, Result, run
from tests.harness.waiting import TIMEOUT

Reply = dict[str, Any]


class Caller:
    """A connection to the socket in an instance's runtime folder."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT)
        # The path of a test's folder may be longer than an address.
        directory = os.open(folder, os.O_PATH)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/control.sock")
        finally:
            os.close(directory)
        self._rest = b""

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send this, as far as the daemon takes it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def send_some(self, data: bytes) -> int:
        """Send what is taken without waiting; returns how much."""
        self._socket.setblocking(False)
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        finally:
            self._socket.settimeout(TIMEOUT)

    def ask(self, request: str, body: bytes = b"", **keys: Any) -> Reply:
        """A request as it should be, and the answer."""
        length = {"length": len(body)} if body else {}
        message = {"version": 1, "request": request, **length, **keys}
        self.send(json.dumps(message).encode() + b"\n" + body)
        return self.answer()

    def answer(self) -> Reply:
        """The next answer."""
        while b"\n" not in self._rest:
            data = self._socket.recv(65536)
            assert data, "the daemon has hung up"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def await_end(self) -> bytes:
        """Wait until the daemon has hung up; returns what it said before."""
        with contextlib.suppress(ConnectionResetError):
            while data := self._socket.recv(65536):
                self._rest += data
        return self._rest


def folder(daemon: Daemon) -> Path:
    """The runtime folder of an instance."""
    return daemon.runtime / daemon.instance


def call(daemon: Daemon, request: str, body: bytes = b"", **keys: Any) -> Reply:
    """One request on a connection of its own."""
    with Caller(folder(daemon)) as caller:
        return caller.ask(request, body, **keys)


def workerd(runtime: Path, *arguments: str | Path, **options: Any) -> Result:
    """Run a command of `workerd` for the instances of this runtime directory."""
    environment = {"RUNTIME_DIRECTORY": str(runtime), **options.pop("env", {})}
    return run([*options.pop("become", ()), *WORKERD, *arguments], env=environment, **options)


def submit(runtime: Path, *arguments: str | Path, stdin: bytes = b"", **options: Any) -> Result:
    """Run `submit` likewise."""
    environment = {"RUNTIME_DIRECTORY": str(runtime), **options.pop("env", {})}
    become: Sequence[str] = options.pop("become", ())
    return run([*become, *SUBMIT, *arguments], stdin, env=environment, **options)


def user(uid: int, *groups: int) -> list[str]:
    """Before a command: run it as this user, in these groups alone.

    The user may read everything, so that it finds the code, and write no more than others.
    """
    if os.geteuid() != 0:
        raise MissingTool("to become another user needs root")
    ids = [f"--reuid={uid}", f"--regid={uid}"]
    ids += [f"--groups={','.join(map(str, groups))}"] if groups else ["--clear-groups"]
    may = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", *ids, *may]


def with_groups(folder: Path, groups: dict[str, int], command: Sequence[str | Path]) -> list[str]:
    """A command for which this host has these groups besides its own."""
    if os.geteuid() != 0:
        raise MissingTool("other groups need root, and a mount namespace")
    file = folder / "group"
    lines = [f"{name}:x:{gid}:\n" for name, gid in groups.items()]
    file.write_text(Path("/etc/group").read_text() + "".join(lines))
    file.chmod(0o644)
    script = 'mount --bind "$0" /etc/group && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(file), *map(str, command)]
