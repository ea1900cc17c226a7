"""Asking the instances of this host over their local sockets (docs/control.md).

Plain and blocking, with a deadline for all of it, and without asyncio: a command that asks
takes less time than Python needs to start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from workerd.control.protocol import GROUP, SOCKET, VERSION, Busy, NoAnswer, NotServedHere, Reply
from workerd.errors import EX_NOPERM, EX_PROTOCOL, CommandError
from workerd.paths import entered, is_instance, runtime_directories

#: Seconds for an answer that needs nobody but the daemon.
TIMEOUT = 3.0
#: Seconds between two tries while the daemon has too many clients.
_PAUSE = 0.05
#: The longest answer, in bytes: a thousand jobs fit many times.
_MAX_ANSWER = 16 << 20
#: The longest path of a socket, in bytes.
_MAX_PATH = 107


def ask(
    folder: Path, request: Mapping[str, object], body: bytes = b"", timeout: float = TIMEOUT
) -> Reply:
    """Ask the instance whose runtime folder this is, and return its answer.

    Raises NoAnswer, and CommandError (NotServedHere) with what the daemon says.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _ask(folder, request, body, deadline)
        except Busy:
            if time.monotonic() + _PAUSE >= deadline:
                raise
        time.sleep(_PAUSE)


def _ask(folder: Path, request: Mapping[str, object], body: bytes, deadline: float) -> Reply:
    message: dict[str, object] = {"version": VERSION, **request}
    if body:
        message["length"] = len(body)
    sent = json.dumps(message).encode() + b"\n" + body
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        _connect(sock, folder, deadline)
        try:
            sock.settimeout(_left(deadline))
            # One that refuses us may not read it all; it has said why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(sent)
            line = _read_line(sock, deadline)
        except TimeoutError:
            raise NoAnswer("it does not answer", listens=True) from None
        except OSError as error:
            raise NoAnswer(f"it does not answer: {error.strerror}") from None
    return _judged(line)


def _connect(sock: socket.socket, folder: Path, deadline: float) -> None:
    while True:
        try:
            with _socket_in(folder) as path:
                sock.settimeout(_left(deadline))
                sock.connect(path)
                return
        except BlockingIOError:
            # As many wait for the daemon to take them as the kernel lets wait.
            if time.monotonic() + _PAUSE >= deadline:
                raise NoAnswer("it does not answer", listens=True) from None
            time.sleep(_PAUSE)
        except PermissionError:
            raise CommandError(EX_NOPERM, not_yours()) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoAnswer(_not_there(folder.name)) from None
        except OSError as error:
            raise NoAnswer(f"{folder / SOCKET}: {error.strerror}") from None


def _not_there(instance: str) -> str:
    return f"instance {instance} does not run on this host"


@contextlib.contextmanager
def address(folder: Path, name: str = SOCKET) -> Iterator[str]:
    """The address of a socket in a folder, however long its path is. Raises OSError."""
    path = os.path.join(folder, name)
    if len(os.fsencode(path)) <= _MAX_PATH:
        yield path
        return
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _socket_in(folder: Path) -> Iterator[str]:
    """The address of the very socket in a folder where jobs can write: no link is followed.

    Raises OSError.
    """
    with entered(folder) as inside:
        found = os.open(SOCKET, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    try:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        yield f"/proc/self/fd/{found}"
    finally:
        os.close(found)


def _read_line(sock: socket.socket, deadline: float) -> bytearray:
    line = bytearray()
    while not line.endswith(b"\n"):
        sock.settimeout(_left(deadline))
        data = sock.recv(1 << 16)
        if not data:
            raise NoAnswer("it went away without an answer")
        line += data
        if len(line) > _MAX_ANSWER:
            raise NoAnswer("it answers without end")
    return line


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _judged(line: bytes | bytearray) -> Reply:
    try:
        answer = json.loads(line)
        if answer.get("ok"):
            return {key: value for key, value in answer.items() if key not in ("ok", "version")}
        status = int(answer.get("status", EX_PROTOCOL))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CommandError(EX_PROTOCOL, "the daemon's answer makes no sense") from None
    kinds = {"busy": Busy, "elsewhere": NotServedHere}
    kind = kinds.get(str(answer.get("code")), CommandError)
    raise kind(status, str(answer.get("error")))


def not_yours() -> str:
    """What to tell a user who may not connect."""
    import pwd

    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"#{uid}"
    return (
        f"only members of the group {GROUP} may ask the daemon: "
        f"ask an administrator: adduser {name} {GROUP} (then log in again)"
    )


def folders() -> dict[str, Path]:
    """The runtime folder of every instance of this host that runs or has run, by name."""
    found: dict[str, Path] = {}
    for directory in runtime_directories():
        with contextlib.suppress(OSError):
            for name in os.listdir(directory):
                if is_instance(name) and os.path.lexists(directory / name / "lock"):
                    found.setdefault(name, directory / name)
    return dict(sorted(found.items()))


def folder_of(instance: str) -> Path:
    """The runtime folder of an instance. Raises NoAnswer where there is none."""
    for directory in runtime_directories():
        if is_instance(instance) and os.path.lexists(directory / instance / "lock"):
            return directory / instance
    raise NoAnswer(_not_there(instance))
