"""Queues and exchanges: the frozen arguments, and a model of how the delay levels route."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.harness.trixie import CHECKOUT
from workerd.config.model import Queue
from workerd.core.topology import (
    DUE,
    MAX_DELAY,
    UNROUTABLE,
    BindExchange,
    BindQueue,
    DeclareExchange,
    DeclareQueue,
    Step,
    dead_letters,
    delay_levels,
    delayed,
    due_jobs,
    level_name,
    no_work_queue,
    work_queue,
)


def companions(queue: Queue) -> list[Step]:
    """All that belongs to a work queue, besides itself."""
    return [*dead_letters(queue), *due_jobs(queue)]


QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
DEAD_LETTERS = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "jobs.dead"}

# The arguments of a queue that exists cannot be changed. A test below that turns red means that
# no installed workerd could declare its queues any more.


def test_a_quorum_queue_is_frozen() -> None:
    assert work_queue(Queue("jobs")) == DeclareQueue(
        "jobs",
        {
            "x-queue-type": "quorum",
            "x-delivery-limit": 1_000_000,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "jobs.dead",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )


def test_a_classic_queue_is_frozen() -> None:
    assert work_queue(Queue("jobs", type="classic")) == DeclareQueue(
        "jobs", {"x-queue-type": "classic", **DEAD_LETTERS}
    )


def test_a_length_limit_adds_itself_and_refuses_what_is_beyond() -> None:
    unlimited = work_queue(Queue("jobs")).arguments
    limited = work_queue(Queue("jobs", max_length=7)).arguments
    assert limited == {**unlimited, "x-max-length": 7}
    assert work_queue(Queue("jobs", type="classic", max_length=7)).arguments == {
        "x-queue-type": "classic",
        **DEAD_LETTERS,
        "x-max-length": 7,
        "x-overflow": "reject-publish",
    }


def test_priorities_are_an_argument_of_classic_queues_alone() -> None:
    classic = Queue("jobs", type="classic", max_priority=5)
    assert work_queue(classic).arguments["x-max-priority"] == 5
    assert "x-max-priority" not in work_queue(replace(classic, type="quorum")).arguments


def test_a_plain_queue_has_no_arguments_whatever_is_configured() -> None:
    queue = Queue("task_queue", declare="plain", type="classic", max_length=7, max_priority=5)
    assert work_queue(queue) == DeclareQueue("task_queue", {})


def test_how_an_instance_consumes_does_not_show_in_the_arguments() -> None:
    queue = Queue("jobs", concurrency=9, prefetch=99, default_handler="sleep", max_deliveries=3)
    assert work_queue(queue) == work_queue(Queue("jobs"))


@pytest.mark.parametrize("kind", ["quorum", "classic"])
@pytest.mark.parametrize("declare", ["create", "plain", "wait"])
def test_the_companions_of_a_queue_are_frozen(kind: str, declare: str) -> None:
    queue = Queue("jobs", type=kind, declare=declare, max_length=7)  # type: ignore[arg-type]
    assert list(companions(queue)) == [
        DeclareQueue("jobs.dead", QUORUM),
        DeclareQueue("jobs.due", QUORUM),
        BindQueue("jobs.due", "workerd.due", "*." * 25 + "jobs"),
    ]


def test_the_delay_levels_are_frozen() -> None:
    steps = list(delay_levels())
    queues = {step.name: step.arguments for step in steps if isinstance(step, DeclareQueue)}
    exchanges = {step.name: step for step in steps if isinstance(step, DeclareExchange)}
    assert list(exchanges) == [
        "workerd.unroutable",
        "workerd.due",
        *(f"workerd.delay.{level:02}" for level in range(25)),
    ]
    assert exchanges["workerd.unroutable"] == DeclareExchange("workerd.unroutable", "fanout")
    assert exchanges["workerd.due"] == DeclareExchange(
        "workerd.due", "topic", {"alternate-exchange": "workerd.unroutable"}
    )
    assert queues.pop("workerd.unroutable") == QUORUM
    for level in range(25):
        name = f"workerd.delay.{level:02}"
        assert exchanges[name] == DeclareExchange(name, "topic")
        below = f"workerd.delay.{level - 1:02}" if level else "workerd.due"
        assert queues.pop(name) == {
            "x-queue-type": "quorum",
            "x-delivery-limit": 1_000_000,
            "x-message-ttl": 1000 * 2**level,
            "x-dead-letter-exchange": below,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
    assert not queues


def test_the_bindings_of_a_level_are_frozen() -> None:
    steps = list(delay_levels())
    assert BindQueue("workerd.unroutable", "workerd.unroutable", "") in steps
    assert BindQueue("workerd.delay.24", "workerd.delay.24", "1.#") in steps
    assert BindExchange("workerd.delay.23", "workerd.delay.24", "0.#") in steps
    assert BindQueue("workerd.delay.22", "workerd.delay.22", "*.*.1.#") in steps
    assert BindExchange("workerd.due", "workerd.delay.00", "*." * 24 + "0.#") in steps
    assert sum(isinstance(step, BindQueue | BindExchange) for step in steps) == 1 + 2 * 25


def test_everything_is_declared_before_it_is_bound() -> None:
    known: set[str] = set()
    for step in [*delay_levels(), *companions(Queue("jobs"))]:
        match step:
            case DeclareQueue(name) | DeclareExchange(name):
                known.add(name)
            case BindQueue(queue, exchange, _):
                assert {queue, exchange} <= known
            case BindExchange(destination, source, _):
                assert {destination, source} <= known


class Router:
    """Topic and fanout exchanges, bindings, and queues that dead-letter what has expired."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.exchanges: dict[str, DeclareExchange] = {}
        self.queues: dict[str, DeclareQueue] = {}
        self.bindings: list[tuple[str, str, Step]] = []
        for step in steps:
            match step:
                case DeclareQueue(name):
                    self.queues[name] = step
                case DeclareExchange(name):
                    self.exchanges[name] = step
                case BindQueue(_, exchange, pattern) | BindExchange(_, exchange, pattern):
                    self.bindings.append((exchange, pattern, step))

    def queues_for(self, exchange: str, key: str) -> set[str]:
        """Where a message that is published to an exchange is put; once into each queue."""
        kind, arguments = self.exchanges[exchange].type, self.exchanges[exchange].arguments
        found: set[str] = set()
        for source, pattern, step in self.bindings:
            matched = kind == "fanout" or topic_matches(pattern.split("."), key.split("."))
            if source == exchange and matched:
                if isinstance(step, BindQueue):
                    found.add(step.queue)
                elif isinstance(step, BindExchange):
                    found |= self.queues_for(step.destination, key)
        if not found and "alternate-exchange" in arguments:
            return self.queues_for(str(arguments["alternate-exchange"]), key)
        return found

    def journeys(self, exchange: str, key: str, after: float = 0.0) -> Iterator[tuple[str, float]]:
        """The queues where a message ends up, and after how many seconds."""
        for name in self.queues_for(exchange, key):
            arguments = self.queues[name].arguments
            if "x-message-ttl" in arguments:
                assert "x-dead-letter-routing-key" not in arguments
                seconds = int(str(arguments["x-message-ttl"])) / 1000
                below = str(arguments["x-dead-letter-exchange"])
                yield from self.journeys(below, key, after + seconds)
            else:
                yield name, after


