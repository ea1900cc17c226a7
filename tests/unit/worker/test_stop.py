"""The wish to stop, and the one deadline that follows from it."""

from __future__ import annotations

import asyncio

from tests.harness.commands import in_loop
from workerd.worker.stop import Stop


def test_asked_once_it_is_wanted_and_asked_again_it_is_in_a_hurry() -> None:
    async def scenario() -> None:
        stop = Stop()
        assert not stop.wanted.is_set()
        stop.request()
        assert stop.wanted.is_set()
        assert not stop.hurry.is_set()
        stop.request()
        assert stop.hurry.is_set()

    in_loop(scenario())


def test_the_time_that_is_left_ends_at_0() -> None:
    async def scenario() -> None:
        stop = Stop()
        assert stop.seconds_left == 0.0
        stop.begin(60.0)
        assert 59.0 < stop.seconds_left <= 60.0
        stop.begin(-1.0)
        assert stop.seconds_left == 0.0

    in_loop(scenario())


def test_who_waits_for_the_end_of_running_jobs_does_not_end_it_for_others() -> None:
    async def scenario() -> None:
        stop = Stop()
        waiting = asyncio.ensure_future(stop.interrupted())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert not stop.interrupt.done()
        assert not await stop.interrupts_within(0.0)
        stop.interrupt.set_result(None)
        assert await stop.interrupts_within(60.0)
        await stop.interrupted()

    in_loop(scenario())
