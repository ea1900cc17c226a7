"""What becomes of a job whose handler has a bug of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.harness.commands import in_loop
from tests.harness.pools import logged
from tests.harness.samples import MESSAGE
from workerd.config.model import Handler, Queue, Settings
from workerd.config.model import Worker as Options
from workerd.core.counters import Counters
from workerd.core.decode import decode
from workerd.core.handler import MayBegin, Started
from workerd.core.job import Delivery, Job, Outcome, Report, Run
from workerd.core.ledger import Ledger
from workerd.worker.executor import Executor
from workerd.worker.stop import Stop

pytestmark = pytest.mark.pure

SETTINGS = Settings(
    worker=Options(queues=("q",)),
    queues={"q": Queue("q")},
    handlers={"resize": Handler("resize", ("true",))},
)


class Faulty:
    """A handler that fails by itself, before or after it has begun with a job."""

    immediate = True
    capacity = 0
    degraded = None

    def __init__(self, begins: bool) -> None:
        self._begins = begins

    async def run(self, _job: Job, _stop: object, started: Started, _may_begin: MayBegin) -> Report:
        if self._begins:
            started({"pid": 1})
        raise RuntimeError("a bug of ours")

    def of(self, _settings: Settings, _changed: Callable[[str], None]) -> Mapping[str, Any]:
        """As the register of handlers."""
        return {"resize": self}


@pytest.mark.parametrize(("begins", "outcome"), [(False, "unavailable"), (True, "failed")])
def test_a_bug_costs_an_attempt_only_where_one_had_begun(begins: bool, outcome: str) -> None:
    async def scenario() -> Report:
        registry: Any = Faulty(begins)
        ledger = Ledger({"q": 1})
        counters = Counters(SETTINGS.handlers)
        executor = Executor(SETTINGS, registry, ledger, counters, Stop(), lambda: None)
        ledger.opened(1)
        run = ledger.delivered(Delivery(1, 1, 0.0, decode(MESSAGE, "q")))
        assert isinstance(run, Run)
        report = await executor.execute(run)
        assert not executor.progress
        return report

    with logged() as events:
        report = in_loop(scenario())
    assert (report.outcome, report.reason, report.ran) == (Outcome(outcome), "bug", begins)
    assert report.error.endswith("RuntimeError: a bug of ours")
    event = "failed" if begins else "handler paused"
    assert [each["reason"] for each in events if each["event"] == event] == ["bug"]
