"""The daemon: from a command line to a running worker and its exit status."""

from __future__ import annotations

import asyncio

# getaddrinfo loads this codec at the first look-up of a name. By then an upgrade may have
# replaced the files of a process that is still draining: load everything now.
import encodings.idna  # noqa: F401
import fcntl
import os
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

from workerd import __version__, broker, log, service
from workerd.broker import Link
from workerd.check import untrusted_programs
from workerd.consumer import OnOutage
from workerd.errors import SettingsError
from workerd.handlers.command import CommandHandler
from workerd.handlers.guardian import Guardian
from workerd.job import Place
from workerd.settings import Settings, load
from workerd.worker import Worker

EX_SOFTWARE = 70
EX_CONFIG = 78


def run(
    config: Path | None, instance: str, detach: bool, pidfile: str | None, log_file: str | None
) -> NoReturn:
    """Run an instance until it has drained; the process ends here, with the exit status.

    Every problem of the configuration goes to the log, then the status is EX_CONFIG.
    """
    service.shed_inheritance()
    try:
        settings = load(config, instance)
        _refuse_unsupported(settings)
        lock = _lock(instance)
        if detach:
            _detach(pidfile, log_file, lock)
    except SettingsError as error:
        log.begin(log.writer("auto"), "info", instance)
        for problem in error.problems:
            log.error("bad configuration", problem=problem)
        _exit(EX_CONFIG)
    # Before the first thread, and before anything that it would have to close.
    guardian = Guardian(lock)
    log.begin(log.writer(settings.log.format), settings.log.level, instance)
    try:
        # Not asyncio.run, which waits for a resolver that hangs in a thread.
        asyncio.new_event_loop().run_until_complete(_serve(settings, instance, guardian))
    except Exception:  # noqa: BLE001 - a bug: tell it and end
        log.error("bug", traceback=traceback.format_exc())
        _exit(EX_SOFTWARE)
    _exit(0)


def _exit(status: int) -> NoReturn:
    """End now, whatever hangs in a thread."""
    log.flush(2.0)
    sys.stdout.flush()
    os._exit(status)


async def _serve(settings: Settings, instance: str, guardian: Guardian) -> None:
    files = ", ".join(map(str, settings.files))
    log.event("starting", version=__version__, pid=os.getpid(), files=files)
    service.forbid_dumps()
    place = Place(socket.gethostname(), instance)
    handlers = {
        name: CommandHandler(handler, os.environ, settings.log.output_lines, guardian)
        for name, handler in settings.handlers.items()
    }

    def connect(purpose: str, on_outage: OnOutage, wake: asyncio.Event) -> AsyncIterator[Link]:
        name = f"workerd@{instance} {place.host} {purpose}"
        return broker.links(settings.broker, name, os.environ, on_outage, wake)

    worker = Worker(settings, handlers, place, connect, service.Systemd())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, worker.stop)
    # Until there is something to reload, a HUP must at least not kill.
    loop.add_signal_handler(
        signal.SIGHUP, lambda: log.warning("no reload", remedy="restart to apply changes")
    )
    loop.add_signal_handler(signal.SIGUSR1, worker.status.log_state)
    await worker.run()


def _refuse_unsupported(settings: Settings) -> None:
    problems = untrusted_programs(settings)
    problems += [
        f"{settings.where('handlers', name)}: this version runs command handlers only"
        for name, handler in settings.handlers.items()
        if handler.kind != "command"
    ]
    if problems:
        raise SettingsError(*problems)


def _lock(instance: str) -> int:
    """Hold the instance's name on this host. Raises SettingsError when another daemon does."""
    try:
        path = service.runtime_directory(instance) / "lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError(
            f"instance {instance} is already running on this host (it holds {path}); "
            "give this one another --instance NAME"
        ) from None
    return file


def _detach(pidfile: str | None, log_file: str | None, lock: int) -> None:
    try:
        service.detach(pidfile, log_file, [lock])
    except OSError as error:
        raise SettingsError(f"cannot detach: {error}") from None
