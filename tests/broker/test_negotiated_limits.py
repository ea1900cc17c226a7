"""What the broker allows on a connection, beside what an instance needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.daemon import Daemon
from tests.harness.peer import Peer
from tests.harness.programs import WORKERD, run
from tests.harness.tables import private

CONFIG = """
[broker]
urls = ["{url}"]
[queues.a]
[queues.b]
[queues.c]
[queues.d]
[handlers.job]
command = ["true"]
queue = "a"
"""
CHANNELS = (
    "the broker allows 6 channels on a connection, and 4 queues need 10: "
    "raise channel_max in rabbitmq.conf, or let this instance consume less"
)
FRAME = (
    "a frame of this broker has 8192 bytes, and the headers of a dead letter need up to 81920: "
    "raise frame_max in rabbitmq.conf"
)


@pytest.mark.parametrize(
    ("limits", "problems"),
    [((6, 131072), [CHANNELS]), ((2047, 8192), [FRAME]), ((10, 131072), [])],
    ids=["channels", "frame", "enough"],
)
def test_a_limit_below_the_need_is_told_by_check_with_both_numbers(
    peer: Callable[..., Peer], tmp_path: Path, limits: tuple[int, int], problems: list[str]
) -> None:
    broker = peer(limits=limits)
    config = private(tmp_path, CONFIG.format(url=broker.url))
    result = run([*WORKERD, "check", "--connect", "--config", str(config)])
    found = [line.partition(": ")[2] for line in result.stderr.splitlines()]
    assert (result.status, [text for text in problems if text not in result.stderr]) == (
        78 if problems else 0,
        [],
    ), found


def test_an_instance_that_gets_too_few_channels_says_what_it_needs_and_what_waits(
    peer: Callable[..., Peer], daemon: Callable[..., Daemon]
) -> None:
    """With 6 channels for 8 consumers some queues starved, and nobody said why."""
    broker = peer(limits=(6, 131072))
    worker = daemon(CONFIG.format(url=broker.url))
    assert worker.wait_event("limits too low", level="warning")["text"] == CHANNELS
    text = "all 6 channels that the broker allows on a connection are in use"
    assert text in worker.wait_event("queue paused")["text"]
    worker.wait_notify(lambda said: f"paused: {text}" in said)
