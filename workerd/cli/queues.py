"""`workerd queues`: what waits at the broker, and what this host holds of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workerd.cli.options import add_common
from workerd.errors import EX_OK
from workerd.output import print_json, print_table

if TYPE_CHECKING:
    from workerd.broker.connection import Connection
    from workerd.config.model import Settings

QUEUES = """\
Show the configured queues: ready messages and consumers at the broker, what
runs and waits in the instances of this host, due retries, dead letters. Asks
the broker, with a connection of its own; a delayed job shows once it is due."""
QUEUES_EPILOG = """\
exit status:
  0   shown; a queue that is missing has no numbers
  64  usage
  69  no broker answered
  77  access refused: user, password, virtual host or permission
  78  bad configuration

examples:
  workerd queues
  workerd queues --json | jq 'select(.dead > 0)'
"""

HEADINGS = ("QUEUE", "READY", "CONSUMERS", "RUNNING", "WAITING", "DUE", "DEAD")


def add_queues(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description, parser.epilog = QUEUES, QUEUES_EPILOG
    add_common(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(carry_out=_queues)


@dataclass(frozen=True, slots=True)
class Depth:
    """Messages of a work queue, and of the queues beside it; None: it is missing or forbidden.

    ``running`` and ``waiting`` are of this host's instances, which hold them unacknowledged.
    """

    queue: str
    ready: int | None
    consumers: int | None
    running: int
    waiting: int
    due: int | None
    dead: int | None


def _queues(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from workerd.aio import complete
    from workerd.config.load import load

    settings = load(args.config, args.instance)
    depths = complete(_depths(settings, _held()))
    if args.json:
        for depth in depths:
            print_json(asdict(depth))
        return EX_OK
    rows = [
        tuple("-" if cell is None else str(cell) for cell in asdict(depth).values())
        for depth in depths
    ]
    print_table([HEADINGS, *rows])
    return EX_OK


def _held() -> dict[str, tuple[int, int]]:
    """What runs and what waits in the instances of this host, by queue."""
    from workerd.control.instances import states

    held: dict[str, tuple[int, int]] = {}
    for state in states(None):
        for queue in state.get("queues", ()):
            running, waiting = held.get(queue["queue"], (0, 0))
            held[queue["queue"]] = (
                running + queue["running"],
                waiting + queue["waiting"] + queue["held"],
            )
    return held


async def _depths(settings: Settings, held: Mapping[str, tuple[int, int]]) -> list[Depth]:
    import os

    from workerd.broker.connection import Connection
    from workerd.core import topology

    connection = await Connection.to_any(settings.broker, "workerd queues", os.environ)
    depths = []
    try:
        for name in settings.queues:
            ready, consumers = await _count(connection, name)
            due, _ = await _count(connection, topology.due(name))
            dead, _ = await _count(connection, topology.dead(name))
            running, waiting = held.get(name, (0, 0))
            depths.append(Depth(name, ready, consumers, running, waiting, due, dead))
    finally:
        await connection.close(timeout=2.0)
    return depths


async def _count(connection: Connection, queue: str) -> tuple[int | None, int | None]:
    from workerd.errors import BrokerError, ErrorKind

    channel = await connection.channel()
    try:
        counts = await channel.count(queue)
    except BrokerError as error:
        if error.kind is ErrorKind.AWAY:
            raise
        return None, None
    await channel.close()
    return counts
