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
from pathlib import Path

from workerd import __version__, broker, log, service
from workerd.errors import SettingsError
from workerd.handlers.command import CommandHandler
from workerd.handlers.guardian import Guardian
from workerd.job import Place
from workerd.settings import Settings, load
from workerd.worker import OnOutage, Worker

EX_SOFTWARE = 70
EX_CONFIG = 78


def run(
    config: Path | None, instance: str, detach: bool, pidfile: str | None, log_file: str | None
) -> int:
    """Run an instance until it has drained; the process ends here, with the exit status.

    Returns only when the configuration is bad (SettingsError is raised) or when it has
    detached. Every problem of the configuration is in the log as well.
    """
    try:
        settings = load(config, instance)
        _refuse_unsupported(settings)
        if detach:
            service.detach(pidfile, log_file)
        lock = _lock(instance)
    except SettingsError as error:
        log.begin(log.writer("auto"), "info", instance)
        for problem in error.problems:
            log.error("bad configuration", problem=problem)
        _exit(EX_CONFIG)
    # Before the first thread, and before anything that it would have to close.
    guardian = Guardian()
    log.begin(log.writer(settings.log.format), settings.log.level, instance)
    try:
        asyncio.run(_serve(settings, instance, guardian))
        status = 0
    except Exception:
        log.error("bug", traceback=traceback.format_exc())
        status = EX_SOFTWARE
    del lock
    _exit(status)


def _exit(status: int) -> "NoReturn":
    """End now. A resolver that hangs in a thread must not hold up a finished process."""
    log.flush(2.0)
    sys.stdout.flush()
    os._exit(status)


async def _serve(settings: Settings, instance: str, guardian: Guardian) -> None:
    log.event("starting", version=__version__, pid=os.getpid(), files=", ".join(map(str, settings.files)))
    service.forbid_dumps()
    place = Place(socket.gethostname(), instance)
    handlers = {
        name: CommandHandler(handler, os.environ, settings.log.output_lines, guardian)
        for name, handler in settings.handlers.items()
    }

    def connect(purpose: str, on_outage: OnOutage, wake: asyncio.Event) -> object:
        name = f"workerd@{instance} {place.host} {purpose}"
        return broker.links(settings.broker, name, os.environ, on_outage, wake)

    worker = Worker(settings, handlers, place, connect, service.Systemd())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    loop.add_signal_handler(signal.SIGQUIT, worker.stop_now)
    # Until there is something to reload, a HUP must at least not kill.
    loop.add_signal_handler(signal.SIGHUP, lambda: log.warning("reload", remedy="restart to apply changes"))
    loop.add_signal_handler(signal.SIGUSR1, worker.log_state)
    await worker.run()


def _refuse_unsupported(settings: Settings) -> None:
    problems = [
        f"{settings.where('handlers', name)}: this version runs command handlers only"
        for name, handler in settings.handlers.items()
        if handler.kind != "command"
    ]
    if problems:
        raise SettingsError(*problems)


def _lock(instance: str) -> int:
    """Hold the instance's name on this host. Raises SettingsError when another daemon does."""
    folder = service.runtime_directory()
    file = os.open(folder / f"{instance}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError(
            f"instance {instance!r} is already running on this host (lock {folder}/{instance}.lock); "
            "give this one another --instance name"
        ) from None
    return file
