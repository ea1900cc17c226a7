"""Many descriptors behind a single one in the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import select
from collections.abc import Callable


class Poller:
    """Calls back when descriptors are ready: an epoll of its own, which the loop watches.

    For descriptors that live as briefly as a job: the loop's own `add_reader` and `remove_reader`
    take ten times as long. It takes up one itself, from `prepare` or `add` to `release`.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._calls: dict[int, Callable[[], object]] = {}

    def prepare(self) -> None:
        """Take up its descriptor, so that the next `add` needs none. Raises OSError."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop = asyncio.get_running_loop()

    def add(self, fd: int, events: int, callback: Callable[..., object], *args: object) -> None:
        """Call this, in the context of now, as often as one of the events can be had.

        Raises OSError.
        """
        self.prepare()
        assert self._epoll is not None
        self._epoll.register(fd, events)
        if not self._calls:
            self._loop.add_reader(self._epoll.fileno(), self._look, self._epoll)
        self._calls[fd] = functools.partial(contextvars.copy_context().run, callback, *args)

    def discard(self, fd: int) -> None:
        """Do not watch it any more, if it is watched. To be called before it is closed."""
        if self._epoll and self._calls.pop(fd, None):
            # A program that is just being started may hold a copy, and keep it in the epoll.
            self._epoll.unregister(fd)

    def release(self) -> None:
        """Give its descriptor back, if it watches nothing."""
        if self._epoll and not self._calls:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _look(self, epoll: select.epoll) -> None:
        ready = [(fd, self._calls[fd]) for fd, _ in epoll.poll(0)]
        for fd, call in ready:
            if self._calls.get(fd) is call:  # or one before it has closed this descriptor
                call()