def topic_matches(pattern: list[str], words: list[str]) -> bool:
    """RabbitMQ's topic exchange: `*` is one word, `#` is any number of them."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(topic_matches(pattern[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and topic_matches(pattern[1:], words[1:])


NAMES = ["a", "x.a", "a.x", "x.x.a", "1", "0", "1.a", "a.", ".a", "a..a"]
ROUTER = Router([*delay_levels(), *(step for name in NAMES for step in companions(Queue(name)))])


def sample() -> list[int]:
    numbers = random.Random(25).sample(range(1, MAX_DELAY + 1), 20)
    return [1, 2, 3, 59, 60, 3600, 2**24 - 1, 2**24, 2**24 + 1, MAX_DELAY, *numbers]


@pytest.mark.parametrize("seconds", sample())
def test_a_delay_ends_after_exactly_that_many_seconds_at_its_queue(seconds: int) -> None:
    assert list(ROUTER.journeys(*delayed("a", seconds))) == [("a.due", seconds)]


@pytest.mark.parametrize("name", NAMES)
def test_no_queue_gets_the_delayed_jobs_of_another(name: str) -> None:
    for seconds in (1, 5, MAX_DELAY):
        assert list(ROUTER.journeys(*delayed(name, seconds))) == [(f"{name}.due", seconds)]


@given(st.integers(1, MAX_DELAY))
@example(1)
@example(MAX_DELAY)
def test_a_delay_enters_at_its_highest_bit_and_rests_once_for_each(seconds: int) -> None:
    exchange, key = delayed("a", seconds)
    assert exchange == f"workerd.delay.{seconds.bit_length() - 1:02}"
    assert ROUTER.queues_for(exchange, key) == {exchange}
    assert list(ROUTER.journeys(exchange, key)) == [("a.due", seconds)]


def test_the_function_in_the_documentation_gives_the_same() -> None:
    text = (CHECKOUT / "docs" / "messages.md").read_text()
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    for seconds in sample():
        assert names["delayed"]("a.x", seconds) == delayed("a.x", seconds)


def test_a_delayed_job_whose_queue_is_gone_blocks_nobody() -> None:
    assert list(ROUTER.journeys(*delayed("gone", 3))) == [(UNROUTABLE, 3)]


def test_the_longest_delay_is_a_little_over_a_year() -> None:
    assert 366 * 86_400 < MAX_DELAY == sum(2**level for level in range(25))


def test_without_a_delay_a_job_is_due_at_once() -> None:
    assert delayed("a", 0) == ("", "a.due")


@pytest.mark.parametrize("seconds", [-1, MAX_DELAY + 1])
def test_a_delay_that_no_level_holds_is_refused(seconds: int) -> None:
    with pytest.raises(ValueError, match="a delay is from 0 to"):
        delayed("a", seconds)


def test_the_longest_name_still_fits_a_routing_key_and_a_queue_name() -> None:
    name = "n" * 200
    _, key = delayed(name, MAX_DELAY)
    steps = list(companions(Queue(name)))
    texts = [key, *(step.pattern for step in steps if isinstance(step, BindQueue))]
    texts += [step.name for step in steps if isinstance(step, DeclareQueue)]
    assert max(map(len, texts)) <= 255


def test_the_levels_have_names_that_sort() -> None:
    assert [level_name(level) for level in (0, 9, 24)] == [
        "workerd.delay.00",
        "workerd.delay.09",
        "workerd.delay.24",
    ]
    assert DUE == "workerd.due"


@pytest.mark.parametrize("kind", ["classic", "quorum", ""])
def test_a_queue_of_these_types_can_hold_jobs(kind: str) -> None:
    assert no_work_queue("jobs", kind) == ""


@pytest.mark.parametrize("kind", ["stream", "mqtt_qos0"])
def test_a_queue_of_another_type_cannot_hold_jobs(kind: str) -> None:
    assert no_work_queue("jobs", kind).startswith(f"jobs is a queue of type {kind}, ")
