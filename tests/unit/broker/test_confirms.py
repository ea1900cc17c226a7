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
        scenario(confirms, [confirms.publish("q", name, size) for size, name in enumerate("abcd")])

    complete(run())


def answers(futures: list[Future]) -> str:
    """For each message: "." without an answer, "+" taken, "r" returned, "n" nack, "?" lost.

    "L": too large, "U": unacceptable.
    """

    def letter(future: Future) -> str:
        if not future.done():
            return "."
        error = future.exception()
        if error is None:
            return "+"
        assert isinstance(error, BrokerError)
        if isinstance(error, Unroutable):
            return "r"
        kinds = {ErrorKind.BUSY: "n", ErrorKind.TOO_LARGE: "L", ErrorKind.UNACCEPTABLE: "U"}
        return kinds.get(error.kind, "?")

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
        futures.append(confirms.publish("q", "e", 0))
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
        futures.append(confirms.publish("q", "a", 0))
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


def test_of_several_messages_that_are_too_large_is_told_which() -> None:
    """One that the broker will never take is no outage, and its neighbours are not to blame."""

    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        text = "PRECONDITION_FAILED - message size 2 is larger than configured max size 1"
        confirms.lose(BrokerError(ErrorKind.TOO_LARGE, text, 406))
        assert answers(futures) == "??LL"
        assert str(futures[0].exception()) == f"lost with another message: {text}"

    with_four(scenario)


def test_a_message_that_is_alone_is_the_one_that_was_refused() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        confirms.answered(3, multiple=True, nack=False)
        confirms.lose(BrokerError(ErrorKind.UNACCEPTABLE, "invalid expiration", 406))
        assert answers(futures) == "+++U"

    def others(confirms: Confirms, futures: list[Future]) -> None:
        confirms.answered(2, multiple=True, nack=False)
        confirms.lose(BrokerError(ErrorKind.UNACCEPTABLE, "invalid expiration", 406))
        assert answers(futures) == "++??"

    with_four(scenario)
    with_four(others)


def test_nobody_need_be_waiting_any_more() -> None:
    def scenario(confirms: Confirms, futures: list[Future]) -> None:
        futures[0].cancel()
        futures[3].cancel()
        confirms.answered(2, multiple=True, nack=False)
        confirms.answered(2, multiple=False, nack=False)
        confirms.lose(BrokerError(ErrorKind.AWAY, "gone"))
        assert answers(futures[1:3]) == "+?"

    with_four(scenario)
