"""Handlers that cannot run at all, for no fault of the job's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.daemon import Daemon


def test_a_job_that_waits_for_its_program_does_not_hold_up_a_stop(
    broker: Broker, client: Client, daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    worker = daemon(
        f'''
        [broker]
        urls = ["{broker.url}"]
        [worker]
        drain_timeout = "1h"
        [handlers.missing]
        command = ["{tmp_path}/missing"]
        '''
    )
    worker.wait_event("consuming")
    client.publish("default", type="missing", message_id="one")
    worker.wait_event("handler unavailable", job_id="one")
    assert worker.stop() == 0
    assert worker.events("interrupted", job_id="one")
    client.await_ready("default", 1)
