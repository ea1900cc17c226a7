"""A warm process and the jobs that it holds, as the daemon sees them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import functools
import os
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol, TypedDict

from workerd import log
from workerd.handlers.guardian import Guardian
from workerd.handlers.output import Output, Records
from workerd.handlers.process import Process, make_pipe, signal_name
from workerd.handlers.program import Program
from workerd.handlers.protocol import (
    VERSION,
    Answer,
    Broken,
    Message,
    Parser,
    Printed,
    Ready,
    Record,
    Unfit,
    frame,
)
from workerd.job import Job, Outcome, Report
from workerd.options import Handler
from workerd.retry import limit

#: The end of stderr that a dead letter carries, in bytes.
ERROR_LIMIT = 8192
#: Of what a process says of itself or of a job, in characters.
_LONGEST_TEXT = 16 * 1024
_CHUNK = 1 << 16
#: What is written to a process at once; the rest waits until it has room.
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_CAUSES = {
    "drain": (Outcome.INTERRUPTED, "drain"),
    "timeout": (Outcome.FAILED, "timeout"),
}


class Turn:
    """A job that waits for a warm process, or is in the hands of one."""

    def __init__(self, job: Job, started: Callable[[int], None], lines: int) -> None:
        self.job = job
        self.report: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        #: The process that holds it.
        self.runner: Runner | None = None
        #: Its number among the jobs of that process, and the bytes that it takes there.
        self.number = self.size = 0
        self._started: Callable[[int], None] | None = started
        # What the job says is logged with the fields of whoever waits for it.
        self._context = contextvars.copy_context()
        self._lines = lines
        self._outputs: dict[str, Output] = {}
        self._records: Records | None = None

    def begin(self) -> None:
        """A process that is ready gets it; told once, even if another gets it after that one."""
        if self._started is not None:
            started, self._started = self._started, None
            assert self.runner is not None
            self._context.run(started, self.runner.pid)

    def printed(self, stream: str, data: bytes) -> None:
        output = self._outputs.get(stream)
        if output is None:
            keep = ERROR_LIMIT if stream == "stderr" else 0
            output = self._outputs[stream] = Output(stream, "info", self._lines, keep)
        self._context.run(output.feed, data)

    def recorded(self, record: Record) -> None:
        if self._records is None:
            self._records = Records(self._lines)
        self._context.run(self._records.add, record.level, record.logger, record.text)

    def end(self, report: Report) -> None:
        """Tell whoever waits for it. All that it has printed is in the log then."""
        for said in (*self._outputs.values(), self._records):
            if said is not None:
                self._context.run(said.close)
        if not self.report.done():
            self.report.set_result(report)

    @property
    def stderr(self) -> str:
        """The end of what it wrote to standard error."""
        output = self._outputs.get("stderr")
        return log.text_lines(output.tail) if output else ""


class Pool(Protocol):
    """Whom a runner tells of its life."""

    settings: Handler

    def ready(self, runner: Runner) -> None:
        """It takes jobs."""

    def unfit(self, runner: Runner, text: str) -> None:
        """It never came so far, or ended before it did anything."""

    def free(self, runner: Runner) -> None:
        """It has answered, and could take another job."""

    def leaves(self, runner: Runner, reason: str) -> None:
        """It takes no further job; what it has it will still do."""

    def ended(self, runner: Runner, unbegun: list[Turn]) -> None:
        """It is over; these jobs were in its pipe, and it never came to them."""


State = Literal["starting", "ready", "leaving", "ended"]


class Runner:
    """One process, from its start to its end. Its jobs are answered in the order they came."""

    def __init__(
        self,
        pool: Pool,
        program: Program,
        arguments: list[bytes],
        lines: int,
        guardian: Guardian,
    ) -> None:
        """Start it. Raises OSError."""
        self.state: State = "starting"
        #: How many jobs it was given, and how many of them it has answered.
        self.taken = 0
        self.count = 0
        #: What it holds: the first is being done, the others are in its pipe.
        self.turns: deque[Turn] = deque()
        self._pool = pool
        self._settings = pool.settings
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        self._parser = Parser(self._settings.output_limit)
        #: What it has printed on descriptors 1 and 2, until its messages before are read.
        self._printed_itself: list[tuple[str, bytes]] = []
        self._listening = False
        #: Printed while it had no job.
        self._between: dict[str, Output] = {}
        #: What it did against the protocol.
        self._fault = ""
        #: It has said that it takes no job after the one that it answered.
        self._gave_up = False
        self._exited = False
        self._unsent: deque[memoryview] = deque()
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            frames, self._frames = make_pipe(theirs, undo)
            answers, self._answers = reversed(make_pipe(undo, theirs))
            for fd in (self._frames, self._answers):
                os.set_blocking(fd, False)
            self._process = Process(
                [program.path, *arguments],
                program.environment | {b"WORKERD_PROTOCOL": b"%d" % VERSION},
                program.directory,
                b"",
                functools.partial(self._listen, "stdout"),
                functools.partial(self._listen, "stderr"),
                guardian,
                (frames, answers),
            )
            undo.pop_all()
        self.pid = self._process.pid
        self._loop.add_reader(self._answers, self._listen)
        self._process.when_over(self._over)
        self._starting = self._loop.call_later(self._settings.start_timeout, self._late)

    # What the pool does with it.

    def take(self, turn: Turn) -> None:
        """Send it a job."""
        self.taken += 1
        turn.number, turn.runner = self.taken, self
        if not self.turns:
            self._close_between()
            self._watch()
        self.turns.append(turn)
        turn.begin()
        data = frame(turn.number, turn.job, limit(turn.job, self._settings.retry))
        turn.size = len(data)
        self._unsent.append(memoryview(data))
        if len(self._unsent) == 1:
            self._send()

    def leave(self, reason: str) -> None:
        """Have it end once it has done what it holds; a process that is starting ends now."""
        if self.state in ("leaving", "ended"):
            return
        was, self.state = self.state, "leaving"
        self._pool.leaves(self, reason)
        if was == "starting":
            self.end("leave")
        elif not self.turns:
            self._hang_up()

    def end(self, cause: str) -> None:
        """SIGTERM to its process group, and SIGKILL after ``kill_grace``."""
        self._process.end(cause, self._settings.kill_grace)

    # What it does.

    def _late(self) -> None:
        self._unfit(f"not ready within {self._settings.start_timeout:g} s")

    def _unfit(self, text: str) -> None:
        """It does not become ready. Those who wait need not wait for its end as well."""
        self._starting.cancel()
        self.state = "leaving"
        self._pool.unfit(self, text)
        self.end("unfit")

    def _listen(self, stream: str = "", data: bytes = b"") -> None:
        """It has sent something, or printed this by itself: what it sent comes first."""
        if data:
            self._printed_itself.append((stream, data))
        if self._listening:
            return
        self._listening = True
        with contextlib.suppress(BlockingIOError):
            sent = os.read(self._answers, _CHUNK)
            if sent:
                self._parse(sent)
            else:
                self._loop.remove_reader(self._answers)
        self._listening = False
        self._tell_printed()

    def _tell_printed(self) -> None:
        printed, self._printed_itself = self._printed_itself, []
        for stream, data in printed:
            self._printed(stream, data)

    def _parse(self, data: bytes) -> None:
        if self._fault:
            return
        try:
            for message in self._parser.feed(data):
                if isinstance(message, Answer):
                    # What the job has printed by itself is in the pipes by now.
                    self._process.read_now()
                    self._tell_printed()
                self._act(message)
        except Broken as broken:
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
            case Record():
                self._recorded(message)
            case Ready() if self.state == "starting":
                self._starting.cancel()
                self.state = "ready"
                self._close_between()
                self._pool.ready(self)
            case Unfit() if self.state == "starting":
                self._unfit(_safe(message.text))
            case Ready():
                if self.count or self.turns:
                    raise Broken("ready again")
            case Unfit():
                pass  # it was given up before

    def _answered(self, answer: Answer) -> None:
        turn = self.turns[0] if self.turns else None
        if turn is None or turn.number != answer.frame:
            raise Broken(f"an answer to frame {answer.frame}, which it is not doing")
        self.turns.popleft()
        self.count += 1
        self._watch()
        turn.end(self._report(answer))
        if answer.last:
            self._gave_up = True
            self.leave("last")
        elif self.state == "ready":
            limit = self._settings.recycle_after
            if limit and self.count >= limit:
                self.leave("recycle_after")
            elif self._settings.memory_limit and self._resident() > self._settings.memory_limit:
                self.leave("memory_limit")
            elif not self._process.cause:
                self._pool.free(self)
        if self.state == "leaving" and not self.turns:
            self._hang_up()

    def _report(self, answer: Answer) -> Report:
        """What an answer means. A job that was told to end, and is done all the same, is done."""
        if answer.outcome is not Outcome.DONE and self._process.cause in _CAUSES:
            outcome, reason = _CAUSES[self._process.cause]
        elif answer.outcome is Outcome.FAILED:
            outcome, reason = answer.outcome, "error" if answer.retry_after is None else "retry"
        else:
            outcome = answer.outcome
            reason = "rejected" if outcome is Outcome.REJECTED else ""
        return Report(
            outcome,
            reason,
            error=_safe(answer.error),
            output=answer.output,
            retry_after=answer.retry_after,
            note=_safe(answer.note),
        )

    def room(self, depth: int) -> int:
        """How many more jobs it may be given."""
        if self.state != "ready" or self._exited or self._process.cause:
            return 0
        left = depth
        if self._settings.recycle_after:
            left = min(left, self._settings.recycle_after - self.count)
        return left - len(self.turns)

    def _over(self, status: int) -> None:
        """The process has ended, and what it printed has been read."""
        self._exited = True
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._answers, _CHUNK):
                self._parse(data)
        if self.state == "starting":
            end = f"ended with {_ending(status)} before it was ready"
            self._unfit(self._fault or self._said(end))
        if self._fault or not (self.state == "leaving" or self._process.cause):
            log.warning("child ended", child=self.pid, **_facts(status))
        self.state = "ended"
        self._starting.cancel()
        if self._timer:
            self._timer.cancel()
        self._loop.remove_reader(self._answers)
        os.close(self._answers)
        charged = self._charged()
        self._hang_up()
        self._close_between()
        unbegun = list(self.turns)[charged:]
        for turn in list(self.turns)[:charged]:
            turn.end(self._crash(turn, status))
        self.turns.clear()
        self._pool.ended(self, unbegun)

    def _charged(self) -> int:
        """For how many of the jobs that it holds its end is an end."""
        if self._process.cause == "drain":
            return len(self.turns)  # nobody waits any more for those that it has not begun
        if self._gave_up or not self.turns:
            return 0
        if self._process.cause == "timeout":
            return 1
        if self._unread() >= sum(turn.size for turn in self.turns):
            self.taken -= len(self.turns)
            return 0  # it died before it had a look at them
        return 1

    def _unread(self) -> int:
        """How many bytes of what it was to be sent it never read."""
        count = fcntl.ioctl(self._frames, termios.FIONREAD, struct.pack("i", 0))
        return sum(map(len, self._unsent)) + int(struct.unpack("i", count)[0])

    def _crash(self, turn: Turn, status: int) -> Report:
        outcome, reason = _CAUSES.get(self._process.cause, (Outcome.FAILED, "crashed"))
        return Report(
            outcome,
            reason,
            **_facts(status),
            error="\n".join(filter(None, (self._fault, turn.stderr))),
        )

    def _said(self, text: str) -> str:
        """This text, and the end of what it wrote to standard error without a job."""
        output = self._between.get("stderr")
        return "\n".join(filter(None, (text, log.text_lines(output.tail) if output else "")))

    # What it prints.

    def _printed(self, stream: str, data: bytes) -> None:
        if self.turns:
            self.turns[0].printed(stream, data)
            return
        output = self._between.get(stream)
        if output is None:
            output = self._between[stream] = Output(stream, "info", self._lines, ERROR_LIMIT)
        output.feed(data)

    def _recorded(self, record: Record) -> None:
        if self.turns:
            self.turns[0].recorded(record)
        else:
            records = Records(self._lines)
            records.add(record.level, record.logger, record.text)
            records.close()

    def _close_between(self) -> None:
        for output in self._between.values():
            output.close()
        self._between.clear()

    # What it is sent.

    def _send(self) -> None:
        """Write as far as the pipe takes it; a process that does not read holds nobody up."""
        try:
            while self._unsent:
                sent = os.write(self._frames, self._unsent[0])
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._frames, self._send)
            return
        except BrokenPipeError:
            pass  # it has ended, which will be told soon
        self._loop.remove_writer(self._frames)

    def _hang_up(self) -> None:
        """End of file: it leaves by itself, or is told to after ``kill_grace``."""
        if self._frames < 0:
            return
        self._loop.remove_writer(self._frames)
        os.close(self._frames)
        self._frames = -1
        if self.state != "ended":
            grace = self._settings.kill_grace
            self._process.end_after(grace, "leave", grace)

    # Time and memory.

    def _watch(self) -> None:
        """The first of its jobs has its time from now on."""
        self._deadline = self._loop.time() + self._settings.timeout
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        # One timer for all jobs, one after another: most of them end long before.
        self._timer = None
        if not self.turns:
            return
        if self._loop.time() >= self._deadline:
            self.end("timeout")
        else:
            self._timer = self._loop.call_at(self._deadline, self._look)

    def _resident(self) -> int:
        """The memory that it has in use (proc(5), statm), in bytes."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb", buffering=0) as file:
                return int(file.read().split()[1]) * _PAGE_SIZE
        except OSError:
            return 0


def _safe(text: str) -> str:
    """The text without what could forge or hide something; its lines stay, and its end."""
    return "\n".join(map(log.safe, text[-_LONGEST_TEXT:].split("\n"))) if text else ""


class _Facts(TypedDict, total=False):
    exit_status: int
    signal: str


def _facts(status: int) -> _Facts:
    return {"exit_status": status} if status >= 0 else {"signal": signal_name(-status)}


def _ending(status: int) -> str:
    return f"status {status}" if status >= 0 else signal_name(-status)
