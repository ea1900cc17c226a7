"""A warm process and the jobs that it holds, as the daemon sees them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import itertools
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Literal

from workerd import log
from workerd.core.retry import limit
from workerd.handlers.guardian import Guardian
from workerd.handlers.output import Records, Transcript
from workerd.handlers.process import Process, ending
from workerd.handlers.program import Program
from workerd.handlers.warm import results
from workerd.handlers.warm.assignment import Assignment
from workerd.handlers.warm.inbox import Inbox, Tokens
from workerd.handlers.warm.protocol import (
    VERSION,
    Answer,
    LogLine,
    Message,
    Parser,
    Printed,
    ProtocolError,
    Ready,
    StartupError,
)

if TYPE_CHECKING:
    from workerd.handlers.warm.pool import WarmHandler

_CHUNK = 1 << 16

State = Literal["starting", "ready", "leaving", "ended"]


class ChildProcess:
    """One process, from its start to its end. Its jobs are answered in the order they came.

    One that ``asks`` begins a job only when it has read its number from a socket, and the jobs
    that it has not begun can be taken back from there. In others, each has begun when it is sent.
    """

    def __init__(
        self,
        pool: WarmHandler,
        program: Program,
        arguments: list[bytes],
        lines: int,
        guardian: Guardian,
        asks: bool,
    ) -> None:
        """Start it. Raises OSError."""
        self.state: State = "starting"
        self.asks = asks
        #: How many jobs it was given, and not taken from; how many it has answered.
        self.taken = 0
        self.count = 0
        #: What it holds: the first is being done, the others are in its pipe.
        self.assignments: deque[Assignment] = deque()
        self._pool = pool
        self._settings = pool.settings
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        self._parser = Parser(self._settings.output_limit)
        #: It is being found out which job it is at, and it must begin no other.
        self._pinned = False
        #: The job that it has heard printing by itself: until that has ended, no other is to lie
        #: behind it, only to be taken back when it prints again.
        self._speaker: Assignment | None = None
        #: Printed while it had no job; it is logged with the fields of its handler.
        self._between = Transcript(contextvars.copy_context(), lines)
        #: What it did against the protocol.
        self._fault = ""
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            frames, ours = _pipe(theirs, undo)
            answers, self._answers = reversed(_pipe(undo, theirs))
            os.set_blocking(self._answers, False)
            tokens = undo.enter_context(contextlib.closing(Tokens())) if asks else None
            self._inbox = Inbox(ours, tokens, pool.before_sending)
            self._process = Process(
                [program.path, *arguments],
                program.environment | {b"WORKERD_PROTOCOL": b"%d" % VERSION},
                program.directory,
                b"",
                functools.partial(self._printed, "stdout"),
                functools.partial(self._printed, "stderr"),
                guardian,
                [frames, answers, *([tokens.fileno()] if tokens else ())],
                self._hear,
            )
            undo.pop_all()
        self.pid = self._process.pid
        self._loop.add_reader(self._answers, self._listen)
        self._process.when_over(self._over)
        late = f"not ready within {self._settings.start_timeout:g} s"
        self._starting = self._loop.call_later(self._settings.start_timeout, self._unfit, late)

    # What the pool does with it.

    def room(self, depth: int) -> int:
        """How many more jobs it may be given."""
        if self.state != "ready" or self._pinned or self._process.over or self._process.cause:
            return 0
        if self.assignments and self.assignments[0] is self._speaker:
            return 0
        left = depth
        if self._settings.recycle_after:
            left = min(left, self._settings.recycle_after - self.count)
        return left - len(self.assignments)

    def take(self, assignment: Assignment) -> None:
        """Have it do a job; `send` sends all that it was given since the last time."""
        self.taken += 1
        assignment.child = self
        idle = not self.assignments
        if idle:
            self._between.close()
            self._watch()
        self.assignments.append(assignment)
        if idle or not self.asks:
            assignment.begin()
        self._inbox.put(assignment, limit(assignment.job, self._settings.retry))

    def send(self) -> None:
        """Send what it was given."""
        self._inbox.send()

    def take_back(self) -> list[Assignment]:
        """The jobs behind the first that it has not begun, and will not."""
        if len(self.assignments) < 2:
            return []
        back = self._inbox.take_back(list(itertools.islice(self.assignments, 1, None)))
        for _ in back:
            self.assignments.pop()
        self.taken -= len(back)
        return back

    def leave(self, reason: str) -> None:
        """Have it end once it has done what it holds; a process that is starting ends now."""
        if self.state in ("leaving", "ended"):
            return
        was, self.state = self.state, "leaving"
        self._pool.leaves(self, reason)
        if was == "starting":
            self.end("leave")
        elif not self.assignments:
            self._hang_up()

    @property
    def told_to_end(self) -> bool:
        return bool(self._process.cause)

    def end(self, cause: str) -> None:
        """SIGTERM to its process group, and SIGKILL after ``kill_grace``."""
        back = self.take_back()  # before it could leave with the permit for one of them
        self._process.end(cause, self._settings.kill_grace)
        self._pool.returned(back)
        self._pool.hand_out()

    def freeze(self) -> None:
        """Have it begin no other job, and read all its answers: it is at the first without one.

        Whoever calls this has the pool `hand_out` again.
        """
        self._pinned = True
        self._pool.returned(self.take_back())
        self._listen()
        self._pinned = False

    # What it does.

    def _unfit(self, text: str) -> None:
        """It does not become ready. Those who wait need not wait for its end as well."""
        self._starting.cancel()
        self.state = "leaving"
        self._pool.startup_failed(self, text)
        self.end("unfit")

    def _listen(self) -> None:
        """Read what it has sent."""
        with contextlib.suppress(BlockingIOError):
            while sent := os.read(self._answers, _CHUNK):
                self._parse(sent)
            self._loop.remove_reader(self._answers)

    def _hear(self) -> None:
        """It has printed something by itself, and that is the job's that it is at.

        Which one that is can be told when it can begin no other, and all its answers are read:
        the first that has none.
        """
        self.freeze()
        self._speaker = self.assignments[0] if self.assignments else None
        self._process.read_now()
        self._pool.hand_out()

    def _parse(self, data: bytes) -> None:
        if self._fault:
            return
        try:
            for message in self._parser.feed(data):
                if isinstance(message, Answer) and (message.printed or not self.asks):
                    # What the job has printed by itself is in the pipes by now.
                    self._process.read_now()
                self._act(message)
        except ProtocolError as broken:
            self._fault = f"broke the protocol: {broken}"
            if self.state == "starting":
                self._unfit(self._fault)
            # Whatever comes after it means nothing.
            self._process.end("protocol", 0.0)

    def _act(self, message: Message) -> None:
        match message:
            case Answer():
                self._answered(message)
            case Printed():
                self._printed(message.stream, message.data)
            case LogLine():
                self._recorded(message)
            case Ready() if self.state == "starting":
                self._starting.cancel()
                self.state = "ready"
                self._between.close()
                self._pool.ready(self)
            case StartupError() if self.state == "starting":
                self._unfit(results.safe(message.text))
            case Ready():
                if self.count or self.assignments:
                    raise ProtocolError("ready again")
            case StartupError():
                pass  # it was given up before

    def _answered(self, answer: Answer) -> None:
        assignment = self.assignments[0] if self.assignments else None
        if assignment is None or assignment.number != answer.frame:
            raise ProtocolError(f"an answer to frame {answer.frame}, which it is not doing")
        self.assignments.popleft()
        self.count += 1
        self._watch()
        seconds = time.monotonic() - assignment.began
        if self.asks and self.assignments and not answer.last:
            self.assignments[0].begin()
            self._inbox.send_tokens()
        assignment.end(results.answered(answer, self._process.cause))
        if answer.last:
            self.leave("last")
            # It may take its time to end.
            back, self.assignments = self.assignments, deque()
            self.taken -= len(back)
            self._pool.returned(list(back))
            self._pool.hand_out()
        elif self.state == "ready":
            most, memory = self._settings.recycle_after, self._settings.memory_limit
            if most and self.count >= most:
                self.leave("recycle_after")
            elif memory and self._process.resident() > memory:
                self.leave("memory_limit")
                self._pool.returned(self.take_back())
                self._pool.hand_out()
            elif not self._process.cause:
                self._pool.free(self, seconds)
        if self.state == "leaving" and not self.assignments:
            self._hang_up()

    def _hang_up(self) -> None:
        """End of file: it leaves by itself, or is told to after ``kill_grace``."""
        if not self._inbox.closed:
            self._inbox.close()
            grace = self._settings.kill_grace
            self._process.end_after(grace, "leave", grace)

    def _over(self, status: int) -> None:
        """The process has ended, and what it printed has been read."""
        self._listen()
        exit_status, signal = ending(status)
        if self.state == "starting":
            end = f"ended with {signal or f'status {exit_status}'} before it was ready"
            self._unfit(self._fault or "\n".join(filter(None, (end, self._between.stderr))))
        if self._fault or not (self.state == "leaving" or self._process.cause):
            log.warning("child ended", child=self.pid, exit_status=exit_status, signal=signal)
        self.state = "ended"
        self._starting.cancel()
        if self._timer:
            self._timer.cancel()
        self._loop.remove_reader(self._answers)
        os.close(self._answers)
        begun, unbegun = self._divide()
        self._inbox.close()
        self._between.close()
        self.taken -= len(unbegun)
        for assignment in begun:
            error = "\n".join(filter(None, (self._fault, assignment.said.stderr)))
            assignment.end(results.unanswered(status, self._process.cause, error))
        self.assignments.clear()
        self._pool.ended(self, unbegun)

    def _divide(self) -> tuple[list[Assignment], list[Assignment]]:
        """The jobs that end with it, and those that it never came to."""
        assignments = list(self.assignments)
        if not assignments:
            return [], []
        if self.asks:
            unbegun = self._inbox.take_back(assignments)
            return assignments[: len(assignments) - len(unbegun)], unbegun
        if self._process.cause == "drain":
            return assignments, []  # nobody waits any more for those that it has not begun
        # What it was sent and never read, it never looked at.
        unread = self._inbox.unread() >= sum(assignment.size for assignment in assignments)
        if unread and self._process.cause != "timeout":
            return [], assignments
        return assignments[:1], assignments[1:]

    # What it prints.

    def _printed(self, stream: str, data: bytes) -> None:
        said = self.assignments[0].said if self.assignments else self._between
        said.printed(stream, data)

    def _recorded(self, record: LogLine) -> None:
        if self.assignments:
            self.assignments[0].said.recorded(record)
        else:
            # At once: nobody knows when the next job comes.
            records = Records(self._lines)
            records.add(record.level, record.logger, record.text)
            records.close()

    # Time.

    def _watch(self) -> None:
        """The first of its jobs has its time from now on."""
        self._deadline = self._loop.time() + self._settings.timeout
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        # One timer for all jobs, one after another: most of them end long before.
        self._timer = None
        if self.assignments and self._loop.time() >= self._deadline:
            self.freeze()  # it may be at the next one, and the daemon not know it yet
            if self.assignments and self._loop.time() >= self._deadline:
                self.end("timeout")
                return
            self._pool.hand_out()
        if self.assignments and self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe: the end to read and the end to write, each closed by its stack."""
    read, write = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, read)
    writer.callback(os.close, write)
    return read, write
