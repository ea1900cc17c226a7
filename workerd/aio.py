"""Waiting for whichever comes first, and running a loop until something is done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def first(*work: Awaitable[object], timeout: float | None = None) -> None:
    """Wait until one of these is done, or the time is up; the others are cancelled.

    Raises what the one that ended raised. ``timeout`` is in seconds.
    """
    tasks = {asyncio.ensure_future(each) for each in work}
    done, pending = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    # Every one is asked, or asyncio would complain about those that nobody asked.
    failures = [failure for task in done if (failure := task.exception())]
    if failures:
        raise failures[0]


def complete(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, which would also wait for a resolver that hangs in a thread."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()
