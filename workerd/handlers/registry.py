"""The handlers of a configuration: their kinds, and what it takes to make, change and end them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from workerd import log_formats
from workerd.config.model import Handler as HandlerSettings
from workerd.config.model import Settings
from workerd.core.handler import Handler
from workerd.handlers.command import CommandHandler
from workerd.handlers.guardian import Guardian
from workerd.handlers.warm.pool import WarmHandler


@runtime_checkable
class Lasting(Handler, Protocol):
    """A handler that lives on over a reload while its settings stay; see `WarmHandler`."""

    @property
    def in_use(self) -> bool: ...

    def start(self) -> None: ...
    def hand_out(self) -> None: ...
    def recall(self) -> None: ...
    def hold(self) -> None: ...
    def retire(self) -> None: ...
    def drain(self) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a handler is made with, besides its own settings."""

    environ: Mapping[str, str]
    guardian: Guardian
    output_lines: int
    level: log_formats.Level
    #: How many jobs may lie with one process.
    depth: int
    changed: Callable[[], object]
    before_sending: Callable[[], None]


@dataclass(frozen=True, slots=True)
class HandlerClass:
    """A kind of handler: the key of its table that names it, and those that not every kind has."""

    name: str
    keys: frozenset[str]
    make: Callable[[HandlerSettings, Surroundings], Handler]


def _command(settings: HandlerSettings, around: Surroundings) -> CommandHandler:
    return CommandHandler(settings, around.environ, around.output_lines, around.guardian)


def _warm(settings: HandlerSettings, around: Surroundings) -> WarmHandler:
    return WarmHandler(
        settings,
        around.environ,
        around.output_lines,
        around.guardian,
        around.level,
        around.depth,
        around.changed,
        around.before_sending,
    )


_PROCESSES = frozenset({"processes", "recycle_after", "memory_limit", "start_timeout"})

#: Every kind of handler, by its name.
KINDS: Mapping[str, HandlerClass] = {
    each.name: each
    for each in (
        HandlerClass("command", frozenset({"exit_codes", "dashes"}), _command),
        HandlerClass("python", _PROCESSES | {"interpreter"}, _warm),
        HandlerClass("stream", _PROCESSES, _warm),
    )
}


class HandlerRegistry:
    """Makes the handlers of a daemon; those that last live on as long as their settings stay.

    ``before_sending`` is called before a warm process is sent what it begins with.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        guardian: Guardian,
        before_sending: Callable[[], None] = lambda: None,
    ) -> None:
        self._environ = environ
        self._guardian = guardian
        self._before_sending = before_sending
        #: Those in force that last, each with all that it was made of.
        self._lasting: dict[str, tuple[object, Lasting]] = {}
        #: Those that have been replaced, and still have jobs or processes.
        self._retired: list[Lasting] = []

    @property
    def trouble(self) -> str:
        """Why nobody would end the jobs if this process were killed; "" when somebody would."""
        return self._guardian.trouble

    def of(
        self, settings: Settings, changed: Callable[[str], None] = lambda _name: None
    ) -> dict[str, Handler]:
        """The handlers of these settings; those that last and are not among them retire.

        ``changed`` is called soon after one has become degraded, or is no longer, with its name.
        """
        before, self._lasting = self._lasting, {}
        handlers = {
            name: self._make(settings, handler, before, changed)
            for name, handler in settings.handlers.items()
        }
        self._retired = [handler for handler in self._retired if handler.in_use]
        for _, replaced in before.values():
            replaced.retire()
            self._retired.append(replaced)
        return handlers

    def _make(
        self,
        settings: Settings,
        handler: HandlerSettings,
        before: dict[str, tuple[object, Lasting]],
        changed: Callable[[str], None],
    ) -> Handler:
        depth = _depth(settings, handler)
        made_of = (handler, settings.log.output_lines, settings.log.level, depth)
        if handler.name in before and before[handler.name][0] == made_of:
            made: Handler = before.pop(handler.name)[1]
        else:
            call_soon = asyncio.get_running_loop().call_soon
            around = Surroundings(
                self._environ,
                self._guardian,
                settings.log.output_lines,
                settings.log.level,
                depth,
                functools.partial(call_soon, changed, handler.name),
                self._before_sending,
            )
            made = KINDS[handler.kind].make(handler, around)
        if isinstance(made, Lasting):
            self._lasting[handler.name] = made_of, made
            if handler.queue in settings.worker.queues:
                made.start()
        return made

    def hand_out(self) -> None:
        """Jobs may begin that could not before."""
        for handler in self._all():
            handler.hand_out()

    def recall(self) -> None:
        """Jobs may not begin that could before."""
        for handler in self._all():
            handler.recall()

    def hold(self) -> None:
        """No job starts any more."""
        for handler in self._all():
            handler.hold()

    def drain(self) -> None:
        """The jobs that wait for a process go back; processes that have none leave."""
        for handler in self._all():
            handler.drain()

    async def close(self) -> None:
        """End every warm process, once no job runs any more."""
        await asyncio.gather(*(handler.close() for handler in self._all()))

    def _all(self) -> list[Lasting]:
        return [handler for _, handler in self._lasting.values()] + self._retired


def _depth(settings: Settings, handler: HandlerSettings) -> int:
    """How many jobs one process may have in its pipe.

    One, unless the queue holds more messages than it runs at once: then a share of them.
    """
    queue = settings.queues.get(handler.queue)
    if queue is None or queue.prefetch <= queue.concurrency:
        return 1
    return max(1, queue.prefetch // handler.processes)
