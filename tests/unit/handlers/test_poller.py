"""Descriptors behind a single one in the loop: who is called, and who is not any more."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import select
from collections.abc import Iterator

from tests.harness.commands import in_loop, open_descriptors
from workerd.handlers.poller import Poller

FULL = b"x"


@contextlib.contextmanager
def pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    """So many pipes: the ends to read and to write."""
    opened = [os.pipe2(os.O_CLOEXEC) for _ in range(count)]
    try:
        yield opened
    finally:
        for ends in opened:
            for fd in ends:
                os.close(fd)


def test_each_is_called_when_it_is_ready_in_its_own_context() -> None:
    variable = contextvars.ContextVar("variable", default="")
    called: list[tuple[str, str]] = []

    async def scenario() -> None:
        readiness, both = Poller(), asyncio.Event()

        def ready(name: str) -> None:
            called.append((name, variable.get()))
            readiness.discard(numbers[name])
            if len(called) == 2:
                both.set()

        with pipes(3) as ((first, fill), (second, fill_too), (never, _)):
            numbers = {"first": first, "second": second, "never": never}
            for name, number in numbers.items():
                variable.set(f"context of {name}")
                readiness.add(number, select.EPOLLIN, ready, name)
            os.write(fill, FULL)
            os.write(fill_too, FULL)
            await both.wait()
            readiness.discard(never)
            readiness.release()

    in_loop(scenario())
    assert sorted(called) == [("first", "context of first"), ("second", "context of second")]


def test_what_one_has_closed_is_not_called_any_more_whoever_has_its_number_now() -> None:
    # Two are ready at once, and the first that is called puts another in the place of the other.
    called: list[str] = []

    async def scenario() -> None:
        readiness, over = Poller(), asyncio.Event()
        with pipes(3) as ((first, fill), (second, fill_too), (empty, _)):

            def ready(name: str, other: int) -> None:
                called.append(name)
                readiness.discard(first)
                readiness.discard(second)
                os.dup2(empty, other, inheritable=False)
                readiness.add(other, select.EPOLLIN, ready, "another", other)
                asyncio.get_running_loop().call_soon(over.set)

            readiness.add(first, select.EPOLLIN, ready, "one", second)
            readiness.add(second, select.EPOLLIN, ready, "one", first)
            os.write(fill, FULL)
            os.write(fill_too, FULL)
            await over.wait()
            readiness.discard(first)
            readiness.discard(second)
            readiness.release()

    in_loop(scenario())
    assert called == ["one"]


def test_it_takes_up_a_descriptor_only_while_it_watches_any() -> None:
    async def scenario() -> None:
        readiness = Poller()
        with pipes(2) as ((first, _), (second, _)):
            before = open_descriptors()
            for _ in range(2):
                readiness.prepare()
                prepared = open_descriptors()
                assert len(prepared - before) == 1
                readiness.add(first, select.EPOLLIN, print)
                readiness.add(second, select.EPOLLIN, print)
                readiness.discard(first)
                readiness.release()  # not yet
                assert open_descriptors() == prepared
                readiness.discard(second)
                readiness.discard(second)
                readiness.release()
                readiness.release()
                assert open_descriptors() == before

    in_loop(scenario())
