"""Waiting for a condition of the worker as a whole."""

from __future__ import annotations

import asyncio

from tests.harness.commands import in_loop
from workerd.worker.changes import Changes


def test_a_condition_is_looked_at_again_whenever_something_happens_and_not_before() -> None:
    async def scenario() -> None:
        noticed: list[None] = []
        looks: list[bool] = []
        changes = Changes(lambda: noticed.append(None))

        def condition() -> bool:
            looks.append(len(noticed) == 2)
            return looks[-1]

        waiting = asyncio.ensure_future(changes.until(condition))
        for _ in range(3):
            await asyncio.sleep(0)
        assert looks == [False]
        changes.happen()
        for _ in range(3):
            await asyncio.sleep(0)
        assert looks == [False, False]
        changes.happen()
        await waiting
        assert looks == [False, False, True]

    in_loop(scenario())


def test_what_is_true_already_is_not_waited_for() -> None:
    in_loop(Changes(lambda: None).until(lambda: True))
