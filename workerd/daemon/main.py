"""The daemon: from a command line to a running worker and its exit status."""

from __future__ import annotations

import asyncio
import contextlib

# getaddrinfo loads this codec at the first look-up of a name. By then an upgrade may have
# replaced the files of a process that is still draining: load everything now.
import encodings.idna  # noqa: F401
import fcntl
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

from workerd import __version__, log, log_formats, paths
from workerd.broker.connection import Connection, connections
from workerd.broker.errors import is_noise
from workerd.check.programs import untrusted_programs
from workerd.config.load import load
from workerd.config.model import Settings
from workerd.control.requests import Requests
from workerd.control.server import Control
from workerd.core.republish import Origin
from workerd.daemon import rundir
from workerd.daemon.detach import detach, open_standard_descriptors, shed_inheritance
from workerd.daemon.reload import Reload
from workerd.daemon.systemd import Systemd
from workerd.errors import EX_CONFIG, EX_SOFTWARE, SettingsError
from workerd.handlers import guard
from workerd.handlers.guardian import Guardian
from workerd.handlers.registry import HandlerRegistry
from workerd.runlog import writer
from workerd.worker.consumer import OnOutage
from workerd.worker.worker import Worker

#: So many more objects than before are a reason to look for cycles of them that nobody needs.
GARBAGE = 20_000


def run(
    config: Path | None, instance: str, detached: bool, pidfile: str | None, log_file: str | None
) -> NoReturn:
    """Run an instance until it has drained; the process ends here, with the exit status.

    Every problem of the configuration goes to the log, then the status is EX_CONFIG.
    """
    # First of all: whatever is opened would take their place.
    open_standard_descriptors()
    # A reload may be asked for before it can be had.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    shed_inheritance()
    try:
        settings = _load(config, instance)
        lock = _lock(instance)
        if detached:
            _detach(pidfile, log_file, lock)
    except SettingsError as error:
        log.begin(log_formats.writer("auto"), "info", instance)
        for problem in error.problems:
            log.error("bad configuration", problem=problem)
        _leave_word(instance, "\n".join(error.problems), ours=False)
        _exit(EX_CONFIG)
    guard.forbid_dumps()
    memory_lock = -1
    with contextlib.suppress(OSError):  # it will be told when the memory is opened
        memory_lock = writer.hold(paths.state_directory() / instance)
    # It has a share in that lock: as long as it lives, the jobs of a killed daemon may live, and
    # no other instance may start them.
    _begin_log(settings, instance)
    try:
        guardian = Guardian(*([] if memory_lock < 0 else [memory_lock]))
        # Not asyncio.run, which waits for a resolver that hangs in a thread.
        serving = _serve(settings, config, instance, guardian, memory_lock)
        status = asyncio.new_event_loop().run_until_complete(serving)
    except Exception:  # noqa: BLE001 - a bug: tell it and end
        log.error("bug", traceback=traceback.format_exc())
        _leave_word(instance, f"a bug, see the log: {traceback.format_exc(0).strip()}", ours=True)
        _exit(EX_SOFTWARE, pidfile)
    # Or systemd would kill it, and say so in the log of every stop.
    guardian.close()
    _exit(status, pidfile)


def _exit(status: int, pidfile: str | None = None) -> NoReturn:
    """End now, whatever hangs in a thread."""
    if pidfile:
        # Its number may soon be another process's.
        with contextlib.suppress(OSError):
            os.unlink(pidfile)
    log.flush(2.0)
    sys.stdout.flush()
    os._exit(status)


async def _serve(
    settings: Settings, config: Path | None, instance: str, guardian: Guardian, memory_lock: int
) -> int:
    """Work until the drain is over; returns the exit status."""
    files = ", ".join(map(str, settings.files))
    log.event("starting", version=__version__, pid=os.getpid(), files=files)
    origin = Origin(socket.gethostname(), instance)

    def connect(
        purpose: str, on_outage: OnOutage, wake: asyncio.Event
    ) -> AsyncIterator[Connection]:
        name = f"workerd@{instance} {origin.host} {purpose}"
        return connections(lambda: worker.settings.broker, name, os.environ, on_outage, wake)

    run_log = writer.RunLog(
        paths.state_directory(),
        instance,
        settings.worker.remember,
        _memory_trouble,
        lock=memory_lock,
        soon=asyncio.get_running_loop().call_soon,
    )
    systemd = Systemd()
    # What ends the daemon when it begins must not be forgotten with it.
    handlers = HandlerRegistry(os.environ, guardian, run_log.flush)
    worker = Worker(settings, handlers, origin, connect, systemd, run_log)
    guardian.watch(worker.changed)
    loop = asyncio.get_running_loop()
    bugs: list[object] = []

    def broken(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # Out of descriptors for somebody who asks; asyncio tries again by itself.
        if is_noise(error) or (isinstance(error, OSError) and "socket" in context):
            return
        text = "".join(traceback.format_exception(error)) if error else context["message"]
        log.error("bug", traceback=text)
        # A callback that broke off may have left a job that nobody will settle any more.
        if "handle" in context:
            bugs.append(error)
            worker.stop()

    loop.set_exception_handler(broken)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, worker.stop)

    def apply(new: Settings) -> None:
        _begin_log(new, instance)
        run_log.remember = new.worker.remember
        worker.reload(new)

    reload = Reload(worker, systemd, lambda: _load(config, instance), apply)
    loop.add_signal_handler(signal.SIGHUP, reload.request)
    loop.add_signal_handler(signal.SIGUSR1, worker.log_state)
    folder = paths.runtime_directory() / instance
    rundir.well(folder)
    requests = Requests(worker, instance)
    control = Control(folder, requests)
    await control.open()
    # What there is now stays. Messages that come together are no garbage, though many: looking
    # for some whenever there are 700 new objects took a twelfth of all time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)
    try:
        await worker.run()
    finally:
        control.close()
    return EX_SOFTWARE if bugs else 0


def _memory_trouble(text: str) -> None:
    if text:
        log.warning("memory not kept", text=text, remedy="until then a crash may rerun jobs")
    else:
        log.event("memory kept")


def _load(config: Path | None, instance: str) -> Settings:
    """The settings of an instance. Raises SettingsError."""
    settings = load(config, instance)
    problems = untrusted_programs(settings)
    if problems:
        raise SettingsError(*problems)
    return settings


def _begin_log(settings: Settings, instance: str) -> None:
    log.begin(log_formats.writer(settings.log.format), settings.log.level, instance)


def _leave_word(instance: str, why: str, ours: bool) -> None:
    """For `workerd status`, as long as nothing of this name runs."""
    if instance not in (".", "..") and "/" not in instance:
        rundir.failed(paths.runtime_directory() / instance, why, ours)


def _lock(instance: str) -> int:
    """Hold the instance's name on this host. Raises SettingsError when another daemon does."""
    try:
        path = paths.runtime_directory() / instance / "lock"
        rundir.make_folder(path.parent)
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
        detach(pidfile, log_file, [lock])
    except OSError as error:
        raise SettingsError(f"cannot detach: {error}") from None
