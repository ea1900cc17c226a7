"""Asks the instances, each in a thread, for as long as somebody looks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from workerd.control import client, instances, protocol

#: Seconds that a look waits for answers; whoever needs longer is shown as it was.
PATIENCE = 0.25

#: Seconds after which it shows that somebody does not answer.
SILENT = 1.0


class Asker:
    """Asks each instance in a thread of its own, so that none waits for another.

    ``name`` is that of the only one, None for all of the host. Raises NoAnswer for one that
    nobody knows.
    """

    def __init__(self, name: str | None) -> None:
        self._only = None if name is None else {name: client.folder_of(name)}
        self._folders: dict[str, Path] = {}
        #: The last answer of each, and when those were asked that have not answered yet.
        self._answers: dict[str, protocol.Reply] = {}
        self._asked: dict[str, float] = {}

    def look(self) -> set[str]:
        """Ask all of them; returns who has answered within the time."""
        self._folders = self._only or client.folders()
        threads = {
            name: threading.Thread(target=self._ask, args=(name, folder), daemon=True)
            for name, folder in self._folders.items()
            if name not in self._asked
        }
        for name, thread in threads.items():
            self._asked[name] = time.monotonic()
            thread.start()
        deadline = time.monotonic() + PATIENCE
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        return {name for name, thread in threads.items() if not thread.is_alive()}

    def _ask(self, name: str, folder: Path) -> None:
        try:
            self._answers[name] = instances.state(name, folder, depths=True)
        finally:
            del self._asked[name]

    def states(self) -> list[protocol.Reply]:
        """What is known of each, by name."""
        return [self._state(name) for name in sorted(self._folders)]

    def _state(self, name: str) -> protocol.Reply:
        nothing = {"instance": name, "state": "silent", "healthy": False, "why": None}
        known = self._answers.get(name, nothing)
        seconds = time.monotonic() - self._asked.get(name, float("inf"))
        if seconds < SILENT:
            return known
        return {**known, "state": "stuck", "healthy": False, "why": f"no answer for {seconds:.0f}s"}
