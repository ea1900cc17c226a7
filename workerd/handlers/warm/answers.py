"""What a warm process sends, read fairly: no process takes more than its share of a turn."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator

from workerd.handlers.warm.inbox import bytes_in
from workerd.handlers.warm.protocol import Message, Parser, ProtocolError

#: As much as a pipe takes, and how much it takes at most if the process enlarges it.
CHUNK, LARGEST_PIPE = 1 << 16, 1 << 20
#: How many messages of one process are acted on in one turn of the loop.
MESSAGES_PER_TURN = 256


class Answers:
    """The pipe that one process answers on.

    ``act`` is called with each message, and may raise ProtocolError; ``broken`` is called with the
    error of a process that breaks the protocol. Of a result the last ``keep`` bytes are kept.
    """

    def __init__(
        self,
        pipe: int,
        keep: int,
        act: Callable[[Message], None],
        broken: Callable[[ProtocolError], None],
    ) -> None:
        """``pipe`` is the end to read from."""
        os.set_blocking(pipe, False)
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._parser = Parser(keep)
        self._act = act
        self._broken = broken
        self._ignored = False
        #: What has been read and not acted on, and the handle of the turn that goes on with it.
        self._messages: Iterator[Message] = iter(())
        self._next_turn: asyncio.Handle | None = None
        self._loop.add_reader(pipe, self._listen)

    def ignore(self) -> None:
        """Read on, so that the process is not held up, and act on nothing any more."""
        self._ignored = True
        self._messages = iter(())

    def catch_up(self, limit: int = CHUNK) -> None:
        """Act on all that the process has sent until now, at most so many bytes."""
        self._act_on(None)
        rest = min(limit, bytes_in(self._pipe))
        while rest > 0 and (count := self._read(min(rest, CHUNK))):
            rest -= count
            self._act_on(None)

    def close(self) -> None:
        """Read no more."""
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._loop.remove_reader(self._pipe)
        os.close(self._pipe)

    def _listen(self) -> None:
        if self._read(CHUNK):
            self._act_on(MESSAGES_PER_TURN)

    def _read(self, limit: int) -> int:
        """Read once; returns how many bytes there were."""
        try:
            data = os.read(self._pipe, limit)
        except BlockingIOError:
            return 0
        if not data:
            self._loop.remove_reader(self._pipe)
        elif not self._ignored:
            self._messages = self._parser.feed(data)
        return len(data)

    def _act_on(self, budget: int | None) -> None:
        """Act on all that has been read, or on so many messages now and on the rest later."""
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
            self._loop.add_reader(self._pipe, self._listen)
        if self._act_on_some(budget) == budget:
            self._loop.remove_reader(self._pipe)
            self._next_turn = self._loop.call_soon(self._act_on, budget)

    def _act_on_some(self, budget: int | None) -> int:
        """Act on so many messages at most; returns how many there were."""
        count = 0
        try:
            for message in itertools.islice(self._messages, budget):
                count += 1
                self._act(message)
                if self._ignored:
                    break
        except ProtocolError as error:
            self.ignore()
            self._broken(error)
        return count
