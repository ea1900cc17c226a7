"""Reloading: the configuration is read again, and applied only if all of it is right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from workerd import log
from workerd.config.model import Settings
from workerd.daemon.systemd import Systemd
from workerd.errors import SettingsError
from workerd.worker.worker import Worker

#: Seconds in which several requests become one reload.
PAUSE = 0.1


class Reload:
    """``load`` reads the settings and raises SettingsError; ``apply`` puts them into force."""

    def __init__(
        self,
        worker: Worker,
        systemd: Systemd,
        load: Callable[[], Settings],
        apply: Callable[[Settings], None],
    ) -> None:
        self._worker = worker
        self._systemd = systemd
        self._load = load
        self._apply = apply
        self._timer: asyncio.TimerHandle | None = None

    def request(self) -> None:
        """Reload soon; a storm of requests is one reload."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._reload)

    def _reload(self) -> None:
        self._timer = None
        worker = self._worker
        if worker.stopping:
            log.event("reload ignored", reason="draining")
            return
        self._systemd.reloading()
        try:
            settings = self._load()
        except SettingsError as error:
            for problem in error.problems:
                log.error("reload refused", problem=problem)
            problems = len(error.problems)
        else:
            changes = differences(worker.settings, settings)
            self._apply(settings)
            problems = 0
            log.event("reloaded", changes=", ".join(changes) or "none")
        worker.reloaded(problems)
        self._systemd.ready()


def differences(old: Settings, new: Settings) -> list[str]:
    """The tables in which two configurations differ: "broker", "handlers.sleep", "-queues.old"."""
    tables = ("broker", "worker", "log", "control")
    names = [name for name in tables if getattr(old, name) != getattr(new, name)]
    for table in ("queues", "handlers"):
        before, after = getattr(old, table), getattr(new, table)
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                sign = "+" if name not in before else "-" if name not in after else ""
                names.append(f"{sign}{table}.{name}")
    return names
