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
from collections.abc import Callable
from typing import Protocol

from workerd import log
from workerd.config.model import Handler
from workerd.core.retry import limit
from workerd.handlers.guardian import Guardian
from workerd.handlers.output import Transcript
from workerd.handlers.process import Process, ending
from workerd.handlers.program import Program
from workerd.handlers.warm import results
from workerd.handlers.warm.answers import LARGEST_PIPE, Answers
from workerd.handlers.warm.assignment import Assignment
from workerd.handlers.warm.inbox import Inbox, Tokens
from workerd.handlers.warm.lifecycle import Lifecycle, State
from workerd.handlers.warm.protocol import (
    VERSION,
    Answer,
    LogLine,
    Message,
    Printed,
    ProtocolError,
    Ready,
    StartupError,
)


class Owner(Protocol):
    """Who has a warm process. It is called in the middle of what the process does: it only takes
    note, and asks the process for nothing more before that has ended.
    """

    def ready(self, child: ChildProcess) -> None:
        """The process takes jobs."""

    def start_failed(self, child: ChildProcess, text: str) -> None:
        """The process did not become ready, or has ended before it had a job."""

    def answered(self, child: ChildProcess, seconds: float) -> None:
        """The process has done a job in this time, and could take another."""

    def returned(self, assignments: list[Assignment]) -> None:
        """A process has not begun these jobs, and will not."""

    def leaves(self, child: ChildProcess, reason: str) -> None:
        """The process takes no further job; those that it has it will still do."""

    def ended(self, child: ChildProcess, unbegun: list[Assignment]) -> None:
        """The process is gone; these jobs were in its pipe, and it never came to them."""


