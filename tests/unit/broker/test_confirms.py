"""Which published messages the broker has taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from workerd.aio import complete
from workerd.broker.confirms import Confirms
from workerd.errors import BrokerError, ErrorKind, Unroutable

pytestmark = pytest.mark.pure

Future = asyncio.Future[None]


def with_four(scenario: Callable[[Confirms, list[Future]], object]) -> None:
    """Run a scenario with four messages, a to d, that were published to q."""

    async def run() -> None:
        confirms = Confirms()
        scenario(confirms, [confirms.publish("q", name) for name in "abcd"])

    complete(run())


def answers(futures: list[Future]) -> str:
    """For each message: "." without an answer, "+" taken, "r" returned, "n" refused, "?" lost."""

    def letter(future: Future) -> str:
        if not future.done():
            return "."
        error = future.exception()
        if error is None:
            return "+"
        assert isinstance(error, BrokerError)
        if isinstance(error, Unroutable):
            return "r"
        return "n" if error.kind is ErrorKind.BUSY else "?"

    return "".join(map(letter, futures))


def test_messages_are_numbered_from_1_in_the_order_of_publishing() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        confirms.answered(2, multiple=False, nack=False)
        assert answers(futures) == ".+.."

    with_four(scenario)


def test_a_multiple_ack_is_for_all_before_it_as_well() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        confirms.answered(1, multiple=False, nack=False)
        confirms.answered(3, multiple=True, nack=False)
        assert answers(futures) == "+++."
        futures.append(confirms.publish("q", "e"))
        confirms.answered(5, multiple=True, nack=False)
        assert answers(futures) == "+++++"

    with_four(scenario)


def test_a_nack_says_that_the_queue_is_full() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        confirms.answered(2, multiple=True, nack=True)
        assert answers(futures) == "nn.."
        assert str(futures[0].exception()) == "the broker refused it: q is full"

    with_four(scenario)


def test_a_message_that_came_back_before_its_ack_is_unroutable() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        confirms.returned("b")
        assert answers(futures) == "...."
        confirms.answered(4, multiple=True, nack=False)
        assert answers(futures) == "+r++"
        assert str(futures[1].exception()) == "no queue 'q'"

    with_four(scenario)


def test_returns_of_equal_ids_are_of_the_oldest_first() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        futures.append(confirms.publish("q", "a"))
        confirms.returned("a")
        confirms.answered(1, multiple=False, nack=False)
        confirms.returned("a")
        confirms.answered(5, multiple=True, nack=False)
        assert answers(futures) == "r+++r"

    with_four(scenario)


def test_a_return_of_an_unknown_message_is_nobodys() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        confirms.returned("z")
        confirms.answered(4, multiple=True, nack=False)
        assert answers(futures) == "++++"

    with_four(scenario)


def test_a_lost_channel_ends_the_messages_without_an_answer() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        confirms.answered(1, multiple=False, nack=False)
        confirms.lose(BrokerError(ErrorKind.AWAY, "gone"))
        assert answers(futures) == "+???"
        assert str(futures[3].exception()) == "gone"

    with_four(scenario)


def test_nobody_need_be_waiting_any_more() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        futures[0].cancel()
        futures[3].cancel()
        confirms.answered(2, multiple=True, nack=False)
        confirms.answered(2, multiple=False, nack=False)
        confirms.lose(BrokerError(ErrorKind.AWAY, "gone"))
        assert answers(futures[1:3]) == "+?"

    with_four(scenario)
