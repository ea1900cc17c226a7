"""How often the broker is asked how much waits, and what is made of its answers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from workerd.errors import BrokerError, ErrorKind
from workerd.worker import queue_depths
from workerd.worker.queue_depths import QueueDepths


class Broker:
    """A connection and all of its channels; what it is asked is in `asked`."""

    def __init__(self, **counts: int | ErrorKind) -> None:
        self.counts = counts
        self.asked: list[str] = []
        self.ended: asyncio.Future[None] = asyncio.Future()
        self.answers = asyncio.Event()
        self.answers.set()
        # As the worker that QueueDepths looks at.
        self.consumer = self
        self.ledger = self.slots = self
        self.connection: Broker | None = self
        self.concurrency = {"jobs": 1}

    async def channel(self) -> Broker:
        self.ended = asyncio.Future()
        return self

    async def count(self, queue: str, timeout: float | None) -> tuple[int, int]:
        # However long it takes, the connection must not be lost over it.
        assert timeout is None
        self.asked.append(queue)
        await self.answers.wait()
        answer = self.counts.get(queue.replace(".", "_"), ErrorKind.MISSING)
        if isinstance(answer, ErrorKind):
            self.ended.set_result(None)
            raise BrokerError(answer, "no")
        return answer, 0


def looks(broker: Broker) -> QueueDepths:
    return QueueDepths(cast(Any, broker), lambda: ["jobs"])


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_depths, "PATIENCE", 0.01)


def test_many_who_ask_at_once_cost_one_question() -> None:
    async def scenario() -> None:
        broker = Broker(jobs=3, jobs_due=0, jobs_dead=1)
        looking = looks(broker)
        found = await asyncio.gather(*(looking.look() for _ in range(10)))
        assert found == [{"jobs": 3, "jobs.due": 0, "jobs.dead": 1}] * 10
        assert await looking.look() == found[0]
        assert broker.asked == ["jobs", "jobs.due", "jobs.dead"]

    asyncio.run(scenario())


def test_a_queue_that_is_missing_is_asked_for_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(queue_depths, "FRESH", -1.0)
        broker = Broker(jobs=3, jobs_due=0)
        looking = looks(broker)
        for _ in range(3):
            assert await looking.look() == {"jobs": 3, "jobs.due": 0}
        # The broker logs each time that it is asked for one that is not there.
        assert broker.asked.count("jobs.dead") == 1
        assert broker.asked.count("jobs") == 3

    asyncio.run(scenario())


@pytest.mark.usefixtures("no_patience")
def test_a_broker_that_does_not_answer_is_not_waited_for_nor_asked_again() -> None:
    async def scenario() -> None:
        broker = Broker(jobs=3, jobs_due=0, jobs_dead=1)
        broker.answers.clear()
        looking = looks(broker)
        assert await looking.look() == {}
        assert await looking.look() == {}
        assert broker.asked == ["jobs"]
        broker.answers.set()
        while not (found := await looking.look()):
            pass
        assert found == {"jobs": 3, "jobs.due": 0, "jobs.dead": 1}

    asyncio.run(scenario())


def test_without_a_connection_nobody_knows() -> None:
    async def scenario() -> None:
        broker = Broker(jobs=3, jobs_due=0, jobs_dead=1)
        looking = looks(broker)
        assert await looking.look()
        broker.connection = None
        assert await looking.look() == {}

    asyncio.run(scenario())


def test_a_connection_that_is_lost_meanwhile_leaves_no_half_of_an_answer() -> None:
    async def scenario() -> None:
        assert await looks(Broker(jobs=3, jobs_due=ErrorKind.AWAY)).look() == {}

    asyncio.run(scenario())