class ChildProcess:
    """One process, from its start to its end. Its jobs are answered in the order they came.

    A process that ``asks`` begins a job only when it has read the job's number from a socket; from
    there those that it has not begun can be taken back. In others, each has begun when it is sent.
    """

    def __init__(
        self,
        owner: Owner,
        settings: Handler,
        program: Program,
        arguments: list[bytes],
        lines: int,
        guardian: Guardian,
        asks: bool,
        before_sending: Callable[[], object],
    ) -> None:
        """Start the process. Raises OSError."""
        self._life = Lifecycle()
        #: How many jobs it was given, and not taken from; how many it has answered.
        self.taken = 0
        self.count = 0
        #: What it has: the first is being done, the others are in its pipe.
        self.assignments: deque[Assignment] = deque()
        self._asks = asks
        self._owner = owner
        self._settings = settings
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        #: The job that is known to print by itself: until that has ended, no other is to lie
        #: behind it, only to be taken back when it prints again.
        self._printer: Assignment | None = None
        #: What it prints while it has no job; logged with the fields of its handler.
        self._between = Transcript(contextvars.copy_context(), lines)
        #: What it did against the protocol, if anything.
        self._fault = ""
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            frames, ours = _pipe(theirs, undo)
            sent, answers = _pipe(undo, theirs)
            tokens = undo.enter_context(contextlib.closing(Tokens())) if asks else None
            self._inbox = Inbox(ours, tokens, before_sending)
            self._process = Process(
                [program.path, *arguments],
                program.environment | {b"WORKERD_PROTOCOL": b"%d" % VERSION},
                program.directory,
                b"",
                functools.partial(self._printed, "stdout"),
                functools.partial(self._printed, "stderr"),
                guardian,
                [frames, answers, *([tokens.fileno()] if tokens else ())],
                self._on_output,
            )
            undo.pop_all()
        self._answers = Answers(sent, settings.output_limit, self._act, self._broken)
        self.pid = self._process.pid
        self._details = {"pid": self.pid}
        self._process.when_over(self._over)
        late = f"not ready within {settings.start_timeout:g} s"
        self._starting = self._loop.call_later(settings.start_timeout, self._unfit, late)

    @property
    def state(self) -> State:
        """See `lifecycle`."""
        return self._life.state

    @property
    def is_starting(self) -> bool:
        return self._life.state == "starting"

    @property
    def is_ready(self) -> bool:
        return self._life.state == "ready"

    # What its owner does with it.

    def room(self, depth: int) -> int:
        """How many more jobs it may be given."""
        if not self.is_ready or self._process.over:
            return 0
        if self.assignments and self.assignments[0] is self._printer:
            return 0
        left = depth
        if self._settings.recycle_after:
            left = min(left, self._settings.recycle_after - self.count)
        return left - len(self.assignments)

    def take(self, assignment: Assignment) -> None:
        """Have it do a job; `send` sends all that it was given since the last time."""
        assert self.is_ready, self.state
        self.taken += 1
        assignment.holder = self
        idle = not self.assignments
        if idle:
            self._between.close()
            self._watch()
        self.assignments.append(assignment)
        if idle or not self._asks:
            assignment.begin(self._details)
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
        self._let_go(back)
        return back

    def leave(self, reason: str) -> None:
        """Have it end once it has done what it has; a process that is starting ends now."""
        if self.is_starting:
            self._starting.cancel()
            self._owner.leaves(self, reason)
            self._end("leave")
        elif self.is_ready:
            self._life.move("leave")
            self._owner.leaves(self, reason)
            self._hang_up()

    def interrupt(self, assignment: Assignment) -> None:
        """Give this job back, or end it if it has begun, and the process with it."""
        self.freeze()
        if assignment in self.assignments:
            self._end("drain")

    def freeze(self) -> None:
        """Have it begin no other job, and read all its answers: it is at the first without one."""
        self._owner.returned(self.take_back())
        self._answers.catch_up()

    def _end(self, cause: str) -> None:
        """SIGTERM to its process group, and SIGKILL after ``kill_grace``."""
        self._life.move("end")
        back = self.take_back()  # before it could leave with the token of one of them
        self._process.end(cause, self._settings.kill_grace)
        self._owner.returned(back)

    def _let_go(self, assignments: list[Assignment]) -> None:
        """It does not have these any more, and has not begun them."""
        self.taken -= len(assignments)
        for assignment in assignments:
            assignment.holder = None

    # What it does.

    def _unfit(self, text: str) -> None:
        """It does not become ready. Those who wait need not wait for its end as well."""
        self._starting.cancel()
        self._life.move("unfit")
        self._answers.ignore()
        self._owner.start_failed(self, text)
        self._process.end("unfit", self._settings.kill_grace)

    def _on_output(self) -> None:
        """It has printed something by itself, and that is the job's that it is at.

        Which job that is shows when it can begin no other, and all its answers are read:
        the first that has none.
        """
        self.freeze()
        self._printer = self.assignments[0] if self.assignments else None
        self._process.read_now()

    def _broken(self, error: ProtocolError) -> None:
        """It has broken the protocol: nothing that it says counts any more."""
        self._fault = f"broke the protocol: {error}"
        if self.is_starting:
            self._unfit(self._fault)
        else:
            self._life.move("breach")
        self._process.end("protocol", 0.0)

    def _act(self, message: Message) -> None:
        match message:
            case Answer():
                if message.printed or not self._asks:
                    # What the job has printed by itself is in the pipes by now.
                    self._process.read_now()
                self._answered(message)
            case Printed():
                self._printed(message.stream, message.data)
            case LogLine():
                self._logged(message)
            case Ready() if self.is_starting:
                self._starting.cancel()
                self._life.move("ready")
                self._between.close()
                self._owner.ready(self)
            case StartupError() if self.is_starting:
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
        if self._asks and self.assignments and not answer.last:
            self.assignments[0].begin(self._details)
            self._inbox.send_tokens()
        assignment.end(results.answered(answer, self._process.cause))
        if answer.last:
            self.leave("last")
            # It may take its time to end.
            back, self.assignments = list(self.assignments), deque()
            self._let_go(back)
            self._owner.returned(back)
        elif self.is_ready:
            self._stay_or_leave(seconds)
        self._hang_up()

    def _stay_or_leave(self, seconds: float) -> None:
        """It has done a job in this time, and that may have been its last."""
        most, memory = self._settings.recycle_after, self._settings.memory_limit
        if most and self.count >= most:
            self.leave("recycle_after")
        elif memory and self._process.resident() > memory:
            self.leave("memory_limit")
            self._owner.returned(self.take_back())
        else:
            self._owner.answered(self, seconds)

    def _hang_up(self) -> None:
        """Once it is to go and has nothing left to do: end of file, and SIGTERM if it stays."""
        going = self.state in ("leaving", "ending")
        if going and not self.assignments and not self._inbox.closed:
            self._inbox.close()
            grace = self._settings.kill_grace
            self._process.end_after(grace, "leave", grace)

    def _over(self, status: int) -> None:
        """The process has ended, and what it printed has been read."""
        self._answers.catch_up(LARGEST_PIPE)
        exit_status, signal = ending(status)
        if self.is_starting:
            end = f"ended with {signal or f'status {exit_status}'} before it was ready"
            self._unfit("\n".join(filter(None, (end, self._between.stderr))))
        by_itself = self.state in ("ready", "ending") and not self._process.cause
        if by_itself or self._fault:
            log.warning("child ended", child=self.pid, exit_status=exit_status, signal=signal)
        was_ready = self.is_ready
        self._life.move("over")
        self._release()
        begun, unbegun = self._divide()
        self._inbox.close()
        self._let_go(unbegun)
        if was_ready and not self.taken:
            self._owner.start_failed(self, "it ended as soon as it was ready")
        for assignment in begun:
            error = "\n".join(filter(None, (self._fault, assignment.transcript.stderr)))
            assignment.end(results.unanswered(status, self._process.cause, error))
        self.assignments.clear()
        self._owner.ended(self, unbegun)

    def _release(self) -> None:
        self._starting.cancel()
        if self._timer:
            self._timer.cancel()
        self._answers.close()
        self._between.close()

    def _divide(self) -> tuple[list[Assignment], list[Assignment]]:
        """The jobs that end with it, and those that it never came to."""
        assignments = list(self.assignments)
        if not assignments:
            return [], []
        if self._asks:
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
        transcript = self.assignments[0].transcript if self.assignments else self._between
        transcript.printed(stream, data)

    def _logged(self, line: LogLine) -> None:
        transcript = self.assignments[0].transcript if self.assignments else self._between
        transcript.logged(line.level, line.logger, line.text)

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
                self._end("timeout")
                return
        if self.assignments and self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe: the end to read and the end to write, each closed by its stack."""
    read, write = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, read)
    writer.callback(os.close, write)
    return read, write
