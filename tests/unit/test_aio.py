"""Waiting for whichever comes first."""

from __future__ import annotations

import asyncio

import pytest

from workerd.aio import complete, first


def test_the_first_that_is_done_ends_the_others() -> None:
    async def scenario() -> bool:
        done, never = asyncio.Event(), asyncio.ensure_future(asyncio.Event().wait())
        done.set()
        await first(done.wait(), never)
        return never.cancelled()

    assert complete(scenario())


def test_what_the_first_raises_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("no")

    async def scenario() -> None:
        await first(fails(), asyncio.Event().wait())

    with pytest.raises(ValueError, match="no"):
        complete(scenario())


def test_when_the_time_is_up_nothing_is_raised() -> None:
    async def scenario() -> bool:
        never = asyncio.ensure_future(asyncio.Event().wait())
        await first(never, timeout=0.0)
        return never.cancelled()

    assert complete(scenario())


def test_several_that_fail_together_leave_nobody_unasked() -> None:
    async def fails(text: str) -> None:
        raise ValueError(text)

    async def scenario() -> None:
        await first(fails("one"), fails("two"))

    with pytest.raises(ValueError, match=r"one|two"):
        complete(scenario())
