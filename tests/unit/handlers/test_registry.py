"""The handlers of a configuration: made, changed by a reload, ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.harness.commands import ENVIRONMENT, unguarded
from tests.harness.pools import (
    PID,
    in_loop,
    job,
    python,
)
from tests.harness.waiting import TIMEOUT
from workerd.config.model import UNUSED, Handler
from workerd.core.job import Outcome, Report
from workerd.handlers.registry import KINDS, HandlerRegistry


def configured(**handlers: Handler) -> Any:
    """Settings with these handlers, and no queue."""
    log_settings = SimpleNamespace(output_lines=10, level="info")
    worker = SimpleNamespace(queues=[])
    return SimpleNamespace(handlers=handlers, log=log_settings, queues={}, worker=worker)


def test_a_job_that_waits_without_a_process_is_not_forgotten_by_reloads(tmp_path: Path) -> None:
    async def scenario() -> Report:
        handlers = HandlerRegistry(ENVIRONMENT, unguarded)
        warm = handlers.of(configured(test=python(tmp_path, PID)))["test"]
        stop = asyncio.get_running_loop().create_future()
        slots: list[None] = []
        waits = asyncio.ensure_future(
            warm.run(job(), stop, lambda _details: None, lambda behind=None: bool(slots))
        )
        await asyncio.sleep(0)
        for _ in range(2):
            handlers.of(configured())
        slots.append(None)
        handlers.hand_out()
        try:
            return await asyncio.wait_for(waits, TIMEOUT / 4)
        finally:
            await handlers.close()

    assert in_loop(scenario()).outcome is Outcome.DONE


def test_the_kinds_are_those_of_the_configuration_and_so_are_their_keys() -> None:
    assert set(KINDS) == set(UNUSED)
    some = frozenset().union(*(kind.keys for kind in KINDS.values()))
    for name, kind in KINDS.items():
        assert UNUSED[kind.name] == some - kind.keys, name  # type: ignore[index]


def test_a_handler_whose_settings_stay_lives_on_over_a_reload(tmp_path: Path) -> None:
    async def scenario() -> None:
        handlers = HandlerRegistry(ENVIRONMENT, unguarded)
        same = python(tmp_path, PID)
        first = handlers.of(configured(test=same, echo=Handler("echo", command=("true",))))
        second = handlers.of(configured(test=same))
        assert second["test"] is first["test"]
        other = python(tmp_path, PID, processes=1)
        assert handlers.of(configured(test=other))["test"] is not first["test"]
        await handlers.close()

    in_loop(scenario())
