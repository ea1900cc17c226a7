"""A child process in a session of its own, watched without threads.

posix_spawn and a pidfd in the event loop: several times as fast as asyncio's own
subprocesses, and no signal can reach a process that took over the pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence

from workerd.handlers.guardian import Guardian
from workerd.handlers.poller import Poller

#: As much as a pipe takes.
_CHUNK = 65536
#: What may still be read after the child has ended; a grandchild could write for ever.
_LAST_READ = 1 << 20

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_DEFAULT_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


class Process:
    """A running child: its standard input is ``body``, its output goes to two callbacks.

    ``more`` are descriptors that it gets as 3, 4 …; the caller closes its own copies. When it has
    printed something, ``on_output`` is called, if there is one, and has to call `read_now`.
    Those that are started often share their ``poller``.
    ``cause`` says why it was ended (`end`); it is "" when the child ended by itself.
    """

    def __init__(
        self,
        argv: list[bytes],
        environment: Mapping[bytes, bytes],
        working_directory: str | None,
        body: bytes,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        guardian: Guardian,
        more: Sequence[int] = (),
        on_output: Callable[[], None] | None = None,
        poller: Poller | None = None,
    ) -> None:
        """Start it. Raises OSError (no such program, no more processes …) and ValueError (NUL)."""
        self._loop = asyncio.get_running_loop()
        self._guardian = guardian
        self._on_stdout, self._on_stderr = on_stdout, on_stderr
        self._on_output = on_output
        self._poller = poller or Poller()
        self.cause = ""
        #: It has ended, and what it wrote last is being read.
        self.over = False
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._timers: list[asyncio.TimerHandle] = []
        #: Its descriptors that are open here; none when it is over.
        self._open: list[int] = []
        try:
            self._start(argv, environment, working_directory, body, more)
        except BaseException:
            self._close()
            raise

    def _start(
        self,
        argv: list[bytes],
        environment: Mapping[bytes, bytes],
        working_directory: str | None,
        body: bytes,
        more: Sequence[int],
    ) -> None:
        stdin, self._stdin = self._pipe()
        os.set_blocking(self._stdin, False)
        # Most bodies fit into the pipe, and are done with before the child exists.
        self._rest = memoryview(body)
        self._feed()
        # The ends that it writes to stay open here as well: that it closes them is no event.
        self._stdout, stdout = self._pipe()
        self._stderr, stderr = self._pipe()
        self._poller.prepare()
        # From here on the guardian knows that there may be a process, whatever happens to us.
        environment = {**environment, **self._guardian.spawning()}
        try:
            self.pid = _spawn(argv, environment, working_directory, (stdin, stdout, stderr, *more))
        except BaseException:
            self._guardian.not_spawned()
            raise
        self._guardian.started(self.pid)
        try:
            self._drop(stdin)
            # Only now, when there is room for it: without a descriptor for it, the program
            # would have begun and be killed, and run again.
            self._pidfd = os.pidfd_open(self.pid)
            self._open.append(self._pidfd)
            self._listen()
        except BaseException:
            self._put_down()
            raise

    async def wait(self) -> int:
        """Its exit status; minus the signal's number when a signal ended it."""
        return await self._exited

    def when_over(self, callback: Callable[[int], None]) -> None:
        """Call this with what `wait` returns, once it has ended."""
        self._exited.add_done_callback(lambda exited: callback(exited.result()))

    def read_now(self) -> None:
        """Hand all that it has written so far to the callbacks: no more fits into a pipe."""
        if self._open:
            _read(self._stdout, self._on_stdout)
            _read(self._stderr, self._on_stderr)

    def resident(self) -> int:
        """The memory that it has in use (proc(5), statm), in bytes."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb", buffering=0) as file:
                return int(file.read().split()[1]) * _PAGE_SIZE
        except OSError:
            return 0

    def end_after(self, seconds: float, cause: str, grace: float) -> None:
        """Call `end` unless it has ended by itself within so many seconds."""
        self._timers.append(self._loop.call_later(seconds, self.end, cause, grace))

    def end(self, cause: str, grace: float) -> None:
        """SIGTERM to its process group, and SIGKILL ``grace`` seconds later."""
        if self.cause or self._has_ended():
            return
        self.cause = cause
        self._signal_group(signal.SIGTERM)
        self._timers.append(self._loop.call_later(grace, self._kill))

    def _kill(self) -> None:
        if not self.over:
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        # A program that became another user's is out of our reach; its timeout has no teeth.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _has_ended(self) -> bool:
        """Whether it has ended, even when the loop has not come to reap it yet."""
        if self.over:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PIDFD, self._pidfd, flags) is not None

    def _listen(self) -> None:
        poller, on_output = self._poller, self._on_output
        if self._stdin >= 0:
            poller.add(self._stdin, select.EPOLLOUT, self._feed)
        for fd, on_data in ((self._stdout, self._on_stdout), (self._stderr, self._on_stderr)):
            os.set_blocking(fd, False)
            if on_output:
                poller.add(fd, select.EPOLLIN, on_output)
            else:
                poller.add(fd, select.EPOLLIN, _read, fd, on_data)
        poller.add(self._pidfd, select.EPOLLIN, self._reap)

    def _feed(self) -> None:
        """Write the body as far as the pipe takes it; a child that never reads blocks nobody."""
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._stdin, self._rest) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            pass  # it does not want the rest; its exit status decides
        self._drop(self._stdin)
        self._stdin = -1

    def _reap(self) -> None:
        # What it left behind in its process group ends with it. Before it is reaped, so
        # that the group's number cannot be somebody else's yet.
        self._signal_group(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self._guardian.ended(self.pid)
        for timer in self._timers:
            timer.cancel()
        self.over = True
        if self._on_output:
            self._on_output()
        # All that it wrote is in the pipes by now. Not until end of file: a daemonised
        # grandchild may hold the other end for ever.
        _read_rest(self._stdout, self._on_stdout)
        _read_rest(self._stderr, self._on_stderr)
        self._close()
        if not self._exited.done():  # whoever waited may have been cancelled
            self._exited.set_result(os.waitstatus_to_exitcode(status))

    def _put_down(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._guardian.ended(self.pid)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        self._open += ends
        return ends

    def _drop(self, fd: int) -> None:
        self._open.remove(fd)
        self._poller.discard(fd)
        os.close(fd)

    def _close(self) -> None:
        while self._open:
            self._drop(self._open[-1])
        self._poller.release()


def _spawn(
    argv: list[bytes],
    environment: Mapping[bytes, bytes],
    working_directory: str | None,
    descriptors: Sequence[int],
) -> int:
    spare: list[int] = []
    actions = []
    try:
        for number, fd in enumerate(descriptors):
            if fd < len(descriptors):
                # It would be overwritten before it is used.
                fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(descriptors))
                spare.append(fd)
            actions.append((os.POSIX_SPAWN_DUP2, fd, number))
        with _directory(working_directory) if working_directory else contextlib.nullcontext():
            return os.posix_spawn(
                argv[0],
                argv,
                environment,
                file_actions=actions,
                setsid=True,
                # The daemon's handled, blocked and ignored signals are no business of a job's.
                setsigmask=[],
                setsigdef=_DEFAULT_SIGNALS,
            )
    finally:
        for fd in spare:
            os.close(fd)


@contextlib.contextmanager
def _directory(path: str) -> Iterator[None]:
    """Be in another directory for the moment of a spawn: posix_spawn cannot change it.

    Nothing else runs meanwhile: one thread, and posix_spawn returns after the exec.
    """
    try:
        home = os.open(".", os.O_PATH | os.O_CLOEXEC)
    except PermissionError:
        # Started as another user from a folder closed to this one: nothing is to be had there.
        home = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(path)
        yield
    finally:
        os.fchdir(home)
        os.close(home)


def _read(fd: int, on_data: Callable[[bytes], None]) -> None:
    with contextlib.suppress(BlockingIOError):
        on_data(os.read(fd, _CHUNK))


def _read_rest(fd: int, on_data: Callable[[bytes], None]) -> None:
    total = 0
    with contextlib.suppress(BlockingIOError):
        while total < _LAST_READ:
            data = os.read(fd, _CHUNK)
            total += len(data)
            on_data(data)


def ending(status: int) -> tuple[int | None, str | None]:
    """What `Process.wait` returns, as an exit status or the name of a signal."""
    if status >= 0:
        return status, None
    try:
        return None, signal.Signals(-status).name
    except ValueError:
        return None, f"signal {-status}"
