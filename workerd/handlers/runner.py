"""A warm process and the jobs that it holds, as the daemon sees them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import functools
import itertools
import os
import struct
import termios
import time
from collections import deque
from typing import Literal, Protocol, TypedDict

from workerd import log
from workerd.handlers.guardian import Guardian
from workerd.handlers.output import Output, Records
from workerd.handlers.permits import Permits
from workerd.handlers.process import Process, signal_name
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
from workerd.handlers.turn import ERROR_LIMIT, Turn
from workerd.job import Outcome, Report
from workerd.options import Handler
from workerd.retry import limit

#: Of what a process says of itself or of a job, in characters.
_LONGEST_TEXT = 16 * 1024
_CHUNK = 1 << 16
#: What is written to a process at once; the rest waits until it has room.
_MOST_PIECES = 64
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_CAUSES = {
    "drain": (Outcome.INTERRUPTED, "drain"),
    "timeout": (Outcome.FAILED, "timeout"),
}


class Pool(Protocol):
    """Whom a runner tells of its life."""

    settings: Handler

    def before_sending(self) -> None:
        """A process is about to be sent jobs, of which it begins with the first at once."""

    def ready(self, runner: Runner) -> None:
        """It takes jobs."""

    def unfit(self, runner: Runner, text: str) -> None:
        """It never came so far, or ended before it did anything."""

    def free(self, runner: Runner, seconds: float) -> None:
        """It has done a job in this time, and could take another."""

    def returned(self, turns: list[Turn]) -> None:
        """It does not come to these, and another may have them."""

    def hand_out(self) -> None:
        """It may have room that it did not have before."""

    def leaves(self, runner: Runner, reason: str) -> None:
        """It takes no further job; what it has it will still do."""

    def ended(self, runner: Runner, unbegun: list[Turn]) -> None:
        """It is over; these jobs were in its pipe, and it never came to them."""


State = Literal["starting", "ready", "leaving", "ended"]


class Runner:
    """One process, from its start to its end. Its jobs are answered in the order they came.

    One that ``asks`` begins a job only when it has read its number from a socket, and the jobs
    that it has not begun can be taken back from there. In others, each has begun when it is sent.
    """

    def __init__(
        self,
        pool: Pool,
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
        self._number = 0
        #: What it holds: the first is being done, the others are in its pipe.
        self.turns: deque[Turn] = deque()
        self._pool = pool
        # What it says without a job is logged with the fields of its handler.
        self._context = contextvars.copy_context()
        self._settings = pool.settings
        self._lines = lines
        self._loop = asyncio.get_running_loop()
        self._parser = Parser(self._settings.output_limit)
        #: It is being found out which job it is at, and it must begin no other.
        self._pinned = False
        #: The job that it has heard printing by itself: until that has ended, no other is to lie
        #: behind it, only to be taken back when it prints again.
        self._speaker: Turn | None = None
        #: Printed while it had no job.
        self._between: dict[str, Output] = {}
        #: What it did against the protocol.
        self._fault = ""
        #: It has said that it takes no job after the one that it answered.
        self._gave_up = False
        #: What it is yet to be sent of each frame, by number, in order.
        self._unsent: dict[int, memoryview] = {}
        #: Whether its pipe has no room at present.
        self._is_full = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            frames, self._frames = _pipe(theirs, undo)
            answers, self._answers = reversed(_pipe(undo, theirs))
            for fd in (self._frames, self._answers):
                os.set_blocking(fd, False)
            more = [frames, answers]
            if asks:
                self._permits = Permits()
                undo.callback(self._permits.close)
                more.append(self._permits.fileno())
            self._process = Process(
                [program.path, *arguments],
                program.environment | {b"WORKERD_PROTOCOL": b"%d" % VERSION},
                program.directory,
                b"",
                functools.partial(self._printed, "stdout"),
                functools.partial(self._printed, "stderr"),
                guardian,
                more,
                self._hear,
            )
            undo.pop_all()
        self.pid = self._process.pid
        self._loop.add_reader(self._answers, self._listen)
        self._process.when_over(self._over)
        self._starting = self._loop.call_later(self._settings.start_timeout, self._late)

    # What the pool does with it.

    def take(self, turn: Turn) -> None:
        """Have it do a job; `send` sends all that it was given since the last time."""
        self.taken += 1
        self._number += 1
        turn.number, turn.runner = self._number, self
        idle = not self.turns
        if idle:
            self._close_between()
            self._watch()
        self.turns.append(turn)
        if idle or not self.asks:
            turn.begin()
        data = frame(turn.number, turn.job, limit(turn.job, self._settings.retry))
        turn.size = len(data)
        self._unsent[turn.number] = memoryview(data)
        if self.asks:
            self._permits.add(turn.number)

    def take_back(self) -> list[Turn]:
        """The jobs behind the first that it has not begun, and will not."""
        if not self.asks or len(self.turns) < 2:
            return []
        unbegun = self._permits.take_back()
        first = self.turns[0]
        if first.number in unbegun:
            unbegun.remove(first.number)
            self._permits.add(first.number)
            self.send()
        back = [turn for turn in self.turns if turn.number in unbegun]
        for turn in back:
            # Of a frame that is in the pipe in part, the rest has to follow.
            if len(self._unsent.get(turn.number, b"")) == turn.size:
                del self._unsent[turn.number]
        self.turns = deque(turn for turn in self.turns if turn.number not in unbegun)
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
        elif not self.turns:
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

    def pin_down(self) -> None:
        """Have it begin no other job, and read all its answers: it is at the first without one.

        Whoever calls this has the pool `hand_out` again.
        """
        self._pinned = True
        self._pool.returned(self.take_back())
        self._listen()
        self._pinned = False

    # What it does.

    def _late(self) -> None:
        self._unfit(f"not ready within {self._settings.start_timeout:g} s")

    def _unfit(self, text: str) -> None:
        """It does not become ready. Those who wait need not wait for its end as well."""
        self._starting.cancel()
        self.state = "leaving"
        self._pool.unfit(self, text)
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
        self.pin_down()
        self._speaker = self.turns[0] if self.turns else None
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
        seconds = time.monotonic() - turn.began
        if self.asks and self.turns and not answer.last:
            self.turns[0].begin()
            self._permits.send()
        turn.end(self._report(answer))
        if answer.last:
            self._gave_up = True
            self.leave("last")
            # It may take its time to end.
            back, self.turns = self.turns, deque()
            self.taken -= len(back)
            self._pool.returned(list(back))
            self._pool.hand_out()
        elif self.state == "ready":
            limit = self._settings.recycle_after
            if limit and self.count >= limit:
                self.leave("recycle_after")
            elif self._settings.memory_limit and self._resident() > self._settings.memory_limit:
                self.leave("memory_limit")
                self._pool.returned(self.take_back())
                self._pool.hand_out()
            elif not self._process.cause:
                self._pool.free(self, seconds)
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
        if self.state != "ready" or self._pinned or self._process.over or self._process.cause:
            return 0
        if self.turns and self.turns[0] is self._speaker:
            return 0
        left = depth
        if self._settings.recycle_after:
            left = min(left, self._settings.recycle_after - self.count)
        return left - len(self.turns)

    def _over(self, status: int) -> None:
        """The process has ended, and what it printed has been read."""
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
        begun, unbegun = self._divide()
        self._hang_up()
        self._close_between()
        self.taken -= len(unbegun)
        for turn in begun:
            turn.end(self._crash(turn, status))
        self.turns.clear()
        self._pool.ended(self, unbegun)

    def _divide(self) -> tuple[list[Turn], list[Turn]]:
        """The jobs that end with it, and those that it never came to."""
        turns = list(self.turns)
        if not turns:
            return [], []
        if self.asks:
            unbegun = self._permits.take_back()
            begun = [turn for turn in turns if turn.number not in unbegun]
            return begun, turns[len(begun) :]
        if self._process.cause == "drain":
            return turns, []  # nobody waits any more for those that it has not begun
        if self._gave_up:
            return [], turns
        # What it was sent and never read, it never looked at.
        unread = self._unread() >= sum(turn.size for turn in turns)
        if unread and self._process.cause != "timeout":
            return [], turns
        return turns[:1], turns[1:]

    def _unread(self) -> int:
        """How many bytes of what it was to be sent it never read."""
        count = fcntl.ioctl(self._frames, termios.FIONREAD, struct.pack("i", 0))
        return sum(map(len, self._unsent.values())) + int(struct.unpack("i", count)[0])

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
        self._context.run(output.feed, data)

    def _recorded(self, record: Record) -> None:
        if self.turns:
            self.turns[0].recorded(record)
        else:
            records = Records(self._lines)
            records.add(record.level, record.logger, record.text)
            records.close()

    def _close_between(self) -> None:
        for output in self._between.values():
            self._context.run(output.close)
        self._between.clear()

    # What it is sent.

    def send(self) -> None:
        """Write as far as the pipe takes it; a process that does not read holds nobody up."""
        if self._frames < 0:
            return
        self._pool.before_sending()
        if self.asks:
            self._permits.send()
        try:
            while self._unsent:
                pieces = list(itertools.islice(self._unsent.items(), _MOST_PIECES))
                sent = os.writev(self._frames, [piece for _, piece in pieces])
                for number, piece in pieces:
                    if sent < len(piece):
                        self._unsent[number] = piece[sent:]
                        break
                    sent -= len(piece)
                    del self._unsent[number]
        except BlockingIOError:
            self._loop.add_writer(self._frames, self.send)
            self._is_full = True
            return
        except BrokenPipeError:
            pass  # it has ended, which will be told soon
        if self._is_full:
            self._is_full = False
            self._loop.remove_writer(self._frames)

    def _hang_up(self) -> None:
        """End of file: it leaves by itself, or is told to after ``kill_grace``."""
        if self._frames < 0:
            return
        self._loop.remove_writer(self._frames)
        os.close(self._frames)
        self._frames = -1
        if self.asks:
            self._permits.close()
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
        if self.turns and self._loop.time() >= self._deadline:
            self.pin_down()  # it may be at the next one, and the daemon not know it yet
            if self.turns and self._loop.time() >= self._deadline:
                self.end("timeout")
                return
            self._pool.hand_out()
        if self.turns and self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look)

    def _resident(self) -> int:
        """The memory that it has in use (proc(5), statm), in bytes."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb", buffering=0) as file:
                return int(file.read().split()[1]) * _PAGE_SIZE
        except OSError:
            return 0


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe: the end to read and the end to write, each closed by its stack."""
    read, write = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, read)
    writer.callback(os.close, write)
    return read, write


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
