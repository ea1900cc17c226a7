"""The handlers of a configuration: what it takes to make them, to change and to end them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping

from workerd.config.model import Handler, Settings
from workerd.handlers.command import CommandHandler
from workerd.handlers.guardian import Guardian
from workerd.handlers.warm.pool import WarmHandler

Kind = CommandHandler | WarmHandler


class HandlerRegistry:
    """Makes the handlers of a daemon. Warm ones live on as long as their settings stay.

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
        #: Those in force, each with all that it was made of.
        self._warm: dict[str, tuple[object, WarmHandler]] = {}
        #: Those that have been replaced, and still have jobs or processes.
        self._retired: list[WarmHandler] = []

    def of(
        self, settings: Settings, changed: Callable[[str], None] = lambda _name: None
    ) -> dict[str, Kind]:
        """The handlers of these settings; warm ones that they do not have any more retire.

        ``changed`` is called soon after one has become degraded, or is no longer, with its name.
        """
        before, self._warm = self._warm, {}
        handlers = {
            name: self._make(settings, handler, before, changed)
            for name, handler in settings.handlers.items()
        }
        self._retired = [warm for warm in self._retired if warm.in_use]
        for _, replaced in before.values():
            replaced.retire()
            self._retired.append(replaced)
        return handlers

    def _make(
        self,
        settings: Settings,
        handler: Handler,
        before: dict[str, tuple[object, WarmHandler]],
        changed: Callable[[str], None],
    ) -> Kind:
        lines = settings.log.output_lines
        if handler.kind == "command":
            return CommandHandler(handler, self._environ, lines, self._guardian)
        made_of = (handler, lines, settings.log.level, _depth(settings, handler))
        if handler.name in before and before[handler.name][0] == made_of:
            warm = before.pop(handler.name)[1]
        else:
            loop = asyncio.get_running_loop()
            warm = WarmHandler(
                handler,
                self._environ,
                lines,
                self._guardian,
                settings.log.level,
                made_of[-1],
                functools.partial(loop.call_soon, changed, handler.name),
                self._before_sending,
            )
        self._warm[handler.name] = made_of, warm
        if handler.queue in settings.worker.queues:
            warm.start()
        return warm

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

    def _all(self) -> list[WarmHandler]:
        return [warm for _, warm in self._warm.values()] + self._retired


def _depth(settings: Settings, handler: Handler) -> int:
    """How many jobs one process may have in its pipe.

    One, unless the queue holds more messages than it runs at once: then a share of them.
    """
    queue = settings.queues.get(handler.queue)
    if queue is None or queue.prefetch <= queue.concurrency:
        return 1
    return max(1, queue.prefetch // handler.processes)
