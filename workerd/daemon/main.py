"""The daemon: from a command line to a running worker and its exit status."""

from __future__ import annotations

import asyncio
import contextlib

# getaddrinfo loads this codec at the first look-up of a name. By then an upgrade may have
# replaced the files of a process that is still draining: load everything now.
import encodings.idna  # noqa: F401
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

from workerd import __version__, log, log_formats, paths
from workerd.broker.connection import Connection, connections
from workerd.broker.errors import is_noise
from workerd.check.programs import untrusted_programs
from workerd.config.load import load
from workerd.config.model import Broker, Settings
from workerd.control.requests import Requests
from workerd.control.server import Control
from workerd.core.republish import Origin
from workerd.daemon import rundir
from workerd.daemon.detach import detach, reopen, shed_inheritance
from workerd.daemon.reload import Reload
from workerd.daemon.systemd import Systemd
from workerd.errors import EX_CONFIG, EX_SOFTWARE, SettingsError
from workerd.handlers import guard
from workerd.handlers.guardian import Guardian
from workerd.handlers.registry import HandlerRegistry
from workerd.runlog import writer
from workerd.runlog.lock import hold
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
    # A reload may be asked for before it can be had.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    shed_inheritance()
    try:
        settings = _load(config, instance)
        lock = rundir.lock(instance)
        if detached:
            detach(pidfile, log_file, [lock])
    except SettingsError as error:
        log.begin(log_formats.writer("auto"), "info", instance)
        for problem in error.problems:
            log.error("bad configuration", problem=problem)
        rundir.failed(instance, "\n".join(error.problems), ours=False)
        _exit(EX_CONFIG)
    guard.forbid_dumps()
    _begin_log(settings, instance)
    run_log_lock = -1
    with contextlib.suppress(OSError):  # `RunLog` tries again, and says why it cannot
        run_log_lock = hold(paths.state_directory() / instance)
    try:
        # The guardian has a share in that lock: as long as it lives, the jobs of a killed daemon
        # may live, and no other instance may start them.
        guardian = Guardian(*([] if run_log_lock < 0 else [run_log_lock]))
        daemon = Daemon(settings, config, instance, guardian, run_log_lock, log_file)
        # Not asyncio.run, which waits for a resolver that hangs in a thread.
        status = asyncio.new_event_loop().run_until_complete(daemon.serve())
    except Exception:  # noqa: BLE001 - a bug: tell it and end
        log.error("bug", traceback=traceback.format_exc())
        why = f"a bug, see the log: {traceback.format_exc(0).strip()}"
        rundir.failed(instance, why, ours=True)
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


class Daemon:
    """A running instance: the worker and all that is beside it."""

    def __init__(
        self,
        settings: Settings,
        config: Path | None,
        instance: str,
        guardian: Guardian,
        run_log_lock: int,
        log_file: str | None,
    ) -> None:
        self._settings = settings
        self._config = config
        self._instance = instance
        self._guardian = guardian
        self._run_log_lock = run_log_lock
        self._log_file = log_file
        self._origin = Origin(log_formats.text_of(os.fsencode(socket.gethostname())), instance)
        #: What went wrong in callbacks, where no job or request answers for it.
        self._bugs: list[object] = []
        #: Called when something has changed that the status line shows.
        self._changed: Callable[[], None] = lambda: None

    async def serve(self) -> int:
        """Work until the drain is over; returns the exit status."""
        control = await self._start()
        try:
            await self._worker.run()
        finally:
            control.close()
        return EX_SOFTWARE if self._bugs else 0

    async def _start(self) -> Control:
        """Put the parts together; returns the one that has to be closed in the end."""
        files = ", ".join(map(str, self._settings.files))
        log.event("starting", version=__version__, pid=os.getpid(), files=files)
        loop = asyncio.get_running_loop()
        self._run_log = writer.RunLog(
            paths.state_directory(),
            self._instance,
            self._settings.worker.remember,
            self._run_log_failed,
            lock=self._run_log_lock,
            soon=loop.call_soon,
            later=loop.call_later,
        )
        # What ends the daemon when it begins must not be forgotten with it.
        handlers = HandlerRegistry(os.environ, self._guardian, self._run_log.flush)
        systemd = Systemd()
        self._worker = Worker(
            self._settings, handlers, self._origin, self._connect, systemd, self._run_log
        )
        self._changed = self._worker.changed
        self._guardian.watch(self._worker.changed)
        loop.set_exception_handler(self._on_error)
        self._handle_signals(loop, systemd)
        folder = paths.runtime_directory() / self._instance
        rundir.well(folder)
        control = Control(folder, Requests(self._worker, self._instance))
        await control.open()
        _collect_less_garbage()
        return control

    def _connect(
        self, purpose: str, on_outage: OnOutage, wake: asyncio.Event
    ) -> AsyncIterator[Connection]:
        name = f"workerd@{self._instance} {self._origin.host} {purpose}"

        def settings() -> Broker:
            return self._worker.settings.broker

        return connections(settings, name, os.environ, on_outage, wake)

    def _handle_signals(self, loop: asyncio.AbstractEventLoop, systemd: Systemd) -> None:
        worker = self._worker
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, worker.stop)
        reload = Reload(worker, systemd, lambda: _load(self._config, self._instance), self._apply)

        def hang_up() -> None:
            self._reopen_log()
            reload.request()

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        loop.add_signal_handler(signal.SIGUSR1, worker.log_state)

    def _reopen_log(self) -> None:
        if self._log_file is None:
            return
        try:
            reopen(self._log_file)
        except OSError as error:
            log.warning("log not reopened", text=f"{self._log_file}: {error.strerror}")

    def _apply(self, settings: Settings) -> None:
        """Put new settings into force."""
        _begin_log(settings, self._instance)
        self._run_log.remember = settings.worker.remember
        self._worker.reload(settings)

    def _run_log_failed(self, text: str) -> None:
        """The run log cannot be written, or can be again (``text`` is "")."""
        if text:
            log.warning("run log not kept", text=text, remedy="until then a crash may rerun jobs")
        else:
            log.event("run log kept")
        self._changed()

    def _on_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # Out of descriptors for somebody who asks; asyncio tries again by itself.
        if is_noise(error) or (isinstance(error, OSError) and "socket" in context):
            return
        text = "".join(traceback.format_exception(error)) if error else context["message"]
        log.error("bug", traceback=text)
        # A callback that broke off may have left a job that nobody will settle any more.
        if "handle" in context:
            self._bugs.append(error)
            self._worker.stop()


def _collect_less_garbage() -> None:
    """Look for cycles of objects less often, and never among those that there are now.

    Messages that come together are no garbage, though many: looking for some whenever there are
    700 new objects took a twelfth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)


def _load(config: Path | None, instance: str) -> Settings:
    """The settings of an instance. Raises SettingsError."""
    settings = load(config, instance)
    problems = untrusted_programs(settings)
    if problems:
        raise SettingsError(*problems)
    return settings


def _begin_log(settings: Settings, instance: str) -> None:
    log.begin(log_formats.writer(settings.log.format), settings.log.level, instance)
