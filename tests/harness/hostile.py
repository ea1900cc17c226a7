"""An instance that says the worst: a socket whose answers are full of text for terminals."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from tests.harness.waiting import TIMEOUT

#: Sets a terminal's title, changes colours and the direction of writing, and forges a line.
EVIL = "a\x1b]0;b\x07\x9b31m\u202ec\x7f\u2028d\r\ne"

_QUEUE = {
    "queue": EVIL,
    "paused": EVIL,
    "consuming": False,
    "running": 1,
    "slots": 2,
    "waiting": 3,
    "held": 4,
    "ready": 5,
    "due": 6,
    "dead": EVIL,
}
_JOB = {
    "id": EVIL,
    "type": EVIL,
    "queue": EVIL,
    "age": 7,
    "attempt": 8,
    "pid": EVIL,
    "ending": False,
    "handler": EVIL,
}
_FAILURE = {
    "when": 1.0,
    "id": EVIL,
    "type": EVIL,
    "reason": EVIL,
    "attempt": 2,
    "last": True,
    "error": EVIL,
    "queue": EVIL,
}
_COMMON = {
    "instance": EVIL,
    "state": EVIL,
    "status": EVIL,
    "healthy": False,
    "why": EVIL,
    "release": EVIL,
    "running": 1,
    "done": EVIL,
    "retried": EVIL,
    "failed": EVIL,
}
ANSWERS: dict[str, dict[str, Any]] = {
    "status": {
        **_COMMON,
        "pid": EVIL,
        "uptime": 9,
        "rabbitmq": EVIL,
        "broker": EVIL,
        "queues": [_QUEUE],
        "jobs": [_JOB],
        "failures": [_FAILURE],
        "notes": [EVIL],
        "pace": {"seconds": 6.0, "until": 0.0, "done": [1], "failed": [1]},
        "degraded": [EVIL],
    },
    "health": {"healthy": True, "why": EVIL, "degraded": [EVIL]},
    "metrics": {
        **_COMMON,
        "python": EVIL,
        "started": 1,
        "connected": True,
        "publishing_blocked": False,
        "log_records_dropped": 0,
        "submissions": 1,
        "lost_connections": {EVIL: 1},
        "submitted": {EVIL: 1},
        "queues": [{**_QUEUE, "paused": 1, "dead": 1}],
        "handlers": [{"handler": EVIL, "paused": 1, "degraded": 1}],
        "process": {},
        "jobs": [{"queue": EVIL, "handler": EVIL, "outcome": EVIL, "count": 1}],
        "run_seconds": [],
        "wait_seconds": [],
    },
    "pause": {"queues": [EVIL], "changed": [], "running": 1},
    "resume": {"queues": [EVIL], "changed": [EVIL], "running": 0},
    "cancel": {"ended": [{"pid": EVIL, "age": 1}], "own_only": False},
    "submit": {"queue": EVIL, "due": None},
}


class HostileInstance:
    """Listens in an instance's folder until `close`; with ``refuses`` every answer is an error."""

    def __init__(self, folder: Path, refuses: bool = False) -> None:
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        self._refuses = refuses
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The path of a test's folder may be longer than an address.
        directory = os.open(folder, os.O_PATH)
        try:
            self._listener.bind(f"/proc/self/fd/{directory}/control.sock")
        finally:
            os.close(directory)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="hostile", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        with client.makefile("rwb") as stream:
            request = json.loads(stream.readline())
            stream.read(request.get("length", 0))
            answer = (
                {"ok": False, "status": 64, "error": EVIL}
                if self._refuses
                else {"ok": True, **ANSWERS[request["request"]]}
            )
            stream.write(json.dumps({"version": 1, **answer}).encode() + b"\n")

    def close(self) -> None:
        # Wakes the thread that accepts; closing the socket would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(TIMEOUT)
