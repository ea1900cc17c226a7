"""Reading what warm processes send: in shares that are fair to all the others."""

from __future__ import annotations

import asyncio
import os

from tests.harness.pools import in_loop, job, pool, sh
from workerd.core.job import Outcome
from workerd.handlers.warm.answers import MESSAGES_PER_TURN, Answers
from workerd.handlers.warm.protocol import Message, ProtocolError

LINE = b'{"log":"debug","text":"x"}\n'


class Reader:
    """The messages of a pipe that is filled with this, each as a number of the turn it came in."""

    def __init__(self, data: bytes, refuses: bool = False) -> None:
        read, self.pipe = os.pipe()
        self.messages: list[Message] = []
        self.errors: list[ProtocolError] = []
        self._refuses = refuses
        self.answers = Answers(read, 100, self._act, self.errors.append)
        os.write(self.pipe, data)

    def _act(self, message: Message) -> None:
        self.messages.append(message)
        if self._refuses:
            raise ProtocolError("not now")

    def close(self) -> None:
        self.answers.close()
        os.close(self.pipe)


def test_a_process_that_sends_very_much_delays_no_other_job() -> None:
    flood = f"ready; next; yes '{LINE.decode().strip()}' | head -n 2000000 >&4; answer"

    async def scenario() -> None:
        echo = sh('ready; while next; do answer "$body"; done')
        async with pool(sh(flood, kill_grace=0.1)) as flooded, pool(echo) as quick:
            stop = asyncio.get_running_loop().create_future()
            endless = flooded.soon(job(), stop)
            for _ in range(10):
                assert (await quick.do(job(b"x"))).outcome is Outcome.DONE
            assert not endless.done()
            stop.set_result(None)
            assert (await endless).outcome is Outcome.INTERRUPTED

    in_loop(scenario())


def test_each_turn_of_the_loop_takes_a_share_of_what_each_has_sent() -> None:
    async def scenario() -> None:
        readers = [Reader(LINE * 2000), Reader(LINE * 1000)]
        for _ in range(20):
            before = [len(reader.messages) for reader in readers]
            await asyncio.sleep(0)
            for reader, count in zip(readers, before, strict=True):
                assert len(reader.messages) - count <= MESSAGES_PER_TURN
        assert [len(reader.messages) for reader in readers] == [2000, 1000]
        for reader in readers:
            reader.close()

    in_loop(scenario())


def test_who_must_know_what_was_sent_until_now_reads_all_of_it() -> None:
    async def scenario() -> None:
        reader = Reader(LINE * 2000)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < len(reader.messages) < 2000
        reader.answers.catch_up()
        assert len(reader.messages) == 2000
        os.write(reader.pipe, LINE)
        while len(reader.messages) < 2001:
            await asyncio.sleep(0)
        reader.close()

    in_loop(scenario())


def test_what_follows_a_breach_of_the_protocol_is_ignored() -> None:
    async def scenario() -> None:
        reader = Reader(LINE + b"nonsense\n" + LINE)
        while not reader.errors:
            await asyncio.sleep(0)
        os.write(reader.pipe, LINE)
        reader.answers.catch_up()
        assert (len(reader.messages), len(reader.errors)) == (1, 1)
        reader.close()

    in_loop(scenario())


def test_what_follows_a_message_that_is_refused_is_ignored() -> None:
    async def scenario() -> None:
        reader = Reader(LINE * 3, refuses=True)
        while not reader.errors:
            await asyncio.sleep(0)
        reader.answers.catch_up()
        assert (len(reader.messages), len(reader.errors)) == (1, 1)
        reader.close()

    in_loop(scenario())
